"""Conditioning: a mean and a scale for every channel of the keys, so that bits go where queries look."""

from dataclasses import replace

import torch

from .quantizer import Quantizer

# fewer tokens than this tell too little about the ones to come
MIN_TOKENS = 64
# statistics of so many tokens, evenly spaced, are as good as those of all, and take little memory
MAX_TOKENS = 4_096
# a channel counts as if it had at least this part of the average energy: keeps scales within a factor of ten
MIN_ENERGY = 1e-4


class QueryEnergy:
    """
    Sum of squares of all queries seen, by KV head and channel.

    Args:
        heads, head_dim (`int`), device: of the layer's keys.
    """

    def __init__(self, heads: int, head_dim: int, device: torch.device):
        self.total = torch.zeros(heads, head_dim, device=device)

    def add(self, query: torch.Tensor, valid: torch.Tensor | None) -> None:
        """
        Args:
            query (`torch.Tensor`): of shape `[batch, num_attention_heads, query_length, head_dim]`.
            valid (`torch.Tensor`, *optional*): boolean, of shape `[batch, query_length]`; false for padding.
        """
        query, valid = _sample(query, valid)
        heads, head_dim = self.total.shape
        # query heads of one KV head are neighbours
        self.total += _energy(query, valid).view(heads, -1, head_dim).sum(1)


def condition(
    quantizer: Quantizer, keys: torch.Tensor, query_energy: torch.Tensor | None, valid: torch.Tensor | None
) -> tuple[Quantizer, str]:
    """
    The quantizer of keys with a mean μ and a scale t per KV head and channel: y = Π t (k - μ), queries Π q / t.

    Scores don't change: q·μ is one number for all keys, and (q / t)·(t k) = q·k. The error of a score is proportional
    to (Σ_c E q_c² / t_c²) (Σ_c t_c² E k_c²), smallest where t_c⁴ = E q_c² / E k_c² (Cauchy-Schwarz), k centred. Both
    expectations come from the tokens at hand; padding does not count, nor do sinks, which stay exact.

    Args:
        quantizer (`Quantizer`): without mean and scale.
        keys (`torch.Tensor`): of shape `[batch, num_key_value_heads, tokens, head_dim]`.
        query_energy (`torch.Tensor`, *optional*): E q² up to a factor, of shape `[num_key_value_heads, head_dim]`.
        valid (`torch.Tensor`, *optional*): boolean, of shape `[batch, tokens]`; false for padding.

    Returns:
        The quantizer and what it does: `"attention"` (mean and scale), `"center"` (mean: no query was seen, or the
        statistics are degenerate) or `"none"` (under 64 tokens, or keys that are not finite).
    """
    if keys.shape[0] * keys.shape[2] < MIN_TOKENS:
        return quantizer, "none"
    keys, valid = _sample(keys, valid)
    count = keys.shape[0] * keys.shape[2] if valid is None else valid.sum()
    mean = _fill(keys, valid).sum((0, 2), keepdim=True, dtype=torch.float32) / count
    key_energy = _energy(keys - mean, valid) / count
    scale = torch.ones_like(key_energy)
    if query_energy is not None:
        scale = (_floor(query_energy) / _floor(key_energy)).pow(0.25)
        # the overall factor is free: keep norms where they were
        scale = scale / scale.log().mean(-1, keepdim=True).exp()
    # one look at the device for all that can be wrong
    checks = [mean.isfinite().all(), (scale.isfinite() & (scale > 0)).all()]
    if valid is not None:
        checks.append(count >= MIN_TOKENS)
    centre, scales, *enough = torch.stack(checks).tolist()
    if not (centre and all(enough)):
        return quantizer, "none"
    centred = replace(quantizer, mean=mean[0])
    if query_energy is None or not scales:
        return centred, "center"
    return replace(centred, scale=scale.unsqueeze(1)), "attention"


def valid_tokens(attention_mask: torch.Tensor | None, kv_len: int) -> torch.Tensor | None:
    """Boolean of shape `[batch, kv_len]`: the tokens that the last query may attend to; `None` where all count."""
    if attention_mask is None or attention_mask.dim() != 4 or attention_mask.shape[-1] < kv_len:
        return None
    last = attention_mask[:, 0, -1, :kv_len]
    # additive masks hide with the dtype's lowest value or -inf
    return last if last.dtype == torch.bool else last > torch.finfo(last.dtype).min / 2


def _sample(states: torch.Tensor, valid: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """At most `MAX_TOKENS` tokens of `[batch, heads, tokens, head_dim]`, evenly spaced, and which of them count."""
    step = -(-states.shape[0] * states.shape[2] // MAX_TOKENS)
    return states.detach()[:, :, :: max(step, 1)], None if valid is None else valid[:, :: max(step, 1)]


def _fill(states: torch.Tensor, valid: torch.Tensor | None) -> torch.Tensor:
    # filled, not multiplied: padding may hold anything
    return states if valid is None else states.masked_fill(~valid[:, None, :, None], 0)


def _energy(states: torch.Tensor, valid: torch.Tensor | None) -> torch.Tensor:
    """Sum of squares over batch and tokens, fp32 `[heads, head_dim]`, in one pass over the states."""
    dtype = torch.promote_types(states.dtype, torch.float32)
    return torch.linalg.vector_norm(_fill(states, valid), dim=(0, 2), dtype=dtype).square().float()


def _floor(energy: torch.Tensor) -> torch.Tensor:
    return energy.clamp_min(MIN_ENERGY * energy.mean(-1, keepdim=True))
