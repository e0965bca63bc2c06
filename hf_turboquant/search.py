"""How codes are chosen: constants that the torch reference and the kernels share."""

from dataclasses import dataclass

# beyond, nobody feels the difference, and rounding errors decide which choice is best
MAX_SEARCHED_BITS = 4

# factors of a vector before rounding, in search of the codes closest in direction: a fine search leaves 5 % less error
# at 4 bits, 1 % at 3
STRETCHES = tuple(1 + step * 3 / 32 for step in (-2, -1, 0, 1, 2))


@dataclass(frozen=True)
class Annealing:
    """
    How codes and signs are chosen together: soft rounds, in which ramps stand in for steps, then two hard ones.

    In each round the codes take up what the signs leave, and the signs what the codes leave. The ramps get steeper from
    `first` to `last`. Every step overshoots: it goes beyond the soft value, away from where it came from. This takes a
    tenth off the error, as the reaction term of message passing does, which keeps a choice from confirming itself.

    Args:
        grid (`float`): factor of the levels while searching; the two scales are fitted afterwards.
        amplitude (`float`): of a sign while searching, times √d.
        first, last (`tuple[float, float]`): width of the ramp between two levels, and between two signs, in parts of
            their distance.
        overshoots (`tuple[float, float]`): of codes and of signs, in parts of the distance from the value before.
        rounds (`int`): soft rounds for tokens that come together.
        single_rounds (`int`): soft rounds for a token that comes alone, as in decoding, where each takes a microsecond
            of every layer.
    """

    grid: float
    amplitude: float
    first: tuple[float, float]
    last: tuple[float, float]
    overshoots: tuple[float, float]
    rounds: int = 12
    single_rounds: int = 4


# by bits of the codes; found by Nelder-Mead on random directions of 128 dimensions, and as good at 64 and 256. Relative
# errors at 2, 3, 4 bits: .088, .0264, .0078 with 8 rounds, .0853, .0256, .0076 with 12, .094, .0283, .0083 with 4
ANNEALINGS = {
    1: Annealing(0.83, 0.63, (0.86, 0.62), (0.255, 0.275), (0.31, 0.28)),
    2: Annealing(0.847, 0.352, (0.52, 0.70), (0.28, 0.37), (0.30, 0.346)),
    3: Annealing(0.935, 0.177, (0.33, 0.66), (0.30, 0.33), (0.34, 0.34)),
}
