"""TokenBuffer: named tensors that grow by tokens, in place. SlotBuffer: the same for exact tokens, in fixed slots."""

from collections.abc import Callable, Sequence

import torch


class TokenBuffer:
    """
    Named tensors of shape `[batch, heads, capacity / block, ...]` that hold `length` tokens.

    Codes come in blocks of 128 tokens, exact states in blocks of one. Appending writes into spare capacity; when that
    is used up, every tensor grows by 1/32, so that each token is copied a constant number of times on average, however
    long the sequence gets. Contents beyond `length` are undefined.

    Args:
        shapes (`dict[str, tuple[torch.dtype, tuple[int, ...]]]`): dtype and shape of one block of every tensor.
        block (`int`): tokens of one block.
        batch, heads (`int`), device (`torch.device`): the leading dimensions and the device of the tensors.
    """

    def __init__(self, shapes, block: int, batch: int, heads: int, device: torch.device):
        self.block = block
        self.length = 0
        # Ordinary tensors even in inference mode, because they are written to outside of it too.
        with torch.inference_mode(False):
            self.tensors = {
                name: torch.empty((batch, heads, 0, *shape), dtype=dtype, device=device)
                for name, (dtype, shape) in shapes.items()
            }

    @classmethod
    def over(cls, tensors: dict[str, torch.Tensor], **fields) -> "TokenBuffer":
        """A buffer over existing tensors; `fields` are its other attributes, such as `block` and `length`."""
        buffer = object.__new__(cls)
        vars(buffer).update(fields, tensors=tensors)
        return buffer

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.tensors[name]

    @property
    def capacity(self) -> int:
        """Tokens that fit into the allocated memory."""
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
        """Grows to hold `tokens` in all, with spare capacity up to `limit`. If memory runs out, nothing changes."""
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
        """Replaces every tensor by `function(tensor)` (reorder, select, repeat, move): either all of them or none."""
        with torch.inference_mode(False):
            self.tensors = {name: function(tensor) for name, tensor in self.tensors.items()}

    def to(self, dtypes: dict[str, torch.dtype]) -> None:
        """Converts the tensors to these dtypes, by name: exactly, if they are wider."""
        with torch.inference_mode(False):
            self.tensors = {name: tensor.to(dtypes[name]) for name, tensor in self.tensors.items()}

    def snapshot(self) -> "TokenBuffer":
        """A buffer with the same tensors but its own length: it does not see later appends and moves."""
        # `copy.copy` takes several times as long.
        return self.over(**vars(self))


def reserve_all(buffers: Sequence[TokenBuffer], tokens: int) -> None:
    """[`TokenBuffer.reserve`] for all of them or, if memory runs out, for none: kernels rely on one capacity."""
    before = [buffer.tensors for buffer in buffers]
    try:
        for buffer in buffers:
            buffer.reserve(tokens)
    except BaseException:
        for buffer, tensors in zip(buffers, before, strict=True):
            buffer.tensors = tensors
        raise


class SlotBuffer(TokenBuffer):
    """
    Exact tokens in slots, one tensor for keys and one for values. The first `sinks` tokens stay in the first slots; the
    others use the ring buffer of `ring` slots after them.
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
    """`count` slots, from ring slot `start` on, of the ring of `ring` slots that begins at `offset`, as slices."""
    head = min(count, ring - start)
    runs = [slice(offset + start, offset + start + head), slice(offset, offset + count - head)]
    return [run for run in runs if run.stop > run.start]
