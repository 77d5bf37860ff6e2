"""Searches that walk over a lattice, a factor apart on each axis, towards lower values: the next point depends on the
values so far, and what is measured is the caller's.
"""

from collections.abc import Callable, Sequence

from lightspan.core.errors import printable

LONGEST_LINE = 13
"""Points after which a line ends: one on which nothing changes has no best value inside."""


def best_on_line(value: Callable[[float], float], centre: float, reach: int, longest: int = LONGEST_LINE) -> float:
    """The best of centre * 2**k for |k| <= reach, on a line that is extended while its best is one of its ends.

    Args:
        value: what is to be low; infinite for a point that diverged.
        longest: points after which an end is taken.
    """
    values = {k: value(centre * 2.0**k) for k in range(-reach, reach + 1)}
    while True:
        best = min(values, key=lambda k: (values[k], k))  # of equal ones, as where all diverged, the smallest
        if min(values) < best < max(values):
            return centre * 2.0**best
        if len(values) >= longest:
            print(printable(f"no best value inside {longest} around {centre:.3g}; taking an end"), flush=True)
            return centre * 2.0**best
        after = best - 1 if best == min(values) else best + 1
        values[after] = value(centre * 2.0**after)


def descend(
    value: Callable[[tuple[float, ...]], float], start: Sequence[float], neighbours: Sequence[Sequence[float]]
) -> tuple[float, ...]:
    """Moves to the first better neighbour until none is better.

    Args:
        value: what is to be low. It is asked for one point again and again, so it should remember.
        neighbours: the factors of each coordinate that lead from a point to those around it.
    """
    best, moved = tuple(start), True
    while moved:
        moved = False
        for factors in neighbours:
            candidate = neighbour(best, factors)
            if value(candidate) < value(best):
                best, moved = candidate, True
                break
    return best


def neighbour(point: Sequence[float], factors: Sequence[float]) -> tuple[float, ...]:
    """The point times the factors, in four digits, so that another way to it leads to the same point."""
    return tuple(float(f"{one * factor:.4g}") for one, factor in zip(point, factors, strict=True))
