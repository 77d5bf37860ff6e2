"""Optuna's suggestions follow from what is known alone, and are better than chance."""

import math
from typing import Any

import pytest

from lightspan.cli.studies.sweeps import tpe
from lightspan.cli.studies.sweeps.points import Choices, Range, drawn
from lightspan.core.errors import UserError

AXES = {
    "lr": Range(1e-5, 1.0, True),
    "width": Choices(([8, 8], [16, 16])),
    "depth": Range(1, 6, False),
    "g": Range(0.0, 1.0, False, 3),
}


def loss(point: dict[str, Any]) -> float:
    return (math.log10(point["lr"]) + 2) ** 2 + (point["width"] != [16, 16]) + abs(point["depth"] - 4) + point["g"]


def followed(count: int, seed: int, known: tuple = ()) -> list[tuple[dict[str, Any], float]]:
    pytest.importorskip("optuna")
    found = list(known)
    while len(found) < count:
        point = tpe.suggest(AXES, "min", found, seed)
        found.append((point, loss(point)))
    return found


def test_a_suggestion_follows_from_the_seed_and_what_is_known() -> None:
    whole = followed(14, seed=3)
    assert followed(14, seed=3, known=tuple(whole[:5])) == whole  # stopped anywhere, it goes the same way
    assert followed(14, seed=3, known=tuple(whole[:12])) == whole
    assert followed(2, seed=4) != whole[:2]


def test_points_are_those_of_the_keys() -> None:
    for point, _ in followed(12, seed=0):
        assert list(point) == list(AXES)
        assert 1e-5 <= point["lr"] <= 1
        assert point["lr"] == float(f"{point['lr']:.6g}")
        assert point["width"] in ([8, 8], [16, 16])
        assert isinstance(point["depth"], int)
        assert 1 <= point["depth"] <= 6
        assert point["g"] in (0.0, 0.5, 1.0)


def test_choices_that_are_equal_and_differ_are_told_apart() -> None:
    """Of 1, 1.0 and true the one with the good results is chosen, and comes back as it was given."""
    pytest.importorskip("optuna")
    values = (1, 1.0, True, [1], [1.0])
    axes = {"k": Choices(values)}
    for best in range(len(values)):
        known = [({"k": value}, float(at != best)) for _ in range(12) for at, value in enumerate(values)]
        chosen = [tpe.suggest(axes, "min", known, seed)["k"] for seed in range(3)]
        assert [repr(one) for one in chosen].count(repr(values[best])) >= 2


def test_it_is_better_than_random_points_and_follows_the_mode() -> None:
    tried = [value for _, value in followed(30, seed=1)]
    chance = [loss(point) for point in drawn(AXES, 1, 30)]
    assert sum(tried[15:]) / 15 < sum(chance) / 30 - 1
    lower = [
        tpe.suggest({"x": Range(0.0, 1.0, False)}, mode, [({"x": i / 20}, i / 20) for i in range(21)], 0)["x"]
        for mode in ("min", "max")
    ]
    assert lower[0] < 0.3 < 0.7 < lower[1]


def test_points_without_a_result_are_the_worst_and_running_ones_are_left_alone() -> None:
    pytest.importorskip("optuna")
    axes = {"x": Range(0.0, 1.0, False)}
    known = [({"x": i / 40}, math.nan if i < 20 else 1.0) for i in range(40)]  # all of the lower half diverged
    points = [tpe.suggest(axes, "min", known, seed)["x"] for seed in range(8)]
    assert sum(point > 0.45 for point in points) >= 7
    flat = [({"x": i / 20}, abs(i / 20 - 0.5)) for i in range(21)]
    busy = [({"x": 0.5}, None)] * 15
    near = [
        sum(abs(tpe.suggest(axes, "min", known, seed)["x"] - 0.5) < 0.05 for seed in range(8))
        for known in (flat, flat + busy)
    ]
    assert near[1] < near[0]


def test_without_optuna_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "optuna", None)
    with pytest.raises(UserError, match=r"--method tpe needs Optuna.*pip install '.\[sweep\]'.*or use --method random"):
        tpe.suggest(AXES, "min", [], 0)
