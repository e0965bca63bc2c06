"""Arena: one tensor with everything that a layer of fixed capacity holds for its tokens."""

import json
import math
from collections import defaultdict
from dataclasses import asdict, replace
from functools import lru_cache

import torch

from .config import TurboQuantConfig
from .packing import BLOCK
from .quantizer import ROLES, Quantizer
from .states import LayerStates
from .storage import TokenBuffer

# Alignment of every tensor in an arena: enough for the widest loads of the kernels and a cache line.
ALIGNMENT_BYTES = 256


def describe(config: TurboQuantConfig, layer_idx: int, key_states: torch.Tensor, value_states: torch.Tensor) -> str:
    """
    Describes everything but the tokens that an arena depends on: equal descriptions mean equal layouts.

    It is a string because `torch.compile` then guards on it before it reuses code compiled for another arena.
    """
    dims, dtypes = (key_states.shape[3], value_states.shape[3]), (key_states.dtype, value_states.dtype)
    return _describe(config, layer_idx, *key_states.shape[:2], dims, dtypes)


@lru_cache(maxsize=1024)
def _describe(config: TurboQuantConfig, layer_idx: int, batch: int, heads: int, dims: tuple, dtypes: tuple) -> str:
    names = [str(dtype).removeprefix("torch.") for dtype in dtypes]
    return json.dumps([asdict(config), layer_idx, batch, heads, dims, names])


def head_dims(description: str) -> dict[str, int]:
    """The head_dim of keys and of values."""
    return dict(zip(ROLES, json.loads(description)[4], strict=True))


def new_arena(description: str, device: torch.device) -> torch.Tensor:
    """Makes an arena that holds no tokens: uint8, all zero, at a fixed address."""
    layout = _layout(description, device)
    # An ordinary tensor even in inference mode, because later writes may happen outside of it.
    with torch.inference_mode(False):
        arena = torch.zeros(layout.nbytes, dtype=torch.uint8, device=device)
    # CUDA graphs need not copy it, and its size depends on the description alone.
    torch._dynamo.mark_static_address(arena)
    torch._dynamo.mark_static(arena)
    return arena


def open_arena(arena: torch.Tensor, description: str) -> LayerStates:
    """The states in `arena`, as views. Lengths are in `counters`; `kv_len` and buffer lengths are upper bounds."""
    layout = _layout(description, arena.device)
    parts = {
        part: {name: arena[start:stop].view(dtype).view(shape) for name, (start, stop, dtype, shape) in tensors.items()}
        for part, tensors in layout.parts.items()
    }
    quantizers, config = dict(layout.quantizers), layout.config
    if "condition" in parts:
        quantizers["keys"] = replace(quantizers["keys"], **parts["condition"])
    codes = {role: TokenBuffer.over(parts[role], block=BLOCK, length=layout.code_tokens) for role in quantizers}
    return LayerStates(
        quantizers,
        codes,
        parts["exact"],
        config.max_cache_len,
        layout.code_tokens,
        config.sink_length,
        config.held_length,
        0,
        config.backend,
        parts["lengths"]["counters"],
    )


class _Layout:
    """The layout of an arena: by part and name, every tensor's first byte, the one after its last, dtype and shape."""

    def __init__(self, description: str, device: torch.device):
        options, layer_idx, batch, heads, _, dtypes = json.loads(description)
        self.config = config = TurboQuantConfig(**options)
        dims, self.quantizers, self.nbytes, self.parts = head_dims(description), {}, 0, defaultdict(dict)
        slots = min(config.sink_length + config.held_length, config.max_cache_len)
        self.code_tokens = max(config.max_cache_len - config.sink_length - config.residual_length, 0)
        self._add("lengths", "counters", torch.int32, (len(dims), batch * heads, 3))
        if config.condition != "none":
            for name in ("mean", "scale"):
                self._add("condition", name, torch.float32, (heads, 1, dims["keys"]))
        for (role, head_dim), dtype in zip(dims.items(), dtypes, strict=True):
            self._add("exact", role, getattr(torch, dtype), (batch, heads, slots, head_dim))
            self.quantizers[role] = Quantizer.create(config, role, layer_idx, head_dim, device)
            for name, (code_dtype, shape) in self.quantizers[role].buffer_shapes.items():
                self._add(role, name, code_dtype, (batch, heads, -(-self.code_tokens // BLOCK), *shape))

    def _add(self, part: str, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        stop = self.nbytes + math.prod(shape) * dtype.itemsize
        self.parts[part][name] = self.nbytes, stop, dtype, shape
        self.nbytes = -(-stop // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


# Many, because requests of every length have descriptions of their own.
_layout = lru_cache(maxsize=1024)(_Layout)
