"""Schedules as functions of the share of the run that is done, so that a changed `max_steps` needs no second edit: of
learning rates and weight decay, and of what a teacher follows and says.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, SequentialLR

from lightspan.core.errors import UserError
from lightspan.core.ranges import require_shares, require_temperatures

ScheduleCallable = Callable[[Optimizer, int], LRScheduler]
"""What a Method expects: called with the optimiser and the run's number of optimiser steps.
`torch.optim.lr_scheduler.CosineAnnealingLR` fits unchanged."""


def restarting_schedule(
    schedule: ScheduleCallable, lengths: Sequence[int], factors: Sequence[float] | None = None
) -> ScheduleCallable:
    """The schedule of a run of several parts, at the start of each of which it begins anew.

    Args:
        schedule: of one part.
        lengths: optimiser steps of each part, at least one part.
        factors: of the rates in each part, of which the first is 1; None is 1 in all.
    """

    def made(optimizer: Optimizer, total_steps: int) -> LRScheduler:
        parts = [schedule(optimizer, length) for length in lengths]
        for part, factor in zip(parts, factors or [1.0] * len(parts), strict=True):
            part.base_lrs = [factor * rate for rate in part.base_lrs]
        return SequentialLR(optimizer, parts, milestones=[*accumulate(lengths)][:-1])

    return made


def cosine_between(start: float, end: float, share: float) -> float:
    """A half cosine from `start` to `end` over `share` in [0, 1], flat at both: of a rate, a momentum, a decay."""
    return end + (start - end) * (1 + math.cos(math.pi * share)) / 2


def line_between(start: float, end: float, share: float, until: float) -> float:
    """A line from `start` to `end`, which it reaches at the share `until` and keeps; `end` at once where that is 0."""
    return start + (end - start) * share / until if share < until else end


@dataclass(frozen=True)
class TeacherMomentum:
    """Of a teacher that averages its student's weights: on a half cosine over the run, as in BYOL's section 3.1. Called
    with the share of the run that is done.

    Args:
        momentum, final_momentum: at its start and its end, in [0, 1].
    Raises: UserError for values outside this range.
    """

    momentum: float
    final_momentum: float

    def __post_init__(self) -> None:
        require_shares(momentum=self.momentum, final_momentum=self.final_momentum)

    def __call__(self, share: float) -> float:
        return cosine_between(self.momentum, self.final_momentum, share)


@dataclass(frozen=True)
class TeacherTemperature:
    """Of a teacher's targets: on a line over the first part of the run, then constant, as in DINO's appendix C. Called
    with the share of the run that is done.

    Args:
        teacher_temperature, final_temperature: at the start and after the warm-up, > 0.
        temperature_warmup: share of the run that the warm-up takes, in [0, 1].
    Raises: UserError for values outside these ranges.
    """

    teacher_temperature: float
    final_temperature: float
    temperature_warmup: float

    def __post_init__(self) -> None:
        require_temperatures(teacher_temperature=self.teacher_temperature, final_temperature=self.final_temperature)
        require_shares(temperature_warmup=self.temperature_warmup)

    def __call__(self, share: float) -> float:
        return line_between(self.teacher_temperature, self.final_temperature, share, self.temperature_warmup)


class WarmupCosine(LRScheduler):
    """Linear warm-up, then a half cosine down to a floor; every group keeps its own peak rate.

    With s the number of optimiser steps done, W = warmup * total_steps and T = total_steps:
    factor = first + (1 - first) (s + 1) / (W + 1) while s < W, then
    final + (1 - final) (1 + cos(pi c (s - W) / (T - W))) / 2
    with c = covered, and after T what it was there: `final`, if c is odd.

    Args:
        total_steps: optimiser steps of the whole run, >= 1.
        warmup: share of the run, in [0, 1).
        final: share of the peak rate left at the end of the cosine, in [0, 1].
        covered: half cosines that the run goes through, above 0: with less than 1 it stops while the rate still falls,
            with more the rate rises again, as torch's CosineAnnealingLR does beyond T_max.
        first: share of the peak rate from which the warm-up starts, in [0, 1].
    Raises: UserError for values outside these ranges.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        total_steps: int,
        warmup: float = 0.1,
        final: float = 0.1,
        covered: float = 1.0,
        first: float = 0.0,
    ) -> None:
        if total_steps < 1:
            raise UserError(
                f"total_steps={total_steps} must be at least 1; set trainer.max_steps or trainer.max_epochs"
            )
        if not 0 <= warmup < 1:
            raise UserError(f"warmup={warmup} is a share of the run and must be in [0, 1)")
        if not (0 <= first <= 1 and 0 <= final <= 1):
            raise UserError(f"first={first} and final={final} are shares of the peak rate and must be in [0, 1]")
        if not 0 < covered < math.inf:
            raise UserError(f"covered={covered} is a number of half cosines and must be above 0")
        self.total_steps, self.warmup = total_steps, warmup
        self.first, self.final, self.covered = first, final, covered
        super().__init__(optimizer)

    def factor(self, step: int) -> float:
        """Share of the peak rate used by optimiser step number `step`, counted from 0."""
        warmup_steps = self.warmup * self.total_steps
        if step < warmup_steps:
            return self.first + (1 - self.first) * (step + 1) / (warmup_steps + 1)
        return self.after_warmup(min((step - warmup_steps) / max(self.total_steps - warmup_steps, 1), 1.0))

    def after_warmup(self, share: float) -> float:
        """Share of the peak rate when so large a share of the steps after the warm-up is done."""
        return cosine_between(1.0, self.final, self.covered * share)

    def get_lr(self) -> list[float | Tensor]:
        return [base * self.factor(self.last_epoch) for base in self.base_lrs]


class WarmupLine(WarmupCosine):
    """`WarmupCosine` with a line instead of the cosine: final + (1 - final) (T - s) / (T - W) after the warm-up.

    Args:
        total_steps, warmup, final: as in `WarmupCosine`.
    Raises: UserError for values outside these ranges.
    """

    def __init__(self, optimizer: Optimizer, total_steps: int, warmup: float = 0.1, final: float = 0.0) -> None:
        super().__init__(optimizer, total_steps, warmup, final)

    def after_warmup(self, share: float) -> float:
        return 1.0 + (self.final - 1.0) * share


class WarmupCosineDecay(WarmupCosine):
    """`WarmupCosine` of the rate, and a half cosine of the weight decay from each group's own to `decay_factor` times
    it (Caron et al., "DINO", 2021, arXiv 2104.14294, section 4: 0.04 to 0.4). Groups without decay keep none.

    Args:
        total_steps, warmup, final, first: as in `WarmupCosine`.
        decay_factor: weight decay at the end by that at the start, >= 0.
    Raises: UserError for values outside these ranges.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        total_steps: int,
        warmup: float = 0.1,
        final: float = 0.1,
        decay_factor: float = 10.0,
        first: float = 0.0,
    ) -> None:
        if decay_factor < 0:
            raise UserError(f"decay_factor={decay_factor} must be at least 0")
        self.decay_factor = decay_factor
        self.base_decays = [group["weight_decay"] for group in optimizer.param_groups]
        super().__init__(optimizer, total_steps, warmup, final, first=first)

    def step(self, epoch: int | None = None) -> None:
        super().step(epoch)
        factor = cosine_between(1.0, self.decay_factor, min(self.last_epoch / self.total_steps, 1.0))
        for group, base in zip(self.optimizer.param_groups, self.base_decays, strict=True):
            group["weight_decay"] = base * factor


class Staircase(LRScheduler):
    """A constant rate that falls by a factor at some shares of the run; every group keeps its own first rate.

    Args:
        total_steps: optimiser steps of the whole run, >= 1; later steps keep the last rate.
        at: shares of the run in (0, 1), ascending; a whole number cuts the run into so many equal parts.
        factor: of each fall, in (0, 1].
    Raises: UserError for values outside these ranges.
    """

    def __init__(
        self, optimizer: Optimizer, total_steps: int, at: Sequence[float] | int = (0.9,), factor: float = 0.1
    ) -> None:
        if total_steps < 1:
            raise UserError(
                f"total_steps={total_steps} must be at least 1; set trainer.max_steps or trainer.max_epochs"
            )
        shares = [part / at for part in range(1, at)] if isinstance(at, int) else [*at]
        wrong = at < 1 if isinstance(at, int) else shares != sorted(shares) or not all(0 < x < 1 for x in shares)
        if wrong or not 0 < factor <= 1:
            raise UserError(
                f"Staircase at={at} must be ascending shares in (0, 1), or parts of the run, 1 or more, and "
                f"factor={factor} in (0, 1]"
            )
        self.falls = [math.ceil(share * total_steps - 1e-9) for share in shares]
        self.factor = factor
        super().__init__(optimizer)

    def get_lr(self) -> list[float | Tensor]:
        fallen = sum(self.last_epoch >= step for step in self.falls)
        return [base * self.factor**fallen for base in self.base_lrs]
