"""TurboQuantCache: a drop-in for `DynamicCache` that holds keys and values in 2 to 8 bits."""

import inspect
import logging
from collections import Counter
from functools import lru_cache
from pathlib import Path

import torch
from transformers import DynamicCache, PreTrainedConfig, StaticCache
from transformers.cache_utils import (
    DynamicLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndStaticFullAttentionLayer,
    LinearAttentionLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from . import ops
from .conditioning import known_head_dims, layer_kinds, rotary_frequencies
from .config import KEYWORDS, PRESETS, TurboQuantConfig, check_names
from .hybrid import TurboQuantHybridLayer
from .layer import TurboQuantLayer
from .memory import MemoryReport, layer_memory
from .packing import can_pack
from .saving import load_cache, model_fields, save_cache
from .sliding import StaticSlidingLayer

logger = logging.getLogger(__name__)

# What replaces the layers that are compressed, by their exact class: subclasses have windows or states of their own.
_OURS = {
    DynamicLayer: TurboQuantLayer,
    StaticLayer: TurboQuantLayer,
    LinearAttentionAndFullAttentionLayer: TurboQuantHybridLayer,
    LinearAttentionAndStaticFullAttentionLayer: TurboQuantHybridLayer,
}


class _CacheClass(type):
    def __setattr__(cls, name, value):
        # `generate` sets this on the cache that it is given, here the class itself.
        if name == "_is_user_defined":
            raise ValueError(f"The cache must be an object, got the class. Pass `{cls.__name__}(model.config)`.")
        super().__setattr__(name, value)


class TurboQuantCache(DynamicCache, metaclass=_CacheClass):
    """
    `model.generate(**inputs, cache=TurboQuantCache(model.config))`; before transformers 5.24 the argument was called
    `past_key_values`.

    Full-attention layers are compressed; linear-attention, sliding-window, shared and other layers keep the layer that
    transformers gives them, and so do layers whose head_dim is under 16 or not a multiple of 4. `print(cache)` shows
    which are which, `cache.memory()` how many bytes they hold.

    Args:
        config (`PreTrainedConfig`, *optional*):
            The model's config; multimodal configs are fine. Without one, every layer the model updates is compressed.
        offloading (`bool`, defaults to `False`), offload_only_non_sliding (`bool`, defaults to `False`):
            As in `DynamicCache`: tokens stay in pinned host memory, and the next layer's are fetched while the current
            layer computes. Needs a CUDA GPU.
        **options: see [`TurboQuantConfig`].

    Raises:
        `ValueError`: an option is out of range, `skip_layers` names a layer that does not exist, or there is no GPU to
            offload from.
    """

    def __init__(
        self,
        config: PreTrainedConfig | None = None,
        *,
        offloading: bool = False,
        offload_only_non_sliding: bool = False,
        **options,
    ):
        check_config(config)
        check_names(options, type(self).__signature__.parameters)
        self.options = TurboQuantConfig(**options)
        if offloading and not torch.cuda.is_available():
            raise ValueError("`offloading` must be False without a CUDA GPU: there is nothing to move tokens from.")
        if offloading and self.options.max_cache_len is not None:
            raise ValueError(
                "`offloading` must be False with `max_cache_len`: compiled steps have the addresses of the tokens. "
                "Leave one of them out."
            )
        if self.options.backend != "torch":
            ops.start_compiler()
        super().__init__(config=config, offloading=offloading, offload_only_non_sliding=offload_only_non_sliding)
        if self.options.max_cache_len is not None:
            self.layers = _static_layers(config, self.options.max_cache_len)
        self.model_fields = None if config is None else model_fields(config)
        self.verdict: dict = {}
        self.skipped = self._resolve_skip_layers()
        # The head_dim of layers that cannot be packed, from the config or from the first states.
        self.unpacked: dict[int, int] = {}
        if config is None:
            self.layer_class_to_replicate = self._next_layer
        # By kind of layer: reading the config for each layer would take long.
        known = {}
        for index, kind in enumerate(() if config is None else layer_kinds(config, len(self.layers))):
            self.layers[index] = ours = self._compressed(self.layers[index], index)
            if isinstance(ours, TurboQuantLayer):
                if kind not in known:
                    known[kind] = rotary_frequencies(config, index), known_head_dims(config, index)
                ours.frequencies, head_dims = known[kind]
                self._fit(index, head_dims)

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        _register(cls)

    def _resolve_skip_layers(self) -> frozenset[int]:
        count, skipped = len(self.layers), self.options.skip_layers
        if not count and any(index < 0 for index in skipped):
            raise ValueError(f"Negative `skip_layers` need the model's `config` to count from its end, got {skipped}.")
        if count and any(not -count <= index < count for index in skipped):
            raise ValueError(f"`skip_layers` must be from {-count} to {count - 1} for this model, got {skipped}.")
        return frozenset(index % count if count else index for index in skipped)

    def _compressed(self, layer, index: int):
        """Our layer in place of one of transformers, or that layer itself if it is skipped or of another kind."""
        kind = _OURS.get(type(layer))
        if kind is None or index in self.skipped:
            return layer
        recurrent = {"number_of_states": layer.number_of_states} if issubclass(kind, LinearAttentionLayer) else {}
        ours = kind(self.options, index, **recurrent)
        ours.verdict = self.verdict
        return ours

    def _next_layer(self) -> DynamicLayer:
        return self._compressed(DynamicLayer(), len(self.layers))

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        As in the base class; see [`TurboQuantLayer.update`].

        Raises:
            `ValueError`: the states don't fit what the layer holds or its capacity, or no layer of the model has a
                head_dim that can be packed.
        """
        if layer_idx >= len(self.layers) or not self.layers[layer_idx].is_initialized:
            self._fit(layer_idx, [dim for x in (key_states, value_states) for dim in getattr(x, "shape", ())[3:]])
            ours = any(isinstance(layer, TurboQuantLayer) for layer in self.layers)
            if self.unpacked and not ours and self.model_fields is not None:
                index, dim = next(iter(self.unpacked.items()))
                raise ValueError(
                    "A model must have a layer of full attention whose head_dim is a multiple of 4, 16 at least, got "
                    f"head_dim {dim} in layer {index} and no other layer to compress. Use `DynamicCache`."
                )
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def early_initialization(self, batch_size: int, num_heads, head_dim, *args, **kwargs) -> None:
        """As in the base class; `head_dim` is one number for all layers, or a list with one for each."""
        dims = [head_dim] * len(self.layers) if isinstance(head_dim, int) else head_dim
        for layer_idx, dim in enumerate(dims[: len(self.layers)]):
            self._fit(layer_idx, [dim])
        super().early_initialization(batch_size, num_heads, head_dim, *args, **kwargs)

    def _fit(self, layer_idx: int, head_dims: list[int]) -> None:
        """Keeps a layer in full precision if one of its `head_dims` cannot be packed."""
        # The base class adds layers in the same way if it has no config.
        while self.layer_class_to_replicate is not None and len(self.layers) <= layer_idx:
            self.layers.append(self.layer_class_to_replicate())
        layer, odd = self.layers[layer_idx], [dim for dim in head_dims if not can_pack(dim)]
        if odd and isinstance(layer, TurboQuantLayer):
            self.layers[layer_idx], self.unpacked[layer_idx] = _in_full_precision(layer), odd[0]
            _log_unpackable(odd[0])

    @classmethod
    def from_preset(cls, config: PreTrainedConfig | None, preset: str, **options) -> "TurboQuantCache":
        """
        Makes a cache with the options of a preset; `options`, as for the constructor, override them. See
        [`TurboQuantConfig.from_preset`].

        Raises:
            `ValueError`: there is no such preset, or the constructor raises it.
        """
        check_config(config)
        # Raises the error for an unknown preset.
        TurboQuantConfig.from_preset(preset)
        return cls(config, **{**PRESETS[preset], **options})

    def prefetch(self, layer_idx: int, only_non_sliding: bool = True) -> None:
        """Fetches the next offloaded layer on a separate stream: the first from `layer_idx` on, wrapping around."""
        current, updated = torch.cuda.current_stream(), self.layers[layer_idx - 1]
        before = dict(vars(updated))
        # Before transformers 5.20 the stream waits neither for copies to the CPU still in progress nor for readers of
        # the memory that the new copies reuse.
        self.prefetch_stream.wait_stream(current)
        super().prefetch(layer_idx, only_non_sliding)
        if any(value is not before.get(name) for name, value in vars(updated).items()):
            # In a model with one layer, that layer is also the next one, and is read at once.
            current.wait_stream(self.prefetch_stream)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """
        Columns of the next mask, and the position of the first one. Raises a `ValueError` if the cache holds tokens and
        none are to come, or if the capacity is too small.
        """
        held = int(self.get_seq_length(layer_idx)) if query_length == 0 else 0
        if held:
            raise ValueError(
                f"The prompt must go on from the {held:,} tokens that the cache holds, got no further token. Give the "
                "whole text so far and more, or `reset()` the cache for another."
            )
        if self.options.max_cache_len is None or torch.compiler.is_compiling():
            return super().get_mask_sizes(query_length, layer_idx)
        first = next((layer for layer in self.layers if isinstance(layer, TurboQuantLayer)), None)
        waits = first is not None and first.tokens.has_tokens and first.conditioning.waits
        if waits and self.layers[layer_idx] is not first:
            first.get_mask_sizes(query_length)
        sizes = super().get_mask_sizes(query_length, layer_idx)
        if waits and not first.conditioning.waits:
            # Before a compiled step, `generate` asks about one layer only, and compiled layers cannot ask themselves.
            for layer in self.layers:
                if isinstance(layer, TurboQuantLayer) and layer is not first:
                    layer.make_room(query_length)
        return sizes

    @property
    def is_compileable(self) -> bool:
        """
        Whether `generate` may compile decode steps: only with a fixed capacity. Recurrent layers alone would always
        allow it, but `generate` would then compile unasked, as it does for every class of caches that it does not know.
        """
        return self.options.max_cache_len is not None and super().is_compileable

    def _await_copies(self) -> None:
        # Reads outside of `update` do not wait for the prefetch stream by themselves.
        if self.offloading:
            torch.cuda.synchronize()

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Reorders the batch for beam search: row `beam_idx[i]` becomes row i."""
        self._await_copies()
        super().reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every row of the batch `repeats` times."""
        self._await_copies()
        super().batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps the rows `indices` of the batch (indices or a boolean mask)."""
        self._await_copies()
        super().batch_select_indices(indices)

    def __getstate__(self) -> dict:
        self._await_copies()
        return {name: value for name, value in vars(self).items() if name != "prefetch_stream"}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        if self.offloading:
            self.prefetch_stream = torch.cuda.Stream()

    def save_pretrained(self, folder: str | Path) -> None:
        """
        Writes all tokens to `folder`, for [`from_pretrained`]: codes, exact tokens and the layers that are not
        compressed. Rotations are not saved, because the seed determines them.

        Args:
            folder (`str` or `Path`): new, empty, or a saved cache, which is replaced.

        Raises:
            `ValueError`: `folder` holds something else, or a layer cannot be saved. Nothing is written in that case.
        """
        self._await_copies()
        save_cache(self, folder)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        config: PreTrainedConfig | None = None,
        device: torch.device | str | None = None,
    ) -> "TurboQuantCache":
        """
        Loads the cache that [`save_pretrained`] wrote, with the options it was saved with.

        Args:
            folder (`str` or `Path`): the saved cache.
            config (`PreTrainedConfig`, *optional*):
                The config of the model that will use the cache, to check that it is the same model.
            device (`torch.device` or `str`, defaults to the CPU): the model's device.

        Raises:
            `ValueError`: `folder` is not a saved cache, was changed or truncated, has another format, or comes from
                a model other than `config`'s.
        """
        check_config(config)
        return load_cache(cls, folder, config, device)

    def memory(self) -> MemoryReport:
        """Counts the bytes of the stored tensors and compares them with those of a `DynamicCache`."""
        return sum((layer_memory(layer) for layer in self.layers), MemoryReport())

    def __repr__(self) -> str:
        kinds = Counter(repr(layer) for layer in self.layers)
        compressed = [i for i, layer in enumerate(self.layers) if isinstance(layer, TurboQuantLayer)]
        lines = [f"  {count} × {kind}" for kind, count in kinds.items()]
        for dim in sorted(set(self.unpacked.values())):
            where = _ranges(sorted(index for index, found in self.unpacked.items() if found == dim))
            lines.append(f"  in full precision, since head_dim {dim} cannot be packed: {where}")
        where = f": {_ranges(compressed)}" if compressed else ""
        head = f"{len(compressed)} of {len(self.layers)} layers compressed{where}" if self.layers else "no layer yet"
        return "\n".join([f"TurboQuantCache({head}", *lines]) + ")"


def _flatten(cache: TurboQuantCache) -> tuple[list, TurboQuantCache]:
    if torch.compiler.is_exporting():
        raise ValueError(
            "What `torch.export` takes must not be a TurboQuantCache: an exported graph cannot hold codes. Take a "
            "`DynamicCache`."
        )
    return [], cache


def _register(cls: type) -> None:
    # Without leaves, so that `tree_map` returns the cache itself: a copy would write to the same buffers. transformers'
    # exporters leave registered classes alone.
    torch.utils._pytree.register_pytree_node(cls, _flatten, lambda _, cache: cache, flatten_with_keys_fn=_flatten)


_register(TurboQuantCache)

# help() and notebooks show this signature, so that every option appears with its default.
TurboQuantCache.__signature__ = inspect.Signature(
    [
        inspect.Parameter(
            "config", inspect.Parameter.POSITIONAL_OR_KEYWORD, default=None, annotation=PreTrainedConfig | None
        ),
        *KEYWORDS,
        *(
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=bool)
            for name in ("offloading", "offload_only_non_sliding")
        ),
    ]
)


def check_config(config) -> None:
    """Raises a `ValueError` if `config` is neither a model's config nor `None`."""
    if config is not None and not isinstance(config, PreTrainedConfig):
        preset = isinstance(config, str) and config in PRESETS
        advice = f"`TurboQuantCache.from_preset(model.config, {config!r})`" if preset else "`model.config`"
        got = f"the class {config.__name__}" if isinstance(config, type) else type(config).__name__
        raise ValueError(f"`config` must be the model's config, got {repr(config) if preset else got}. Use {advice}.")


@lru_cache(maxsize=64)
def _log_unpackable(dim: int) -> None:
    logger.warning("Layers of head_dim %d stay in full precision: only multiples of 4 from 16 on can be packed.", dim)


def _in_full_precision(layer: TurboQuantLayer) -> DynamicLayer | StaticLayer:
    """The layer of transformers that takes the place of an empty `layer`, with its recurrent states if it has any."""
    grows, stays = (theirs for theirs, ours in _OURS.items() if ours is type(layer))
    kind = stays if layer.fixed else grows
    held = vars(layer)
    plain = kind(**{name: held[name] for name in ("number_of_states", "max_cache_len") if name in held})
    if isinstance(plain, LinearAttentionLayer):
        recurrent = vars(LinearAttentionLayer(layer.number_of_states))
        vars(plain).update({name: value for name, value in held.items() if name in recurrent})
    return plain


def _static_layers(config: PreTrainedConfig | None, max_cache_len: int) -> list:
    if config is None:
        raise ValueError("`max_cache_len` needs the model's `config` to know its layers, got none. Use `model.config`.")
    return [
        StaticSlidingLayer(max_cache_len, layer.max_cache_len) if type(layer) is StaticSlidingWindowLayer else layer
        for layer in StaticCache(config=config, max_cache_len=max_cache_len).layers
    ]


def _ranges(indices: list[int]) -> str:
    """`[0, 1, 2, 5]` -> `"0-2, 5"`."""
    runs: list[list[int]] = []
    for index in indices:
        if runs and index == runs[-1][-1] + 1:
            runs[-1].append(index)
        else:
            runs.append([index])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
