"""SwAV (arXiv 2006.09882) on Fashion-MNIST: small crops at the same cost, and codes with and without equipartition.

The card asks for small pictures of known classes; here they are the 3,000 training and 1,000 test pictures of
Fashion-MNIST that the package ships. The network is a convolutional one of 128 features, K = 60 prototypes, batches of
128. Arms:

- multi-crop: two large and four small crops.
- two crops: the large ones alone, with as many more steps as the small crops cost processor time; seconds are recorded.
- plain codes: multi-crop, but a code is the softmax of its scores, without Sinkhorn-Knopp's equal use of prototypes.
- untrained: the network before training.

Linear probes are fitted on features of the training pictures and read on the test pictures. Use of prototypes is the
entropy of how often each is the nearest of a test picture, over log K. Each arm's rate is chosen of the same four on
seed 100, by probes on 400 validation pictures that are neither trained nor tested on: `python evidence/test_82_swav.py`
repeats that search.
"""

import math
import time
from functools import partial

import torch
from lightning import seed_everything
from quiet import quiet_trainer
from torch import Tensor
from torch.nn import functional as F

from lightspan.backbones.vision import SmallConvNet
from lightspan.datamodules.image.augment.views import MultiCrop, RandomViews
from lightspan.datamodules.image.sets.small import FashionMNIST
from lightspan.evaluation.probes.linear_probe import linear_probe_accuracy
from lightspan.methods.clustering.swav import SwAV
from lightspan.nn.heads.projector import Projector
from lightspan.optim.schedules import WarmupCosine

SEEDS = (0, 1, 2)
BATCH, K, VALIDATION = 128, 60, 400
RATES = (3e-4, 1e-3, 3e-3, 1e-2)
STEPS = {"multi-crop": 240, "two crops": 400, "plain codes": 240}
CHOSEN = {"multi-crop": 3e-3, "two crops": 3e-3, "plain codes": 3e-4}


class PlainCodes(SwAV):
    """Codes without the constraint: what each picture prefers."""

    def codes(self, view: int, scores_BK: Tensor) -> Tensor:
        return (scores_BK.detach() / self.code_temperature).softmax(dim=1)


def method(arm: str, rate: float) -> SwAV:
    return (PlainCodes if arm == "plain codes" else SwAV)(
        SmallConvNet(width=16, stages=4),
        Projector(128, [256], 64),
        prototypes=K,
        freeze_prototypes=0.1,
        optimizer=partial(torch.optim.Adam, lr=rate, weight_decay=1e-6),
        lr_scheduler=partial(WarmupCosine, final=0.001),
    )


def pictures(arm: str, seed: int, val_size: int = 0) -> FashionMNIST:
    crops = [RandomViews(count=2, scale=(0.3, 1.0))]
    if arm != "two crops":
        crops.append(RandomViews(count=4, size=14, scale=(0.1, 0.3)))
    return FashionMNIST(BATCH, MultiCrop(crops), seed=seed, val_size=val_size)


def train(arm: str, rate: float, seed: int, val_size: int = 0) -> tuple[SwAV, SwAV, float]:
    """(untrained, trained, CPU seconds of `fit`)."""
    seed_everything(seed, verbose=False)
    before, after = (method(arm, rate) for _ in range(2))
    after.load_state_dict(before.state_dict())
    trainer = quiet_trainer(max_steps=STEPS[arm])
    start = time.process_time()
    trainer.fit(after, datamodule=pictures(arm, seed, val_size))
    return before.eval(), after.eval(), time.process_time() - start


@torch.no_grad()
def measure(trained: SwAV, val_size: int = 0) -> dict[str, float]:
    """Accuracy in per cent, and use of prototypes in [0, 1]."""
    data = pictures("two crops", 0, val_size)
    data.setup()
    sides: list[Tensor] = []
    for loader in (data.bank_dataloader(), data.val_dataloader()):
        batches = list(loader)
        sides += [
            torch.cat([trained.backbone(of["image"]) for of in batches]),
            torch.cat([of["label"] for of in batches]),
        ]
    nearest = trained.prototypes(F.normalize(trained.network.head(sides[2]), dim=1)).argmax(dim=1)
    share_1K = torch.bincount(nearest, minlength=K)[None] / len(nearest)
    return {
        "linear": 100 * float(linear_probe_accuracy(*sides)),
        "use": float(torch.special.entr(share_1K).sum()) / math.log(K),
    }


def test_swav(evidence) -> None:
    runs: dict[str, dict[int, dict[str, float]]] = {arm: {} for arm in ("untrained", *STEPS)}
    for seed in SEEDS:
        for arm in STEPS:
            before, after, seconds = train(arm, CHOSEN[arm], seed)
            runs[arm][seed] = measure(after)
            evidence.figure(f"CPU seconds, {arm}", seconds, seed, "s")
            if arm == "multi-crop":
                runs["untrained"][seed] = measure(before)
    for arm, of_seed in runs.items():
        for seed, measured in of_seed.items():
            evidence.figure(f"linear probe, {arm}", measured["linear"], seed, "%")
            evidence.figure(f"use of prototypes, {arm}", measured["use"], seed)
    evidence.note(
        f"Steps of {BATCH} pictures: {STEPS}. Rates of {RATES} chosen on seed 100: "
        f"{', '.join(f'{arm} {rate:g}' for arm, rate in CHOSEN.items())}. The cost of a step is that of this processor "
        "under the load it had."
    )

    def gain(over: str) -> dict[int, float]:
        return {seed: runs["multi-crop"][seed]["linear"] - runs[over][seed]["linear"] for seed in SEEDS}

    evidence.claim("linear probe, multi-crop minus untrained", gain("untrained"), at_least=4.0, unit="points")
    evidence.claim("linear probe, multi-crop minus two crops", gain("two crops"), at_least=1.0, unit="points")
    use = {arm: {seed: of[seed]["use"] for seed in SEEDS} for arm, of in runs.items()}
    evidence.claim("use of prototypes over log K, multi-crop", use["multi-crop"], at_least=0.9)
    evidence.claim("use of prototypes over log K, plain codes", use["plain codes"], at_most=0.5)


def search() -> None:
    for arm in STEPS:
        for rate in RATES:
            _, trained, seconds = train(arm, rate, 100, VALIDATION)
            print(f"{arm}, rate {rate:g}: {measure(trained, VALIDATION)['linear']:.1f} %, {seconds:.0f} s", flush=True)


if __name__ == "__main__":
    search()
