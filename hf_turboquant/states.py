"""What attention reads of one layer after an update, and how a query attends; `ops` works on both."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from .quantizer import Quantizer
from .storage import TokenBuffer, ring_runs


@dataclass(eq=False)
class LayerStates:
    """
    What attention reads of one layer after one update: exact sinks, then the codes, then exact recent tokens.

    Exact tokens are in slots: the sinks in the first `sink_length` slots, then the recent tokens in a ring of `ring`
    slots, the oldest of them at ring slot `phase`.

    Args:
        quantizers (`dict[str, Quantizer]`), codes (`dict[str, TokenBuffer]`):
            By role, `"keys"` and `"values"`. `quantized` is the number of codes to read.
        exact (`dict[str, torch.Tensor]`): by role, of shape `[batch, num_key_value_heads, slots, head_dim]`.
        kv_len (`int`), quantized (`int`): the number of all tokens, and of those in codes.
        backend (`str`): `"auto"`, `"triton"` or `"torch"`: see [`TurboQuantConfig`].
        counters (`torch.Tensor`, *optional*):
            With a fixed capacity the lengths are in device memory, int32 of shape `[2, batch * heads, 3]`: for keys
            and for values, the number of all tokens, of quantized ones, and of the recent ones that stay exact, at most
            `ring`. `kv_len` and `quantized` are upper bounds in that case.
        plans (`Plans`, *optional*): the layer's plans for launches.
        training (`dict[str, torch.Tensor]`, *optional*):
            By role, the newest tokens as they came, if gradients flow to them. Attention then reads these, and all
            others dequantized.
        outdated (`bool`): whether the layer has gone on and may have overwritten what these states read.
        window (`int`, *optional*): recent tokens that stay exact if they are fewer than `ring`.
    """

    quantizers: dict[str, Quantizer]
    codes: dict[str, TokenBuffer]
    exact: dict[str, torch.Tensor]
    kv_len: int
    quantized: int
    sink_length: int
    ring: int
    phase: int
    backend: str = "auto"
    counters: torch.Tensor | None = None
    plans: dict | None = None
    training: dict[str, torch.Tensor] | None = None
    outdated: bool = False
    window: int | None = None

    def measured(self) -> "LayerStates":
        """The same states with their lengths on the host; waits for the device if they are only there."""
        if self.counters is None:
            return self
        if self.counters.is_cuda and torch.cuda.is_current_stream_capturing():
            got = " and ".join(
                f"{role} of {q.nbits} bits, head_dim {q.head_dim}" for role, q in self.quantizers.items()
            )
            raise ValueError(
                "A CUDA graph must not hold what fetches lengths from the device, as the torch reference, more than 16 "
                f"queries and any operation but attention do, got {got}. Pass `disable_compile=True` to `generate`."
            )
        kv_len, quantized, window = self.counters[0, 0].tolist()
        if kv_len > self.kv_len:
            raise ValueError(
                f"A cache with `max_cache_len={self.kv_len}` must get no more tokens than that, got more by compiled "
                "steps. Make a larger one, or `reset()` it."
            )
        phase = quantized % self.ring if self.ring else 0
        return replace(self, kv_len=kv_len, quantized=quantized, phase=phase, window=window, counters=None)

    @property
    def recent_start(self) -> int:
        """Position of the oldest exact recent token."""
        return self.sink_length + self.quantized

    def exact_runs(self) -> list[tuple[int, slice]]:
        """The exact tokens as a few runs (position of the first token, slots) in sequence order."""
        sinks = min(self.sink_length, self.kv_len)
        runs = [(0, slice(0, sinks))] if sinks else []
        position = self.recent_start
        for run in ring_runs(self.phase, self.kv_len - position, self.ring, self.sink_length):
            runs.append((position, run))
            position += run.stop - run.start
        return runs

    def shape(self, role: str) -> torch.Size:
        batch, heads, _, head_dim = self.exact[role].shape
        return torch.Size((batch, heads, self.kv_len, head_dim))

    def same_tokens(self, other: "LayerStates") -> bool:
        """Whether both read the same tensors: cross-attention asks a layer for keys and values separately."""
        return (
            (self.kv_len, self.phase) == (other.kv_len, other.phase)
            and self.exact is other.exact
            and all(self.codes[role].tensors is other.codes[role].tensors for role in self.codes)
        )


@dataclass(eq=False)
class ExactStates:
    """
    All tokens of a layer while none is quantized and the layer waits for the query that attends to them.

    Args:
        exact (`dict[str, torch.Tensor]`): by role, of shape `[batch, num_key_value_heads, kv_len, head_dim]`.
        observe (`Callable`): called with the query and the attention mask, or with `None` twice if they are unknown.
        writable (`bool`): whether a write to these tensors changes what the layer holds.
    """

    exact: dict[str, torch.Tensor]
    observe: Callable[[torch.Tensor | None, torch.Tensor | None], None]
    writable: bool = False

    def shape(self, role: str) -> torch.Size:
        return self.exact[role].shape


class AttentionOptions(NamedTuple):
    """
    How a query attends.

    Args:
        scaling (`float`): factor of the logits.
        attention_mask (`torch.Tensor`, *optional*):
            Boolean (true: attend) or additive, broadcastable to `[batch, num_attention_heads, query_length, kv_len]`;
            may be longer than kv_len.
        is_causal (`bool`): query i of `query_length` sees positions up to `kv_len - query_length + i`.
        softcap (`float`, *optional*): logits become `softcap * tanh(logits / softcap)` before the mask (Gemma 2).
        sinks (`torch.Tensor`, *optional*): of shape `[num_attention_heads]`, one more logit in every head's
            denominator (gpt-oss).
    """

    scaling: float
    attention_mask: torch.Tensor | None = None
    is_causal: bool = False
    softcap: float | None = None
    sinks: torch.Tensor | None = None

    def finish(self, products: torch.Tensor, first_query: int, first_key: int = 0) -> torch.Tensor:
        """
        Logits from products of queries and keys, of shape `[batch, num_attention_heads, queries, keys]`: scaled, capped
        and masked. `first_query` and `first_key` are the positions of the first query and key.
        """
        logits = products * self.scaling
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        queries, keys = logits.shape[2:]
        if self.is_causal:
            positions = torch.arange(first_query, first_query + queries, device=logits.device).unsqueeze(-1)
            later = torch.arange(first_key, first_key + keys, device=logits.device) > positions
            logits = logits.masked_fill(later, -torch.inf)
        if self.attention_mask is None:
            return logits
        mask = self.attention_mask[..., first_key : first_key + keys]
        return logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask
