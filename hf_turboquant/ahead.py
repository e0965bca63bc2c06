"""Compiles all kernels of a layer beside its first prompt, in place of one by one as they are needed."""

from dataclasses import replace
from functools import lru_cache, partial

import torch

from . import ops
from .conditioning import HORIZON


def note_launches(layer, key_states: torch.Tensor, value_states: torch.Tensor, query: torch.Tensor, masked: bool):
    """
    Notes what the prompt and decode steps of `layer` will launch on a GPU, for [`compile_noted`]: if the prompt is
    quantized later, compiling it at once would delay the first token, because Triton's front end is Python.

    Args:
        layer (`TurboQuantLayer`): before its first token is quantized.
        key_states, value_states, query (`torch.Tensor`): of the prompt.
        masked (`bool`): whether the prompt has a mask.
    """
    if key_states.device.type == "cuda" and layer.config.backend != "torch" and not ops.is_only_compiling():
        shapes = key_states.shape[1:2] + key_states.shape[3:] + value_states.shape[3:]
        dtypes = key_states.dtype, value_states.dtype, query.dtype
        groups = query.shape[1] // key_states.shape[1]
        short = key_states.shape[2] < HORIZON
        kind = type(layer), shapes, dtypes, groups, short, masked, key_states.device
        # Most layers of a model are alike, and finding that out below takes longer.
        if layer.verdict.get("compiled") != kind:
            layer.verdict["compiled"] = kind
            # Kernels are the same for every capacity, and requests have many.
            config = replace(layer.config, max_cache_len=1) if layer.config.max_cache_len else layer.config
            frequencies = None if layer.frequencies is None else tuple(layer.frequencies)
            layer.verdict.setdefault("to_compile", []).append((config, frequencies, *kind))


def compile_noted(layer) -> None:
    """
    Starts to compile, in other threads, what was noted for the layers of a cache. The first of the launches waits for
    that. Triton keeps the kernels on disk for later processes.
    """
    for noted in layer.verdict.pop("to_compile", ()):
        _start(*noted)


@lru_cache(maxsize=64)
def _start(*args) -> None:
    *_, device = args
    ops.compile_in_background(partial(_launch, *args), device)


def _launch(config, frequencies, kind, shapes, dtypes, groups, short, masked, device) -> None:
    """Launches everything once, where launches only compile."""
    heads, key_dim, value_dim = shapes
    # So many that nothing waits for more different tokens, which would look at what was not computed.
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
