"""SimSiam without stop-gradient and without predictor, on Fashion-MNIST: what keeps the embeddings apart.

The paper (sections 4.1 and 4.2) has both collapse: every embedding becomes the same, and nothing is left to classify.
Arms have one network, one number of steps and the same rates to choose from, the best by 20-nearest-neighbour
accuracy of the features on validation images, on a seed of its own. Claims are measured on test images: by how much
features of SimSiam are better, and how much more its embeddings differ. `spread` is the deviation of unit-length
embeddings times the root of their width: near 1 where they lie all around, 0 where they are one point (the paper's
figure 2, middle).
"""

import time
from functools import partial

import torch
from lightning import seed_everything
from quiet import quiet_trainer
from torch import Tensor, nn
from torch.nn import functional as F

from lightspan.backbones.vision import SmallConvNet
from lightspan.datamodules.image.augment.views import TwoViews
from lightspan.datamodules.image.sets.small import FashionMNIST
from lightspan.evaluation.probes.knn import knn_accuracy
from lightspan.methods.distillation.simsiam import SimSiam
from lightspan.nn.heads.projector import Projector
from lightspan.optim.schedules import WarmupCosine

SEEDS, CHOSEN_ON, STEPS, BATCH = (0, 1, 2), 100, 120, 128
RATES = (0.01, 0.03, 0.1, 0.3)
ARMS = ("SimSiam", "no stop-gradient", "no predictor")


class BothSides(SimSiam):
    """Both sides of a cosine pass the gradient."""

    def target(self, z_BD: Tensor) -> Tensor:
        return z_BD


def made(arm: str, rate: float) -> SimSiam:
    predictor = nn.Identity() if arm == "no predictor" else Projector(128, [32], 128)
    return (BothSides if arm == "no stop-gradient" else SimSiam)(
        SmallConvNet(1, width=8, stages=4),
        Projector(64, [128, 128], 128, bias=False, batch_norm=True),
        predictor,
        optimizer=partial(torch.optim.SGD, lr=rate, momentum=0.9, weight_decay=1e-4),
        lr_scheduler=partial(WarmupCosine, warmup=0.0, final=0.0),
    )


@torch.no_grad()
def measured(method: SimSiam, data: FashionMNIST, split: str) -> tuple[float, float]:
    """(accuracy in per cent, spread) on the images of `split`, "val" or "test"."""
    method.eval()
    sides, embeddings = [], []
    for loader in (data.bank_dataloader(), getattr(data, f"{split}_dataloader")()):
        batches = list(loader)
        sides.append(torch.cat([method.features(batch) for batch in batches]))
        sides.append(torch.cat([batch["label"] for batch in batches]))
        embeddings = [method.embeddings(batch) for batch in batches]
    unit_ND = F.normalize(torch.cat(embeddings), dim=1)
    spread = float(unit_ND.std(dim=0).mean()) * unit_ND.shape[1] ** 0.5
    return 100 * float(knn_accuracy(*sides, k=20)), spread


def train(arm: str, rate: float, seed: int, split: str, steps: int = STEPS) -> tuple[float, float]:
    seed_everything(seed, verbose=False)
    method, data = made(arm, rate), FashionMNIST(BATCH, views=TwoViews(), seed=seed)
    trainer = quiet_trainer(max_steps=steps)
    data.setup("fit")
    if steps:
        trainer.fit(method, datamodule=data)
    return measured(method, data, split)


def test_stop_gradient_and_predictor_keep_embeddings_apart(evidence) -> None:
    started, accuracy, spread = time.process_time(), {}, {}
    for arm in ARMS:
        searched = {rate: train(arm, rate, CHOSEN_ON, "val")[0] for rate in RATES}
        best = max(searched, key=lambda rate: searched[rate])
        evidence.note(f"{arm}: rate {best}, of { ({rate: round(found, 1) for rate, found in searched.items()}) }")
        for seed in SEEDS:
            accuracy[arm, seed], spread[arm, seed] = train(arm, best, seed, "test")
            evidence.figure(f"kNN accuracy, {arm}", accuracy[arm, seed], seed, "%")
            evidence.figure(f"spread of embeddings, {arm}", spread[arm, seed], seed)
    for seed in SEEDS:
        evidence.figure("kNN accuracy, untrained", train("SimSiam", RATES[0], seed, "test", steps=0)[0], seed, "%")
    for arm in ARMS[1:]:
        gain = {seed: accuracy["SimSiam", seed] - accuracy[arm, seed] for seed in SEEDS}
        apart = {seed: spread["SimSiam", seed] - spread[arm, seed] for seed in SEEDS}
        evidence.claim(f"SimSiam minus {arm}, kNN accuracy", gain, at_least=5.0, unit="points")
        evidence.claim(f"SimSiam minus {arm}, spread of embeddings", apart, at_least=0.5)
    seconds = time.process_time() - started
    evidence.note(f"{STEPS} steps of {BATCH} images; {seconds:.0f} s of processor time altogether.")
