"""Estimators on features of known truth: a dimension, a closed form, and scikit-learn's answers."""

import math

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler, normalize

from lightspan.evaluation.features.features import Features
from lightspan.evaluation.geometry.dimension import Spectrum, TwoNN
from lightspan.evaluation.geometry.dimension_scales import DecimatedTwoNN, Gride
from lightspan.evaluation.geometry.distance import FrechetDistance
from lightspan.evaluation.geometry.similarity import CKA, InformationImbalance
from lightspan.evaluation.probes.probes import KNN, LinearProbe

SEEDS = (0, 1, 2)
DIMENSION, WIDTH, POINTS = 5, 64, 2000


def curved(seed: int) -> torch.Tensor:
    """Points of a 5-dimensional manifold that a random smooth map bends into 64 dimensions: [N 64]."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.rand(POINTS, DIMENSION, generator=generator, dtype=torch.float64)
    into = torch.randn(DIMENSION, WIDTH, generator=generator, dtype=torch.float64)
    return torch.sin(z @ into / math.sqrt(DIMENSION)) + z @ into


def test_the_dimension_of_a_bent_manifold_and_of_a_flat_one(evidence) -> None:
    bent, flat = {}, {}
    for seed in SEEDS:
        result = TwoNN().fit(Features(curved(seed)))
        evidence.figure("TwoNN dimension, bent manifold of 5", result.dimension, seed)
        bent[seed] = abs(result.dimension - DIMENSION)
        generator = torch.Generator().manual_seed(seed)
        frame = torch.linalg.qr(torch.randn(WIDTH, DIMENSION, generator=generator, dtype=torch.float64)).Q
        rows = torch.randn(POINTS, DIMENSION, generator=generator, dtype=torch.float64) @ frame.T
        flat[seed] = abs(Spectrum().fit(Features(rows)).participation_ratio - DIMENSION)
    evidence.claim("TwoNN, distance from the true 5", bent, at_most=0.4)
    evidence.claim("participation ratio of a flat 5, distance from 5", flat, at_most=0.1)


def test_the_distance_of_two_gaussians_is_the_closed_form(evidence) -> None:
    apart = {}
    for seed in SEEDS:
        generator = torch.Generator().manual_seed(seed)
        first, second = (torch.randn(50_000, 4, generator=generator, dtype=torch.float64) for _ in range(2))
        scales, shift = torch.tensor([0.5, 1.0, 2.0, 3.0]).double(), torch.tensor([1.0, 0.0, -1.0, 2.0]).double()
        # Covariances that commute: |m|^2 + sum (s_a - s_b)^2.
        truth = float(shift.square().sum() + (scales - 1).square().sum())
        value = FrechetDistance().fit(Features(first), Features(second * scales + shift)).distance
        evidence.figure("Fréchet distance, truth 11.25", value, seed)
        apart[seed] = abs(value - truth) / truth
    evidence.claim("Fréchet distance, relative to the closed form", apart, at_most=0.03)


def test_a_noisy_plane_shows_its_dimension_at_large_scales(evidence) -> None:
    """A square in 6 dimensions with noise of 0.004 in all: the distance between neighbours is 0.013 at first."""
    for estimator in (Gride(furthest=128), DecimatedTwoNN(fewest=60)):
        name, near, far = type(estimator).__name__, {}, {}
        for seed in SEEDS:
            generator = torch.Generator().manual_seed(seed)
            plane = torch.zeros(1500, 6, dtype=torch.float64)
            plane[:, :2] = torch.rand(1500, 2, generator=generator, dtype=torch.float64)
            noise = 0.004 * torch.randn(1500, 6, generator=generator, dtype=torch.float64)
            scales = estimator.fit(Features(plane + noise)).scales
            near[seed], far[seed] = scales[0]["dimension"], abs(scales[-1]["dimension"] - 2)
            evidence.figure(f"{name}, dimension at the largest scale", scales[-1]["dimension"], seed)
        evidence.claim(f"{name}, dimension at the smallest scale", near, at_least=2.8)
        evidence.claim(f"{name}, distance from 2 at the largest scale", far, at_most=0.3)


def test_features_that_share_nothing_are_told_from_those_that_do(evidence) -> None:
    """CKA of 40 samples of 200 independent features each; imbalances of 3 coordinates and the first of them."""
    debiased, biased, gaps = {}, {}, {}
    for seed in SEEDS:
        generator = torch.Generator().manual_seed(seed)
        one, other = (Features(torch.randn(40, 200, generator=generator)) for _ in range(2))
        found = CKA().fit(one, other)
        debiased[seed], biased[seed] = abs(found.debiased), found.biased
        whole = torch.randn(500, 3, generator=generator)
        told = InformationImbalance().fit(Features(whole), Features(whole[:, :1].contiguous()))
        evidence.figure("InformationImbalance, from three coordinates to one of them", told.from_first, seed)
        gaps[seed] = told.from_second - told.from_first
    evidence.claim("CKA, debiased, distance from 0 for independent features", debiased, at_most=0.1)
    evidence.claim("CKA, biased, of the same", biased, at_least=0.7)
    evidence.claim("InformationImbalance from one coordinate minus that from all three", gaps, at_least=0.1)


def test_probes_agree_with_scikit_learn(evidence) -> None:
    digits = load_digits()
    x, label = digits.data.astype(np.float64), digits.target
    neighbours, regression = {}, {}
    for seed in SEEDS:
        order = np.random.default_rng(seed).permutation(len(x))
        bank, query = order[:1400], order[1400:]
        sides = [Features(torch.from_numpy(x[part]), torch.from_numpy(label[part]).long()) for part in (bank, query)]
        ours = 100 * KNN(k=1).fit(*sides).accuracy
        theirs = 100 * KNeighborsClassifier(1).fit(normalize(x[bank]), label[bank]).score(
            normalize(x[query]), label[query]
        )
        evidence.figure("1-NN by cosine on digits", ours, seed, "%")
        neighbours[seed] = abs(ours - theirs)
        ours = 100 * LinearProbe(l2=1.0).fit(*sides).accuracy
        scaler = StandardScaler().fit(x[bank])
        model = LogisticRegression(C=1.0, max_iter=5000, tol=1e-10).fit(scaler.transform(x[bank]), label[bank])
        theirs = 100 * model.score(scaler.transform(x[query]), label[query])
        evidence.figure("linear probe on digits", ours, seed, "%")
        regression[seed] = abs(ours - theirs)
    evidence.claim("1-NN, distance from scikit-learn's", neighbours, at_most=1e-9, unit="points")
    evidence.claim("linear probe, distance from scikit-learn's", regression, at_most=0.26, unit="points")
    evidence.note("One of 397 test digits is 0.25 points: the linear probe may differ by one where L-BFGS stops early.")
