"""Arena: one tensor with everything that a layer of static capacity holds for its tokens."""

import json
import math
from dataclasses import asdict, replace
from functools import lru_cache

import torch

from .config import TurboQuantConfig
from .packing import BLOCK
from .quantizer import Quantizer
from .states import LayerStates
from .storage import TokenBuffer

# Alignment of every tensor in an arena: enough for the widest loads of the kernels and a cache line.
ALIGNMENT_BYTES = 256


def describe(config: TurboQuantConfig, layer_idx: int, key_states: torch.Tensor, value_states: torch.Tensor) -> str:
    """
    Describes everything but the tokens that an arena depends on: equal descriptions have equal layouts.

    It is a string because `torch.compile` then guards on it before it reuses code compiled for another arena.
    """
    dims, dtypes = (key_states.shape[3], value_states.shape[3]), (key_states.dtype, value_states.dtype)
    return _describe(config, layer_idx, *key_states.shape[:2], dims, dtypes)


@lru_cache(maxsize=1024)
def _describe(config: TurboQuantConfig, layer_idx: int, batch: int, heads: int, dims: tuple, dtypes: tuple) -> str:
    names = (str(dtype).removeprefix("torch.") for dtype in dtypes)
    roles = "keys", "values"
    by_role = dict(zip(roles, dims, strict=True)), dict(zip(roles, names, strict=True))
    return json.dumps([asdict(config), layer_idx, batch, heads, *by_role])


def head_dims(description: str) -> dict[str, int]:
    """The head_dim of keys and of values."""
    return json.loads(description)[4]


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
    tensors = {name: layout.view(arena, name) for name in layout.tensors}

    def part(role: str) -> dict[str, torch.Tensor]:
        return {name[1]: tensor for name, tensor in tensors.items() if name[0] == role}

    quantizers = dict(layout.quantizers)
    if ("condition", "mean") in tensors:
        quantizers["keys"] = replace(quantizers["keys"], **part("condition"))
    config = layout.config
    codes = {role: TokenBuffer.over(part(role), block=BLOCK, length=layout.code_tokens) for role in quantizers}
    return LayerStates(
        quantizers,
        codes,
        part("exact"),
        config.max_cache_len,
        layout.code_tokens,
        config.sink_length,
        config.held_length,
        0,
        config.backend,
        tensors["arena", "counters"],
    )


class _Layout:
    """The layout of an arena: offset, dtype and shape of every tensor by (part, name)."""

    def __init__(self, description: str, device: torch.device):
        options, layer_idx, batch, heads, dims, dtypes = json.loads(description)
        self.config = config = TurboQuantConfig(**options)
        self.quantizers = {
            role: _quantizer(config, role, layer_idx, head_dim, device) for role, head_dim in dims.items()
        }
        exact = min(config.sink_length + config.held_length, config.max_cache_len)
        self.code_tokens = max(config.max_cache_len - config.sink_length - config.residual_length, 0)
        self.tensors: dict[tuple[str, str], tuple[int, torch.dtype, tuple[int, ...]]] = {}
        self.nbytes = 0
        self._add("arena", "counters", torch.int32, (len(dims), batch * heads, 3))
        if config.condition != "none":
            for name in ("mean", "scale"):
                self._add("condition", name, torch.float32, (heads, 1, dims["keys"]))
        for role, head_dim in dims.items():
            self._add("exact", role, getattr(torch, dtypes[role]), (batch, heads, exact, head_dim))
            for name, (code_dtype, shape) in self.quantizers[role].buffer_shapes().items():
                self._add(role, name, code_dtype, (batch, heads, -(-self.code_tokens // BLOCK), *shape))

    def _add(self, part: str, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        self.tensors[part, name] = self.nbytes, dtype, shape
        nbytes = math.prod(shape) * dtype.itemsize
        self.nbytes += -(-nbytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES

    def view(self, arena: torch.Tensor, name: tuple[str, str]) -> torch.Tensor:
        offset, dtype, shape = self.tensors[name]
        return arena[offset : offset + math.prod(shape) * dtype.itemsize].view(dtype).view(shape)


# Every length of a request has another description.
_layout = lru_cache(maxsize=1024)(_Layout)
# Never freed: graphs that torch.compile captured read their constants, and run again for an arena at the address of a
# freed one. Two for each layer and setting, whatever the requests.
_quantizers: dict[tuple, Quantizer] = {}


def _quantizer(config: TurboQuantConfig, role: str, layer_idx: int, head_dim: int, device: torch.device) -> Quantizer:
    key = replace(config, max_cache_len=None), role, layer_idx, head_dim, device
    if key not in _quantizers:
        _quantizers[key] = Quantizer.create(config, role, layer_idx, head_dim, device)
    return _quantizers[key]
