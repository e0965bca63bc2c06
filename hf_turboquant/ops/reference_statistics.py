"""The statistics of key channels in plain torch: what conditioning knows, and what the kernels are held to."""

import torch


def channel_statistics(keys, query_energy, valid, turns, least_tokens, least_energy):
    """[`ops.channel_statistics`]."""
    count = keys.shape[0] * keys.shape[2]
    if valid is not None:
        keys, count = fill(keys, valid), valid.sum()
    mean = keys.sum((0, 2), keepdim=True, dtype=torch.float32) / count
    key_energy = energy(fill(keys - mean, valid)) / count
    if turns is not None:
        mean, lost = future_mean(keys, mean, count, *turns)
        key_energy = key_energy + lost[0, :, 0]
    centred = mean.isfinite().all()
    if valid is not None:
        centred &= count >= least_tokens
    # a mean of zero and a scale of one change nothing
    mean = torch.where(centred, mean, 0)[0]
    if query_energy is None:
        return mean, None, torch.stack([centred, torch.zeros_like(centred)])
    energies = (x.clamp_min(least_energy * x.mean(-1, keepdim=True)) for x in (query_energy, key_energy))
    scale = torch.div(*energies).pow(0.25)
    # the overall factor is free: norms stay where they were
    scale = scale / scale.log().mean(-1, keepdim=True).exp()
    scaled = centred & (scale.isfinite() & (scale > 0)).all()
    return mean, torch.where(scaled, scale, 1).unsqueeze(1), torch.stack([centred, scaled])


def fill(states: torch.Tensor, valid: torch.Tensor | None) -> torch.Tensor:
    """States `[batch, heads, tokens, head_dim]`, zero where `valid`, boolean `[batch, tokens]`, is false."""
    # not multiplied: padding may hold anything
    return states if valid is None else states.masked_fill(~valid[:, None, :, None], 0)


def energy(states: torch.Tensor) -> torch.Tensor:
    """Sum of squares of states `[batch, heads, ..., head_dim]`, fp32 `[heads, head_dim]`, in one pass over them."""
    dtype = torch.promote_types(states.dtype, torch.float32)
    others = 0, *range(2, states.dim() - 1)
    return torch.linalg.vector_norm(states, dim=others, dtype=dtype).square().float()


def future_mean(
    keys: torch.Tensor, mean: torch.Tensor, count, undo: torch.Tensor, turn: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The mean of keys over the first H positions, if what it is before the embedding stays as it is here.

    The embedding multiplies a pair of channels, as a complex number, by e^(iωp) at position p. Undone, pairs have a
    mean m, which over H positions comes to m (e^(iωH) - 1) / (iωH): slow pairs turn for thousands of positions, and
    their mean over a few hundred is not what it will be. Pairs are channels i and i + `pairs` or 2 i and 2 i + 1,
    whichever leaves more of a mean; if both leave less than there is without, keys come some other way.

    Args:
        keys (`torch.Tensor`): of shape `[batch, heads, tokens, head_dim]`, zero where they don't count.
        mean (`torch.Tensor`): theirs, fp32 `[1, heads, 1, head_dim]`.
        count (`int` or `torch.Tensor`): how many it is of.
        undo, turn (`torch.Tensor`): see [`ops.channel_statistics`].

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
