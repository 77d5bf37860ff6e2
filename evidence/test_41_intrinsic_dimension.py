"""Intrinsic dimension (arXiv 1804.08838) of 8 x 8 digits: by three maps, for a net ten times as large, without a rule.

d90 is, for each seed, the smallest dimension of a grid in which a net reaches 0.9 of what it reaches when all its
weights train (intrinsic_dimension.py). Arms: a net 64-100-100-10 in Fastfood, sparse and dense subspaces; one of width
400, with ten times the weights; and the first with labels permuted among the training images, where it is judged, as
these can only be memorised. Nets are judged on test images elsewhere.

Floors: a net that learns in no subspace, whose d90 is the number D of its weights; the labels without a rule; the same
net with another seed. Ceilings: the same net with another seed; the one dimension of a subspace through the trained
weights; D. Gates: accuracy at d90, ahead of chance.
"""

import math
from functools import cache

from intrinsic_dimension import GRID, SHARE, Task, climbed, train

from lightspan.datamodules.image.sets.small import Digits

SEEDS, SEARCH = (0, 1, 2, 3, 4), 100
RATES, WHOLE_RATES = (1e-2, 3e-2, 1e-1, 3e-1), (3e-4, 1e-3, 3e-3, 1e-2)
NET, WIDE = (Task(f"64-{width}-{width}-10", Digits, width, 60, 100) for width in (100, 400))
SHUFFLED = Task("64-100-100-10, shuffled labels", Digits, 100, 240, 3000, shuffled=True)
ARMS = {
    "Fastfood": (NET, "Fastfood", 125),
    "sparse": (NET, "sparse", 125),
    "dense": (NET, "dense", 125),
    "width 400": (WIDE, "Fastfood", 125),
    "shuffled labels": (SHUFFLED, "Fastfood", 2000),
}
"""The net, the map, and where on the grid its d90 is sought first."""


@cache
def whole(task: Task, rate: float, seed: int) -> float:
    return train(task, None, "", rate, seed)


def found(arm: str, rate: float, whole_rate: float, seed: int) -> tuple[float, float]:
    """d90, and the accuracy there in per cent."""
    (task, kind, start), reached = ARMS[arm], {}

    def reaches(dim: int) -> bool:
        reached[dim] = train(task, dim, kind, rate, seed)
        return reached[dim] >= SHARE * whole(task, whole_rate, seed)

    d90 = climbed(reaches, start)
    print(arm, seed, d90, {dim: round(value, 1) for dim, value in reached.items()}, flush=True)
    return d90, reached.get(d90, math.nan)  # type: ignore[call-overload]


def test_intrinsic_dimension_of_digits(evidence) -> None:
    def score(arm: str, rate: float) -> float:
        task, kind, _ = ARMS[arm]
        return train(task, task.searched_at, kind, rate, SEARCH, held_out=True)

    rates = evidence.search({arm: lambda rate, arm=arm: score(arm, rate) for arm in ARMS}, RATES)
    of_whole = evidence.search(
        {
            task.name: lambda rate, task=task: train(task, None, "", rate, SEARCH, held_out=True)
            for task in (NET, WIDE, SHUFFLED)
        },
        WHOLE_RATES,
        what="rate with all weights",
    )
    dims: dict[str, dict[int, float]] = {}
    for arm, (task, _, _) in ARMS.items():
        runs = {seed: found(arm, rates[arm], of_whole[task.name], seed) for seed in SEEDS}
        dims[arm] = {seed: d90 for seed, (d90, _) in runs.items()}
        evidence.gate(arm, {seed: value for seed, (_, value) in runs.items()}, 10.0, by=50.0, unit="points")
        for seed in SEEDS:
            evidence.figure(f"d90, {arm}", dims[arm][seed], seed)
            evidence.figure(f"accuracy at d90, {arm}", runs[seed][1], seed, "%")
    for task in (NET, WIDE, SHUFFLED):
        evidence.figure(f"D, {task.name}", task.weights)
        for seed in SEEDS:
            evidence.figure(
                f"accuracy with all weights, {task.name}", whole(task, of_whole[task.name], seed), seed, "%"
            )
    evidence.note(f"The grid: {', '.join(map(str, GRID))}.")

    def over(first: dict[int, float], second: str) -> dict[int, float]:
        return {seed: first[seed] / dims[second][seed] for seed in SEEDS}

    def everything(task: Task) -> dict[int, float]:
        return dict.fromkeys(SEEDS, float(task.weights))

    def again(arm: str) -> dict[int, float]:
        """d90 of the seed before."""
        return {seed: dims[arm][SEEDS[seed - 1]] for seed in SEEDS}

    for kind in ("Fastfood", "sparse"):
        evidence.claim(
            f"d90, {kind} over dense", over(dims[kind], "dense"), at_most=1.5, arms=(kind, "dense"),
            floor=over(everything(NET), "dense"), ceiling=over(again("dense"), "dense"),
        )  # fmt: skip
    evidence.claim(
        "d90, width 400 over width 100", over(dims["width 400"], "Fastfood"), at_most=2.0,
        floor=over(everything(WIDE), "Fastfood"), ceiling=over(again("Fastfood"), "Fastfood"),
        arms=("width 400", "Fastfood"),
    )  # fmt: skip
    evidence.claim(
        "d90 as a share of the weights, width 100",
        {seed: d90 / NET.weights for seed, d90 in dims["Fastfood"].items()},
        at_most=0.1,
        floor={seed: d90 / NET.weights for seed, d90 in dims["shuffled labels"].items()},
        ceiling=1 / NET.weights,
        arms=("Fastfood", "shuffled labels"),
    )
    evidence.claim(
        "d90, shuffled labels over true ones", over(dims["shuffled labels"], "Fastfood"), at_least=4.0,
        floor=over(again("Fastfood"), "Fastfood"), ceiling=over(everything(NET), "Fastfood"),
        arms=("shuffled labels", "Fastfood"),
    )  # fmt: skip


if __name__ == "__main__":
    for arm, (rate, whole_rate) in dict.fromkeys(ARMS, (0.03, 1e-3)).items():
        print(arm, found(arm, rate, whole_rate, SEARCH), flush=True)
