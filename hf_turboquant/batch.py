"""What is done to all tokens of a layer at once: reorder, repeat, select, crop, move, copy, hand out."""

from collections.abc import Callable

import torch
from transformers.cache_utils import DynamicLayer

from .handle import handles
from .quantizer import ROLES
from .states import ExactStates
from .tokens import Tokens


class BatchOperations:
    """Operations of [`TurboQuantLayer`], which says what its attributes mean."""

    def come_to_rest(self) -> None:
        """Stores all waiting tokens, brings offloaded ones back to the layer's device, and fetches the lengths."""
        self.settle()
        if self.is_offloaded and torch.cuda.is_available():
            # A copy may be in progress on another stream.
            torch.cuda.synchronize()
        self.prefetch()
        self.measure()

    def _map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Applies `function` to every tensor of tokens; either all of them change or none."""
        if not self.is_initialized:
            return
        self.come_to_rest()
        valid = self.conditioning.valid
        valid = None if valid is None else function(valid)
        self._replace(self.tokens.mapped(function))
        self.conditioning.valid = valid
        if self.is_offloaded:
            self.offload()

    def _replace(self, tokens: Tokens) -> None:
        """Goes on with `tokens`, copies of those held."""
        self.tokens = self.tokens.replaced_by(tokens, self._outdate)

    def crop(self, tokens_to_remove: int) -> None:
        """
        Removes tokens from the end; `tokens_to_remove` means what it does in `DynamicLayer.crop`. The remaining tokens
        are unchanged: exact tokens stay exact, quantized ones stay quantized.
        """
        if not self.is_initialized:
            return
        self.settle()
        self.measure()
        # Ask transformers' own layer what the argument means: this changed between releases.
        positions, held = DynamicLayer(), torch.empty(1, 1, self.tokens.length, 1, device="meta")
        positions.update(held, held)
        positions.crop(tokens_to_remove)
        length = positions.get_seq_length()
        if self.fixed:
            # Handles read what the next step overwrites.
            self._outdate()
        if not length:
            self._begin_again()
        else:
            self.tokens.crop(length)
            if self.conditioning.valid is not None:
                self.conditioning.valid = self.conditioning.valid[:, :length]

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Reorders the batch for beam search: row `beam_idx[i]` becomes row i."""
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
        are moved when they are stored. With a fixed capacity, raises a `ValueError`.
        """
        if self.fixed:
            raise ValueError(
                "A cache with `max_cache_len` must stay on its device, because compiled steps hold its addresses, got "
                "a call of `offload`. Leave `max_cache_len` out."
            )
        self.is_offloaded = self.is_initialized
        if self.observed is not None:
            # `settle` calls `offload` once the tokens are stored.
            self.settle()
        elif self.is_offloaded and self.pending is None:
            self.settle()
            # A non-blocking copy to the CPU goes to pinned memory.
            self._replace(self.tokens.mapped(lambda tensor: tensor.to("cpu", non_blocking=True)))

    def prefetch(self) -> None:
        """Moves codes and exact tokens back to the layer's device on the current stream."""
        if self.is_offloaded and self.tokens.exact is not None and self.tokens.exact["keys"].device != self.device:
            self._replace(self.tokens.mapped(lambda tensor: tensor.to(self.device, non_blocking=True)))

    @property
    def keys(self) -> torch.Tensor | None:
        """
        The keys held, as a handle that later updates don't change; `None` before the first token. While nothing is
        quantized, writing to it changes what is held; after that it raises a `ValueError`.
        """
        self.come_to_rest()
        return self._held()[0] if self.is_initialized else None

    @property
    def values(self) -> torch.Tensor | None:
        """The values held, in the same form as `keys`."""
        self.come_to_rest()
        return self._held()[1] if self.is_initialized else None

    @keys.setter
    def keys(self, states: None) -> None:
        self._refuse(states)

    @values.setter
    def values(self, states: None) -> None:
        self._refuse(states)

    def _refuse(self, states: torch.Tensor | None) -> None:
        # The constructor of the base class sets both to None.
        if states is not None:
            raise ValueError("A TurboQuantLayer holds codes: its keys and values cannot be assigned. Use `update`.")

    def _held(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Handles of all tokens held, which later updates do not change."""
        if self.fixed:
            return handles(self.tokens.frozen())
        self.lent = True
        if self.tokens.quantized:
            return handles(self.tokens.read())
        return handles(ExactStates({role: self.tokens.whole(role) for role in ROLES}, lambda *_: None, writable=True))

    def __getstate__(self) -> dict:
        # Otherwise each copy would quantize the prompt again.
        self._store_deferred()
        return {name: value for name, value in vars(self).items() if name != "step" or not self.fixed}
