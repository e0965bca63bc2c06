"""Conditioning: a mean and a scale for every channel of the keys, so that bits go where queries look."""

import math
from dataclasses import replace

import torch

from .quantizer import Quantizer

# fewer tokens than this tell too little about the ones to come
MIN_TOKENS = 64
# statistics of so many tokens, evenly spaced, are as good as those of all, and take little memory
MAX_TOKENS = 4_096
# with fewer tokens than this, statistics are those to be expected of so many
HORIZON = 2_048
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
    quantizer: Quantizer,
    keys: torch.Tensor,
    query_energy: torch.Tensor | None,
    valid: torch.Tensor | None,
    frequencies: list[float] | None = None,
    first: int = 0,
) -> tuple[Quantizer, str | torch.Tensor]:
    """
    The quantizer of keys with a mean μ and a scale t per KV head and channel: y = Π t (k - μ), queries Π q / t.

    Scores don't change: q·μ is one number for all keys, and (q / t)·(t k) = q·k. The error of a score is proportional
    to (Σ_c E q_c² / t_c²) (Σ_c t_c² E k_c²), smallest where t_c⁴ = E q_c² / E k_c² (Cauchy-Schwarz), k centred. Both
    expectations come from the tokens at hand; padding does not count, nor do sinks, which stay exact.

    Rotary embeddings turn the mean of slow pairs of channels as positions go on. Where there are fewer than `HORIZON`
    tokens, μ is the mean over so many positions, and what leaves it counts as energy: see [`future_mean`].

    Args:
        quantizer (`Quantizer`): without mean and scale.
        keys (`torch.Tensor`): of shape `[batch, num_key_value_heads, tokens, head_dim]`.
        query_energy (`torch.Tensor`, *optional*): E q² up to a factor, of shape `[num_key_value_heads, head_dim]`.
        valid (`torch.Tensor`, *optional*): boolean, of shape `[batch, tokens]`; false for padding.
        frequencies (`list[float]`, *optional*): ω of each pair of channels: see [`rotary.rotary_frequencies`].
        first (`int`): position of the first of `keys`.

    Returns:
        The quantizer and what it does, for [`outcome`]: nothing waits for the device here.
    """
    if keys.shape[0] * keys.shape[2] < MIN_TOKENS:
        return quantizer, "none"
    stop, step = first + keys.shape[2], _step(keys)
    keys, valid = _sample(keys, valid)
    keys = _fill(keys, valid)
    count = keys.shape[0] * keys.shape[2] if valid is None else valid.sum()
    mean = keys.sum((0, 2), keepdim=True, dtype=torch.float32) / count
    key_energy = _energy(keys - mean, valid) / count
    if frequencies and stop < HORIZON:
        positions = torch.arange(first, stop, step, device=keys.device)
        mean, lost = future_mean(keys, mean, count, positions, mean.new_tensor(frequencies))
        key_energy = key_energy + lost[0, :, 0]
    centred = mean.isfinite().all()
    if valid is not None:
        centred &= count >= MIN_TOKENS
    # a mean of zero and a scale of one change nothing
    mean = torch.where(centred, mean, 0)
    if query_energy is None:
        return replace(quantizer, mean=mean[0]), torch.stack([centred, torch.zeros_like(centred)])
    scale = (_floor(query_energy) / _floor(key_energy)).pow(0.25)
    # the overall factor is free: keep norms where they were
    scale = scale / scale.log().mean(-1, keepdim=True).exp()
    scaled = centred & (scale.isfinite() & (scale > 0)).all()
    scale = torch.where(scaled, scale, 1)
    return replace(quantizer, mean=mean[0], scale=scale.unsqueeze(1)), torch.stack([centred, scaled])


def outcome(found: str | torch.Tensor) -> str:
    """
    What [`condition`] came to: `"attention"` (mean and scale), `"center"` (mean: no query was seen, or the statistics
    are degenerate) or `"none"` (under 64 tokens, or keys that are not finite). Waits for the device.
    """
    if isinstance(found, str):
        return found
    centred, scaled = found.tolist()
    return "attention" if scaled else "center" if centred else "none"


def future_mean(
    keys: torch.Tensor, mean: torch.Tensor, count, positions: torch.Tensor, frequencies: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The mean of keys over the first `HORIZON` positions, if what it is before the embedding stays as it is here.

    The embedding multiplies a pair of channels, as a complex number, by e^(iωp) at position p. Undone, pairs have a
    mean m, which over H positions comes to m (e^(iωH) - 1) / (iωH): slow pairs turn for thousands of positions, and
    their mean over a few hundred is not what it will be. Pairs are channels i and i + `pairs` or 2 i and 2 i + 1,
    whichever leaves more of a mean; if both leave less than there is without, keys come some other way.

    Args:
        keys (`torch.Tensor`): of shape `[batch, heads, tokens, head_dim]`, zero where they don't count.
        mean (`torch.Tensor`): theirs, fp32 `[1, heads, 1, head_dim]`.
        count (`int` or `torch.Tensor`): how many it is of.
        positions (`torch.Tensor`): of the tokens.
        frequencies (`torch.Tensor`): ω, of shape `[pairs]`.

    Returns:
        The mean, and the energy that leaves it for each channel; both of the shape of `mean`.
    """
    pairs = len(frequencies)
    angles = positions[:, None] * frequencies
    cos, sin = angles.cos(), angles.sin()
    end = HORIZON * frequencies
    # real and imaginary part of (e^(iωH) - 1) / (iωH), for ω = 0 too
    shrink, turn = torch.sinc(end / math.pi), torch.sinc(end / (2 * math.pi)) * (end / 2).sin()
    best, lost, left = mean, torch.zeros_like(mean), mean[..., : 2 * pairs].square().sum()
    halves, neighbours = (slice(pairs), slice(pairs, 2 * pairs)), (slice(0, 2 * pairs, 2), slice(1, 2 * pairs, 2))
    for x, y in (halves, neighbours):
        real, imaginary = keys[..., x].float(), keys[..., y].float()
        still = (
            (real * cos + imaginary * sin).sum((0, 2), keepdim=True) / count,
            (imaginary * cos - real * sin).sum((0, 2), keepdim=True) / count,
        )
        found, leaves = mean.clone(), torch.zeros_like(mean)
        found[..., x] = still[0] * shrink - still[1] * turn
        found[..., y] = still[0] * turn + still[1] * shrink
        less = mean.square() - found.square()
        leaves[..., x] = leaves[..., y] = (less[..., x] + less[..., y]).clamp_min(0) / 2
        # decided on the device
        remains = still[0].square().sum() + still[1].square().sum()
        best, lost = torch.where(remains > left, found, best), torch.where(remains > left, leaves, lost)
        left = torch.maximum(remains, left)
    return best, lost


def valid_tokens(attention_mask: torch.Tensor | None, kv_len: int) -> torch.Tensor | None:
    """Boolean of shape `[batch, kv_len]`: the tokens that the last query may attend to; `None` where all count."""
    if attention_mask is None or attention_mask.dim() != 4 or attention_mask.shape[-1] < kv_len:
        return None
    last = attention_mask[:, 0, -1, :kv_len]
    # additive masks hide with the dtype's lowest value or -inf
    return last if last.dtype == torch.bool else last > torch.finfo(last.dtype).min / 2


def _sample(states: torch.Tensor, valid: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """At most `MAX_TOKENS` tokens of `[batch, heads, tokens, head_dim]`, evenly spaced, and which of them count."""
    step = _step(states)
    return states.detach()[:, :, ::step], None if valid is None else valid[:, ::step]


def _step(states: torch.Tensor) -> int:
    return max(-(-states.shape[0] * states.shape[2] // MAX_TOKENS), 1)


def _fill(states: torch.Tensor, valid: torch.Tensor | None) -> torch.Tensor:
    # filled, not multiplied: padding may hold anything
    return states if valid is None else states.masked_fill(~valid[:, None, :, None], 0)


def _energy(states: torch.Tensor, valid: torch.Tensor | None) -> torch.Tensor:
    """Sum of squares over batch and tokens, fp32 `[heads, head_dim]`, in one pass over the states."""
    dtype = torch.promote_types(states.dtype, torch.float32)
    return torch.linalg.vector_norm(_fill(states, valid), dim=(0, 2), dtype=dtype).square().float()


def _floor(energy: torch.Tensor) -> torch.Tensor:
    return energy.clamp_min(MIN_ENERGY * energy.mean(-1, keepdim=True))
