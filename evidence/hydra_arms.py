"""What the evidence on Hydra shares: the arms, which differ in pairs and gate, or have SupCon's loss, and training."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightspan.backbones.vision import SmallConvNet
from lightspan.methods.contrastive.hydra import Hydra
from lightspan.methods.contrastive.supcon import SupCon
from lightspan.nn.class_pairs import Arbitrary, ClassPairs, Identical
from lightspan.nn.heads.class_gates import ClassPairGate
from lightspan.nn.heads.projector import Projector
from lightspan.optim.schedules import WarmupCosine

SEEDS = (0, 1, 2, 3, 4)
RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
BATCH, WIDTH = 128, 64


class Arm(NamedTuple):
    """Hydra with these pairs, or SupCon without any."""

    pairs: Callable[[int], ClassPairs] | None
    gated: bool = False


ARMS = {
    "Hydra": Arm(Arbitrary, gated=True),
    "no gate": Arm(Arbitrary),
    "identical pairs": Arm(Identical),
    "SupCon": Arm(None),
}


class Data(NamedTuple):
    """images [N C H W], standardised, and labels [N]."""

    images: Tensor
    labels: Tensor


def built(arm: Arm, seed: int, channels: int, classes: int, rate: float) -> Hydra | SupCon:
    torch.manual_seed(seed)
    backbone = SmallConvNet(in_chans=channels, width=8, stages=4)
    projector = Projector(backbone.num_features, [128], WIDTH, layer_norm=True)
    optimizer = partial(torch.optim.Adam, lr=rate, weight_decay=5e-4)
    method: Hydra | SupCon
    if arm.pairs is None:
        method = SupCon(backbone, projector, optimizer=optimizer)
    else:
        gate = ClassPairGate(classes, WIDTH, label_features=64, hidden=128) if arm.gated else None
        method = Hydra(backbone, projector, gate, arm.pairs(seed), optimizer=optimizer)
    method.log_training = lambda figures: None  # type: ignore[method-assign]
    return method


def train(method: Hydra | SupCon, data: Data, seed: int, steps: int) -> None:
    optimizer = method.groups.optimizer(method, method.optimizer)
    schedule = WarmupCosine(optimizer, steps, warmup=0.05, final=0.0)
    method.train()
    for step, rows in enumerate(batches(len(data.labels), steps, seed)):
        optimizer.zero_grad()
        method.training_step({"image": data.images[rows], "label": data.labels[rows]}, step).backward()
        optimizer.step()
        schedule.step()
    method.eval()


def batches(count: int, steps: int, seed: int) -> Iterator[Tensor]:
    generator = np.random.default_rng(seed)
    for _ in range(steps):
        yield torch.from_numpy(generator.choice(count, BATCH, replace=False))


@torch.no_grad()
def features(method: Hydra | SupCon, data: Data) -> Tensor:
    return torch.cat([method.features({"image": part}) for part in data.images.split(256)])
