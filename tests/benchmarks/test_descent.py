"""Walks over a lattice: where they end, and what they ask for on the way."""

import math

from descent import descend


def test_a_walk_ends_where_no_neighbour_is_better() -> None:
    asked: list[tuple[float, ...]] = []

    def value(point: tuple[float, ...]) -> float:
        asked.append(point)
        return abs(math.log2(point[0]) - 3) + abs(math.log2(point[1]) + 2)

    steps = ((0.5, 1), (2, 1), (1, 0.5), (1, 2))
    assert descend(value, (1.0, 1.0), steps) == (8.0, 0.25)
    assert set(asked) >= {(4.0, 0.25), (16.0, 0.25), (8.0, 0.125), (8.0, 0.5)}


def test_a_walk_stays_where_all_is_equal() -> None:
    assert descend(lambda point: 0.0, (1.0,), ((2,), (0.5,))) == (1.0,)
