"""How codes are chosen: the constants that the torch reference and the kernels share."""

from dataclasses import dataclass

# Factors of a vector before rounding, to find the codes closest in direction. A fine search leaves 5 % less error at
# 4 bits and 1 % less at 3.
STRETCHES = tuple(1 + step * 3 / 32 for step in (-2, -1, 0, 1, 2))


@dataclass(frozen=True)
class Annealing:
    """
    How codes and signs are chosen together: soft rounds, which use ramps instead of steps, then two hard rounds.

    In each round the codes approximate the remainder of the signs, and the signs that of the codes. The ramps get
    steeper from `first` to `last`. Every update overshoots: it goes past the soft value, away from the previous one.
    This reduces the error by a tenth; like the reaction term of message passing, it keeps a choice from confirming
    itself.

    Args:
        grid (`float`): factor of the levels while searching; the two scales are fitted afterwards.
        amplitude (`float`): magnitude of a sign while searching, times √d.
        first, last (`tuple[float, float]`):
            Width of the ramp between two levels, and between two signs, as fractions of their distance.
        overshoots (`tuple[float, float]`):
            For codes and for signs, as fractions of the distance from the previous value.
        rounds (`int`): soft rounds for tokens that come together.
        single_rounds (`int`): soft rounds for a single token, as in decoding, where each takes a microsecond per layer.
    """

    grid: float
    amplitude: float
    first: tuple[float, float]
    last: tuple[float, float]
    overshoots: tuple[float, float]
    rounds: int = 12
    single_rounds: int = 4


# By bits of the codes. Found by Nelder-Mead on random directions of 128 dimensions, and as good at 64 and 256. Relative
# errors at 2, 3 and 4 bits: 0.088, 0.0264, 0.0078 with 8 rounds; 0.0853, 0.0256, 0.0076 with 12; 0.094, 0.0283, 0.0083
# with 4.
ANNEALINGS = {
    1: Annealing(0.83, 0.63, (0.86, 0.62), (0.255, 0.275), (0.31, 0.28)),
    2: Annealing(0.847, 0.352, (0.52, 0.70), (0.28, 0.37), (0.30, 0.346)),
    3: Annealing(0.935, 0.177, (0.33, 0.66), (0.30, 0.33), (0.34, 0.34)),
}
