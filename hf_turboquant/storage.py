"""TokenBuffer: named tensors that grow by tokens, in place."""

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
    def over(cls, tensors: dict[str, torch.Tensor], block: int, length: int) -> "TokenBuffer":
        """A buffer that holds `length` tokens in tensors that are there already."""
        buffer = object.__new__(cls)
        buffer.tensors, buffer.block, buffer.length = tensors, block, length
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
            grown[:, :, : tensor.shape[2]] = tensor
            return grown

        self.map(grow)

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Replaces every tensor by `function(tensor)`: reorder, select, repeat, move. All of them or none."""
        with torch.inference_mode(False):
            self.tensors = {name: function(tensor) for name, tensor in self.tensors.items()}

    def snapshot(self) -> "TokenBuffer":
        """The same tensors with a length of their own: later appends and moves don't show."""
        return TokenBuffer.over(self.tensors, self.block, self.length)
