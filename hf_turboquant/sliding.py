"""A sliding layer of fixed capacity that a CUDA graph can hold."""

import torch
from transformers.cache_utils import StaticSlidingWindowLayer


class StaticSlidingLayer(StaticSlidingWindowLayer):
    """
    Like `StaticSlidingWindowLayer`, whose step over a full window makes an index on the host. torch.compile treats that
    as a constant, but a plain CUDA graph cannot copy it to the device.
    """

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As in the base class; states have shape `[batch, num_key_value_heads, tokens, head_dim]`."""
        full = self.is_initialized and self.cumulative_length_int >= self.max_cache_len
        if torch.compiler.is_compiling() or not full or key_states.shape[2] != 1:
            return super().update(key_states, value_states, *args, **kwargs)
        self.cumulative_length_int += 1
        for held, new in ((self.keys, key_states), (self.values, value_states)):
            held.copy_(torch.cat([held[:, :, 1:], new], dim=2))
        return self.keys, self.values
