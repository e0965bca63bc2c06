"""TurboQuantCache: a drop-in for `DynamicCache` that holds keys and values in 2-4 bits."""

import inspect
import json
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import torch
import transformers
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import (
    DYNAMIC_LAYER_TYPE_MAPPING,
    DynamicLayer,
    LinearAttentionAndFullAttentionLayer,
)

from . import saving
from .config import TurboQuantConfig
from .hybrid import TurboQuantHybridLayer
from .layer import TurboQuantLayer
from .memory import MemoryReport
from .snapshot import restore_layer

# what a saved cache says of its model, to be told from another
MODEL_FIELDS = ("model_type", "num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads")
MODEL_FIELDS += ("head_dim", "vocab_size", "layer_types")
LAYER_ARGUMENTS = ("sliding_window", "number_of_states")
# the layers that can be saved; those that models bring along may keep anything
SAVED_LAYERS = {kind.__name__: kind for kind in (*DYNAMIC_LAYER_TYPE_MAPPING.values(), DynamicLayer)}
SAVED_LAYERS = {name: kind for name, kind in SAVED_LAYERS.items() if kind.__module__ == DynamicLayer.__module__}
SAVED_LAYERS |= {kind.__name__: kind for kind in (TurboQuantLayer, TurboQuantHybridLayer)}


class TurboQuantCache(DynamicCache):
    """
    `model.generate(**inputs, past_key_values=TurboQuantCache(model.config))`.

    Full-attention layers are compressed; linear-attention, sliding-window, shared and other layers keep the layer that
    transformers gives them. `print(cache)` tells which are which, `cache.memory()` what they hold.

    Args:
        config (`PreTrainedConfig`, *optional*):
            The model's config; multimodal configs are fine. Without one, every layer the model updates is compressed.
        offloading (`bool`, defaults to `False`):
            Layers wait in pinned host memory and the next one is fetched ahead, as with `DynamicCache`.
        offload_only_non_sliding (`bool`, defaults to `False`):
            With `offloading`, layers with a sliding window stay on the device.
        **options: see [`TurboQuantConfig`].

    Raises:
        `ValueError`: an option is out of range, or `skip_layers` names a layer that does not exist.
    """

    def __init__(
        self,
        config: PreTrainedConfig | None = None,
        *,
        offloading: bool = False,
        offload_only_non_sliding: bool = False,
        **options,
    ):
        self.options = TurboQuantConfig(**options)
        _check_config(config)
        if offloading and not torch.cuda.is_available():
            raise ValueError("`offloading=True` needs a CUDA device to move tokens from, got none. Leave it out.")
        super().__init__(config=config, offloading=offloading, offload_only_non_sliding=offload_only_non_sliding)
        self.model_fields = None if config is None else _model_fields(config)
        self.skipped = self._resolve_skip_layers()
        if config is None:
            self.layer_class_to_replicate = self._next_layer
        for index, layer in enumerate(self.layers):
            # other subclasses of DynamicLayer bring windows or states of their own
            if type(layer) is DynamicLayer:
                self.layers[index] = self._layer(index)
            elif type(layer) is LinearAttentionAndFullAttentionLayer and index not in self.skipped:
                self.layers[index] = TurboQuantHybridLayer(self.options, index, layer.number_of_states)

    def _resolve_skip_layers(self) -> frozenset[int]:
        count, skipped = len(self.layers), self.options.skip_layers
        if not count and any(index < 0 for index in skipped):
            raise ValueError(f"Negative `skip_layers` need the model's `config` to count from its end, got {skipped}.")
        if count and any(not -count <= index < count for index in skipped):
            raise ValueError(f"`skip_layers` must be from {-count} to {count - 1} for this model, got {skipped}.")
        return frozenset(index % count if count else index for index in skipped)

    def _layer(self, index: int) -> DynamicLayer:
        return DynamicLayer() if index in self.skipped else TurboQuantLayer(self.options, index)

    def _next_layer(self) -> DynamicLayer:
        return self._layer(len(self.layers))

    def save_pretrained(self, folder: str | Path) -> None:
        """
        Writes all tokens to `folder`, for [`from_pretrained`]: codes, exact tokens and the layers that are not
        compressed. Rotations come from the seed again and take no room.

        Args:
            folder (`str` or `Path`): new, empty, or a saved cache, which is replaced.

        Raises:
            `ValueError`: `folder` holds something else, or a layer cannot be saved. Nothing is written then.
        """
        for index, layer in enumerate(self.layers):
            if SAVED_LAYERS.get(type(layer).__name__) is not type(layer):
                raise ValueError(
                    f"Every layer must be one of {sorted(SAVED_LAYERS)} to be saved, got {type(layer).__name__} at "
                    f"layer {index}: it may keep tokens in ways of its own. Prefill the text again instead."
                )
        # negative indices need a model to count from its end
        options = {**asdict(self.options), "skip_layers": sorted(self.skipped)}
        lazy = self.layer_class_to_replicate is not None
        about = {"transformers": transformers.__version__, "options": options, "model": self.model_fields, "lazy": lazy}
        saving.save(folder, self.layers, about)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        config: PreTrainedConfig | None = None,
        device: torch.device | str | None = None,
        *,
        offloading: bool = False,
        offload_only_non_sliding: bool = False,
    ) -> "TurboQuantCache":
        """
        The cache that [`save_pretrained`] wrote, with its own options.

        Args:
            folder (`str` or `Path`): what was saved.
            config (`PreTrainedConfig`, *optional*): the config of the model that goes on with it, to be compared.
            device (`torch.device` or `str`, defaults to the CPU): of the model.
            offloading, offload_only_non_sliding (`bool`): as in the constructor.

        Raises:
            `ValueError`: `folder` is no saved cache, was changed or cut off, comes from a newer format, or from
                another model than `config`'s.
        """
        _check_config(config)
        header, states = saving.read(folder, torch.device(device or "cpu"))
        with saving.refusing(folder):
            options = asdict(TurboQuantConfig(**header["options"]))
            model, lazy = header["model"] and dict(header["model"]), header["lazy"]
        cache = cls(None, offloading=offloading, offload_only_non_sliding=offload_only_non_sliding, **options)
        cache.model_fields = model
        with saving.refusing(folder):
            for index, state in enumerate(states):
                layer = cache._saved_layer(index, state)
                restore_layer(layer, state)
                # before the next one comes: the device may not hold them all
                if offloading and isinstance(layer, TurboQuantLayer):
                    layer.offload()
                cache.layers.append(layer)
        if not lazy:
            cache.layer_class_to_replicate = None
        if config is not None:
            cache._check_model(folder, config)
        return cache

    def _saved_layer(self, index: int, state: dict):
        kind = SAVED_LAYERS[state["kind"]]
        if kind is TurboQuantLayer:
            return TurboQuantLayer(self.options, index)
        given = {name: state["fields"][name] for name in LAYER_ARGUMENTS if name in state["fields"]}
        return TurboQuantHybridLayer(self.options, index, **given) if kind is TurboQuantHybridLayer else kind(**given)

    def _check_model(self, folder: str | Path, config: PreTrainedConfig) -> None:
        def kind(layer) -> tuple:
            return type(layer).__name__, *(getattr(layer, name, None) for name in LAYER_ARGUMENTS)

        fields, count = _model_fields(config), len(DynamicCache(config=config).layers)
        compared = [(name, held, fields.get(name)) for name, held in (self.model_fields or {}).items()]
        # fields come and go between releases of transformers
        compared = [pair for pair in compared if None not in pair] + [("number of layers", len(self.layers), count)]
        if len(self.layers) == count:
            pairs = zip(self.layers, type(self)(config, **asdict(self.options)).layers, strict=True)
            compared += [(f"layer {i}", kind(held), kind(given)) for i, (held, given) in enumerate(pairs)]
        for what, held, given in compared:
            if held == given:
                continue
            raise ValueError(
                f"`config` must be of the model whose tokens {folder} holds: its {what} is {held}, got {given}. Load "
                "it with that model, or prefill the text again with this one."
            )

    def memory(self) -> MemoryReport:
        """Bytes held, counted from the stored tensors, against those of a `DynamicCache`."""
        return sum((_layer_memory(layer) for layer in self.layers), MemoryReport())

    def __repr__(self) -> str:
        kinds = Counter(repr(layer) for layer in self.layers)
        compressed = [i for i, layer in enumerate(self.layers) if isinstance(layer, TurboQuantLayer)]
        lines = [f"  {count} × {kind}" for kind, count in kinds.items()]
        where = f": {_ranges(compressed)}" if compressed else ""
        head = f"{len(compressed)} of {len(self.layers)} layers compressed{where}" if self.layers else "no layer yet"
        return "\n".join([f"TurboQuantCache({head}", *lines]) + ")"


# the signature that help() and notebooks show, with the defaults where they stand
TurboQuantCache.__signature__ = inspect.Signature(
    [
        inspect.Parameter(
            "config", inspect.Parameter.POSITIONAL_OR_KEYWORD, default=None, annotation=PreTrainedConfig | None
        ),
        *(
            parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
            for parameter in inspect.signature(TurboQuantConfig).parameters.values()
        ),
        *(
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=bool)
            for name in ("offloading", "offload_only_non_sliding")
        ),
    ]
)


def _check_config(config) -> None:
    if config is not None and not isinstance(config, PreTrainedConfig):
        raise ValueError(f"`config` must be the model's config, got {type(config).__name__}. Use `model.config`.")


def _model_fields(config: PreTrainedConfig) -> dict:
    text = config.get_text_config(decoder=True)
    return json.loads(json.dumps({name: getattr(text, name, None) for name in MODEL_FIELDS}, default=str))


def _layer_memory(layer) -> MemoryReport:
    # a compressed layer has its tokens in buffers: its own tensors are recurrent states, and tokens not yet stored
    held = _tensor_bytes(vars(layer))
    if not isinstance(layer, TurboQuantLayer) or not layer.is_initialized:
        return MemoryReport(other_bytes=held, full_bytes=held)
    codes = scales = allocated = 0
    for buffer in layer.codes.values():
        used = buffer.used_nbytes
        scale_bytes = sum(t.nbytes for name, t in buffer.tensors.items() if "plane" not in name)
        scale_bytes = scale_bytes * buffer.length // buffer.capacity if buffer.capacity else 0
        codes, scales, allocated = codes + used - scale_bytes, scales + scale_bytes, allocated + buffer.nbytes
    token_bytes = sum(
        tensor.shape[0] * tensor.shape[1] * tensor.shape[3] * tensor.element_size()
        for tensor in layer.exact.tensors.values()
    )
    exact = token_bytes * (layer.length - layer.codes["keys"].length)
    return MemoryReport(
        codes_bytes=codes,
        scales_bytes=scales,
        exact_bytes=exact,
        slack_bytes=allocated + layer.exact.nbytes - codes - scales - exact,
        constants_bytes=sum(quantizer.nbytes for quantizer in layer.quantizers.values()),
        other_bytes=held,
        full_bytes=token_bytes * layer.length + held,
    )


def _tensor_bytes(tree) -> int:
    if isinstance(tree, torch.Tensor):
        return tree.nbytes
    if isinstance(tree, dict):
        return sum(_tensor_bytes(value) for value in tree.values())
    return 0


def _ranges(indices: list[int]) -> str:
    """`[0, 1, 2, 5]` -> `"0-2, 5"`."""
    runs: list[list[int]] = []
    for index in indices:
        if runs and index == runs[-1][-1] + 1:
            runs[-1].append(index)
        else:
            runs.append([index])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
