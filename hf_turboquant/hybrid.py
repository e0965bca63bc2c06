"""Layers with full attention in codes beside recurrent states."""

from collections.abc import Callable

import torch
from transformers.cache_utils import LinearAttentionAndFullAttentionLayer, LinearAttentionLayer

from .config import TurboQuantConfig
from .layer import TurboQuantLayer


class TurboQuantHybridLayer(LinearAttentionAndFullAttentionLayer, TurboQuantLayer):
    """
    A layer with both full attention and a recurrent part (Falcon-H1, Zamba2): keys and values become codes, the conv
    and recurrent states stay as transformers keeps them.

    Args:
        config (`TurboQuantConfig`): options of the cache.
        layer_idx (`int`): index of the layer in the model; seeds its rotations.
        number_of_states (`int`, defaults to 1): conv and recurrent states that the layer holds.
    """

    # The constructor sets it, where the recurrent part has a property. Each method that both parts have is overridden
    # here and calls both by name.
    is_compileable = False

    def __init__(self, config: TurboQuantConfig, layer_idx: int, number_of_states: int = 1):
        # This one first, because the other constructor resets the layer.
        LinearAttentionLayer.__init__(self, number_of_states=number_of_states)
        TurboQuantLayer.__init__(self, config, layer_idx)

    def __repr__(self) -> str:
        return TurboQuantLayer.__repr__(self)

    def lazy_initialization(self, *key_value_states: torch.Tensor, **linear_states) -> None:
        """Attention passes keys and values by position, the recurrent part passes keywords."""
        if key_value_states:
            TurboQuantLayer.lazy_initialization(self, *key_value_states)
        else:
            LinearAttentionLayer.lazy_initialization(self, **linear_states)

    def reset(self) -> None:
        """Forgets all tokens; the recurrent states become zero."""
        LinearAttentionLayer.reset(self)
        TurboQuantLayer.reset(self)

    def crop(self, tokens_to_remove: int) -> None:
        """As `TurboQuantLayer.crop`; raises an error if the recurrent part cannot be rolled back."""
        LinearAttentionLayer.crop(self, tokens_to_remove)
        TurboQuantLayer.crop(self, tokens_to_remove)

    def _map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        # transformers' own layer repeats and selects only its keys and values, and then fails at the next token.
        mapped = [
            {index: state if state is None else function(state) for index, state in states.items()}
            for states in (self.conv_states, self.recurrent_states)
        ]
        TurboQuantLayer._map(self, function)
        self.conv_states, self.recurrent_states = mapped

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Reorders the batch for beam search."""
        TurboQuantLayer.reorder_cache(self, beam_idx)

    def offload(self) -> None:
        """Moves codes and exact tokens to the CPU; recurrent states stay, because they are read before an update."""
        TurboQuantLayer.offload(self)

    def prefetch(self) -> None:
        """Moves codes and exact tokens back to the layer's device."""
        TurboQuantLayer.prefetch(self)

    def get_max_length(self) -> int:
        """Capacity in tokens, or -1 if the layer grows."""
        return TurboQuantLayer.get_max_length(self)
