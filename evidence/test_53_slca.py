"""SLCA (arXiv 2303.05118) on digits in five tasks of two classes: against fine-tuning at one rate, and by its parts.

The backbone, an MLP of 64-200-200, is pre-trained on the same digits after a quarter turn, with their labels: a related
task whose pictures look different. Then the upright digits come in five tasks, in an order of the seed, 20 times each:

- uniform: cross-entropy of the new classes, one rate for backbone and head.
- slow: the same with the backbone at a hundredth of the head's rate, as the paper has it.
- SLCA: the slow learner, and after each task the alignment.
- nearest class mean, on the frozen backbone.

The figure is the accuracy on all classes after the last task, on 360 test digits. Rates are searched by it on seed 100
and 300 digits that are held out of training. The floor is chance, and the ceiling fine-tuning on all classes at once,
for as many passes. Gates: the last training batch, among its own two classes.

Without alignment the slow learner does not hold what the paper claims of it: it stays below fine-tuning at one rate.
Each task's scores are learned apart from those of others, and a backbone that hardly moves does not level them.
"""

import copy
from functools import cache, partial

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
RATES = (1e-3, 3e-3, 1e-2, 3e-2)
UNIFORM, SLOW, FULL = "fine-tuning at one rate", "the slow learner", "SLCA"
MEANS, JOINT = "nearest class mean", "all classes at once"
SHARES = {UNIFORM: 1.0, SLOW: 0.01, FULL: 0.01}
"""The backbone's rate by the head's, of each arm that is trained."""
CHANCE = 10.0


@cache
def pretrained(seed: int, val_size: int) -> tuple[nn.Module, float]:
    """The backbone, and its accuracy in per cent on the turned digits that it was not trained on."""
    seed_everything(seed, verbose=False)
    optimizer = partial(torch.optim.AdamW, lr=2e-3, weight_decay=0.05)
    method = Classifier(MLP((1, 8, 8), (200, 200)), 10, optimizer=optimizer, lr_scheduler=WarmupCosine)
    data = Derived(Digits(), quarter_turns=1, batch_size=64, val_size=val_size, seed=seed)
    trainer = quiet_trainer(max_epochs=30, limit_val_batches=1.0, check_val_every_n_epoch=30)
    trainer.fit(method, datamodule=data)
    return method.backbone, 100 * float(trainer.callback_metrics["val/accuracy"])


def stream(seed: int, val_size: int, tasks: int = TASKS) -> ClassStream:
    return ClassStream(Digits(), tasks, PASSES, order=seed, batch_size=BATCH, val_size=val_size, seed=seed)


def learned(arm: str, seed: int, rate: float, val_size: int = 0) -> tuple[IncrementalAccuracy, float]:
    """(what was known of each task after each, per cent of the last training batch right among its classes)."""
    backbone, _ = pretrained(seed, val_size)
    seed_everything(seed, verbose=False)
    method = SLCA(
        copy.deepcopy(backbone).requires_grad_(True),
        10,
        backbone_rate=SHARES.get(arm, 1.0),
        align_epochs=5 if arm == FULL else 0,
        seed=seed,
        optimizer=partial(torch.optim.SGD, lr=rate, momentum=0.9, weight_decay=5e-4),
        lr_scheduler=Staircase,
    )
    watched = Forgetting()
    trainer = quiet_trainer(max_epochs=1, limit_val_batches=0, callbacks=[watched])
    trainer.fit(method, datamodule=stream(seed, val_size, 1 if arm == JOINT else TASKS))
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
    def searched(arm: str, rate: float) -> float:
        return last(learned(arm, SEARCH_SEED, rate, VALIDATION)[0])

    rates = evidence.search({arm: partial(searched, arm) for arm in SHARES}, RATES, seed=SEARCH_SEED)
    reached: dict[str, dict[int, float]] = {}
    for arm in (*SHARES, JOINT):
        runs = {seed: learned(arm, seed, rates.get(arm, rates[UNIFORM])) for seed in SEEDS}
        reached[arm] = {seed: last(found) for seed, (found, _) in runs.items()}
        for seed, (found, _) in runs.items():
            evidence.figure(f"last accuracy, {arm}", reached[arm][seed], seed, "%")
            evidence.figure(f"average accuracy, {arm}", 100 * sum(found.after_task()) / len(found.rows), seed, "%")
            evidence.figure(f"forgetting, {arm}", 100 * found.forgetting(), seed, "points")
        if arm != JOINT:
            evidence.gate(arm, {seed: own for seed, (_, own) in runs.items()}, 50.0, by=30.0, unit="points")
    reached[MEANS] = {seed: nearest_mean(pretrained(seed, 0)[0].eval(), seed) for seed in SEEDS}
    for seed in SEEDS:
        evidence.figure("turned digits, after pre-training", pretrained(seed, 0)[1], seed, "%")
        evidence.figure(f"last accuracy, {MEANS}", reached[MEANS][seed], seed, "%")
    evidence.note(f"1,437 training and 360 test digits, {PASSES} passes of each task in batches of {BATCH}.")

    def over(second: str, of: dict[int, float]) -> dict[int, float]:
        return {seed: of[seed] - reached[second][seed] for seed in SEEDS}

    for first, second, margin in ((FULL, UNIFORM, 20.0), (SLOW, UNIFORM, 8.0), (FULL, SLOW, 5.0), (FULL, MEANS, 1.0)):
        evidence.claim(
            f"{first} minus {second}", over(second, reached[first]), at_least=margin, unit="points",
            floor=over(second, dict.fromkeys(SEEDS, CHANCE)), ceiling=over(second, reached[JOINT]),
            arms=(first, *({second} & SHARES.keys())),
        )  # fmt: skip


if __name__ == "__main__":
    backbone, before = pretrained(SEARCH_SEED, VALIDATION)
    means = nearest_mean(copy.deepcopy(backbone).eval(), SEARCH_SEED, VALIDATION)
    print(f"turned digits {before:.2f} %, nearest class mean {means:.2f} %", flush=True)
    for arm in (*SHARES, JOINT):
        for rate in RATES:
            found, own = learned(arm, SEARCH_SEED, rate, VALIDATION)
            forgotten = 100 * found.forgetting()
            print(f"{arm} {rate}: last {last(found):.2f} %, forgetting {forgotten:.1f}, own {own:.1f} %", flush=True)
