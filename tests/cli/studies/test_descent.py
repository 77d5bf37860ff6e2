"""Walks over a lattice: where they end, and what they ask for on the way."""

import math

import pytest

from lightspan.cli.studies.sweeps.descent import LONGEST_LINE, best_on_line, descend


@pytest.mark.parametrize("optimum", [-4, -2, 0, 1, 2, 5])
def test_a_line_is_extended_until_its_best_is_inside(optimum: int) -> None:
    asked: list[int] = []

    def loss(rate: float) -> float:
        asked.append(round(math.log2(rate / 3e-3)))
        return float((asked[-1] - optimum) ** 2)

    assert best_on_line(loss, 3e-3, reach=2) == 3e-3 * 2.0**optimum
    assert sorted(asked) == list(range(min(-2, optimum - 1), max(2, optimum + 1) + 1))


def test_a_line_without_an_optimum_ends(capsys: pytest.CaptureFixture[str]) -> None:
    asked: list[float] = []

    def loss(rate: float) -> float:
        asked.append(rate)
        return math.inf

    assert best_on_line(loss, 1.0, reach=2) == min(asked)  # where all diverge, the way is down
    assert len(asked) == LONGEST_LINE
    assert "no best value inside" in capsys.readouterr().out


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
