"""How many tokens a layer holds, on the host and on the device, how many bytes, and for how many it has room."""

import torch
from transformers.cache_utils import DynamicLayer

from .traced import seq_length

NOT_COMPILED = (
    "Only steps of a few tokens without gradients are compiled over a cache with `max_cache_len`, and only after an "
    "uncompiled prefill, attention included, as in `generate`. Leave `fullgraph=True` out for anything else."
)


class Lengths(DynamicLayer):
    """Methods of [`TurboQuantLayer`], which says what its attributes mean."""

    @property
    def nbytes(self) -> int:
        """Bytes allocated for tokens."""
        return self.tokens.nbytes

    def get_max_length(self) -> int:
        """Capacity in tokens, or -1 if the layer grows."""
        return self.max_cache_len if self.fixed else -1

    def get_seq_length(self) -> int | torch.Tensor:
        """
        Number of tokens held. With a fixed capacity, once there are any, a tensor on the device, as in transformers'
        static layers.
        """
        if self.pending is not None:
            return self.tokens.length + self.pending["keys"].shape[2]
        if not self.fixed or not self.tokens.has_tokens:
            return self.tokens.length
        if torch.compiler.is_compiling():
            return seq_length(self.tokens.arena, self.tokens.description)
        # A copy, because the next step changes the counter.
        return self.tokens.states.counters[0, 0, 0].to(torch.int64)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """
        Columns of the next update's mask (`max_cache_len` for a step over a fixed capacity), and the position of the
        first column. Raises a `ValueError` if a fixed capacity is too small.
        """
        if not self.fixed:
            return super().get_mask_sizes(query_length)
        self._store_deferred()
        waiting = self.pending["keys"].shape[2] if self.pending else 0
        # What waits will have been stored by then.
        is_step = query_length <= self.step_tokens and (self.tokens.has_tokens or waiting > 0)
        if waiting or not is_step:
            self.measure()
            self._check_room(waiting + query_length)
        elif not torch.compiler.is_compiling() and not self.tokens.is_capturing():
            # `generate` asks before every compiled step, while the device is idle: waiting for the length would keep it
            # idle for longer.
            self.tokens.announced = False
            self.find_room(query_length)
            self.tokens.announce(query_length)
        return self.max_cache_len if is_step else self.tokens.length + waiting + query_length, 0

    def _is_step(self, tokens: int) -> bool:
        """Whether this many tokens are a step over a fixed capacity."""
        return self.fixed and tokens <= self.step_tokens and self.tokens.has_tokens and self.pending is None

    def _prepare_step(self, tokens: int) -> bool:
        """
        Whether this many tokens are a step, which one launch appends. With a fixed capacity, makes sure that there is
        room, or raises a `ValueError`.
        """
        held = self.tokens
        if not self.fixed:
            return tokens == 1 and held.length > 0 and not self.conditioning.waits and held.are_coded_after(1)
        if self._is_step(tokens):
            self.find_room(tokens)
            return True
        self.measure()
        self._check_room(tokens)
        return False

    @torch.compiler.disable(reason=NOT_COMPILED)
    def measure(self) -> None:
        """Fetches the lengths from the device, where steps over a fixed capacity update them."""
        self.tokens.measure()
        if self.fixed and self.conditioning.waits and self.tokens.has_tokens and self.tokens.quantized:
            # A step has quantized a token: the provisional mean and scale are final from then on.
            self.conditioning.finish(self.conditioning.provisional)
            self.tokens.stop_waiting()
            self.tokens.write_lengths()

    def count(self, tokens: int) -> None:
        """
        Counts the tokens of a step that was launched. Callers that replay a CUDA graph must call it, because no Python
        runs within the graph. Captured steps are not counted: they have not run.
        """
        self.tokens.count(tokens)

    def find_room(self, tokens: int) -> None:
        """
        Checks the capacity before a step that has not been announced: raises a `ValueError` if its tokens do not fit,
        and waits for the exact length only if the bound says that they may not.
        """
        if self.tokens.may_lack_room(tokens):
            self.make_room(tokens)

    def make_room(self, tokens: int) -> None:
        """
        Fetches the exact length; raises a `ValueError` if this many more tokens do not fit. Conditions keys that wait
        for it, if the exact slots cannot take the tokens.
        """
        if not self.fixed:
            return
        self.measure()
        self._check_room(tokens)
        if self.conditioning.waits and self.tokens.has_tokens:
            self._learn_now(tokens)

    def _check_room(self, tokens: int) -> None:
        if self.tokens.length + tokens > self.max_cache_len:
            raise ValueError(
                f"A cache with `max_cache_len={self.max_cache_len}` must get no more tokens than that, got "
                f"{tokens} after {self.tokens.length} at layer {self.layer_idx}. Make a larger one, or `reset()` it."
            )
