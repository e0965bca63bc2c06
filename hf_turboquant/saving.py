"""Saves a cache as a folder with one safetensors file, whose metadata describe it: no pickle, nothing half written."""

import hashlib
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch.utils._pytree import keystr, tree_leaves_with_path, tree_map_only, tree_map_with_path
from transformers import PreTrainedConfig, cache_utils

from . import __version__
from .conditioning import Learned, learned
from .config import TurboQuantConfig
from .hybrid import TurboQuantHybridLayer
from .layer import TurboQuantLayer
from .quantizer import ROLES
from .sliding import StaticSlidingLayer

FORMAT, FORMAT_VERSION, FILE = "hf_turboquant cache", 5, "cache.safetensors"
# What a saved cache records of its model, to recognise it.
MODEL_FIELDS = ("model_type", "num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads")
MODEL_FIELDS += ("head_dim", "vocab_size", "layer_types")
# Arguments that make a layer and distinguish it from others of its kind.
ARGUMENTS = ("sliding_window", "number_of_states", "max_cache_len")
# Endings of the names of fields that a layer only gets with its first tokens.
FIRST_TOKENS = ("dtype", "device", "batch_size", "num_heads", "head_dim")
# Only our layers and those of transformers can be saved; layers that models define may keep anything.
_THEIRS = *cache_utils.DYNAMIC_LAYER_TYPE_MAPPING.values(), *cache_utils.STATIC_LAYER_TYPE_MAPPING.values()
_THEIRS = [kind for kind in _THEIRS if kind.__module__ == cache_utils.__name__]
SAVED_LAYERS = {kind.__name__: kind for kind in (*_THEIRS, TurboQuantLayer, TurboQuantHybridLayer, StaticSlidingLayer)}
# As saved when layers of fixed capacity were classes of their own.
SAVED_LAYERS |= {"TurboQuantStaticLayer": TurboQuantLayer, "TurboQuantStaticHybridLayer": TurboQuantHybridLayer}


def save_cache(cache, folder: str | Path) -> None:
    """[`TurboQuantCache.save_pretrained`]: writes the file beside `folder`, then moves it into `folder`."""
    folder = Path(folder).resolve()
    with _refusing(folder, "new, empty or a saved cache", "Name another."):
        names = [path.name for path in folder.iterdir()] if folder.exists() else []
        if names not in ([], [FILE]):
            raise ValueError("it holds something else")
        if names:
            _read_header(folder)
    tensors: dict[str, torch.Tensor] = {}

    def encode(path, value):
        name = f"layers{keystr(path)}"
        if isinstance(value, torch.Tensor):
            # A copy, because safetensors refuses tensors that share memory.
            tensors[name] = value.detach().to("cpu", memory_format=torch.contiguous_format, copy=True)
            return f"$tensor {name}"
        if isinstance(value, (torch.dtype, torch.device)):
            return f"${type(value).__name__} {str(value).removeprefix('torch.')}"
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        raise ValueError(f"`{name}` must be a tensor or a plain value to be saved, got {type(value).__name__}.")

    # Negative indices could not be resolved without a model.
    options = {**asdict(cache.options), "skip_layers": sorted(cache.skipped)}
    header = {"format": FORMAT, "format_version": FORMAT_VERSION, "hf_turboquant": __version__}
    header |= {"options": options, "model": cache.model_fields, "unpacked": cache.unpacked}
    header["layers"] = tree_map_with_path(encode, [_state(layer, index) for index, layer in enumerate(cache.layers)])
    header["sha256"] = _sha256(header, tensors)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as work:
        new = Path(work, FILE)
        save_file(tensors, new, {"cache": json.dumps(header)})
        folder.mkdir(exist_ok=True)
        # safetensors makes files that only their owner can read.
        new.chmod(folder.stat().st_mode & 0o666)
        new.replace(folder / FILE)


@torch.inference_mode(False)
def load_cache(cls, folder: str | Path, config: PreTrainedConfig | None, device: torch.device | str | None):
    """[`TurboQuantCache.from_pretrained`]. Makes ordinary tensors, even in inference mode."""
    folder, device = Path(folder), torch.device(device or "cpu")
    with _refusing(folder, "a saved cache", "Name another, or prefill the text again and save that."):
        header = _read_header(folder)
        if (found := header["format_version"]) != FORMAT_VERSION:
            wrote = f"as hf_turboquant {header.get('hf_turboquant')} wrote it and can read it"
            raise ValueError(f"its format must be {FORMAT_VERSION}, got {found}, {wrote}")
        tensors = load_file(folder / FILE)
        if header.pop("sha256") != _sha256(header, tensors):
            raise ValueError(f"{FILE} must be as it was written, got one that was changed")
        options = TurboQuantConfig(**header["options"])
        # The layers come from the folder: with a capacity, the cache would need the model's config to make them.
        cache = cls(None, **asdict(replace(options, max_cache_len=None)))
        cache.options, cache.model_fields, cache.unpacked = options, header["model"], header["unpacked"]

        def decode(value: str):
            what, _, name = value.partition(" ")
            if what != "$tensor":
                return getattr(torch, name) if what == "$dtype" else device if what == "$device" else value
            # A copy, because tensors in the file's memory may begin at odd bytes.
            tensor = tensors[name].to(device, copy=True)
            if options.max_cache_len is not None:
                # CUDA graphs need not copy tensors with a static address.
                torch._dynamo.mark_static_address(tensor)
            return tensor

        for index, state in enumerate(header["layers"]):
            # Layers go to the device one by one.
            cache.layers.append(_new_layer(cache, index, **tree_map_only(str, decode, state)))
    if cache.model_fields is not None:
        cache.layer_class_to_replicate = None
    if config is not None:
        given = _recognised(cls(config, **asdict(replace(options, skip_layers=()))))
        for what, held in _recognised(cache).items():
            # Fields come and go between releases of transformers.
            if held != given.get(what) and None not in (held, given.get(what)):
                raise ValueError(
                    f"`config` must be of the model whose tokens {folder} holds: its {what} is {held}, got "
                    f"{given[what]}. Load it with that model, or prefill the text again with this one."
                )
    return cache


def model_fields(config: PreTrainedConfig) -> dict:
    """The fields that distinguish a model from others, as json represents them."""
    # Not by attribute: if layers differ, the config refuses to give one value for all of them.
    text = config.get_text_config(decoder=True).to_dict()
    return json.loads(json.dumps({name: text.get(name) for name in MODEL_FIELDS}, default=str))


def _recognised(cache) -> dict:
    """What the caches of one model have in common."""
    found = {**(cache.model_fields or {}), "number of layers": len(cache.layers)}
    for index, layer in enumerate(cache.layers):
        if index not in {*cache.skipped, *cache.unpacked}:
            found[f"layer {index}"] = type(layer).__name__, *(getattr(layer, name, None) for name in ARGUMENTS)
    return found


def _state(layer, index: int) -> dict:
    """Kind, fields and tokens of a layer; stores waiting tokens first."""
    if SAVED_LAYERS.get(type(layer).__name__) is not type(layer):
        raise ValueError(
            f"Every layer must be one of {sorted(SAVED_LAYERS)} to be saved, got {type(layer).__name__} at "
            f"layer {index}: it may keep tokens in ways of its own. Prefill the text again instead."
        )
    fields, tokens = vars(layer), None
    if isinstance(layer, TurboQuantLayer):
        layer.come_to_rest()
        # Everything of a recurrent part; the rest is tokens or is made again.
        kept = {"frequencies", *vars(cache_utils.LinearAttentionLayer())}
        fields = {name: value for name, value in fields.items() if name in kept}
        tokens = _tokens(layer) if layer.is_initialized else None
    return {"kind": type(layer).__name__, "fields": fields, "tokens": tokens}


def _tokens(layer: TurboQuantLayer) -> dict:
    """The tokens of a layer and what is known of them; tensors share its memory."""
    held, conditioning, keys = layer.tokens, layer.conditioning, layer.tokens.quantizers["keys"]
    # Steps over a fixed capacity don't extend the mask of padding.
    conditioning.add_mask(None, held.exact["keys"].shape[0], held.length)
    # A layer of fixed capacity knows before the first code how its keys would be conditioned.
    known = learned(conditioning.provisional if conditioning.waits else conditioning.found)
    return {
        "length": held.length,
        "quantized": held.quantized,
        "waits": conditioning.waits,
        "learned": list(known),
        "query_energy": conditioning.query_energy,
        "valid": conditioning.valid,
        # If the statistics were degenerate, the mean and scale held change nothing.
        "mean": keys.mean if known.centred else None,
        "scale": keys.scale if known.scaled else None,
        "stored": held.parts(),
        "constants": {role: _probe(quantizer) for role, quantizer in held.quantizers.items()},
    }


def _new_layer(cache, index: int, kind: str, fields: dict, tokens: dict | None):
    """Makes a layer from what `_state` returned; raises a `ValueError` if that contradicts itself or the options."""
    kind, given = SAVED_LAYERS[kind], {name: fields[name] for name in ARGUMENTS if name in fields}
    if issubclass(kind, TurboQuantLayer):
        layer = kind(cache.options, index, **given)
        layer.verdict = cache.verdict
    else:
        # A sliding layer of fixed capacity keeps only the smaller of capacity and window, which then serves as both.
        layer = kind(**{"sliding_window": given.get("max_cache_len"), **given})
    for name, value in fields.items():
        if name not in vars(layer) and not name.endswith(FIRST_TOKENS):
            raise ValueError(f"{kind.__name__} must have a field `{name}`, and has none in this transformers")
        setattr(layer, name, value)
    if tokens is not None:
        _restore(layer, tokens)
    return layer


def _restore(layer: TurboQuantLayer, saved: dict) -> None:
    """Makes room in an empty layer, checks that what it would save now has the form of `saved`, and copies `saved`."""
    like, known = [saved["stored"][role]["exact"][0] for role in ROLES], Learned(*saved["learned"])
    layer.lazy_initialization(*like)
    conditioning, length, quantized = layer.conditioning, saved["length"], saved["quantized"]
    fits, room = 0 <= quantized <= max(length - layer.tokens.sinks, 0), layer.config.max_cache_len
    if not fits or (room is not None and (length > room or quantized > layer.tokens.codes["keys"].capacity)):
        raise ValueError(f"length must fit the rest of layer {layer.layer_idx}, got {length}, {quantized} quantized")
    if not saved["waits"]:
        conditioning.finish(known)
        layer.tokens = layer.tokens.emptied()
    layer.tokens.resize(length, quantized)
    batch, heads, _, head_dim = like[0].shape
    if saved["query_energy"] is not None:
        conditioning.query_energy = torch.empty(heads, head_dim, dtype=torch.float32, device=layer.device)
    if saved["valid"] is not None:
        conditioning.valid = torch.empty(batch, length, device=layer.device, dtype=torch.bool)
    if layer.fixed:
        conditioning.provisional = known
        layer.tokens.keep_condition(None)
        layer.tokens.write_lengths()
    elif known.centred:
        mean, scale = torch.empty((2, heads, 1, head_dim), dtype=torch.float32, device=layer.device)
        quantizers = layer.tokens.quantizers
        quantizers["keys"] = replace(quantizers["keys"], mean=mean, scale=scale if known.scaled else None)
    held, given = (dict(tree_leaves_with_path(tree)) for tree in (_tokens(layer), saved))
    for path in held | given:
        expected, got = (_described(leaves.get(path, "nothing")) for leaves in (held, given))
        # Tolerates the rounding of another machine, but not another random stream.
        close = isinstance(expected, float) and isinstance(got, float) and abs(expected - got) < 1e-3
        if expected != got and not close:
            raise ValueError(f"{keystr(path)} must be {expected} to fit the rest of layer {layer.layer_idx}, got {got}")
        if isinstance(held.get(path), torch.Tensor):
            held[path].copy_(given[path])


def _described(leaf):
    return f"{leaf.dtype} {list(leaf.shape)}" if isinstance(leaf, torch.Tensor) else leaf


def _probe(quantizer) -> list[float]:
    """A rough checksum: a few sums that depend on every number of the rotation, the sketch and the codebook."""
    constants = quantizer.transform[0], quantizer.sketch, quantizer.centroids
    flat = [constant.double().cpu().flatten() for constant in constants if constant is not None]
    return [float(x @ torch.arange(1, len(x) + 1, dtype=x.dtype).sin()) for x in flat]


@contextmanager
def _refusing(folder: Path, what: str, advice: str) -> Iterator[None]:
    """Turns all errors from wrong contents into one; errors for lack of memory or a device stay as they are."""
    try:
        yield
    except (ValueError, OSError, LookupError, TypeError, AttributeError, SafetensorError) as error:
        got = str(error) if isinstance(error, (ValueError, OSError)) else f"{type(error).__name__}: {error}"
        raise ValueError(f"{folder} must be {what}: {got}. {advice}") from error


def _read_header(folder: Path) -> dict:
    """What is saved besides tensors; raises an error if `folder` does not hold a cache of any format version."""
    with safe_open(folder / FILE, framework="pt") as file:
        text = (file.metadata() or {}).get("cache", "{}")
    # Recurrent states have integer keys, which json turns into strings.
    header = json.loads(text, object_hook=lambda x: {int(k) if k.isdigit() else k: v for k, v in x.items()})
    if (found := header.get("format")) != FORMAT:
        raise ValueError(f"its metadata must say {FORMAT!r}, as from format {FORMAT_VERSION} on, got {found!r}")
    return header


def _sha256(header: dict, tensors: dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {_described(tensor)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
