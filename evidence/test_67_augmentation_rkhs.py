"""Augmentation RKHS (arXiv 2306.00788): the complexity of an augmentation says how many samples a probe needs.

On {-1, 1}^8 with random masks, everything but the samples is exact. (1) Eigenfunctions of 60 unlabelled points,
extended to all, and a ridge probe of 25 labels of a sum of coordinates: the stronger the mask, the lower its complexity
and the error. The floor has random functions in place of eigenfunctions, the ceiling those of all points. (2) Kernel
ridge regression of a target with a product of three coordinates besides, from 120 noisy labels: masks that are too
strong lose the product, so that the best rate lies inside. The floor is a constant guess, the ceiling a regression on
the nine functions themselves. (3) Digits with masked pixels: spectral contrastive networks, one for each rate, and
their linear probes, beside complexity and instability. Learning rates are chosen on a third of the digits, on which no
figure is taken.
"""

import math
from collections.abc import Sequence
from functools import partial
from itertools import pairwise

import torch
from digits import parted
from scipy.stats import spearmanr
from torch import Tensor, nn

from lightspan.evaluation.augmentations.complexity import sample_complexities
from lightspan.evaluation.augmentations.densities import RandomMask
from lightspan.evaluation.augmentations.ratio_trace import between_views, label_fit, whitened_views
from lightspan.evaluation.augmentations.tables import AugmentationTable, cube, masked_cube
from lightspan.evaluation.probes.linear_probe import linear_probe_accuracy
from lightspan.objectives.spectral import spectral_contrastive

SEEDS, SEARCH_SEED = (0, 1, 2, 3, 4, 5, 6, 7, 8, 9), 100
DIGIT_SEEDS = (0, 1, 2, 3, 4)
SIDE, RATES, STRONG = 8, (0.1, 0.3, 0.5, 0.7, 0.9), 0.97
UNLABELLED, LABELLED, RIDGE = 60, 25, 0.1
REGRESSED, PENALTY, NOISE = 120, 0.05, 0.3
PIXEL_RATES, WIDTH, STEPS, BATCH = (0.1, 0.3, 0.5, 0.7, 0.9), 16, 600, 256
LEARNING = (1e-4, 3e-4, 1e-3, 3e-3)


def target(x_ND: Tensor, generator: torch.Generator, product: bool) -> Tensor:
    weight_D = torch.randn(SIDE, generator=generator, dtype=torch.float64)
    linear_N = x_ND @ (weight_D / weight_D.norm())
    return (linear_N + x_ND[:, :3].prod(dim=1)) / math.sqrt(2) if product else linear_N


def probed(functions_NR: Tensor, y_N: Tensor, rows: Tensor) -> float:
    """Mean squared error over all points of ridge regression on the rows."""
    x_nR = functions_NR[rows]
    gram_RR = x_nR.T @ x_nR + RIDGE * torch.eye(x_nR.shape[1], dtype=torch.float64)
    return float((functions_NR @ torch.linalg.solve(gram_RR, x_nR.T @ y_N[rows]) - y_N).square().mean())


def eigenspaces(seed: int) -> dict[float, dict[str, float]]:
    """Of each rate: complexity of the samples, and errors."""
    generator = torch.Generator().manual_seed(seed)
    x, found = cube(SIDE), {}
    y = target(x, generator, product=False)
    order = torch.randperm(len(x), generator=generator)
    rows = order[torch.randint(UNLABELLED, (LABELLED,), generator=generator)]
    random = torch.randn(len(x), 1 + SIDE, generator=generator, dtype=torch.float64)
    for rate in RATES:
        table = masked_cube(SIDE, rate)
        few = table.of_samples(order[:UNLABELLED])
        found[rate] = {
            "complexity": few.complexity(),
            "error": probed(few.eigenfunctions(1 + SIDE)[1], y, rows),
            "random functions": probed(random, y, rows),
            "all points": probed(table.eigenfunctions(1 + SIDE)[1], y, rows),
        }
    return found


def regressed(tables: dict[float, AugmentationTable], seed: int, product: bool) -> dict[float, float]:
    """Errors of kernel ridge regression by rate; kernels have a mean diagonal of 1. That of the rate 0 is of ridge
    regression on the coordinates and the product.
    """
    generator = torch.Generator().manual_seed(seed)
    x = cube(SIDE)
    y = target(x, generator, product)
    rows = torch.randperm(len(x), generator=generator)[:REGRESSED]
    told = y[rows] + NOISE * torch.randn(REGRESSED, generator=generator, dtype=torch.float64)
    right = torch.cat([x, x[:, :3].prod(dim=1, keepdim=True)], dim=1)
    errors = {}
    for rate, kernel in [(0.0, right @ right.T), *((rate, table.kernel()) for rate, table in tables.items())]:
        kernel = kernel / kernel.diagonal().mean()
        own = kernel[rows][:, rows] + PENALTY * torch.eye(REGRESSED, dtype=torch.float64)
        errors[rate] = float((kernel[:, rows] @ torch.linalg.solve(own, told) - y).square().mean())
    return errors


def test_the_error_of_a_probe_follows_the_complexity(evidence) -> None:
    runs = {seed: eigenspaces(seed) for seed in SEEDS}
    for seed, of_rate in runs.items():
        for rate, found in of_rate.items():
            for name, value in found.items():
                evidence.figure(f"hypercube, mask {rate:g}, {name}", value, seed)

    def ratio(first: str, second: str) -> dict[int, float]:
        return {seed: found[0.1][first] / found[0.5][second] for seed, found in runs.items()}

    evidence.claim(
        "error at a mask of 0.1 over 0.5",
        ratio("error", "error"),
        at_least=3.0,
        floor=ratio("random functions", "random functions"),
        ceiling=ratio("error", "all points"),
        arms=(),
    )

    def correlated(name: str) -> dict[int, float]:
        return {
            seed: float(
                spearmanr([one["complexity"] for one in found.values()], [one[name] for one in found.values()])[0]
            )
            for seed, found in runs.items()
        }

    flat = dict.fromkeys(SEEDS, 0.0)  # random functions have the same error at every rate: no rank
    evidence.claim(
        "rank correlation of complexity and error", correlated("error"), at_least=0.8, floor=flat,
        ceiling=dict.fromkeys(SEEDS, 1.0), arms=(),
    )  # fmt: skip


def test_a_target_of_higher_degree_has_its_best_rate_inside(evidence) -> None:
    tables = {rate: masked_cube(SIDE, rate) for rate in (*RATES, STRONG)}
    errors = {product: {seed: regressed(tables, seed, product) for seed in SEEDS} for product in (True, False)}
    for product, runs in errors.items():
        for seed, found in runs.items():
            for rate, value in found.items():
                name = "sum and product" if product else "sum"
                evidence.figure(f"kernel ridge, {name}, mask {rate:g}, error", value, seed)

    def outside(end: float, inside: Sequence[float]) -> dict[int, float]:
        return {seed: found[end] / min(found[rate] for rate in inside) for seed, found in errors[True].items()}

    for end in (RATES[0], STRONG):
        evidence.claim(
            f"sum and product, error at a mask of {end:g} over the least inside",
            outside(end, RATES[1:-1]), at_least=1.3,
            floor=dict.fromkeys(SEEDS, 1.0), ceiling=outside(end, (0.0,)), arms=(),
        )  # fmt: skip
    monotone = {
        seed: float(all(a > b for a, b in pairwise(values)))
        for seed, values in ((seed, [found[r] for r in RATES]) for seed, found in errors[False].items())
    }
    evidence.figure("sum alone, share of seeds whose error falls with every rate", sum(monotone.values()) / len(SEEDS))


def masked(x: Tensor, rate: float, generator: torch.Generator) -> Tensor:
    """Pixels, and which of them are masked."""
    gone = (torch.rand(x.shape, generator=generator) < rate).float()
    return torch.cat([x * (1 - gone), gone], dim=1)


def on_digits(rate: float, seed: int, learning: float, steps: int = STEPS) -> dict[str, float]:
    """A spectral contrastive network of masked digits, and what a probe reads from it, in per cent."""
    images, labels = parted(seed, searching=seed == SEARCH_SEED)
    x, y = torch.from_numpy(images).float().flatten(1), torch.from_numpy(labels).long()
    half = len(x) // 2
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, WIDTH))
    generator = torch.Generator().manual_seed(seed)

    def loss_of(rows: Tensor) -> Tensor:
        return spectral_contrastive(*(network(masked(x[rows], rate, generator)) for _ in range(2)))

    optimizer = torch.optim.Adam(network.parameters(), lr=learning)
    fixed = torch.Generator().manual_seed(1)
    pairs = [masked(x[:half], rate, fixed) for _ in range(2)]

    @torch.no_grad()
    def own_loss() -> float:
        return float(spectral_contrastive(*map(network, pairs)))

    found = {"loss before": own_loss()}
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(torch.randint(half, (BATCH,), generator=generator)).backward()
        optimizer.step()
    with torch.no_grad():
        views = torch.stack([network(masked(x, rate, generator)) for _ in range(8)], dim=1).double()
    rows = views.mean(dim=1)
    w = whitened_views(views[:half], WIDTH)
    g = between_views(w)
    share, epsilon = label_fit(w, nn.functional.one_hot(y[:half]).double(), g)
    density = sample_complexities(RandomMask(rate), x[:half].double(), torch.arange(50), [half], 16, generator)
    return found | {
        "loss": own_loss(),
        "probe": 100 * linear_probe_accuracy(rows[:half], y[:half], rows[half:], y[half:]),
        "trace": float(g.trace()),
        "label share": share,
        "label instability": epsilon,
        "complexity": float(density.median()),
    }


def test_masked_digits(evidence) -> None:
    def searched(rate: float, learning: float) -> float:
        return on_digits(rate, SEARCH_SEED, learning)["probe"]

    chosen = evidence.search({f"mask {rate:g}": partial(searched, rate) for rate in PIXEL_RATES}, LEARNING)
    runs = {
        rate: {seed: on_digits(rate, seed, chosen[f"mask {rate:g}"]) for seed in DIGIT_SEEDS} for rate in PIXEL_RATES
    }
    for rate, of_seed in runs.items():
        evidence.gate(
            f"mask {rate:g}",
            {seed: found["loss"] for seed, found in of_seed.items()},
            {seed: found["loss before"] for seed, found in of_seed.items()},
            by=0.5,
            lower_is_better=True,
        )
        for seed, found in of_seed.items():
            for name, value in found.items():
                evidence.figure(f"digits, mask {rate:g}, {name}", value, seed, "%" if name == "probe" else "")
    for seed in DIGIT_SEEDS:
        of_rate = [runs[rate][seed] for rate in PIXEL_RATES]
        for name in ("trace", "label share", "label instability"):
            found = spearmanr([one[name] for one in of_rate], [one["probe"] for one in of_rate])[0]
            evidence.figure(f"digits, rank correlation over masks of {name} and probe", float(found), seed)


if __name__ == "__main__":
    print(eigenspaces(SEARCH_SEED))
    tables = {rate: masked_cube(SIDE, rate) for rate in (*RATES, STRONG)}
    print(regressed(tables, SEARCH_SEED, True), regressed(tables, SEARCH_SEED, False))
    for rate in PIXEL_RATES:
        for one in LEARNING:
            print(rate, one, on_digits(rate, SEARCH_SEED, one), flush=True)
