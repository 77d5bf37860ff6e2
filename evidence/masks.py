"""Nets trained under MaskLearning by every arm that the evidence on masks compares, with one search for each.

An arm is a way to choose a mask with four settings; its search trains them all once, on a seed of its own, and judges
on data that no claim is measured on. All arms of a task train for the same steps on the same batches, with the same
share of the run for learning the mask, and the same number of entries stays.
"""

import logging
import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import product
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
SEARCH_SEED = 100
EVERY = 20  # steps between two updates of an index set
Settings = Mapping[str, float]
Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Arm:
    """How a mask is chosen: a learner from settings, and whether the density falls to its end or is there at once."""

    name: str
    make: Callable[[Settings], MaskLearner]
    grid: Mapping[str, tuple[float, ...]]
    falls: bool = True

    def settings(self) -> list[dict[str, float]]:
        return [dict(zip(self.grid, values, strict=True)) for values in product(*self.grid.values())]

    def density(self, end: float) -> float | Schedule:
        return Cubic(1.0, end, until=0.8) if self.falls else end


def arms(rates: tuple[float, float, float, float]) -> list[Arm]:
    """Every arm has four settings; those with a second setting try the middle two rates of the weights.

    "Magnitude, all at once" trains with all weights for three quarters of the run and then cuts the smallest.
    """
    middle = rates[1:3]
    return [
        Arm(
            "Concrete",
            lambda s: ByGradient(optimizer=partial(torch.optim.Adam, lr=s["logit rate"])),
            {"rate": middle, "logit rate": (0.03, 0.1)},
        ),
        Arm(
            "movement", lambda s: ByScore(Movement(), memory=s["memory"], every=EVERY),
            {"rate": middle, "memory": (0.9, 1.0)},
        ),
        Arm("drop and grow", lambda s: DropAndGrow(s["alpha"], EVERY), {"rate": middle, "alpha": (0.1, 0.3)}, False),
        Arm("magnitude", lambda s: ByScore(every=EVERY), {"rate": rates}),
        Arm("magnitude, all at once", lambda s: ByScore(every=10**9), {"rate": rates}),
        Arm("random", lambda s: DropAndGrow(0.0, EVERY), {"rate": rates}, False),
    ]  # fmt: skip


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


def callback_of(arm: Arm, settings: Settings, match: list[str], density: float, seed: int) -> MaskLearning:
    return MaskLearning(match, arm.make(settings), arm.density(density), seed=seed)


def searched(arm: Arm, trial: Callable[[Arm, Settings], float]) -> dict[str, float]:
    """The settings with the highest result of their one trial."""
    return max(arm.settings(), key=lambda settings: trial(arm, settings))
