"""What evidence on pre-training for few labels shares: batches of views, draws of labels, and fine-tuning."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from digits import parted
from quiet import quiet_trainer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightspan.datamodules.image.augment.views import Views, seeded
from lightspan.optim.schedules import WarmupCosine
from lightspan.training.method import Method

BATCH = 32


def digits_of(seed: int, searching: bool, side: int, test: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(training digits, test digits), each images [N 1 side side] in [0, 1] and labels; a search has its own."""
    images, labels = parted(seed, searching)
    x = torch.from_numpy(images).float()[:, None]
    x, y = F.interpolate(x, (side, side), mode="bilinear").clamp(0, 1), torch.from_numpy(labels)
    return (x[test:], y[test:]), (x[:test], y[:test])


def standardised(x: Tensor) -> Tensor:
    return (x - 0.3) / 0.35


def batches(images: Tensor, views: Views, steps: int, seed: int) -> DataLoader:
    """Views of images in a random order; each step has new ones."""
    generator = np.random.default_rng(seed)
    chosen = [generator.choice(len(images), min(BATCH, len(images)), replace=False) for _ in range(steps)]

    def batch(step: int) -> dict[str, Any]:
        with seeded(seed * 1_000_003 + step):
            of_images = [views(images[row]) for row in chosen[step]]
        stacked = [standardised(torch.stack(view)) for view in zip(*of_images, strict=True)]
        return {"views": stacked, "index": torch.from_numpy(chosen[step])}

    return DataLoader([*range(steps)], batch_size=None, collate_fn=batch)


def adamw(rate: float) -> dict[str, Callable[..., Any]]:
    """The optimiser of all arms."""
    return {
        "optimizer": partial(torch.optim.AdamW, lr=rate, weight_decay=0.04),
        "lr_scheduler": partial(WarmupCosine, final=0.0),
    }


def pretrained(method: Method, images: Tensor, views: Views, steps: int, seed: int) -> Method:
    """In evaluation mode; with steps=0 untrained."""
    if steps:
        quiet_trainer(max_steps=steps, gradient_clip_val=3.0).fit(method, batches(images, views, steps, seed))
    return method.eval()


def few(label_N: Tensor, each: int, seed: int) -> Tensor:
    """Places of `each` samples of every class, or of all there are."""
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(label_N)))
    return torch.cat([order[label_N[order] == one][:each] for one in label_N.unique()])


def fine_tuned(
    network: nn.Module, given: tuple[Tensor, Tensor], views: Views, steps: int, rate: float, seed: int
) -> nn.Module:
    """All weights, on labelled images; in evaluation mode."""
    (x, y), generator = given, np.random.default_rng(seed)
    optimizer = torch.optim.AdamW(network.parameters(), lr=rate, weight_decay=0.04)
    schedule = WarmupCosine(optimizer, max(steps, 1), final=0.0)
    network.train()
    for step in range(steps):
        rows = generator.choice(len(x), min(BATCH, len(x)), replace=False)
        with seeded(seed * 1_000_003 + step):
            seen = standardised(torch.stack([views(x[row])[0] for row in rows]))
        optimizer.zero_grad()
        F.cross_entropy(network(seen), y[rows]).backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 3.0)
        optimizer.step()
        schedule.step()
    return network.eval()


@torch.no_grad()
def accuracy(network: nn.Module, test: tuple[Tensor, Tensor]) -> float:
    """In per cent."""
    return 100 * float((network(standardised(test[0])).argmax(dim=1) == test[1]).double().mean())
