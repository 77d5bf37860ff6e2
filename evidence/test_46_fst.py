"""FST (arXiv 2209.06993) on rendered scenes: pixels are labelled in plain colours and told in another style.

Scenes of 32 x 32 pixels with two to four discs and rings on a ground: with more shapes a U-Net of this size takes
thousands of steps before it tells them apart in the source. The source has plain colours, the target turned hues,
textures and grain. Arms with one small U-Net: the source alone, the mean teacher (FST without virtual steps), FST with
three virtual steps one after the other (deep) and with three averaged ones (wide), at equal real steps; and the mean
teacher with four times the steps, which are FST's computation. Figures are the student's mean IoU on target scenes that
nothing is trained on. Rates of each arm are the best of the same three on scenes of another seed (`python
evidence/test_46_fst.py`).
"""

from functools import partial
from typing import Any

import numpy as np
import torch
from lightning import Callback, seed_everything
from quiet import quiet_trainer
from torch import Tensor

from lightspan.backbones.dense import UNet
from lightspan.datamodules.rendered.scene_data import TwoDomains
from lightspan.datamodules.rendered.scenes import SceneSpace
from lightspan.methods.distillation.fst import FST
from lightspan.optim.schedules import WarmupCosine

SEEDS, SEARCH_SEED = (0, 1, 2), 100
STEPS, BATCH, TRAINING, JUDGED, VIRTUAL = 300, 16, 2048, 512, 3
SPACE = SceneSpace(32, 32, fewest=2, most=4, shapes=2)
RATES = (3e-3, 1e-2, 3e-2)
ARMS: dict[str, dict[str, Any]] = {
    "source alone": {"virtual_steps": 0},
    "mean teacher": {"virtual_steps": 0},
    f"mean teacher, {VIRTUAL + 1} times the steps": {"virtual_steps": 0},
    "FST deep": {"virtual_steps": VIRTUAL, "form": "deep"},
    "FST wide": {"virtual_steps": VIRTUAL, "form": "wide"},
}
LONGER = f"mean teacher, {VIRTUAL + 1} times the steps"
CHOSEN = dict(zip(ARMS, (1e-2, 3e-2, 1e-2, 3e-2, 3e-2), strict=True))


class SourceAlone(FST):
    """Without mixtures and pseudo-labels."""

    def losses(self, *given: Any) -> dict[str, Tensor]:
        figures = super().losses(*given)
        return figures | {"train/loss": figures["train/source_nats"]}


class PseudoLabelAccuracy(Callback):
    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        self.seen.append(100 * float(trainer.callback_metrics["train/pseudo_accuracy"]))


def mean_iou(method: FST, data: TwoDomains) -> float:
    """On the target's scenes, over the classes that occur, in per cent."""
    classes, counts = data.num_classes, torch.zeros(data.num_classes**2, dtype=torch.int64)
    with torch.no_grad():
        for batch in data.val_dataloader():
            answer, right = method(batch["target_image"]).argmax(dim=1), batch["target_semantic"]
            counts += torch.bincount((right * classes + answer).flatten(), minlength=classes**2)
    table = counts.view(classes, classes).double()
    union = table.sum(dim=0) + table.sum(dim=1) - table.diagonal()
    return 100 * float((table.diagonal() / union)[union > 0].mean())


def measured(arm: str, rate: float, seed: int, steps: int = STEPS) -> dict[str, float]:
    """mIoU and the accuracy of pseudo-labels in each fifth of the run."""
    data = TwoDomains(SPACE, size=TRAINING, val_size=JUDGED, batch_size=BATCH, draw_seed=seed, seed=seed)
    seed_everything(seed, verbose=False)
    kind, count = SourceAlone if arm == "source alone" else FST, steps * (VIRTUAL + 1 if arm == LONGER else 1)
    optimizer = partial(torch.optim.AdamW, lr=rate, weight_decay=0.01)
    schedule, settings = partial(WarmupCosine, warmup=0.05, final=0.0), {"momentum": 0.98, "confidence": 0.9}
    backbone = UNet(width=8)
    method = kind(backbone, data.num_classes, **settings, **ARMS[arm], optimizer=optimizer, lr_scheduler=schedule)
    followed = PseudoLabelAccuracy()
    quiet_trainer(max_steps=count, callbacks=[followed]).fit(method, datamodule=data)
    fifths = {f"fifth {1 + at}": float(np.mean(part)) for at, part in enumerate(np.array_split(followed.seen, 5))}
    return {"mIoU": mean_iou(method.eval(), data)} | fifths


def test_fst(evidence) -> None:
    runs = {arm: {seed: measured(arm, CHOSEN[arm], seed) for seed in SEEDS} for arm in ARMS}
    for arm, of_seed in runs.items():
        for seed, found in of_seed.items():
            for name, value in found.items():
                named = name if name == "mIoU" else f"accuracy of pseudo-labels, {name} of the run"
                evidence.figure(f"{named}, {arm}", value, seed, "%")
    evidence.note(
        f"{STEPS} real steps of {BATCH} scenes of each style. Rates of {RATES} chosen on scenes of seed {SEARCH_SEED}",
        CHOSEN,
    )

    def gain(arm: str, over: str) -> dict[int, float]:
        return {seed: runs[arm][seed]["mIoU"] - runs[over][seed]["mIoU"] for seed in SEEDS}

    evidence.claim("mIoU, FST deep minus mean teacher", gain("FST deep", "mean teacher"), at_least=1.0, unit="points")
    evidence.claim(f"mIoU, FST deep minus {LONGER}", gain("FST deep", LONGER), at_least=-0.5, unit="points")
    evidence.claim("mIoU, FST wide minus mean teacher", gain("FST wide", "mean teacher"), at_least=1.0, unit="points")
    evidence.claim("mIoU, FST deep minus source alone", gain("FST deep", "source alone"), at_least=0.0, unit="points")
    later = [f"fifth {number}" for number in range(2, 6)]
    least = {seed: min(runs["FST deep"][seed][at] - runs["mean teacher"][seed][at] for at in later) for seed in SEEDS}
    for seed, value in least.items():
        evidence.claim(
            f"pseudo-labels, FST deep minus mean teacher, least of the fifths from the second, seed {seed}",
            value,
            at_least=0.0,
            unit="points",
        )


if __name__ == "__main__":
    for arm in ARMS:
        for one in RATES:
            print(arm, one, measured(arm, one, SEARCH_SEED), flush=True)
