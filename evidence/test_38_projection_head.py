"""Projection heads (arXiv 2403.11391): features before the head and behind it, of drawn features and of letters.

Drawn: ten features of strengths from 0.35 to 2 in 64 dimensions of noise, of which both views keep the features. Two
linear layers follow the spectral contrastive loss by plain gradient descent from small balanced weights. A feature's
weight is the length of what a layer makes of its direction; a linear probe tells the sign of one feature from 40
samples. With a weakest strength of 0.2 the layers did not learn it, and no comparison could have told; 0.35 is the
least of 0.2, 0.35, 0.5 and 0.7 that a probe reads on the search seed. The floor is the untrained layer, and the
ceiling the ten features themselves, all of one weight; of spreads, balanced layers of the same product.

Letters: small printed ones, labelled in three groups, of which SupCon learns, with an MLP as head, with the fixed
reweighting head, and without a head; a linear probe tells the 26 letters. The floor is the untrained network, the
ceiling the network with the MLP that was told all letters. Digits, of which an earlier record had them, are read from
an untrained network nearly as well. Rates are searched by the probe before the head, on letters of the search seed.

Measured: weights are flatter before the head, as the theory says (their spread is half of that behind it), and letters
are read far better before the MLP than behind it. Not held, though the ceilings keep the margins: the flatter weights
do not help a probe of 40 samples with the weakest feature; a network with an MLP as head is read no better than one
without a head, whose best rate is 27 times as high; the fixed head is 3.7 points behind the MLP, where 2 are allowed.
"""

from functools import partial

import numpy as np
import torch
from coarse_letters import LETTERS, adam, network, told, trained
from torch import Tensor, nn

from lightspan.evaluation.probes.linear_probe import linear_probe_accuracy
from lightspan.methods.contrastive.supcon import SupCon
from lightspan.nn.heads.projector import Projector
from lightspan.nn.heads.reweighting import BehindHead, ReweightingHead
from lightspan.objectives.spectral import spectral_contrastive
from lightspan.training.method import Method

SEEDS, LETTER_SEEDS, SEARCH_SEED = tuple(range(10)), (0, 1, 2, 3, 4), 100
FEATURES, DIMENSIONS, WIDTH, NOISE = 10, 64, 32, 0.5
SAMPLES, DESCENT, RATE, START, PROBED = 2000, 3000, 0.03, 0.3, 40
STRENGTHS = np.geomspace(0.35, 2.0, FEATURES)
GROUPS, KAPPA, RATES = 3, 1.05, (1e-3, 3e-3, 1e-2, 3e-2)
ARMS = ("MLP head", "fixed head", "no head")


def drawn(count: int, generator: torch.Generator, directions: Tensor, views: int) -> tuple[list[Tensor], Tensor]:
    """(views [N 64], signs of the features [N 10])."""
    signs = torch.randn(count, FEATURES, generator=generator, dtype=torch.float64).sign()
    signal = (signs * torch.from_numpy(STRENGTHS)) @ directions
    noise = (torch.randn(count, DIMENSIONS, generator=generator, dtype=torch.float64) for _ in range(views))
    return [signal + NOISE * each for each in noise], signs


def of_same_moments(x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor]:
    """128 pairs in place of all, with their second moments, which are all that the loss of linear layers knows."""
    both = torch.cat([x1, x2], dim=1)
    few = torch.linalg.cholesky(both.T @ both / len(both)).T * both.shape[1] ** 0.5
    return few[:, : x1.shape[1]], few[:, x1.shape[1] :]


def spread(layer: Tensor, directions: Tensor) -> float:
    """Standard deviation of the features' log weights."""
    return float((layer @ directions.T).norm(dim=0).log().std())


def linear_layers(seed: int) -> dict[str, float]:
    generator = torch.Generator().manual_seed(seed)
    random = partial(torch.randn, generator=generator, dtype=torch.float64)
    directions = torch.linalg.qr(random(DIMENSIONS, FEATURES)).Q.T
    x1, x2 = of_same_moments(*drawn(SAMPLES, generator, directions, 2)[0])
    start = START * torch.linalg.qr(random(DIMENSIONS, WIDTH)).Q.T
    w1, w2 = start.clone(), START * torch.linalg.qr(random(WIDTH, WIDTH)).Q  # W1 W1' = W2' W2
    untrained = spread(w1, directions) / spread(w2 @ w1, directions)
    weights = [w1.requires_grad_(), w2.requires_grad_()]
    for _ in range(DESCENT):
        loss = spectral_contrastive(x1 @ w1.T @ w2.T, x2 @ w1.T @ w2.T)
        with torch.no_grad():
            for w, gradient in zip(weights, torch.autograd.grad(loss, weights), strict=True):
                w -= RATE * gradient
    w1, w2 = w1.detach(), w2.detach()
    _, values, right = torch.linalg.svd(w2 @ w1, full_matrices=False)
    balanced = values.sqrt()[:, None] * right
    behind = spread(w2 @ w1, directions)
    found = {
        "balance": float((w1 @ w1.T - w2.T @ w2).abs().max()),
        "spread, untrained": untrained,
        "spread, before": spread(w1, directions) / behind,
        "spread, features": spread(balanced, directions) / behind,
    }
    layers = {"untrained": start, "before": w1, "behind": w2 @ w1, "features": directions}
    accuracies: dict[str, list[float]] = {}
    for _ in range(20):
        (bank,), known = drawn(PROBED, generator, directions, 1)
        (asked,), asked_for = drawn(1000, generator, directions, 1)
        for side, layer in layers.items():
            for name, feature in (("weakest", 0), ("strongest", FEATURES - 1)):
                labels = ((signs[:, feature] > 0).long() for signs in (known, asked_for))
                rows = (rows @ layer.T for rows in (bank, asked))
                both = [each for pair in zip(rows, labels, strict=True) for each in pair]
                accuracies.setdefault(f"{name}, {side}", []).append(100 * linear_probe_accuracy(*both))
    return found | {name: float(np.mean(values)) for name, values in accuracies.items()}


def supcon(arm: str, rate: float) -> Method:
    backbone = network()
    width = backbone.num_features
    heads: dict[str, partial[nn.Module]] = {
        "MLP head": partial(Projector, width, [width], width, hidden_norm=False),
        "fixed head": partial(ReweightingHead, width, KAPPA),
        "no head": partial(nn.Identity),
    }
    return SupCon(backbone, heads[arm](), **adam(rate))


def on_letters(arm: str, seed: int, rate: float, groups: int = GROUPS, **steps: int) -> dict[str, float]:
    """Per cent of letters and of groups, before the head, and of letters behind it."""
    method = trained(partial(supcon, arm, rate), groups, seed, **steps)
    found = told(method.backbone, GROUPS, seed)
    behind = BehindHead(method.backbone, method.projector) if arm != "no head" else method.backbone
    return {"before": found["letters"], "behind": told(behind, GROUPS, seed)["letters"], "groups": found["groups"]}


def test_linear_layers(evidence) -> None:
    runs = {seed: linear_layers(seed) for seed in SEEDS}
    for seed, found in runs.items():
        for name, value in found.items():
            unit = "%" if name.startswith(("weakest", "strongest")) else ""
            evidence.figure(f"drawn features, {name}", value, seed, unit)
    evidence.note(
        f"Strengths from {STRENGTHS[0]:g} to {STRENGTHS[-1]:g} by equal factors, noise {NOISE:g}, {DESCENT} steps of "
        f"{RATE:g} on all {SAMPLES} pairs; probes are means over 20 draws. A spread is over that behind the head."
    )

    def of(name: str) -> dict[int, float]:
        return {seed: found[name] for seed, found in runs.items()}

    def off(side: str) -> dict[int, float]:
        return {seed: abs(found[f"spread, {side}"] - 0.5) for seed, found in runs.items()}

    def gain(side: str) -> dict[int, float]:
        return {seed: found[f"weakest, {side}"] - found["weakest, behind"] for seed, found in runs.items()}

    evidence.gate("two layers", of("weakest, before"), of("weakest, untrained"), by=5.0, unit="points")
    evidence.claim(
        "spread of log weights before the head as a share of that behind it, distance from a half",
        off("before"), at_most=0.1, floor=off("untrained"), ceiling=off("features"), arms=("two layers",),
    )  # fmt: skip
    evidence.claim(
        "weakest feature, before minus behind", gain("before"), at_least=5.0, unit="points",
        floor=gain("untrained"), ceiling=gain("features"), arms=("two layers",),
    )  # fmt: skip


def test_letters_in_groups(evidence) -> None:
    rates = evidence.search(
        {arm: lambda rate, arm=arm: on_letters(arm, SEARCH_SEED, rate)["before"] for arm in ARMS},
        RATES, seed=SEARCH_SEED,
    )  # fmt: skip
    runs = {arm: {seed: on_letters(arm, seed, rates[arm]) for seed in LETTER_SEEDS} for arm in ARMS}
    learned = rates["MLP head"]
    runs["untrained"] = {seed: on_letters("MLP head", seed, learned, steps=0) for seed in LETTER_SEEDS}
    runs["all letters"] = {seed: on_letters("MLP head", seed, learned, LETTERS) for seed in LETTER_SEEDS}
    for arm, of_seed in runs.items():
        for seed, found in of_seed.items():
            for name, value in found.items():
                evidence.figure(f"letters, {arm}, {name}", value, seed, "%")
    groups = {arm: {seed: found["groups"] for seed, found in of_seed.items()} for arm, of_seed in runs.items()}
    for arm in ARMS:
        evidence.gate(arm, groups[arm], groups["untrained"], by=15.0, unit="points")

    def claim(name: str, arms: tuple[str, ...], side: str, margin: float) -> None:
        def gain(arm: str) -> dict[int, float]:
            return {seed: runs[arm][seed]["before"] - runs[arms[-1]][seed][side] for seed in LETTER_SEEDS}

        evidence.claim(
            f"letters, {name}", gain(arms[0]), at_least=margin, unit="points",
            floor=gain("untrained"), ceiling=gain("all letters"), arms=arms,
        )  # fmt: skip

    claim("before the head minus behind it", ("MLP head",), "behind", 3.0)
    claim("MLP head minus no head", ("MLP head", "no head"), "before", 3.0)
    claim("fixed head minus MLP head", ("fixed head", "MLP head"), "before", -2.0)


if __name__ == "__main__":
    print(linear_layers(SEARCH_SEED))
    for arm in ARMS:
        print(arm, on_letters(arm, SEARCH_SEED, RATES[2]), flush=True)
    print(
        on_letters("MLP head", SEARCH_SEED, RATES[2], steps=0), on_letters("MLP head", SEARCH_SEED, RATES[2], LETTERS)
    )
