"""Codebooks: Lloyd-Max levels for one coordinate of a random point on the sphere, and plain int8 numbers."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy.special import betainc, betaln
from scipy.stats import beta


@dataclass(frozen=True, eq=False)
class Codebook:
    """
    The quantizer of one coordinate: up to 4 bits of a unit vector of `head_dim` dimensions (TurboQuant, section 3.1).

    Args:
        centroids (`np.ndarray` of shape `[2**nbits]`, float64): value of every code, indexed by the code.
        levels (`np.ndarray` of shape `[2**nbits]`, int8), offset (`float`), scale (`float`):
            `centroids = (levels + offset) * scale`. `offset` is 1/2 at 4 bits, where a negative level is the one's
            complement of its positive twin, and 0 otherwise.
        boundaries (`np.ndarray` of shape `[2**nbits - 1]`, float64, *optional*):
            Midpoints of neighbouring values, ascending; up to 4 bits, as all that follows.
        ranks_to_codes (`np.ndarray` of shape `[2**nbits]`, uint8, *optional*): code of the i-th smallest value. Codes
            ascend with their values, except at 4 bits: there bits 0-2 are the magnitude and bit 3 says "negative",
            which is what a kernel decodes fastest.
        distortion (`float`, *optional*): expected squared error of a unit vector, the sum over its coordinates.
    """

    centroids: np.ndarray
    levels: np.ndarray
    offset: float = 0.0
    scale: float = 1.0
    boundaries: np.ndarray | None = None
    ranks_to_codes: np.ndarray | None = None
    distortion: float | None = None


# The codes of 8 bits are the levels themselves, bytes in two's complement. The scale is every vector's own.
INT8 = Codebook(np.arange(256, dtype=np.uint8).view(np.int8).astype(np.float64), np.arange(256).astype(np.int8))


@lru_cache(maxsize=64)
def lloyd_max(nbits: int, head_dim: int) -> Codebook:
    """
    The optimal codebook of `2**nbits` values for a coordinate t of a uniform unit vector in `head_dim` dimensions,

        f(t) = Γ(d/2) / (√π Γ((d-1)/2)) · (1 - t²)^((d-3)/2)         (TurboQuant, lemma 1)

    The values are rounded to the int8 grid that the kernels read, at the scale that costs least (under 0.5 % of the
    distortion).

    Raises:
        `ValueError`: `nbits` is not 1 to 4 or `head_dim` is under 16.
    """
    if not 1 <= nbits <= 4:
        raise ValueError(f"`nbits` must be 1 to 4, got {nbits}.")
    if head_dim < 16:
        raise ValueError(f"`head_dim` must be at least 16, got {head_dim}. Keep such layers in full precision.")
    half = _lloyd_max_half(2 ** (nbits - 1), head_dim)
    offset = 0.5 if nbits == 4 else 0.0
    # The largest level may be anything that the int8 grid holds: scan for the scale that costs least.
    scales = half[-1] / (np.linspace(96, 127, 512) + offset)
    rounded = [(scale, np.clip(np.round(half / scale - offset), 0, 127)) for scale in scales]
    costs = [_distortion((levels + offset) * scale, head_dim) for scale, levels in rounded]
    distortion, (scale, levels) = min(zip(costs, rounded, strict=True), key=lambda book: book[0])
    # At 4 bits codes 0-7 are the positive values, 8-15 their negatives; -(l + 1/2) = ~l + 1/2.
    levels = np.concatenate([levels, -1 - levels] if offset else [-levels[::-1], levels])
    centroids = (levels + offset) * scale
    ranks_to_codes = np.argsort(centroids).astype(np.uint8)
    ascending = centroids[ranks_to_codes]
    boundaries = (ascending[1:] + ascending[:-1]) / 2
    return Codebook(centroids, levels.astype(np.int8), offset, scale, boundaries, ranks_to_codes, distortion)


def _lloyd_max_half(count: int, head_dim: int) -> np.ndarray:
    """The positive values before rounding, ascending, float64 of shape `[count]`."""
    # Start at the optimum for large counts: points of density f^(1/3), which is a beta density too.
    exponent = (head_dim - 3) / 6 + 1
    quantiles = 0.5 + (np.arange(count) + 0.5) / (2 * count)
    half = 2 * beta.ppf(quantiles, exponent, exponent) - 1
    previous = np.inf
    for _ in range(20_000):
        mass, moment = _cell_integrals(half, head_dim)
        half = moment / mass
        distortion = 1 - 2 * head_dim * np.sum(moment * half)
        if previous - distortion < 1e-10 * distortion:
            break
        previous = distortion
    return half


def _cell_integrals(half: np.ndarray, head_dim: int) -> tuple[np.ndarray, np.ndarray]:
    """∫ f and ∫ t f over the cell of each positive value; the cells meet in the middle and end at 0 and 1."""
    edges = np.concatenate([[0.0], (half[1:] + half[:-1]) / 2, [1.0]])
    a = (head_dim - 1) / 2
    # (1 + t) / 2 follows Beta(a, a); the upper tail keeps precision that the cumulative function would lose.
    upper_tail = betainc(a, a, (1 - edges) / 2)
    # d/dt (1 - t²)^a = -(d - 1) t (1 - t²)^((d-3)/2) gives the first moment in closed form.
    normaliser = np.exp(-betaln(0.5, a))
    upper_moment = normaliser / (head_dim - 1) * (1 - edges**2) ** a
    return upper_tail[:-1] - upper_tail[1:], upper_moment[:-1] - upper_moment[1:]


def _distortion(half: np.ndarray, head_dim: int) -> float:
    mass, moment = _cell_integrals(half, head_dim)
    return float(1 - 2 * head_dim * np.sum(2 * half * moment - half**2 * mass))
