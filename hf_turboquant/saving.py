"""Saves a cache as a folder of one safetensors and one json file: no pickle, nothing half written or half read."""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.utils._pytree import tree_leaves
from transformers import DynamicCache, PreTrainedConfig, cache_utils

from .conditioning import NOT_CONDITIONED, Learned, learned
from .config import TurboQuantConfig
from .hybrid import TurboQuantHybridLayer, TurboQuantStaticHybridLayer
from .layer import TurboQuantLayer
from .static import StaticSlidingLayer, TurboQuantStaticLayer
from .tokens import ROLES

FORMAT, FORMAT_VERSION = "hf_turboquant cache", 4
HEADER, TENSORS = "cache.json", "cache.safetensors"
# What a saved cache records of its model, to recognise it.
MODEL_FIELDS = ("model_type", "num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads")
MODEL_FIELDS += ("head_dim", "vocab_size", "layer_types")
# Arguments that make a layer and distinguish it from others of its kind; then what it has from its first tokens on.
ARGUMENTS = ("sliding_window", "number_of_states", "max_cache_len")
FIRST_TOKENS = {"dtype", "device", "indexer_dtype", "indexer_device"}
FIRST_TOKENS |= {"batch_size", "num_heads", "k_head_dim", "v_head_dim"}
# Only our layers and those of transformers can be saved; layers that models define may keep anything.
_THEIRS = {*cache_utils.DYNAMIC_LAYER_TYPE_MAPPING.values(), *cache_utils.STATIC_LAYER_TYPE_MAPPING.values()}
_THEIRS = {kind for kind in _THEIRS if kind.__module__ == cache_utils.__name__}
_OURS = {TurboQuantLayer, TurboQuantStaticLayer, TurboQuantHybridLayer, TurboQuantStaticHybridLayer, StaticSlidingLayer}
SAVED_LAYERS = {kind.__name__: kind for kind in _THEIRS | _OURS}
# What each outcome of conditioning adds to the keys' quantiser.
CONDITIONED = {"none": set(), "center": {"mean"}, "attention": {"mean", "scale"}}


def save_cache(cache, folder: str | Path) -> None:
    """[`TurboQuantCache.save_pretrained`]: writes to a new folder beside `folder`, then renames it to `folder`."""
    folder = Path(folder).resolve()
    if folder.exists() and not (folder.is_dir() and {path.name for path in folder.iterdir()} <= {HEADER, TENSORS}):
        raise ValueError(
            f"`folder` must be new, empty or a saved cache, got {folder}, which holds something else. Name another."
        )
    if folder.exists() and any(folder.iterdir()):
        # Raises unless it is ours.
        _read_header(folder)
    tensors: dict[str, torch.Tensor] = {}
    layers = [_encode(_state(layer, index), f"layers.{index}", tensors) for index, layer in enumerate(cache.layers)]
    # The package imports this file before it defines its version.
    from . import __version__

    header = {"format": FORMAT, "format_version": FORMAT_VERSION, "hf_turboquant": __version__}
    # Negative indices could not be resolved without a model.
    header["options"] = {**asdict(cache.options), "skip_layers": sorted(cache.skipped)}
    header |= {"model": cache.model_fields, "layers": layers}
    header["unpacked"] = {str(index): dim for index, dim in cache.unpacked.items()}
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as work:
        new, old = Path(work, "new"), Path(work, "old")
        new.mkdir()
        save_file(tensors, new / TENSORS)
        header["tensors_sha256"] = _tensors_sha256(new)
        header["sha256"] = _sha256(header)
        (new / HEADER).write_text(json.dumps(header, indent=1), encoding="utf-8")
        # safetensors makes files that only their owner can read.
        shutil.copymode(new / HEADER, new / TENSORS)
        if folder.exists():
            folder.rename(old)
        try:
            new.rename(folder)
        except BaseException:
            if old.exists():
                old.rename(folder)
            raise


@torch.inference_mode(False)
def load_cache(cls, folder: str | Path, config: PreTrainedConfig | None, device: torch.device | str | None):
    """[`TurboQuantCache.from_pretrained`]. Makes ordinary tensors, even in inference mode."""
    folder, device = Path(folder), torch.device(device or "cpu")
    header = _read_header(folder)
    if header["format_version"] < FORMAT_VERSION:
        raise ValueError(
            f"The format of {folder} must be {FORMAT_VERSION}, got {header['format_version']}, as hf_turboquant "
            f"{header.get('hf_turboquant')} wrote it. Prefill the text again and save that, or install that release."
        )
    with _refusing(folder):
        if (found := _tensors_sha256(folder)) != header["tensors_sha256"]:
            raise ValueError(f"{TENSORS} must have the sha256 {header['tensors_sha256']}, got {found}")
        tensors = load_file(folder / TENSORS)
        options = TurboQuantConfig(**header["options"])
        # The layers come from the folder: with a capacity, the cache would need the model's config to make them.
        cache = cls(None, **asdict(replace(options, max_cache_len=None)))
        cache.options, cache.model_fields = options, header["model"] and dict(header["model"])
        cache.unpacked = {int(index): dim for index, dim in header.get("unpacked", {}).items()}
        # Layers go to the device one by one.
        cache.layers = [
            _new_layer(options, index, **_decode(state, tensors, device))
            for index, state in enumerate(header["layers"])
        ]
    for layer in cache.layers:
        if isinstance(layer, TurboQuantLayer):
            layer.verdict = layer.conditioning.verdict = cache.verdict
    if cache.model_fields is not None:
        cache.layer_class_to_replicate = None
    if config is not None:
        _check_model(cache, folder, config)
    return cache


def model_fields(config: PreTrainedConfig) -> dict:
    """The fields that distinguish a model from others, as json represents them."""
    # Not by attribute: if layers differ, the config refuses to give one value for all of them.
    text = config.get_text_config(decoder=True).to_dict()
    return json.loads(json.dumps({name: text.get(name) for name in MODEL_FIELDS}, default=str))


def _check_model(cache, folder: Path, config: PreTrainedConfig) -> None:
    def kind(layer) -> tuple:
        return type(layer).__name__, *(getattr(layer, name, None) for name in ARGUMENTS)

    fields, count = model_fields(config), len(DynamicCache(config=config).layers)
    compared = [(name, held, fields.get(name)) for name, held in (cache.model_fields or {}).items()]
    # Fields come and go between releases of transformers.
    compared = [pair for pair in compared if None not in pair] + [("number of layers", len(cache.layers), count)]
    if len(cache.layers) == count:
        fresh = type(cache)(config, **asdict(cache.options))
        for index, dim in cache.unpacked.items():
            fresh._fit(index, [dim])
        pairs = zip(cache.layers, fresh.layers, strict=True)
        compared += [(f"layer {i}", kind(held), kind(given)) for i, (held, given) in enumerate(pairs)]
    for what, held, given in compared:
        if held != given:
            raise ValueError(
                f"`config` must be of the model whose tokens {folder} holds: its {what} is {held}, got {given}. Load "
                "it with that model, or prefill the text again with this one."
            )


def _state(layer, index: int) -> dict:
    """Kind, fields and tokens of a layer, after all of them have been stored where the layer keeps them."""
    if SAVED_LAYERS.get(type(layer).__name__) is not type(layer):
        raise ValueError(
            f"Every layer must be one of {sorted(SAVED_LAYERS)} to be saved, got {type(layer).__name__} at "
            f"layer {index}: it may keep tokens in ways of its own. Prefill the text again instead."
        )
    fields, tokens = vars(layer), None
    if isinstance(layer, TurboQuantLayer):
        layer.come_to_rest()
        layer.measure()
        # Everything of a recurrent part; the rest is tokens or is made again.
        kept = {"frequencies", *vars(cache_utils.LinearAttentionLayer())}
        fields = {name: value for name, value in fields.items() if name in kept}
        tokens = _tokens(layer) if layer.is_initialized else None
    return {"kind": type(layer).__name__, "fields": fields, "tokens": tokens}


def _tokens(layer: TurboQuantLayer) -> dict:
    """The arguments of `_restore`."""
    held, conditioning = layer.tokens, layer.conditioning
    length, quantized, sinks = held.length, held.quantized, min(held.sinks, held.length)
    # Steps over a static capacity don't lengthen what is known of padding.
    conditioning.add_mask(None, held.exact["keys"].shape[0], length)
    # A static layer knows before the first code how it would be conditioned.
    provisional = learned(getattr(layer, "provisional", NOT_CONDITIONED))
    found = None if conditioning.waits else learned(conditioning.found)
    # If the statistics were degenerate, the mean and scale held change nothing.
    kept = CONDITIONED[(found or provisional).condition]

    def stored(role: str) -> dict[str, torch.Tensor]:
        # In sequence order, without the slots that hold no token.
        exact, buffer = held.exact, held.codes[role]
        pieces = [*exact.pieces(role, 0, sinks), *exact.pieces(role, sinks + quantized, length)]
        codes = {name: tensor[:, :, : -(-quantized // buffer.block)] for name, tensor in buffer.tensors.items()}
        return {"exact": torch.cat([exact[role][:, :, :0], *pieces], dim=2), **codes}

    return {
        "length": length,
        "quantized": quantized,
        "stored": {role: stored(role) for role in ROLES},
        "found": None if found is None else list(found),
        "provisional": list(provisional),
        "learned": {name: getattr(held.quantizers["keys"], name) for name in kept},
        "query_energy": conditioning.query_energy,
        "valid": conditioning.valid,
        "constants": {role: _probe(quantizer) for role, quantizer in held.quantizers.items()},
    }


def _new_layer(options: TurboQuantConfig, index: int, kind: str, fields: dict, tokens: dict | None):
    """Makes a layer from what `_state` returned; raises a `ValueError` if that contradicts itself or the options."""
    kind, given = SAVED_LAYERS[kind], {name: fields[name] for name in ARGUMENTS if name in fields}
    # The window of a layer of static capacity is that capacity.
    theirs = {"sliding_window": given.get("max_cache_len"), **given}
    layer = kind(options, index, **given) if issubclass(kind, TurboQuantLayer) else kind(**theirs)
    for name, value in fields.items():
        if name not in {*vars(layer), *FIRST_TOKENS}:
            raise ValueError(f"{kind.__name__} must have a field `{name}`, and has none in this transformers")
        setattr(layer, name, value)
    if options.max_cache_len is not None:
        # CUDA graphs need not copy tensors with a static address.
        for tensor in tree_leaves(fields):
            if isinstance(tensor, torch.Tensor):
                torch._dynamo.mark_static_address(tensor)
    if tokens is not None:
        _restore(layer, **tokens)
    return layer


def _restore(layer, length, quantized, stored, found, provisional, learned, query_energy, valid, constants) -> None:
    sinks, room = layer.config.sink_length, layer.config.max_cache_len
    for role in ROLES:
        _must(stored[role]["exact"].is_floating_point(), f"tokens of {role}", stored[role]["exact"].dtype)
    layer.lazy_initialization(*(stored[role]["exact"][:, :, :0] for role in ROLES))
    batch, heads, _, head_dim = stored["keys"]["exact"].shape
    conditioning, provisional = layer.conditioning, Learned(*provisional)
    if found is not None:
        conditioning.finish(Learned(*found))
        layer.tokens = layer.tokens.emptied(layer.config.residual_length)
    held = layer.tokens
    recent = length - min(sinks, length) - quantized
    fits = room is None or (length <= room and quantized <= held.codes["keys"].capacity)
    fits = fits and 0 <= quantized and 0 <= recent <= held.exact.ring
    _must(fits, "length", f"{length}, {quantized} of them quantised")
    held.exact.reserve(length - quantized, limit=length - quantized)
    for role in ROLES:
        buffer, blocks = held.codes[role], -(-quantized // held.codes[role].block)
        expected = {name: (t.dtype, (batch, heads, blocks, *t.shape[3:])) for name, t in buffer.tensors.items()}
        expected["exact"] = held.exact[role].dtype, (batch, heads, length - quantized, held.exact[role].shape[3])
        found = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in stored[role].items()}
        _must(found == expected, f"tokens of {role}", found)
        # Tolerates the rounding of another machine, but not another random stream.
        probes = zip(constants[role], _probe(held.quantizers[role]), strict=True)
        same = all(abs(held - made) < 1e-3 for held, made in probes)
        _must(same, f"rotation and codebook of {role}", "others from the same seed")
        buffer.reserve(quantized, limit=quantized)
        buffer.length, exact = quantized, stored[role].pop("exact")
        for name, tensor in stored[role].items():
            buffer[name][:, :, :blocks] = tensor
        held.exact.write(role, 0, exact[:, :, :sinks])
        held.exact.write(role, sinks + quantized, exact[:, :, sinks:])
    known, shapes = conditioning.found or provisional, {name: tuple(tensor.shape) for name, tensor in learned.items()}
    expected = dict.fromkeys(CONDITIONED[known.condition], (heads, 1, head_dim))
    _must(shapes == expected, f"what {known.condition!r} learned", shapes)
    for name, tensor, shape in (("query_energy", query_energy, (heads, head_dim)), ("valid", valid, (batch, length))):
        _must(tensor is None or tensor.shape == shape, name, None if tensor is None else list(tensor.shape))
    held.length, conditioning.query_energy, conditioning.valid = length, query_energy, valid
    if isinstance(layer, TurboQuantStaticLayer):
        layer.provisional = provisional
        layer._condition(learned.get("mean"), learned.get("scale"))
        layer._write_lengths()
    else:
        held.quantizers = {**held.quantizers, "keys": replace(held.quantizers["keys"], **learned)}


def _probe(quantizer) -> list[float]:
    """A rough checksum: a few sums that depend on every number of the rotation, the sketch and the codebook."""
    x = torch.arange(1, quantizer.head_dim + 1, dtype=torch.float64).cos()
    matrices = [m.double().cpu() for m in (quantizer.transform[0], quantizer.sketch) if m is not None]
    centroids = quantizer.centroids.double().cpu()
    return [*(float(x.sin() @ matrix @ x) for matrix in matrices), float(centroids.abs() @ centroids.cos())]


def _must(holds: bool, what: str, got) -> None:
    if not holds:
        raise ValueError(f"{what} must fit the rest of the layer, got {got}")


def _encode(tree, name: str, tensors: dict[str, torch.Tensor]):
    """Encodes `tree` as json and adds its tensors to `tensors` by name."""
    if isinstance(tree, dict):
        return {key: _encode(value, f"{name}.{key}", tensors) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_encode(value, f"{name}.{index}", tensors) for index, value in enumerate(tree)]
    if isinstance(tree, torch.Tensor):
        # A copy, because safetensors refuses tensors that share memory.
        tensors[name] = tree.detach().to("cpu", memory_format=torch.contiguous_format, copy=True)
        return f"$tensor {name}"
    if isinstance(tree, (torch.dtype, torch.device)):
        return f"${type(tree).__name__} {str(tree).removeprefix('torch.')}"
    if tree is None or isinstance(tree, (bool, int, float, str)):
        return tree
    raise ValueError(f"`{name}` must be a tensor or a plain value to be saved, got {type(tree).__name__}.")


def _decode(tree, tensors: dict[str, torch.Tensor], device: torch.device):
    if isinstance(tree, dict):
        # Recurrent states have integer keys, which json turns into strings.
        return {int(k) if k.isdigit() else k: _decode(value, tensors, device) for k, value in tree.items()}
    if isinstance(tree, list):
        return [_decode(value, tensors, device) for value in tree]
    what, _, name = tree.partition(" ") if isinstance(tree, str) else (None, None, None)
    if what == "$tensor":
        # A copy, because tensors in the file's memory may begin at odd bytes.
        return tensors[name].to(device, copy=True)
    return getattr(torch, name) if what == "$dtype" else device if what == "$device" else tree


@contextmanager
def _refusing(folder: Path) -> Iterator[None]:
    """Turns all errors from wrong contents into one; errors for lack of memory or a device stay as they are."""
    try:
        yield
    except (ValueError, OSError, LookupError, TypeError, AttributeError, SafetensorError) as error:
        got = str(error) if isinstance(error, (ValueError, OSError)) else f"{type(error).__name__}: {error}"
        raise ValueError(
            f"{folder} must be a folder as `save_pretrained` writes it: {got}. Save the cache again."
        ) from error


def _read_header(folder: Path) -> dict:
    if not (folder / HEADER).exists():
        what = f"holds no {HEADER}" if folder.is_dir() else "is a file" if folder.exists() else "does not exist"
        raise ValueError(f"`folder` must be one that `save_pretrained` wrote, got {folder}, which {what}.")
    with _refusing(folder):
        header = json.loads((folder / HEADER).read_text(encoding="utf-8"))
        if header["format"] != FORMAT:
            raise ValueError(f"`format` must be {FORMAT!r}, got {header['format']!r}")
        newer = header["format_version"] > FORMAT_VERSION
    if newer:
        raise ValueError(
            f"The format of {folder} must be at most {FORMAT_VERSION}, got {header['format_version']}. Upgrade "
            f"hf_turboquant: it was written by {header.get('hf_turboquant')}."
        )
    with _refusing(folder):
        if header["sha256"] != _sha256(header):
            raise ValueError(f"{HEADER} must be as it was written, got one that was changed")
    return header


def _sha256(header: dict) -> str:
    rest = {key: value for key, value in header.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _tensors_sha256(folder: Path) -> str:
    return hashlib.sha256(np.memmap(folder / TENSORS, mode="r")).hexdigest()
