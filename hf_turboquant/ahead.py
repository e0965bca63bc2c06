"""Compiles all kernels of a layer while its first prompt runs, instead of one by one when they are needed."""

from dataclasses import replace
from functools import lru_cache, partial

import torch

from . import ops
from .conditioning import HORIZON


def compile_ahead(layer, states: dict[str, torch.Tensor], query_heads: int, query_dtype: torch.dtype, masked: bool):
    """
    Starts to compile, in other threads, what the first prompt and decode steps of `layer` launch on a GPU; the first
    launch waits for all of it. Triton keeps the kernels on disk for later processes. Layers of another kind compile
    theirs when their own prompt is stored.

    Args:
        layer (`TurboQuantLayer`): before its first token is quantized.
        states (`dict[str, torch.Tensor]`): keys and values of the prompt, by role.
        query_heads (`int`), query_dtype (`torch.dtype`): of the prompt's query.
        masked (`bool`): whether the prompt has a mask.
    """
    keys, values = states["keys"], states["values"]
    if keys.device.type != "cuda" or layer.config.backend == "torch" or ops.is_only_compiling():
        return
    shapes, dtypes = keys.shape[1:2] + keys.shape[3:] + values.shape[3:], (keys.dtype, values.dtype, query_dtype)
    kind = type(layer), shapes, dtypes, query_heads // keys.shape[1], keys.shape[2] < HORIZON, masked, keys.device
    # Most layers of a model are alike. `_start` would find that out too, but takes longer.
    if layer.verdict.get("compiled") != kind:
        layer.verdict["compiled"] = kind
        # Kernels are the same for every capacity, and requests have many.
        config = replace(layer.config, max_cache_len=1) if layer.config.max_cache_len else layer.config
        _start(config, None if layer.frequencies is None else tuple(layer.frequencies), *kind)


@lru_cache(maxsize=64)
def _start(*args) -> None:
    *_, device = args
    ops.compile_in_background(partial(_launch, *args), device)


def _launch(config, frequencies, kind, shapes, dtypes, groups, short, masked, device) -> None:
    """Launches everything once, where launches only compile."""
    heads, key_dim, value_dim = shapes
    # More than can wait for different tokens: telling these apart would read statistics that were not computed.
    tokens = HORIZON // 2 if short else HORIZON + 256
    static = config.max_cache_len is not None
    layer = kind(
        replace(
            config,
            sink_length=min(config.sink_length, 4),
            residual_length=min(config.residual_length, 8),
            max_cache_len=2 * tokens if static else None,
        ),
        0,
    )
    layer.frequencies = frequencies
    # The layout that models have: heads next to each other.
    sizes = (heads, key_dim), (heads, value_dim), (heads * groups, key_dim)
    keys, values, query = (
        torch.empty((1, tokens, *size), dtype=dtype, device=device).transpose(1, 2)
        for size, dtype in zip(sizes, dtypes, strict=True)
    )
    layer.update(keys, values)
    layer.settle(query, torch.ones((1, 1, 1, tokens), dtype=torch.bool, device=device) if masked else None)
    states = layer.update(keys[:, :, :1], values[:, :, :1])[0].states
    # A step over a fixed capacity has a mask for all of it.
    mask = torch.ones((1, 1, 1, 2 * tokens), dtype=torch.bool, device=device) if static else None
    ops.attention(query[:, :, :1], states, scaling=1.0, attention_mask=mask)
