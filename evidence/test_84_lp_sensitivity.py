"""lp sensitivity sampling (arXiv 2306.00732) beside uniform sampling: drawn matrices, and prices of houses.

Drawn: 400 rows of 4 columns, of which 8 are 30 times as long and 4 lie on one axis; 80 rows are kept, and the figure is
the median over 10 draws of the measured distortion of |A x|_p^p over directions x. The floor is uniform sampling in
place of the scores, and the ceiling takes the heavy rows for certain, which is what the scores have to find. A matrix
without heavy rows is the control: there the gap has to be small.

Houses: Ames, 317 columns with the price; Lewis weights at p = 1, 800 of 2,344 rows, and the loss on all rows of the
regression on the sample over the least one. Its ceiling draws twice as many rows.
"""

import statistics

import torch
from torch import Tensor

from lightspan.datamodules.table.rows import Ames
from lightspan.selection.distortion import distortion, lp_regression
from lightspan.selection.lp_sampling import Rule, scores
from lightspan.selection.sampling import bernoulli, inclusion
from lightspan.selection.sensitivities import in_column_space

NEEDS = ("/usr/lib/R/site-library/modeldata",)
SEEDS, SEARCH_SEED = (0, 1, 2, 3, 4), 100
DRAWS, KEPT = 10, 80
PS = (1.0, 1.5, 4.0)
RULE: Rule = "sensitivity"


def drawn(seed: int, heavy: bool) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x_N4 = torch.randn(400, 4, generator=generator, dtype=torch.float64)
    if heavy:
        x_N4[:8] *= 30
        x_N4[8:12] = torch.tensor([200.0, 0, 0, 0])
    return x_N4


def median_distortion(u_NR: Tensor, score_N: Tensor, p: float, seed: int) -> float:
    chance_N = inclusion(score_N, KEPT)
    found = []
    for draw in range(DRAWS):
        kept = bernoulli(chance_N, 1000 * seed + draw)
        found.append(distortion(u_NR, kept, 1 / chance_N[kept], p))
    return statistics.median(found)


def told(u_NR: Tensor) -> Tensor:
    """Scores that know which rows are heavy."""
    score_N = torch.ones(len(u_NR), dtype=torch.float64)
    score_N[:12] = 1e6
    return score_N


def over_uniform(seed: int, p: float, rule: Rule, heavy: bool) -> float:
    """Distortion over that of uniform sampling."""
    u_NR = in_column_space(drawn(seed, heavy))
    uniform = median_distortion(u_NR, scores(u_NR, "uniform", p), p, seed)
    return median_distortion(u_NR, scores(u_NR, rule, p), p, seed) / uniform


def houses() -> tuple[Tensor, Tensor]:
    data = Ames()
    data.setup("fit")
    rows = [data.bank.sample(number, 0) for number in range(len(data.bank))]
    x_ND = torch.stack([row["table"] for row in rows]).double()
    x_ND = torch.cat([x_ND, torch.ones(len(x_ND), 1, dtype=torch.float64)], dim=1)
    return x_ND, torch.stack([row["target"] for row in rows]).double()


def loss_over_least(x_ND: Tensor, y_N: Tensor, least: float, rule: Rule, rows: int, seed: int) -> float:
    """At p = 1."""
    u_NR = in_column_space(torch.cat([x_ND, y_N[:, None]], dim=1))
    chance_N = inclusion(scores(u_NR, rule, 1.0), rows)
    kept = bernoulli(chance_N, seed)
    solution_D = lp_regression(x_ND[kept], y_N[kept], 1.0, 1 / chance_N[kept])
    return float((x_ND @ solution_D - y_N).abs().sum()) / least


def chance_of_heavy(seed: int, p: float, rule: Rule) -> float:
    """Mean chance that a heavy row is kept."""
    u_NR = in_column_space(drawn(seed, heavy=True))
    return float(inclusion(scores(u_NR, rule, p), KEPT)[:12].mean())


def test_heavy_rows_are_found_and_nothing_is_free_without_them(evidence) -> None:
    torch.set_num_threads(1)
    for p in PS:
        ratio, ceiling = {}, {}
        for seed in SEEDS:
            ratio[seed] = over_uniform(seed, p, RULE, heavy=True)
            u_NR = in_column_space(drawn(seed, heavy=True))
            uniform = median_distortion(u_NR, scores(u_NR, "uniform", p), p, seed)
            ceiling[seed] = median_distortion(u_NR, told(u_NR), p, seed) / uniform
            evidence.figure(f"distortion of uniform sampling at p = {p:g}", uniform, seed)
            for rule in ("root_leverage", "sensitivity_and_leverage"):
                evidence.figure(f"{rule} over uniform at p = {p:g}", over_uniform(seed, p, rule, heavy=True), seed)  # type: ignore[arg-type]
        evidence.gate(
            f"sensitivity, p = {p:g}",
            {seed: chance_of_heavy(seed, p, RULE) for seed in SEEDS},
            {seed: chance_of_heavy(seed, p, "uniform") for seed in SEEDS},
            by=0.3,
        )
        evidence.claim(
            f"distortion of sensitivity over uniform at p = {p:g}",
            ratio,
            at_most=1 / 3,
            floor=dict.fromkeys(SEEDS, 1.0),
            ceiling=ceiling,
            arms=(f"sensitivity, p = {p:g}",),
        )
        even = {seed: over_uniform(seed, p, RULE, heavy=False) for seed in SEEDS}
        evidence.claim(
            f"distortion of sensitivity over uniform at p = {p:g}, no heavy rows",
            even,
            at_least=1 / 2 if p <= 2 else 1 / 3,
            floor=ratio,
            ceiling=dict.fromkeys(SEEDS, 1.0),
            arms=(f"sensitivity, p = {p:g}",),
        )
    evidence.note(
        "The gate of a score is the chance with which it keeps a heavy row, against that of uniform sampling."
    )


def unlearned(x_ND: Tensor, y_N: Tensor, least: float) -> float:
    """What a constant gives, with the sign of a score."""
    return -float((y_N - y_N.median()).abs().sum()) / least


def test_a_sample_of_houses_gives_nearly_the_prices_that_all_houses_give(evidence) -> None:
    torch.set_num_threads(1)
    x_ND, y_N = houses()
    least = float((x_ND @ lp_regression(x_ND, y_N, 1.0) - y_N).abs().sum())
    loss: dict[str, dict[int, float]] = {}
    for name, rule, rows in (("lewis", "lewis", 800), ("uniform", "uniform", 800), ("more rows", "lewis", 1600)):
        loss[name] = {seed: loss_over_least(x_ND, y_N, least, rule, rows, seed) for seed in SEEDS}  # type: ignore[arg-type]
        for seed, value in loss[name].items():
            evidence.figure(f"loss over the least, {name}", value, seed)
    evidence.gate("lewis", {seed: -value for seed, value in loss["lewis"].items()}, unlearned(x_ND, y_N, least), by=0.1)
    evidence.claim(
        "loss on all houses of 800 by Lewis weights over 800 at random",
        {seed: loss["lewis"][seed] / loss["uniform"][seed] for seed in SEEDS},
        at_most=0.95,
        floor=dict.fromkeys(SEEDS, 1.0),
        ceiling={seed: loss["more rows"][seed] / loss["uniform"][seed] for seed in SEEDS},
        arms=("lewis",),
    )


if __name__ == "__main__":
    for power in PS:
        print(power, [over_uniform(SEARCH_SEED, power, RULE, heavy) for heavy in (True, False)])
    table_ND, price_N = houses()
    most = float((table_ND @ lp_regression(table_ND, price_N, 1.0) - price_N).abs().sum())
    for kind, count in (("lewis", 800), ("uniform", 800), ("lewis", 1600)):
        print(kind, count, loss_over_least(table_ND, price_N, most, kind, count, SEARCH_SEED))  # type: ignore[arg-type]
