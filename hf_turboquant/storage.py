"""TokenBuffer: named tensors that grow by tokens, in place; SlotBuffer: the exact tokens among them."""

import copy
from collections.abc import Callable

import torch


class TokenBuffer:
    """
    Named tensors of shape `[batch, heads, capacity / block, ...]` that hold `length` tokens.

    Codes come in blocks of 128 tokens, exact states in blocks of one. Appending writes into spare capacity; when that
    is used up every tensor grows by 1/32, so a token is copied a constant number of times however long the sequence
    gets. What lies beyond `length` is undefined.

    Args:
        shapes (`dict[str, tuple[torch.dtype, tuple[int, ...]]]`): dtype and shape of one block of every tensor.
        block (`int`): tokens of one block.
        batch, heads (`int`), device (`torch.device`): the leading dimensions and where the tensors live.
    """

    def __init__(self, shapes, block: int, batch: int, heads: int, device: torch.device):
        self.block = block
        self.length = 0
        # ordinary tensors, also in inference mode: they are written to later, whatever mode that is in
        with torch.inference_mode(False):
            self.tensors = {
                name: torch.empty((batch, heads, 0, *shape), dtype=dtype, device=device)
                for name, (dtype, shape) in shapes.items()
            }

    @classmethod
    def over(cls, tensors: dict[str, torch.Tensor], **fields) -> "TokenBuffer":
        """A buffer over tensors that are there already; `fields` are the others, such as `block` and `length`."""
        buffer = object.__new__(cls)
        vars(buffer).update(fields, tensors=tensors)
        return buffer

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.tensors[name]

    @property
    def capacity(self) -> int:
        return next(iter(self.tensors.values())).shape[2] * self.block

    @property
    def nbytes(self) -> int:
        """Bytes allocated, spare capacity included."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def used_nbytes(self) -> int:
        """Bytes of the tokens held."""
        return self.nbytes * self.length // self.capacity if self.capacity else 0

    def reserve(self, tokens: int, limit: int | None = None) -> None:
        """Makes room for `tokens` tokens in all (at most `limit` are allocated). Nothing changes if memory runs out."""
        if tokens <= self.capacity:
            return
        target = tokens + tokens // 32
        target = target if limit is None else min(target, limit)
        blocks = -(-target // self.block)

        def grow(tensor: torch.Tensor) -> torch.Tensor:
            grown = tensor.new_empty((*tensor.shape[:2], blocks, *tensor.shape[3:]))
            if tensor.shape[2]:
                grown[:, :, : tensor.shape[2]] = tensor
            return grown

        self.map(grow)

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Replaces every tensor by `function(tensor)`: reorder, select, repeat, move. All of them or none."""
        with torch.inference_mode(False):
            self.tensors = {name: function(tensor) for name, tensor in self.tensors.items()}

    def snapshot(self) -> "TokenBuffer":
        """The same tensors with a length of their own: later appends and moves don't show."""
        return copy.copy(self)


class SlotBuffer(TokenBuffer):
    """
    Exact tokens in slots, one tensor for keys and one for values: the first `sinks` tokens stay in the first slots, the
    others go round a ring of `ring` slots behind them.
    """

    def __init__(self, shapes, batch: int, heads: int, device: torch.device, sinks: int, ring: int):
        super().__init__(shapes, 1, batch, heads, device)
        self.sinks, self.ring = sinks, ring

    def runs(self, start: int, stop: int) -> list[slice]:
        """Slots of the tokens at positions `start` to `stop`, in order."""
        runs = [slice(start, min(stop, self.sinks))] if start < min(stop, self.sinks) else []
        start = max(start, self.sinks)
        if stop > start:
            runs += ring_runs((start - self.sinks) % self.ring, stop - start, self.ring, self.sinks)
        return runs

    def pieces(self, name: str, start: int, stop: int) -> list[torch.Tensor]:
        """Views of the tokens at positions `start` to `stop`."""
        return [self[name][:, :, run] for run in self.runs(start, stop)]

    def write(self, name: str, start: int, states: torch.Tensor) -> None:
        """Writes states of shape `[batch, heads, tokens, head_dim]` to the slots of the positions from `start` on."""
        for run in self.runs(start, start + states.shape[2]):
            count = run.stop - run.start
            self[name][:, :, run] = states[:, :, :count]
            states = states[:, :, count:]


def ring_runs(start: int, count: int, ring: int, offset: int) -> list[slice]:
    """`count` slots of a ring of `ring` slots that begins at `offset`, from ring slot `start` on, as slices."""
    head = min(count, ring - start)
    runs = [slice(offset + start, offset + start + head), slice(offset, offset + count - head)]
    return [run for run in runs if run.stop > run.start]
