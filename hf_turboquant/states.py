"""QuantizedStates: the tensor handle that a layer's `update` returns in place of keys or values."""

from dataclasses import dataclass

import torch
from torch.utils._pytree import tree_map_only

from . import ops
from .quantizer import Quantizer
from .storage import TokenBuffer

# what can be asked of a handle without reading a single code
_METADATA = {
    getattr(torch.Tensor, name).__get__
    for name in ("shape", "dtype", "device", "layout", "ndim", "requires_grad", "is_cuda", "is_cpu", "is_nested")
} | {
    getattr(torch.Tensor, name)
    for name in ("size", "dim", "numel", "stride", "is_contiguous", "is_floating_point", "is_complex", "element_size")
}


@dataclass(frozen=True, eq=False)
class LayerStates:
    """
    What attention reads of one layer, as of one update: exact sinks, then the codes, then exact recent tokens.

    Exact tokens lie in slots: the sinks in the first `sink_length`, the recent ones behind them in a ring of `ring`
    slots, the oldest of them at ring slot `phase`.

    Args:
        quantizers (`dict[str, Quantizer]`), codes (`dict[str, TokenBuffer]`): by role, `"keys"` and `"values"`.
        exact (`dict[str, torch.Tensor]`): by role, of shape `[batch, num_key_value_heads, slots, head_dim]`.
        kv_len (`int`): tokens in all.
    """

    quantizers: dict[str, Quantizer]
    codes: dict[str, TokenBuffer]
    exact: dict[str, torch.Tensor]
    kv_len: int
    sink_length: int
    ring: int
    phase: int

    @property
    def recent_start(self) -> int:
        """Position of the oldest exact recent token."""
        return self.sink_length + self.codes["keys"].length

    def exact_runs(self) -> list[tuple[int, slice]]:
        """The exact tokens as (position of the first, slots), a few runs in the order of the sequence."""
        runs = [(0, slice(0, self.sink_length))] if self.sink_length else []
        position = self.recent_start
        for run in ring_runs(self.phase, self.kv_len - position, self.ring, self.sink_length):
            runs.append((position, run))
            position += run.stop - run.start
        return runs

    def shape(self, role: str) -> tuple[int, int, int, int]:
        batch, heads, _, head_dim = self.exact[role].shape
        return batch, heads, self.kv_len, head_dim

    def dequantize(self, role: str) -> torch.Tensor:
        """All keys or values in the model's dtype, of shape `[batch, num_key_value_heads, kv_len, head_dim]`."""
        exact = self.exact[role]
        out = exact.new_empty(self.shape(role))
        ops.dequantize(self.codes[role], self.quantizers[role], out[:, :, self.sink_length : self.recent_start])
        for position, run in self.exact_runs():
            piece = exact[:, :, run]
            out[:, :, position : position + piece.shape[2]] = piece
        return out


def ring_runs(start: int, count: int, ring: int, offset: int) -> list[slice]:
    """`count` slots of a ring of `ring` slots that begins at `offset`, from ring slot `start` on, as slices."""
    head = min(count, ring - start)
    runs = [slice(offset + start, offset + start + head), slice(offset, offset + count - head)]
    return [run for run in runs if run.stop > run.start]


class QuantizedStates(torch.Tensor):
    """
    Stands for the keys or the values of a layer: a tensor of shape `[batch, num_key_value_heads, kv_len, head_dim]`
    in the model's dtype, of which only the codes exist. Shape, dtype and device are answered as they are; any other
    operation works on the dequantised tensor, made for that operation alone. Valid until the layer's next update.

    Args:
        states (`LayerStates`): what the layer holds.
        role (`str`): `"keys"` or `"values"`.
    """

    @staticmethod
    def __new__(cls, states: LayerStates, role: str):
        exact = states.exact[role]
        handle = torch.Tensor._make_wrapper_subclass(
            cls, states.shape(role), dtype=exact.dtype, device=exact.device, requires_grad=False
        )
        handle.states, handle.role = states, role
        return handle

    def dequantize(self) -> torch.Tensor:
        """The keys or values as a plain tensor."""
        return self.states.dequantize(self.role)

    def __repr__(self, **kwargs) -> str:
        nbits = self.states.quantizers[self.role].nbits
        return f"QuantizedStates({self.role}, {nbits} bits, shape={list(self.states.shape(self.role))})"

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        return func(*_plain(args), **_plain(kwargs))

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        # reached where torch's C++ side skips the function override
        return func(*_plain(args), **_plain(kwargs or {}))


def _plain(tree):
    return tree_map_only(QuantizedStates, QuantizedStates.dequantize, tree)
