"""SLCA (arXiv 2303.05118) on digits in five tasks of two classes: against fine-tuning at one rate, and by its parts.

The backbone, an MLP of 64-200-200, is pre-trained on the same digits after a quarter turn, with their labels: a related
task whose pictures look different. Then the upright digits come in five tasks, in an order of the seed, 20 times each:

- uniform: cross-entropy of the new classes, one rate for backbone and head.
- slow: the same with the backbone at a share of the head's rate.
- SLCA: the slow learner, and after each task the alignment.
- nearest class mean, on the frozen backbone.

Rates, and shares of the rate, are chosen on seed 100 by the accuracy after the last task on 300 digits that are held
out of training, from as many settings for each trained arm: `python evidence/test_53_slca.py` repeats the search.
"""

import copy
import sys
from functools import partial

import torch
from lightning import seed_everything
from quiet import quiet_trainer
from torch import nn

from lightspan.backbones.vision import MLP
from lightspan.callbacks.pictures.forgetting import Forgetting
from lightspan.datamodules.image.sets.small import Digits
from lightspan.datamodules.image.variants.class_stream import ClassStream
from lightspan.datamodules.image.variants.tasks import Derived
from lightspan.evaluation.gaussians.closed_form import IncrementalAccuracy, NearestMean
from lightspan.evaluation.geometry.moments import Moments
from lightspan.evaluation.rows import unit_rows
from lightspan.methods.supervised.classifier import Classifier
from lightspan.methods.supervised.slca import SLCA
from lightspan.optim.schedules import Staircase, WarmupCosine

SEEDS, SEARCH_SEED, VALIDATION = (0, 1, 2, 3, 4), 100, 300
TASKS, PASSES, BATCH = 5, 20, 32
RATES = {
    "uniform": [(lr, 1.0) for lr in (5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1)],
    "slow": [(lr, share) for lr in (1e-3, 3e-3, 1e-2, 3e-2) for share in (0.01, 0.1)],
    "SLCA": [(lr, share) for lr in (1e-3, 3e-3, 1e-2, 3e-2) for share in (0.01, 0.1)],
}
CHOSEN = {"uniform": (5e-3, 1.0), "slow": (1e-2, 0.01), "SLCA": (3e-3, 0.01)}


def pretrained(seed: int, val_size: int) -> tuple[nn.Module, float]:
    """The backbone, and its accuracy in per cent on the turned digits that it was not trained on."""
    seed_everything(seed, verbose=False)
    optimizer = partial(torch.optim.AdamW, lr=2e-3, weight_decay=0.05)
    method = Classifier(MLP((1, 8, 8), (200, 200)), 10, optimizer=optimizer, lr_scheduler=WarmupCosine)
    data = Derived(Digits(), quarter_turns=1, batch_size=64, val_size=val_size, seed=seed)
    trainer = quiet_trainer(max_epochs=30, limit_val_batches=1.0, check_val_every_n_epoch=30)
    trainer.fit(method, datamodule=data)
    return method.backbone, 100 * float(trainer.callback_metrics["val/accuracy"])


def stream(seed: int, val_size: int) -> ClassStream:
    return ClassStream(Digits(), TASKS, PASSES, order=seed, batch_size=BATCH, val_size=val_size, seed=seed)


def learned(
    arm: str, backbone: nn.Module, seed: int, setting: tuple[float, float], val_size: int = 0
) -> tuple[IncrementalAccuracy, float]:
    """(what was known of each task after each, per cent of the last training batch right among its classes)."""
    seed_everything(seed, verbose=False)
    lr, share = setting
    method = SLCA(
        copy.deepcopy(backbone).requires_grad_(True),
        10,
        backbone_rate=share,
        align_epochs=5 if arm == "SLCA" else 0,
        seed=seed,
        optimizer=partial(torch.optim.SGD, lr=lr, momentum=0.9, weight_decay=5e-4),
        lr_scheduler=Staircase,
    )
    watched = Forgetting()
    trainer = quiet_trainer(max_epochs=1, limit_val_batches=0, callbacks=[watched])
    trainer.fit(method, datamodule=stream(seed, val_size))
    return watched.result(), 100 * float(trainer.callback_metrics["train/accuracy"])


@torch.no_grad()
def nearest_mean(backbone: nn.Module, seed: int, val_size: int = 0) -> float:
    """Accuracy after the last task, in per cent."""
    data = stream(seed, val_size)
    data.setup()
    moments = Moments.of(torch.zeros(0, 200))
    for task in range(TASKS):
        for batch in data.task_bank(task):
            moments = moments + Moments.of(unit_rows(backbone(batch["image"])), batch["label"], 10)
    head, right, rows = NearestMean().head(moments), 0, 0
    for loader in data.val_dataloader():
        for batch in loader:
            right += head.correct(unit_rows(backbone(batch["image"])), batch["label"])
            rows += len(batch["label"])
    return 100 * right / rows


def last(found: IncrementalAccuracy) -> float:
    return 100 * found.after_task()[-1]


def test_slca_forgets_less_than_fine_tuning(evidence) -> None:
    over_uniform, slow_over_uniform, aligned, over_means = {}, {}, {}, {}
    for seed in SEEDS:
        backbone, before = pretrained(seed, 0)
        evidence.figure("turned digits, after pre-training", before, seed, "%")
        reached = {"nearest class mean": nearest_mean(backbone.eval(), seed)}
        evidence.figure("last accuracy, nearest class mean", reached["nearest class mean"], seed, "%")
        for arm, setting in CHOSEN.items():
            found, own = learned(arm, backbone, seed, setting)
            reached[arm] = last(found)
            accuracies = found.after_task()
            evidence.figure(f"last accuracy, {arm}", reached[arm], seed, "%")
            evidence.figure(f"average accuracy, {arm}", 100 * sum(accuracies) / TASKS, seed, "%")
            evidence.figure(f"forgetting, {arm}", 100 * found.forgetting(), seed, "points")
            evidence.figure(f"last training batch among its own classes, {arm}", own, seed, "%")
        over_uniform[seed] = reached["SLCA"] - reached["uniform"]
        slow_over_uniform[seed] = reached["slow"] - reached["uniform"]
        aligned[seed] = reached["SLCA"] - reached["slow"]
        over_means[seed] = reached["SLCA"] - reached["nearest class mean"]
    evidence.note(
        f"1,437 training and 360 test digits, {PASSES} passes of each task in batches of {BATCH}; a test digit is 0.28 "
        "points. Rates of the head and shares of the backbone: "
        + ", ".join(f"{arm} {lr:g} and {share:g}" for arm, (lr, share) in CHOSEN.items())
        + f", each of {len(RATES['SLCA'])} settings, chosen on seed {SEARCH_SEED} and {VALIDATION} held-out digits."
    )
    evidence.claim("SLCA minus fine-tuning at one rate", over_uniform, at_least=20.0, unit="points")
    evidence.claim("slow learner minus fine-tuning at one rate", slow_over_uniform, at_least=8.0, unit="points")
    evidence.claim("SLCA minus the slow learner alone", aligned, at_least=5.0, unit="points")
    evidence.claim("SLCA minus nearest class mean", over_means, at_least=1.0, unit="points")


if __name__ == "__main__":
    backbone, before = pretrained(SEARCH_SEED, VALIDATION)
    means = nearest_mean(backbone.eval(), SEARCH_SEED, VALIDATION)
    print(f"turned digits {before:.2f} %, nearest class mean {means:.2f} %", flush=True)
    for arm, settings in RATES.items() if len(sys.argv) < 2 else [(arm, RATES[arm]) for arm in sys.argv[1:]]:
        for setting in settings:
            found, own = learned(arm, backbone, SEARCH_SEED, setting, VALIDATION)
            forgotten = 100 * found.forgetting()
            print(f"{arm} {setting}: last {last(found):.2f} %, forgetting {forgotten:.1f}, own {own:.1f} %", flush=True)
