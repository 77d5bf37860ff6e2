"""Nets trained under MaskLearning by every arm that the evidence on masks compares, with one search for each.

All arms of a task train for the same steps on the same batches, with the same share of the run for learning the mask,
and the same number of entries stays. What an arm has besides the rate of the weights is at its usual value.
"""

import logging
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import lightning
import torch
from quiet import quiet_trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightspan.callbacks.training.mask_learning import MaskLearning
from lightspan.optim.masks.by_gradient import ByGradient
from lightspan.optim.masks.by_score import ByScore
from lightspan.optim.masks.drop_and_grow import DropAndGrow
from lightspan.optim.masks.learner import MaskLearner
from lightspan.subspaces.masks.schedules import Cubic, Schedule
from lightspan.subspaces.masks.scores import Movement

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
EVERY = 20  # steps between two updates of an index set
Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Arm:
    """How a mask is chosen: a learner, and whether the density falls to its end or is there at once."""

    make: Callable[[], MaskLearner]
    falls: bool = True

    def callback(self, match: list[str], density: float, seed: int) -> MaskLearning:
        ahead: float | Schedule = Cubic(1.0, density, until=0.8) if self.falls else density
        return MaskLearning(match, self.make(), ahead, seed=seed)


ARMS = {
    "Concrete": Arm(lambda: ByGradient(optimizer=partial(torch.optim.Adam, lr=0.1))),
    "magnitude": Arm(lambda: ByScore(every=EVERY)),
    "drop and grow": Arm(lambda: DropAndGrow(0.3, EVERY), falls=False),
    "movement": Arm(lambda: ByScore(Movement(), memory=1.0, every=EVERY)),
    "magnitude, all at once": Arm(lambda: ByScore(every=10**9)),
    "random": Arm(lambda: DropAndGrow(0.0, EVERY), falls=False),
}
"""\"All at once\" trains with all weights for three quarters of the run and then cuts the smallest."""


class Net(lightning.LightningModule):
    """Anyone's module: a net, a loss, Adam."""

    def __init__(self, net: nn.Module, loss: Loss, rate: float) -> None:
        super().__init__()
        self.net, self.loss, self.rate = net, loss, rate

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return self.loss(self.net, *batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        return torch.optim.Adam(trained, lr=self.rate)


class Batches:
    """As many batches as there are steps, in an order of the seed."""

    def __init__(self, x: Tensor, y: Tensor, size: int, steps: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        rows: list[Tensor] = []
        while len(rows) < steps:
            rows += [part for part in torch.randperm(len(x), generator=generator).split(size) if len(part) == size]
        self.x, self.y, self.rows = x, y, rows[:steps]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.x[self.rows[index]], self.y[self.rows[index]]


def train(net: nn.Module, loss: Loss, batches: Batches, rate: float, callback: MaskLearning | None) -> None:
    """Trains `net` in place, with all its weights where there is no callback."""
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
        warnings.simplefilter("ignore")
        trainer = quiet_trainer(
            max_steps=len(batches),
            max_epochs=1,
            default_root_dir=folder,
            callbacks=[] if callback is None else [callback],
            log_every_n_steps=len(batches),
        )
        loader: Any = DataLoader(batches, batch_size=None)  # type: ignore[arg-type]
        trainer.fit(Net(net, loss, rate), loader)
