"""The statistics of key channels for conditioning, in plain torch; the kernels are tested against them."""

import torch

# Of so many tokens, the landmarks, a token must not be like so many: see `different_tokens`.
LANDMARKS, MOST_ALIKE = 64, 8
# The cosine from which on two tokens are alike: a bias of the values may well give all of them one direction.
ALIKE = 0.95


def channel_statistics(keys, values, query_energy, valid, turns, least_tokens, least_energy):
    """[`ops.channel_statistics`]."""
    if valid is None:
        valid = torch.ones(keys.shape[0], keys.shape[2], dtype=torch.bool, device=keys.device)
    enough = different_tokens(values, valid).sum() >= least_tokens
    keys, count = fill(keys, valid), valid.sum()
    mean = keys.sum((0, 2), keepdim=True, dtype=torch.float32) / count
    key_energy = energy(fill(keys - mean, valid)) / count
    if turns is not None:
        mean, lost = future_mean(keys, mean, count, *turns)
        key_energy = key_energy + lost[0, :, 0]
    # Of no tokens the mean is NaN.
    centred = mean.isfinite().all()
    # A mean of zero and a scale of one change nothing.
    mean = torch.where(centred, mean, 0)[0]
    if query_energy is None:
        return mean, None, _integers(centred, torch.zeros_like(centred), enough, count)
    energies = (x.clamp_min(least_energy * x.mean(-1, keepdim=True)) for x in (query_energy, key_energy))
    scale = torch.div(*energies).pow(0.25)
    # The overall factor is free: keep norms about as they were.
    scale = scale / scale.log().mean(-1, keepdim=True).exp()
    scaled = centred & enough & (scale.isfinite() & (scale > 0)).all()
    return mean, torch.where(scaled, scale, 1).unsqueeze(1), _integers(centred, scaled, enough, count)


def _integers(*found: torch.Tensor) -> torch.Tensor:
    return torch.stack([x.to(torch.int32) for x in found])


def different_tokens(values: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """
    Boolean of shape `[batch, tokens]`: the valid tokens that are not one of a few repeated over and over.

    Values tell, because keys are rotated by their positions: a token is a repetition if the values of over an eighth of
    all tokens, estimated from 64 of them, have its direction. The positions of these landmarks are multiples of the
    golden ratio, since a text may have a period that divides a regular distance.

    Args:
        values (`torch.Tensor`): of shape `[batch, heads, tokens, head_dim]`.
        valid (`torch.Tensor`): boolean, of shape `[batch, tokens]`; false for tokens that do not count.
    """
    rows = torch.nn.functional.normalize(values.transpose(1, 2).flatten(2).flatten(0, 1).float(), dim=-1)
    at = torch.arange(LANDMARKS, device=values.device) * 40503 % 2**16 * len(rows) // 2**16
    known = valid.flatten()[at]
    # Padding may take most of the landmarks; each of them is like itself.
    alike = ((rows @ rows[at].mT > ALIKE) & known).sum(1) - 1
    return valid & (LANDMARKS * alike < MOST_ALIKE * known.sum()).view_as(valid)


def fill(states: torch.Tensor, valid: torch.Tensor | None) -> torch.Tensor:
    """States `[batch, heads, tokens, head_dim]`, zero where `valid`, boolean `[batch, tokens]`, is false."""
    # Not by multiplication, because padding may hold inf or NaN.
    return states if valid is None else states.masked_fill(~valid[:, None, :, None], 0)


def energy(states: torch.Tensor) -> torch.Tensor:
    """Sum of squared states `[batch, heads, ..., head_dim]`, fp32 `[heads, head_dim]`, in a single pass."""
    dtype = torch.promote_types(states.dtype, torch.float32)
    others = 0, *range(2, states.dim() - 1)
    return torch.linalg.vector_norm(states, dim=others, dtype=dtype).square().float()


def future_mean(
    keys: torch.Tensor, mean: torch.Tensor, count, undo: torch.Tensor, turn: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The mean of keys over the first H positions, assuming that their mean before the embedding stays as it is here.

    The embedding multiplies a pair of channels, as a complex number, by e^(iωp) at position p. With the embedding
    undone, pairs have a mean m, and over H positions its mean is m (e^(iωH) - 1) / (iωH). Slow pairs need thousands of
    positions for a full rotation, so their mean over a few hundred differs from the later one. Pairs are channels i and
    i + `pairs` or 2 i and 2 i + 1, whichever gives the larger mean. If the plain mean is larger than both, keys are
    embedded in another way and the plain mean is kept.

    Args:
        keys (`torch.Tensor`): of shape `[batch, heads, tokens, head_dim]`, zero where they don't count.
        mean (`torch.Tensor`): the mean of these keys, fp32 `[1, heads, 1, head_dim]`.
        count (`int` or `torch.Tensor`): the number of keys in the mean.
        undo, turn (`torch.Tensor`): the two `turns` of [`ops.channel_statistics`].

    Returns:
        The mean, and for each channel the energy that moves out of it; both have the shape of `mean`.
    """
    pairs = len(turn)
    still = (_as_pairs(keys, pairs) * undo).sum((1, 3), keepdim=True) / count
    found = still * turn
    now = _as_pairs(mean, pairs)
    leaves = (torch.view_as_real(now).square() - torch.view_as_real(found).square()).sum(-1).clamp_min(0) / 2
    remains = torch.view_as_real(still).square().sum((1, 2, 3, 4, 5))
    # The choice is made on the device.
    best, lost, left = mean, torch.zeros_like(mean), torch.view_as_real(now[0]).square().sum()
    candidates = _as_channels(torch.view_as_real(found), mean), _as_channels(torch.stack([leaves, leaves], -1), lost)
    for layout in range(2):
        better = remains[layout] > left
        best, lost = (torch.where(better, new[layout], old) for new, old in zip(candidates, (best, lost), strict=True))
        left = torch.maximum(remains[layout], left)
    return best, lost


def _as_pairs(states: torch.Tensor, pairs: int) -> torch.Tensor:
    """Channels as complex numbers, `[2, ..., pairs]`: paired with channel i + `pairs`, and with the next channel."""
    turned = states[..., : 2 * pairs]
    both = turned.unflatten(-1, (2, pairs)).mT, turned.unflatten(-1, (pairs, 2))
    return torch.view_as_complex(torch.stack(both).float())


def _as_channels(pairs: torch.Tensor, like: torch.Tensor) -> list[torch.Tensor]:
    """Turns `[2, ..., pairs, 2]` back into the channels of both layouts; channels without a pair come from `like`."""
    rest = like[..., 2 * pairs.shape[-2] :]
    return [torch.cat([both.flatten(-2), rest], -1) for both in (pairs[0].mT, pairs[1])]
