"""LOOK (arXiv 2110.06014) on digits that are labelled odd or even: which digit they are, read from frozen features.

Arms with one network, equal steps and batches: LOOK, SupCon and cross-entropy; beside them the untrained network, and
LOOK with other numbers of neighbours, up to all rows of its bank. Each label has five digits, of which no arm is told.
A linear probe learns the ten digits from the training pictures' features and is scored on test pictures; nearest
neighbours tell odd from even; the effective rank is that of features around the mean of their label.

The 1,797 digits are divided once: `python evidence/test_15_look.py` chooses rates and LOOK's neighbours on 597 of them
with seed 100, by the probe's accuracy, and all figures are taken on the other 1,200, halved anew for each seed.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from digits import parted
from lightning import seed_everything
from quiet import quiet_trainer
from torch import Tensor
from torch.utils.data import DataLoader

from lightspan.backbones.vision import SmallConvNet
from lightspan.evaluation.geometry.spectra import effective_rank, singular_values
from lightspan.evaluation.probes.knn import knn_accuracy
from lightspan.evaluation.probes.linear_probe import linear_probe_accuracy
from lightspan.methods.contrastive.supcon import SupCon
from lightspan.methods.supervised.classifier import Classifier
from lightspan.methods.supervised.look import LOOK
from lightspan.nn.heads.projector import Projector
from lightspan.optim.schedules import WarmupCosine
from lightspan.training.method import Method

SEEDS, SEARCH_SEED = (0, 1, 2), 100
STEPS, BATCH, QUEUE = 600, 128, 512
RATES, NEIGHBOURS = (1e-3, 3e-3, 1e-2, 3e-2), (5, 10, 20)
SWEEP = (5, 20, 80, 256, QUEUE)
CHOSEN: dict[str, tuple[float, int | None]] = {
    "LOOK": (1e-2, 5), "SupCon": (1e-2, None), "cross-entropy": (3e-2, None),
}  # fmt: skip


def method(arm: str, rate: float, neighbours: int | None) -> Method:
    backbone = SmallConvNet(width=8, stages=4)
    head = Projector(backbone.num_features, [128], 64)
    optimisation: dict[str, Any] = {
        "optimizer": partial(torch.optim.Adam, lr=rate, weight_decay=1e-4),
        "lr_scheduler": partial(WarmupCosine, warmup=0.05, final=0.0),
    }
    if arm == "cross-entropy":
        return Classifier(backbone, 2, **optimisation)
    if arm == "SupCon":
        return SupCon(backbone, head, **optimisation)
    assert neighbours is not None
    return LOOK(backbone, head, QUEUE, neighbours, momentum=0.95, batch_statistics=True, **optimisation)


def halves(seed: int, searching: bool) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Pictures [N 1 8 8] and digits [N], to train and to test."""
    images, digits = parted(seed, searching)
    x, y, middle = torch.from_numpy(images).float()[:, None] * 2 - 1, torch.from_numpy(digits).long(), len(digits) // 2
    return (x[:middle], y[:middle]), (x[middle:], y[middle:])


def batches(x: Tensor, label: Tensor, seed: int, steps: int) -> DataLoader:
    generator = np.random.default_rng(seed)
    chosen = [torch.from_numpy(generator.choice(len(x), BATCH, replace=False)) for _ in range(steps)]

    def batch(step: int) -> dict[str, Tensor]:
        rows = chosen[step]
        return {"image": x[rows], "label": label[rows], "index": rows}

    return DataLoader([*range(steps)], batch_size=None, collate_fn=batch)


def measured(arm: str, seed: int, rate: float, neighbours: int | None, steps: int = STEPS) -> dict[str, float]:
    """Of one run, or with steps=0 of the untrained network; the search's seed has the search's digits."""
    (x, digit), (test_x, test_digit) = halves(seed, searching=seed == SEARCH_SEED)
    seed_everything(seed, verbose=False)
    trained = method(arm, rate, neighbours)
    if steps:
        quiet_trainer(max_steps=steps).fit(trained, batches(x, digit % 2, seed, steps))
    trained.eval()
    with torch.no_grad():
        bank, asked = (trained.features({"image": images}) for images in (x, test_x))
    around = torch.cat([asked[test_digit % 2 == odd] - asked[test_digit % 2 == odd].mean(dim=0) for odd in (0, 1)])
    return {
        "digits": 100 * linear_probe_accuracy(bank, digit, asked, test_digit),
        "odd or even": 100 * knn_accuracy(bank, digit % 2, asked, test_digit % 2),
        "effective rank within a label": float(effective_rank(singular_values(around))),
    }


def test_look(evidence) -> None:
    runs = {arm: {seed: measured(arm, seed, *CHOSEN[arm]) for seed in SEEDS} for arm in CHOSEN}
    runs["untrained"] = {seed: measured("SupCon", seed, 1.0, None, steps=0) for seed in SEEDS}
    rate = CHOSEN["LOOK"][0]
    for count in SWEEP:
        runs[f"LOOK with {count} neighbours"] = {seed: measured("LOOK", seed, rate, count) for seed in SEEDS}
    for arm, of_seed in runs.items():
        for seed, found in of_seed.items():
            for name, value in found.items():
                evidence.figure(f"{name}, {arm}", value, seed, "" if "rank" in name else "%")
    evidence.note(
        f"{STEPS} steps of {BATCH} pictures as they are; a bank of {QUEUE} rows. Of rates {RATES} and, of LOOK, "
        f"neighbours {NEIGHBOURS}, chosen on seed {SEARCH_SEED}",
        CHOSEN,
    )
    evidence.note("The sweep of neighbours has the rate that was chosen for LOOK; the last has all rows of the bank.")

    def gain(over: str, figure: str, of: str = "LOOK") -> Mapping[int, float]:
        return {seed: runs[of][seed][figure] - runs[over][seed][figure] for seed in SEEDS}

    for over in ("cross-entropy", "SupCon"):
        evidence.claim(f"digits, LOOK minus {over}", gain(over, "digits"), at_least=4.0, unit="points")
        evidence.claim(f"odd or even, LOOK minus {over}", gain(over, "odd or even"), at_least=-1.0, unit="points")
    rank = "effective rank within a label"
    evidence.claim(f"{rank}, LOOK minus SupCon", gain("SupCon", rank), at_least=0.0)
    few, most = (f"LOOK with {count} neighbours" for count in (SWEEP[0], SWEEP[-1]))
    evidence.claim(f"digits, {few} minus {most}", gain(most, "digits", few), at_least=0.0, unit="points")


if __name__ == "__main__":
    for arm in CHOSEN:
        for count in NEIGHBOURS if arm == "LOOK" else (None,):
            for one in RATES:
                print(arm, one, count, measured(arm, SEARCH_SEED, one, count), flush=True)
