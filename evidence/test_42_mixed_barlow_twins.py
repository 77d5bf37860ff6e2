"""Mixed Barlow Twins (arXiv 2312.02151) against Barlow Twins on 600 digits, in training that lasts too long on purpose.

Barlow Twins is reported to overfit in long training with a wide embedding: nearest-neighbour accuracy rises, then
falls. The mixed term should remove the fall. Both arms are `MixedBarlowTwins` with the same data, views, network,
optimiser and schedule, all at the method's defaults for small images; they differ only in `lam_reg`.

Rate and batch size were chosen for the plain arm, on seed 100 and 200 validation images that are neither trained nor
tested on, by the peak of its curve: `python evidence/test_42_mixed_barlow_twins.py` repeats that sweep. Its peaks in
per cent at batch 100 and 200: lr 1e-3 98.5 and 98.5, lr 3e-3 99.5 and 98.5, lr 1e-2 99.0 and 98.5.

The first claim did not hold when it was measured, and its margin stays as it was set: at that rate the plain arm ends
0.6 points below its peak, so there is hardly any decay to remove, and at 98 % of 360 images a point is more than half
of the remaining errors. The smaller fall of the mixed arm starts from a lower peak.
"""

import time
from functools import partial
from typing import Literal

import torch
from lightning import Callback, LightningModule, Trainer, seed_everything
from quiet import quiet_trainer

from lightspan.backbones.vision import SmallConvNet
from lightspan.datamodules.image.augment.views import TwoViews
from lightspan.datamodules.image.sets.small import Digits
from lightspan.evaluation.probes.knn import knn_accuracy
from lightspan.methods.contrastive.mixed_barlow_twins import MixedBarlowTwins
from lightspan.nn.heads.projector import Projector
from lightspan.optim.schedules import WarmupCosine

EPOCHS, TRACK_EVERY = 400, 10
LR, BATCH = 3e-3, 100
NEIGHBOURS = 20
SEEDS = (0, 1, 2)


class KnnCurve(Callback):
    """Nearest-neighbour accuracy in per cent on a held-out split, before training and after every tenth epoch."""

    def __init__(self, split: Literal["validation", "test"]) -> None:
        self.split = split
        self.accuracies: list[float] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.measure(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if (trainer.current_epoch + 1) % TRACK_EVERY == 0:
            self.measure(trainer, pl_module)

    @torch.no_grad()
    def measure(self, trainer: Trainer, pl_module: LightningModule) -> None:
        data: Digits = trainer.datamodule  # type: ignore[attr-defined]
        held_out = data.test_dataloader() if self.split == "test" else data.val_dataloader()
        pl_module.eval()
        sides = []
        for loader in (data.bank_dataloader(), held_out):
            batches = list(loader)
            sides.append(torch.cat([pl_module.features(batch) for batch in batches]))
            sides.append(torch.cat([batch["label"] for batch in batches]))
        pl_module.train()
        self.accuracies.append(100 * float(knn_accuracy(*sides, k=NEIGHBOURS)))


def train(
    seed: int, lam_reg: float, split: Literal["validation", "test"], lr: float = LR, batch_size: int = BATCH
) -> tuple[list[float], float]:
    """One run. Returns the accuracy curve in per cent, first entry before training, and the CPU seconds of `fit`."""
    seed_everything(seed, verbose=False)
    backbone = SmallConvNet(in_chans=1, width=16, stages=3)
    method = MixedBarlowTwins(
        backbone,
        Projector(backbone.num_features, hidden=[512], out_features=512),
        optimizer=partial(torch.optim.Adam, lr=lr, weight_decay=1e-6),
        lr_scheduler=partial(WarmupCosine, warmup=10 / EPOCHS, final=0.0),
        lam_reg=lam_reg,
        normalize=True,
    )
    data = Digits(batch_size, views=TwoViews(flip=0.0), train_size=600, val_size=200, seed=seed)
    curve = KnnCurve(split)
    trainer = quiet_trainer(max_epochs=EPOCHS, callbacks=[curve])
    start = time.process_time()
    trainer.fit(method, datamodule=data)
    return curve.accuracies, time.process_time() - start


def test_the_mixed_term_removes_the_decay_of_long_training(evidence) -> None:
    gain, less_decay, above_random, cost = {}, {}, {}, {}
    for seed in SEEDS:
        (plain, plain_s), (mixed, mixed_s) = train(seed, 0.0, "test"), train(seed, 4.0, "test")
        for arm, accuracies in (("plain", plain), ("mixed", mixed)):
            evidence.figure(f"kNN accuracy, {arm}, end", accuracies[-1], seed, "%")
            evidence.figure(f"kNN accuracy, {arm}, peak", max(accuracies), seed, "%")
        evidence.figure("kNN accuracy, untrained", plain[0], seed, "%")
        gain[seed] = mixed[-1] - plain[-1]
        less_decay[seed] = (max(plain) - plain[-1]) - (max(mixed) - mixed[-1])
        above_random[seed] = min(plain[-1], mixed[-1]) - plain[0]
        cost[seed] = mixed_s / plain_s
    evidence.note(
        f"600 training and 360 test digits, {EPOCHS} epochs, k = {NEIGHBOURS}, accuracy every {TRACK_EVERY} epochs; "
        f"lr {LR:g} and batch {BATCH} chosen by the plain arm's peak on seed 100 and 200 validation images."
    )
    evidence.claim("end, mixed minus plain", gain, at_least=1.0, unit="points")
    # 360 images and three seeds resolve 0.09 points: the margin says no more than "smaller".
    evidence.claim("fall from peak to end, plain minus mixed", less_decay, at_least=0.01, unit="points")
    evidence.claim("end of the worse arm minus untrained", above_random, at_least=5.0, unit="points")
    evidence.claim("CPU seconds, mixed over plain", cost, at_most=1.8)


if __name__ == "__main__":
    for rate in (1e-3, 3e-3, 1e-2):
        for size in (100, 200):
            accuracies, seconds = train(100, 0.0, "validation", rate, size)
            print(f"lr {rate:g} batch {size}: peak {max(accuracies):.1f} end {accuracies[-1]:.1f} % in {seconds:.0f} s")
