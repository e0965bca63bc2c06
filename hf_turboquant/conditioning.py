"""Conditioning: a mean and a scale for every channel of the keys, so that bits go where queries look."""

from dataclasses import replace
from functools import lru_cache

import numpy as np
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
        turns = _turns(tuple(frequencies), first, stop, step, keys.device)
        mean, lost = future_mean(keys, mean, count, *turns)
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


# the layers of a model ask for the same
@lru_cache(maxsize=4)
def _turns(frequencies: tuple[float, ...], first: int, stop: int, step: int, device) -> tuple[torch.Tensor, ...]:
    """Of every pair e^(-iωp) at the positions, `[positions, pairs]`, and (e^(iωH) - 1) / (iωH), `[pairs]`."""
    angles = np.arange(first, stop, step)[:, None] * np.array(frequencies)
    half = HORIZON * np.array(frequencies) / 2
    # a sine over its angle, for ω = 0 too
    turns = np.exp(-1j * angles), np.exp(1j * half) * np.sinc(half / np.pi)
    return tuple(torch.from_numpy(turn.astype(np.complex64)).to(device) for turn in turns)


def future_mean(
    keys: torch.Tensor, mean: torch.Tensor, count, undo: torch.Tensor, turn: torch.Tensor
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
        undo, turn (`torch.Tensor`): see [`_turns`].

    Returns:
        The mean, and the energy that leaves it for each channel; both of the shape of `mean`.
    """
    pairs = len(turn)
    still = (_as_pairs(keys, pairs) * undo).sum((1, 3), keepdim=True) / count
    found = still * turn
    now = _as_pairs(mean, pairs)
    leaves = (torch.view_as_real(now).square() - torch.view_as_real(found).square()).sum(-1).clamp_min(0) / 2
    remains = torch.view_as_real(still).square().sum((1, 2, 3, 4, 5))
    # decided on the device
    best, lost, left = mean, torch.zeros_like(mean), torch.view_as_real(now[0]).square().sum()
    candidates = _as_channels(torch.view_as_real(found), mean), _as_channels(torch.stack([leaves, leaves], -1), lost)
    for layout in range(2):
        better = remains[layout] > left
        best, lost = (torch.where(better, new[layout], old) for new, old in zip(candidates, (best, lost), strict=True))
        left = torch.maximum(remains[layout], left)
    return best, lost


def _as_pairs(states: torch.Tensor, pairs: int) -> torch.Tensor:
    """Channels as complex numbers, `[2, ..., pairs]`: paired with the one `pairs` further on, and with the next."""
    turned = states[..., : 2 * pairs]
    both = turned.unflatten(-1, (2, pairs)).mT, turned.unflatten(-1, (pairs, 2))
    return torch.view_as_complex(torch.stack(both).float())


def _as_channels(pairs: torch.Tensor, like: torch.Tensor) -> list[torch.Tensor]:
    """From `[2, ..., pairs, 2]` back to the channels of either layout; those without a pair are as in `like`."""
    rest = like[..., 2 * pairs.shape[-2] :]
    return [torch.cat([both.flatten(-2), rest], -1) for both in (pairs[0].mT, pairs[1])]


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
