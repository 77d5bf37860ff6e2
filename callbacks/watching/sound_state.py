"""Weights and optimiser state of one moment, kept in CPU memory, to which a run can return."""

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_map

from lightspan.core.sharded import local
from lightspan.optim.virtual import own_state


class SoundState:
    """A copy of the module's and the optimisers' state; of sharded weights each rank keeps its part.

    Positions of data, schedules and counters of steps are not part of it: a run that returns goes on with new data.
    """

    def __init__(self, trainer: Trainer, module: LightningModule) -> None:
        self.module = {name: _copied(local(value)) for name, value in _tensors(module).items()}
        self.optimizers = [tree_map(_copied, own_state(optimizer)) for optimizer in trainer.optimizers]
        self.rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in trainer.optimizers]
        self.bases = [list(getattr(one.scheduler, "base_lrs", [])) for one in trainer.lr_scheduler_configs]

    @torch.no_grad()
    def restore(self, trainer: Trainer, module: LightningModule, factor: float) -> None:
        """Puts the state back, with `factor` times the learning rates of that moment; once more, times `factor` again.

        A schedule that computes from its `base_lrs`, or from the present rate, goes on with the new ones.
        """
        self.rates = [[rate * factor for rate in rates] for rates in self.rates]
        self.bases = [[base * factor for base in bases] for bases in self.bases]
        for name, value in _tensors(module).items():
            local(value).copy_(self.module[name])
        for optimizer, state, rates in zip(trainer.optimizers, self.optimizers, self.rates, strict=True):
            optimizer.load_state_dict(tree_map(_copied, state))
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate
        for one, bases in zip(trainer.lr_scheduler_configs, self.bases, strict=True):
            scheduler: Any = one.scheduler
            if bases:
                scheduler.base_lrs = list(bases)


def _tensors(module: LightningModule) -> dict[str, Tensor]:
    return {name: value for name, value in module.state_dict().items() if isinstance(value, Tensor)}


def _copied(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    # A DTensor stays on the devices of its mesh.
    return value.detach().clone() if isinstance(value, DTensor) else value.detach().to("cpu", copy=True)
