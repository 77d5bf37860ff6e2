"""Small printed letters labelled in groups alone, and what features tell: what LOOK and projection heads share.

Pictures of 14 x 14, on which a probe of untrained features reads a quarter of the 26 letters, and of trained ones more
than four fifths. A letter's group is its number in the alphabet modulo the count of groups, so that each group has
letters of all shapes. Each seed draws pictures of its own.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from letters import letters
from lightning import seed_everything
from quiet import quiet_trainer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightspan.backbones.vision import SmallConvNet
from lightspan.evaluation.probes.knn import knn_accuracy
from lightspan.evaluation.probes.linear_probe import linear_probe_accuracy
from lightspan.optim.schedules import WarmupCosine
from lightspan.training.method import Method

LETTERS, COUNT, STEPS, BATCH = 26, 1600, 400, 128
Set = tuple[Tensor, Tensor]


@cache
def halves(seed: int) -> tuple[Set, Set]:
    """Pictures [N 1 14 14] in [-1, 1] and letters [N], to train and to test."""
    drawn = letters(2 * COUNT, seed)
    x = F.avg_pool2d(torch.from_numpy(drawn.images).float()[:, None] / 127.5 - 1, 2)
    y, order = torch.from_numpy(drawn.labels), torch.from_numpy(np.random.default_rng(seed).permutation(2 * COUNT))
    return (x[order[:COUNT]], y[order[:COUNT]]), (x[order[COUNT:]], y[order[COUNT:]])


def network() -> SmallConvNet:
    return SmallConvNet(width=8, stages=4)


def adam(rate: float) -> dict[str, Any]:
    """The optimiser of all arms."""
    schedule = partial(WarmupCosine, warmup=0.05, final=0.0)
    return {"optimizer": partial(torch.optim.Adam, lr=rate, weight_decay=1e-4), "lr_scheduler": schedule}


def trained(make: Callable[[], Method], groups: int, seed: int, steps: int = STEPS) -> Method:
    """On pictures labelled by their group; with steps=0 untrained. In evaluation mode."""
    (x, y), generator = halves(seed)[0], np.random.default_rng(seed)
    rows = [torch.from_numpy(generator.choice(len(x), BATCH, replace=False)) for _ in range(steps)]
    seed_everything(seed, verbose=False)
    method = make()
    batches: DataLoader[Any] = DataLoader(
        rows,  # type: ignore[arg-type]
        batch_size=None,
        collate_fn=lambda row: {"image": x[row], "label": y[row] % groups, "index": row},
    )
    if steps:
        quiet_trainer(max_steps=steps).fit(method, batches)
    return method.eval()


@torch.no_grad()
def told(features: nn.Module, groups: int, seed: int) -> dict[str, float]:
    """In per cent: a linear probe of the letters of test pictures, 20 neighbours of their group, and a linear probe of
    the groups of the pictures that were learned from.
    """
    (x, y), (test_x, test_y) = halves(seed)
    bank, asked = features(x), features(test_x)
    return {
        "letters": 100 * linear_probe_accuracy(bank, y, asked, test_y),
        "groups": 100 * knn_accuracy(bank, y % groups, asked, test_y % groups),
        "learned": 100 * linear_probe_accuracy(bank, y % groups, bank, y % groups),
    }
