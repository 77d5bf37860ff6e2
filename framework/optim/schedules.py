"""Learning-rate schedules as functions of the share of the run that is done, so that a changed `max_steps` needs no
second edit.
"""

import math
from collections.abc import Callable

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightspan.errors import UserError

ScheduleCallable = Callable[[Optimizer, int], LRScheduler]
"""What a Method expects: called with the optimiser and the run's number of optimiser steps.
`torch.optim.lr_scheduler.CosineAnnealingLR` fits unchanged."""


class WarmupCosine(LRScheduler):
    """Linear warm-up from 0, then a half cosine down to a floor; every group keeps its own peak rate.

    With s the number of optimiser steps done, W = warmup * total_steps and T = total_steps:
    factor = (s + 1) / (W + 1) while s < W, then final + (1 - final) (1 + cos(pi (s - W) / (T - W))) / 2, and `final`
    after T.

    Args:
        total_steps: optimiser steps of the whole run, >= 1.
        warmup: share of the run, in [0, 1).
        final: share of the peak rate left at the end, in [0, 1].
    Raises: UserError for values outside these ranges.
    """

    def __init__(self, optimizer: Optimizer, total_steps: int, warmup: float = 0.1, final: float = 0.1) -> None:
        if total_steps < 1:
            raise UserError(
                f"total_steps={total_steps} must be at least 1; set trainer.max_steps or trainer.max_epochs"
            )
        if not 0 <= warmup < 1:
            raise UserError(f"warmup={warmup} is a share of the run and must be in [0, 1)")
        if not 0 <= final <= 1:
            raise UserError(f"final={final} is a share of the peak rate and must be in [0, 1]")
        self.total_steps, self.warmup, self.final = total_steps, warmup, final
        super().__init__(optimizer)

    def factor(self, step: int) -> float:
        """Share of the peak rate used by optimiser step number `step`, counted from 0."""
        warmup_steps = self.warmup * self.total_steps
        if step < warmup_steps:
            return (step + 1) / (warmup_steps + 1)
        done = min((step - warmup_steps) / max(self.total_steps - warmup_steps, 1), 1.0)
        return self.final + (1 - self.final) * (1 + math.cos(math.pi * done)) / 2

    def get_lr(self) -> list[float | Tensor]:
        return [base * self.factor(self.last_epoch) for base in self.base_lrs]
