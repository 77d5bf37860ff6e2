"""Estimators on features of known truth: a dimension, a closed form, and scikit-learn's answers.

Floors are the same figure without what the claim is about: coordinates that are shuffled apart, a distance of means
alone, the smallest scale in place of the largest, the biased value, coordinates that lose nothing, and scikit-learn
with another distance or penalty. Ceilings know the truth: ratios drawn from the law that TwoNN assumes, the drawn
coordinates, scipy's matrix root, a plane without noise and noise without a plane, a hundred times the samples, features
that share nothing, and a second way through scikit-learn. Nothing is trained by gradient and nothing chosen.
"""

import math
from typing import Any

import numpy as np
import torch
from scipy.linalg import sqrtm
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler, normalize
from torch import Tensor

from lightspan.evaluation.features.features import Features
from lightspan.evaluation.geometry.dimension import Spectrum, TwoNN, likeliest_dimension
from lightspan.evaluation.geometry.dimension_scales import DecimatedTwoNN, Gride
from lightspan.evaluation.geometry.distance import FrechetDistance
from lightspan.evaluation.geometry.similarity import CKA, InformationImbalance
from lightspan.evaluation.probes.probes import KNN, LinearProbe

SEEDS, PROBED_SEEDS, SEARCH_SEED = tuple(range(15)), (0, 1, 2, 3, 4), 100
DIMENSION, WIDTH, POINTS = 5, 64, 2000
Found = dict[str, float]


def drawn(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def shuffled(x_ND: Tensor, generator: torch.Generator) -> Tensor:
    """Each coordinate in an order of its own."""
    return torch.stack([x_N[torch.randperm(len(x_N), generator=generator)] for x_N in x_ND.T], dim=1)


def dimensions(seed: int) -> dict[str, Found]:
    """Distances from 5 for points of a 5-dimensional manifold that a random smooth map bends into 64 dimensions, and
    for normal points of 5 of 64 dimensions.
    """
    generator = drawn(seed)
    z = torch.rand(POINTS, DIMENSION, generator=generator, dtype=torch.float64)
    into = torch.randn(DIMENSION, WIDTH, generator=generator, dtype=torch.float64)
    bent = torch.sin(z @ into / math.sqrt(DIMENSION)) + z @ into
    lawful = torch.rand(POINTS, generator=generator, dtype=torch.float64) ** (-1 / DIMENSION)
    frame = torch.linalg.qr(torch.randn(WIDTH, DIMENSION, generator=generator, dtype=torch.float64)).Q
    normal = torch.randn(POINTS, DIMENSION, generator=generator, dtype=torch.float64)
    energy = torch.linalg.eigvalsh(normal.T.cov())
    found = {
        "TwoNN": {
            "value": TwoNN().fit(Features(bent)).dimension,
            "floor": TwoNN().fit(Features(shuffled(bent, generator))).dimension,
            "ceiling": float(likeliest_dimension(lawful)),
        },
        "participation ratio": {
            "value": Spectrum().fit(Features(normal @ frame.T)).participation_ratio,
            "floor": Spectrum().fit(Features(shuffled(normal @ frame.T, generator))).participation_ratio,
            "ceiling": float(energy.sum() ** 2 / energy.square().sum()),
        },
    }
    return {name: {kind: abs(value - DIMENSION) for kind, value in of.items()} for name, of in found.items()}


def gaussians(seed: int) -> Found:
    """Relative distances from the closed form for covariances that commute: |m|^2 + sum (s_a - s_b)^2."""
    generator = drawn(seed)
    first, second = (torch.randn(50_000, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    scales, shift = torch.tensor([0.5, 1.0, 2.0, 3.0]).double(), torch.tensor([1.0, 0.0, -1.0, 2.0]).double()
    second = second * scales + shift
    truth = float(shift.square().sum() + (scales - 1).square().sum())
    means = float((first.mean(dim=0) - second.mean(dim=0)).square().sum())
    one, other = (np.cov(rows.numpy().T) for rows in (first, second))
    found = {
        "value": FrechetDistance().fit(Features(first), Features(second)).distance,
        "floor": means,
        "ceiling": means + float(np.trace(one + other - 2 * np.real(sqrtm(one @ other)))),
    }
    return {kind: abs(value - truth) / truth for kind, value in found.items()}


def scales_of(estimator: Gride | DecimatedTwoNN, seed: int) -> dict[str, Found]:
    """A square in 6 dimensions with noise of 0.004 in all: the distance between neighbours is 0.013 at first."""
    generator = drawn(seed)
    plane = torch.zeros(1500, 6, dtype=torch.float64)
    plane[:, :2] = torch.rand(1500, 2, generator=generator, dtype=torch.float64)
    noise = 0.004 * torch.randn(1500, 6, generator=generator, dtype=torch.float64)
    both, clean, alone = (
        [scale["dimension"] for scale in estimator.fit(Features(rows)).scales] for rows in (plane + noise, plane, noise)
    )
    return {
        "smallest": {"value": both[0], "floor": clean[0], "ceiling": alone[0]},
        "largest": {"value": abs(both[-1] - 2), "floor": abs(both[0] - 2), "ceiling": abs(clean[-1] - 2)},
    }


def shared(seed: int) -> dict[str, Found]:
    """CKA of 40 samples of 200 independent features each; the gap of imbalances between 3 coordinates and the first."""
    generator = drawn(seed)
    one, other = (torch.randn(4000, 200, generator=generator) for _ in range(2))
    few = CKA().fit(Features(one[:40]), Features(other[:40]))
    whole = torch.randn(500, 3, generator=generator)
    turned = whole @ torch.linalg.qr(torch.randn(3, 3, generator=generator)).Q
    told = InformationImbalance().fit(Features(whole), Features(whole[:, :1].contiguous()))
    same = InformationImbalance().fit(Features(whole), Features(turned))
    apart = InformationImbalance().fit(Features(whole), Features(torch.randn(500, 3, generator=generator)))
    return {
        "CKA": {
            "value": abs(few.debiased),
            "floor": few.biased,
            "ceiling": abs(CKA().fit(Features(one), Features(other)).debiased),
        },
        "imbalance": {
            "value": told.from_second - told.from_first,
            "floor": same.from_second - told.from_first,
            "ceiling": apart.from_second - told.from_first,
        },
    }


def probes(seed: int) -> dict[str, Found]:
    """Distances from scikit-learn's accuracy on digits, in points."""
    digits = load_digits()
    x, label = digits.data.astype(np.float64), digits.target
    order = np.random.default_rng(seed).permutation(len(x))
    bank, query = order[:1400], order[1400:]
    sides = [Features(torch.from_numpy(x[part]), torch.from_numpy(label[part]).long()) for part in (bank, query)]
    unit, scaled = normalize(x), StandardScaler().fit(x[bank]).transform(x)

    def right(model: Any, rows: np.ndarray) -> float:
        return float(100 * model.fit(rows[bank], label[bank]).score(rows[query], label[query]))

    def regression(solver: str, penalty: float) -> LogisticRegression:
        return LogisticRegression(C=1 / penalty, solver=solver, max_iter=5000, tol=1e-10)

    found = {
        "1-NN": {
            "value": 100 * KNN(k=1).fit(*sides).accuracy,
            "floor": right(KNeighborsClassifier(1), scaled),
            "ceiling": right(KNeighborsClassifier(1, metric="cosine"), x),
        },
        "linear probe": {
            "value": 100 * LinearProbe(l2=1.0).fit(*sides).accuracy,
            "floor": right(regression("lbfgs", 1000.0), scaled),
            "ceiling": right(regression("newton-cg", 1.0), scaled),
        },
    }
    theirs = {"1-NN": right(KNeighborsClassifier(1), unit), "linear probe": right(regression("lbfgs", 1.0), scaled)}
    return {name: {kind: abs(value - theirs[name]) for kind, value in of.items()} for name, of in found.items()}


def claim(evidence, name: str, runs: dict[int, Found], unit: str = "", **margin: float) -> None:
    value, floor, ceiling = ({s: of[kind] for s, of in runs.items()} for kind in ("value", "floor", "ceiling"))
    evidence.claim(name, value, floor=floor, ceiling=ceiling, arms=(), unit=unit, **margin)


def part(runs: dict[int, dict[str, Found]], name: str) -> dict[int, Found]:
    return {seed: found[name] for seed, found in runs.items()}


def test_the_dimension_of_a_bent_manifold_and_of_a_flat_one(evidence) -> None:
    runs = {seed: dimensions(seed) for seed in SEEDS}
    claim(evidence, "TwoNN, distance from the true 5", part(runs, "TwoNN"), at_most=0.4)
    flat = part(runs, "participation ratio")
    claim(evidence, "participation ratio of a flat 5, distance from 5", flat, at_most=0.1)


def test_the_distance_of_two_gaussians_is_the_closed_form(evidence) -> None:
    runs = {seed: gaussians(seed) for seed in SEEDS}
    claim(evidence, "Fréchet distance, relative to the closed form", runs, at_most=0.03)


def test_a_noisy_plane_shows_its_dimension_at_large_scales(evidence) -> None:
    for estimator in (Gride(furthest=128), DecimatedTwoNN(fewest=60)):
        name, runs = type(estimator).__name__, {seed: scales_of(estimator, seed) for seed in SEEDS}
        claim(evidence, f"{name}, dimension at the smallest scale", part(runs, "smallest"), at_least=2.8)
        claim(evidence, f"{name}, distance from 2 at the largest scale", part(runs, "largest"), at_most=0.3)


def test_features_that_share_nothing_are_told_from_those_that_do(evidence) -> None:
    runs = {seed: shared(seed) for seed in SEEDS}
    for seed, found in runs.items():
        evidence.figure("CKA, biased, for independent features", found["CKA"]["floor"], seed)
    claim(evidence, "CKA, debiased, distance from 0 for independent features", part(runs, "CKA"), at_most=0.1)
    gaps = part(runs, "imbalance")
    claim(evidence, "InformationImbalance from one coordinate minus that from all three", gaps, at_least=0.1)


def test_probes_agree_with_scikit_learn(evidence) -> None:
    runs = {seed: probes(seed) for seed in PROBED_SEEDS}
    claim(evidence, "1-NN, distance from scikit-learn's", part(runs, "1-NN"), "points", at_most=1e-9)
    claim(evidence, "linear probe, distance from scikit-learn's", part(runs, "linear probe"), "points", at_most=0.26)
    evidence.note("One of 397 test digits is 0.25 points: the linear probe may differ by one where L-BFGS stops early.")


if __name__ == "__main__":
    for figures in (dimensions, gaussians, shared, probes):
        print(figures(SEARCH_SEED))
    print(scales_of(Gride(furthest=128), SEARCH_SEED), scales_of(DecimatedTwoNN(fewest=60), SEARCH_SEED))
