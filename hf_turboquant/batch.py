"""What is done to all tokens of a layer at once: reorder, repeat, select, move to the CPU and back."""

from collections.abc import Callable

import torch


class BatchOperations:
    """Operations of [`TurboQuantLayer`], which says what its attributes mean."""

    def come_to_rest(self) -> None:
        """Stores all waiting tokens and brings offloaded ones back to the layer's device."""
        self.settle()
        if self.is_offloaded and torch.cuda.is_available():
            # A copy may be in progress on another stream.
            torch.cuda.synchronize()
        self.prefetch()

    def _map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Applies `function` to every tensor of tokens; either all of them change or none."""
        if not self.is_initialized:
            return
        self.come_to_rest()
        valid = self.conditioning.valid
        valid = None if valid is None else function(valid)
        self._replace(function)
        self.conditioning.valid = valid
        if self.is_offloaded:
            self.offload()

    def _replace(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.tokens = self.tokens.mapped(function)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Reorders the batch for beam search."""
        self._map(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every row of the batch `repeats` times."""
        self._map(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps the rows `indices` of the batch (indices or a boolean mask)."""
        self._map(lambda tensor: tensor[indices, ...])

    def offload(self) -> None:
        """
        Moves codes and exact tokens to pinned host memory on the current stream. Tokens whose query was not seen yet
        are moved when they are stored.
        """
        self.is_offloaded = self.is_initialized
        if self.observed is not None:
            # This comes back here.
            self.settle()
        elif self.is_offloaded and self.pending is None:
            self.settle()
            # A non-blocking copy to the CPU goes to pinned memory.
            self._replace(lambda tensor: tensor.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        """Moves codes and exact tokens back to the layer's device on the current stream."""
        if self.is_offloaded and self.tokens.exact["keys"].device != self.device:
            self._replace(lambda tensor: tensor.to(self.device, non_blocking=True))
