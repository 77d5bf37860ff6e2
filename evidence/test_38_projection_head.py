"""Projection heads (arXiv 2403.11391): features before the head and behind it, of drawn features and of digits.

Drawn: ten features of strengths from 0.2 to 2 in 64 dimensions of noise, of which both views keep the features. Two
linear layers follow the spectral contrastive loss by plain gradient descent from small balanced weights. A feature's
weight is the length of what a layer makes of its direction; a linear probe tells the sign of one feature from 40
samples.

Digits: labelled in three groups (0 to 3, 4 to 6, 7 to 9), of which SupCon learns, with an MLP as head, with the fixed
reweighting head, and without a head; a linear probe tells the ten digits before and behind it. Rates of each arm were
chosen of the same four, by the probe before the head, on 597 of the 1,797 digits with seed 100
(`python evidence/test_38_projection_head.py`); figures are taken on the other 1,200, halved anew for each seed.
"""

from functools import partial

import numpy as np
import torch
from digits import parted
from lightning import seed_everything
from quiet import quiet_trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightspan.backbones.vision import SmallConvNet
from lightspan.evaluation.probes.linear_probe import linear_probe_accuracy
from lightspan.methods.contrastive.supcon import SupCon
from lightspan.nn.heads.projector import Projector
from lightspan.nn.heads.reweighting import ReweightingHead
from lightspan.objectives.spectral import spectral_contrastive
from lightspan.optim.schedules import WarmupCosine

SEEDS, SEARCH_SEED = (0, 1, 2), 100
FEATURES, DIMENSIONS, WIDTH, NOISE = 10, 64, 32, 0.5
SAMPLES, DESCENT, RATE, START, PROBED = 2000, 3000, 0.03, 0.3, 40
STRENGTHS = np.geomspace(0.2, 2.0, FEATURES)
STEPS, BATCH, KAPPA = 600, 128, 1.05
RATES = (1e-3, 3e-3, 1e-2, 3e-2)
GROUPS = torch.tensor([0, 0, 0, 0, 1, 1, 1, 2, 2, 2])
CHOSEN = {"MLP head": 1e-2, "fixed head": 3e-3, "no head": 3e-2}


def drawn(count: int, generator: torch.Generator, directions: Tensor, views: int) -> tuple[list[Tensor], Tensor]:
    """(views [N 64], signs of the features [N 10])."""
    signs = torch.randn(count, FEATURES, generator=generator, dtype=torch.float64).sign()
    signal = (signs * torch.from_numpy(STRENGTHS)) @ directions
    noise = (torch.randn(count, DIMENSIONS, generator=generator, dtype=torch.float64) for _ in range(views))
    return [signal + NOISE * each for each in noise], signs


def linear_layers(seed: int, steps: int = DESCENT) -> dict[str, float]:
    generator = torch.Generator().manual_seed(seed)
    random = partial(torch.randn, generator=generator, dtype=torch.float64)
    directions = torch.linalg.qr(random(DIMENSIONS, FEATURES)).Q.T
    (x1, x2), _ = drawn(SAMPLES, generator, directions, 2)
    frame = torch.linalg.qr(random(DIMENSIONS, WIDTH)).Q.T
    w1, w2 = START * frame, START * torch.linalg.qr(random(WIDTH, WIDTH)).Q  # W1 W1' = W2' W2
    weights = [w1.requires_grad_(), w2.requires_grad_()]
    for _ in range(steps):
        loss = spectral_contrastive(x1 @ w1.T @ w2.T, x2 @ w1.T @ w2.T)
        with torch.no_grad():
            for w, gradient in zip(weights, torch.autograd.grad(loss, weights), strict=True):
                w -= RATE * gradient
    w1, w2 = w1.detach(), w2.detach()
    found = {"balance": float((w1 @ w1.T - w2.T @ w2).abs().max())}
    spreads = {}
    for side, layer in (("before", w1), ("behind", w2 @ w1)):
        spreads[side] = float((layer @ directions.T).norm(dim=0).log().std())
        accuracies = {0: [], FEATURES - 1: []}
        for _ in range(20):
            (bank,), known = drawn(PROBED, generator, directions, 1)
            (asked,), told = drawn(1000, generator, directions, 1)
            for feature, values in accuracies.items():
                sides = (
                    (rows @ layer.T, (signs[:, feature] > 0).long()) for rows, signs in ((bank, known), (asked, told))
                )
                values.append(100 * linear_probe_accuracy(*(each for side_ in sides for each in side_)))
        found |= {f"weakest, {side}": float(np.mean(accuracies[0]))}
        found |= {f"strongest, {side}": float(np.mean(accuracies[FEATURES - 1]))}
    return found | {"spread": spreads["before"] / spreads["behind"]}


def head(arm: str, width: int) -> nn.Module:
    return {
        "MLP head": lambda: Projector(width, [width], width, hidden_norm=False),
        "fixed head": lambda: ReweightingHead(width, KAPPA),
        "no head": nn.Identity,
    }[arm]()


def on_digits(arm: str, seed: int, rate: float, steps: int = STEPS) -> dict[str, float]:
    """Accuracy of a probe of the ten digits, in per cent; the search's seed has the search's digits."""
    images, digits = parted(seed, searching=seed == SEARCH_SEED)
    x, y, middle = torch.from_numpy(images).float()[:, None] * 2 - 1, torch.from_numpy(digits).long(), len(digits) // 2
    seed_everything(seed, verbose=False)
    backbone = SmallConvNet(width=8, stages=4)
    optimizer = partial(torch.optim.Adam, lr=rate, weight_decay=1e-4)
    schedule = partial(WarmupCosine, warmup=0.05, final=0.0)
    method = SupCon(backbone, head(arm, backbone.num_features), optimizer=optimizer, lr_scheduler=schedule)
    generator = np.random.default_rng(seed)
    chosen = [torch.from_numpy(generator.choice(middle, BATCH, replace=False)) for _ in range(steps)]

    def batch(step: int) -> dict[str, Tensor]:
        return {"image": x[chosen[step]], "label": GROUPS[y[chosen[step]]]}

    quiet_trainer(max_steps=steps).fit(method, DataLoader([*range(steps)], batch_size=None, collate_fn=batch))
    method.eval()
    with torch.no_grad():
        before = method.backbone(x)
        sides = {"before": before, "behind": method.projector(before)}
    return {
        side: 100 * linear_probe_accuracy(rows[:middle], y[:middle], rows[middle:], y[middle:])
        for side, rows in sides.items()
    }


def test_linear_layers(evidence) -> None:
    runs = {seed: linear_layers(seed) for seed in SEEDS}
    for seed, found in runs.items():
        for name, value in found.items():
            unit = "%" if name.startswith(("weakest", "strongest")) else ""
            evidence.figure(f"drawn features, {name}", value, seed, unit)
    evidence.note(
        f"Strengths from {STRENGTHS[0]:g} to {STRENGTHS[-1]:g} by equal factors, noise {NOISE:g}, {DESCENT} steps of "
        f"{RATE:g} on all {SAMPLES} pairs; probes are means over 20 draws."
    )

    def gain(feature: str) -> dict[int, float]:
        return {seed: found[f"{feature}, before"] - found[f"{feature}, behind"] for seed, found in runs.items()}

    spread = {seed: found["spread"] for seed, found in runs.items()}
    for bound, value in (("at_least", 0.4), ("at_most", 0.6)):
        evidence.claim("spread of log weights, before over behind", spread, **{bound: value})
    evidence.claim("weakest feature, before minus behind", gain("weakest"), at_least=5.0, unit="points")
    evidence.claim("strongest feature, before minus behind", gain("strongest"), at_least=-2.0, unit="points")


def test_digits_in_groups(evidence) -> None:
    runs = {arm: {seed: on_digits(arm, seed, CHOSEN[arm]) for seed in SEEDS} for arm in CHOSEN}
    for arm, of_seed in runs.items():
        for seed, found in of_seed.items():
            for side, value in found.items():
                evidence.figure(f"digits, {arm}, {side}", value, seed, "%")
    evidence.note(f"{STEPS} steps of {BATCH} digits. Rates of {RATES} chosen on seed {SEARCH_SEED}", CHOSEN)

    def gain(arm: str, side: str, over: str, other: str) -> dict[int, float]:
        return {seed: runs[arm][seed][side] - runs[over][seed][other] for seed in SEEDS}

    before, behind = ("MLP head", "before"), ("MLP head", "behind")
    evidence.claim("digits, before the head minus behind it", gain(*before, *behind), at_least=3.0, unit="points")
    without = gain(*before, "no head", "before")
    evidence.claim("digits, MLP head minus no head", without, at_least=3.0, unit="points")
    fixed = gain("fixed head", "before", *before)
    evidence.claim("digits, fixed head minus MLP head", fixed, at_least=-2.0, unit="points")


if __name__ == "__main__":
    for arm in CHOSEN:
        for one in RATES:
            print(arm, one, on_digits(arm, SEARCH_SEED, one), flush=True)
