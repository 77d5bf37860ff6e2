"""A search that walks over a lattice, a factor apart on each axis, towards lower values: the next point depends on the
values so far, and what is measured is the caller's.
"""

from collections.abc import Callable, Sequence


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
