"""What is known only when a Trainer is about to take its first step: whether its data can be resumed, whether it will
ever be validated, and whether its schedules are long enough.
"""

import math
import re
import warnings
from collections.abc import Iterator
from typing import Any

from lightning.fabric.utilities.types import _Stateful
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, GradientAccumulationScheduler, Timer
from lightning.pytorch.utilities.types import LRSchedulerConfig
from torch.optim.lr_scheduler import ChainedScheduler, LRScheduler, OneCycleLR

from lightspan.core.errors import UserError, print_notes
from lightspan.nn.teachers.frozen import Frozen
from lightspan.training.checkpoints.restore import refuse_unresumable


class StartChecks(Callback):
    """Warns of training loaders that keep no position, of a run that ends before its first validation, and of one that
    outlasts its schedule. Silences Lightning's warning of a teacher in evaluation mode.

    Raises: UserError for a schedule that ends before the run, and for a checkpoint that cannot be resumed.
    """

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        refuse_unresumable(trainer, checkpoint)  # also where the recipe has no `Checkpoint`, which would do so

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        silence_frozen(pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.should_stop:  # a run of no steps
            return
        refuse_short_schedules(trainer)
        if trainer.is_global_zero and (loaders := without_position(trainer)):
            print_notes(
                [
                    f"the training data come from a {' and a '.join(loaders)}, which keeps no position: stopped inside "
                    "an epoch and resumed, this run sees other samples than an uninterrupted one; "
                    "lightspan.datamodules.loading.ranks.train_loader gives one that continues with the next sample"
                ]
            )
        if trainer.is_global_zero and (said := without_validation(trainer)):
            print_notes([said])
        if trainer.is_global_zero:
            print_notes(schedules_that_end_early(trainer))


def silence_frozen(module: LightningModule) -> None:
    """Lightning warns of modules in evaluation mode. Those of `Frozen` networks, such as teachers, are meant to be: as
    many as these are no news. A teacher's BatchNorm that normalises by its own batches is in training mode.
    """
    parts = (part for one in module.modules() if isinstance(one, Frozen) for part in one.modules())
    frozen = {id(part) for part in parts if not part.training}
    if frozen:
        warnings.filterwarnings("ignore", message=rf"Found {len(frozen)} module\(s\) in eval mode")


def without_validation(trainer: Trainer) -> str | None:
    """What to say of a run that could validate and ends before it does; None for any other."""
    batches, every = trainer.num_training_batches, trainer.check_val_every_n_epoch
    due = trainer.val_check_batch  # None where the clock decides
    # Loaders are asked for before the first epoch that is validated; until then nobody knows how much there is.
    empty = trainer.fit_loop.epoch_loop.val_loop._combined_loader is not None and not any(trainer.num_val_batches)
    if not trainer.enable_validation or empty or due is None:
        return None
    first = due if every is None else (every - 1) * batches + min(due, batches)
    total = math.inf if trainer.max_epochs in (None, -1) else (trainer.max_epochs or 0) * batches
    if trainer.max_steps >= 0:
        steps = trainer.accumulate_grad_batches  # batches of one, except at the end of an epoch
        of_epoch = math.ceil(batches / steps) if math.isfinite(batches) else math.inf
        whole, rest = divmod(trainer.max_steps, of_epoch)
        total = min(total, rest * steps + (whole * batches if whole else 0))
    if not total < first:
        return None
    when = f"after {first:.0f} batches" if math.isfinite(first) else "at the end of an epoch"
    often = every in (None, 1)
    way_out = f"trainer.val_check_interval={total:.0f} or lower" if often else "trainer.check_val_every_n_epoch=1"
    return (
        f"this run is never validated: it ends after {total:.0f} batches, and the first validation is due {when}; set "
        f"{way_out}, or train longer"
    )


def without_position(trainer: Trainer) -> list[str]:
    """The classes of those training loaders whose position is not in a checkpoint."""
    combined = trainer.fit_loop._combined_loader
    loaders = combined.flattened if combined is not None else []
    return sorted({type(loader).__name__ for loader in loaders if not isinstance(loader, _Stateful)})


def refuse_short_schedules(trainer: Trainer) -> None:
    """Raises UserError if a `OneCycleLR` has fewer steps than the run; torch would raise in the middle of it."""
    for schedule, length, last in _too_short_ones(trainer):
        if isinstance(schedule, OneCycleLR):
            raise UserError(_too_short(length, f"this run takes it to step {last}"))


def schedules_that_end_early(trainer: Trainer) -> list[str]:
    """What to say of each schedule that ends before the run: one of a resumed run is as long as that was to be when it
    began.
    """
    return [
        f"the schedule {type(schedule).__name__} ends at step {length}, and this run has steps up to {last}"
        + (f" (it is resumed, and was to end at step {length} when it began)" if schedule.last_epoch else "")
        + ": after its end the rate is no longer planned, and may stay at 0 without training anything. Let the run end "
        f"at step {length} (trainer.max_steps, trainer.max_epochs), or start one of {last} steps in another folder"
        for schedule, length, last in _too_short_ones(trainer)
    ]


def _too_short_ones(trainer: Trainer) -> Iterator[tuple[LRScheduler, int, int]]:
    """(schedule, its steps, to which the run takes it) of schedules that end before the run.

    None if the number of steps is not known: time or early stopping may end the run, or accumulation may change during
    it.
    """
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # a connector of the trainer sets it
    if any(isinstance(callback, EarlyStopping | Timer | GradientAccumulationScheduler) for callback in callbacks):
        return
    for config in trainer.lr_scheduler_configs:
        to_come = _calls_to_come(trainer, config)
        for schedule in _parts(config.scheduler) if math.isfinite(to_come) else ():
            length = getattr(schedule, "total_steps", getattr(schedule, "T_max", None))
            if isinstance(length, int) and (last := schedule.last_epoch + int(to_come)) > length:
                yield schedule, length, last


def exhausted_schedule(error: BaseException) -> str | None:
    """The message for torch's error that a schedule was stepped beyond its end; None for any other error."""
    found = re.fullmatch(r"Tried to step (\d+) times\. The specified number of total steps is (\d+)", str(error))
    return None if found is None else _too_short(int(found[2]), f"it came to step {found[1]}")


def _too_short(length: int, run: str) -> str:
    return (
        f"the schedule OneCycleLR has total_steps={length}, but {run}; beyond its end it has no learning rate. Give it "
        "total_steps=self.trainer.estimated_stepping_batches in configure_optimizers, or lower trainer.max_steps or "
        "trainer.max_epochs, or use a schedule that keeps its last rate, such as "
        "lightspan.optim.schedules.WarmupCosine"
    )


def _calls_to_come(trainer: Trainer, config: LRSchedulerConfig) -> float:
    """How often the Trainer will step a schedule until the end; infinite if that is not known."""
    if config.frequency != 1 or not trainer.lightning_module.automatic_optimization:
        return math.inf
    if config.interval == "step":
        return trainer.estimated_stepping_batches - trainer.global_step
    counted = trainer.max_epochs is not None and trainer.max_epochs >= 0 and trainer.max_steps == -1
    return (trainer.max_epochs or 0) - trainer.current_epoch if counted else math.inf


def _parts(schedule: object) -> Iterator[LRScheduler]:
    """The schedule itself, or those chained in it. Parts of a SequentialLR count their own steps."""
    if isinstance(schedule, ChainedScheduler):
        for part in schedule._schedulers:
            yield from _parts(part)
    elif isinstance(schedule, LRScheduler):
        yield schedule
