"""What is left to do for a step at the moment of its checkpoint, and how the next start does it.

Lightning writes checkpoints in the middle of its work: after the optimiser's step and before the line of that step is
logged, before the validation and the end of the epoch that are due, before schedules that follow a metric step,
and before the end of training. A run that is killed there and continues from that checkpoint would never do these
things: Lightning resumes after them.
"""

import contextlib
import copy
from collections.abc import Iterator, Mapping
from typing import Any

from lightning.fabric.utilities.apply_func import convert_tensors_to_scalars
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.loops.fit_loop import RestartStage
from lightning.pytorch.loops.loop import _Loop
from lightning.pytorch.trainer import call
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch import Tensor

from lightspan.training.checkpoints.restore import explained_restoring
from lightspan.training.loggers.jsonl import JsonlLogger


def log_position(trainer: Trainer) -> dict[str, Any]:
    """The position in the logs, for a checkpoint: "lines" of metrics.jsonl, which are on disk then, "unlogged", and
    the "metrics" that schedules and callbacks follow.

    Every rank must call it: figures that are means over ranks are reduced.
    """
    lines = [logger.position() for logger in trainer.loggers if isinstance(logger, JsonlLogger)]
    return {"lines": lines[0] if lines else None, "unlogged": unlogged(trainer), "metrics": _metrics(trainer)}


def _metrics(trainer: Trainer) -> dict[str, Tensor]:
    """Lightning's `callback_metrics`, with the means over the training epoch if its last batch is done."""
    metrics, results = dict(trainer.callback_metrics), trainer.fit_loop.epoch_loop._results
    if trainer.fit_loop.epoch_loop._num_ready_batches_reached() and results:
        metrics.update(results.metrics(on_step=False)["callback"])
    return {name: value.detach().cpu() for name, value in metrics.items()}


def rewind_logs(trainer: Trainer, step: int, lines: int | None) -> None:
    """Drops what was logged after a checkpoint: for optimiser step `step` or later, or after that many lines."""
    for logger in trainer.loggers:
        if isinstance(logger, JsonlLogger):
            logger.rewind(step, lines)
        elif isinstance(logger, TensorBoardLogger):
            _purge(logger, step)


@rank_zero_only
def _purge(logger: TensorBoardLogger, step: int) -> None:
    """TensorBoard's own way: a session start at a step hides what earlier files have for this step and later."""
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # type: ignore[import-untyped]

    start = Event(step=step, session_log=SessionLog(status=SessionLog.START))
    logger.experiment._get_file_writer().add_event(start)


def unlogged(trainer: Trainer) -> dict[str, Any] | None:
    """{"step", "metrics"} of the line that Lightning is about to log; None if it has none to log."""
    loop, connector = trainer.fit_loop.epoch_loop, trainer._logger_connector
    if trainer.validating or trainer.sanity_checking or trainer._results is None:
        return None
    step = loop._batches_that_stepped
    count: Any = loop.batch_progress.total
    if count.completed == count.processed - 1:  # in on_train_batch_end
        accumulates = loop._should_accumulate() and trainer.lightning_module.automatic_optimization
        if accumulates or not connector.should_update_logs:
            return None
    elif connector._first_loop_iter is None:  # at the end of an epoch
        step -= 1
    else:
        return None
    metrics = convert_tensors_to_scalars(connector.metrics["log"])
    if not metrics:
        return None
    if "step" in metrics:  # Lightning's way to log against another axis
        return {"step": int(metrics.pop("step")), "metrics": metrics}
    return {"step": step, "metrics": {"epoch": trainer.current_epoch, **metrics}}


@contextlib.contextmanager
def before_validation(trainer: Trainer) -> Iterator[None]:
    """Inside a validation: a checkpoint written in this block is before all of the validation and after its step."""
    progress = trainer.fit_loop.epoch_loop.batch_progress
    for count in (progress.total, progress.current):
        count.completed -= 1
    try:
        yield
    finally:
        progress.increment_completed()


class PendingWork:
    """Does what was left to do when a checkpoint was written: the log line, the validation, schedules that follow a
    metric, the end of the epoch, and the end of training if no step is left.

    Created while the checkpoint is loaded for training; then call `begin` before Lightning checks whether training is
    over, and `finish` when training starts.

    Args:
        checkpoint: as loaded.
        log: what `log_position` returned when it was written; {} if it was not called.
    """

    def __init__(self, checkpoint: Mapping[str, Any], log: Mapping[str, Any]) -> None:
        self._line: dict[str, Any] | None = log.get("unlogged")
        self._metrics: dict[str, Tensor] = log.get("metrics", {})
        self._step: int = checkpoint["global_step"]
        fit = checkpoint["loops"]["fit_loop"]
        batch, epoch = fit["epoch_loop.batch_progress"], fit["epoch_progress"]
        count = batch["total"]
        self._inside_step = count["completed"] == count["processed"] - 1
        self._inside_epoch = epoch["total"]["processed"] == epoch["total"]["started"] - 1
        self._behind_batch = self._inside_epoch and count["ready"] == count["processed"] > 0
        self._at_epochs_end = epoch["total"]["completed"] == epoch["total"]["processed"] - 1
        self._last_batch: bool = batch["is_last_batch"]
        self._epochs: dict[str, Any] = epoch
        self._limits: tuple[int, int | None] | None = None

    def begin(self, trainer: Trainer) -> None:
        """Lets Lightning enter its loop if no step is left: it would otherwise also skip the end of training."""
        loop = trainer.fit_loop
        if self._no_step_is_left(trainer) or _reached(self._epochs["current"]["processed"], loop.max_epochs):
            self._limits = (loop.epoch_loop.max_steps, loop.max_epochs)
            loop.epoch_loop.max_steps = loop.max_epochs = -1

    def finish(self, trainer: Trainer) -> None:
        """Every rank must call it, once everything in the checkpoint is restored.

        Afterwards the loops are where those of an uninterrupted run would be, at the next batch or the next
        epoch, and Lightning has nothing to advance for a restart.
        """
        loop, device = trainer.fit_loop, trainer.strategy.root_device
        if self._limits is not None:
            loop.epoch_loop.max_steps, loop.max_epochs = self._limits
        over = self._no_step_is_left(trainer) or _reached(self._epochs["current"]["processed"], loop.max_epochs)
        trainer._logger_connector._callback_metrics.update({n: v.to(device) for n, v in self._metrics.items()})
        if self._behind_batch or self._at_epochs_end:
            _Loop.restarting.fset(loop, False)  # type: ignore[attr-defined]  # also of the inner loops
            for stage in (loop, loop.epoch_loop, loop.epoch_loop.val_loop):
                stage.reset_restart_stage()
            loop.epoch_progress.load_state_dict(self._epochs)  # Lightning has advanced it
        loop._restarting = False  # else Lightning skips the metric's schedules at the end of this epoch
        if self._line is not None:
            with explained_restoring(trainer.ckpt_path, "lightspan.log.unlogged"):
                _log(trainer, self._line["step"], self._line["metrics"])
        if self._inside_step:
            loop.epoch_loop.batch_progress.increment_completed()
            assert loop._data_fetcher is not None
            if loop.epoch_loop._should_check_val_fx(loop._data_fetcher):
                _validate(trainer)
        if self._behind_batch:
            _end_batch(trainer)
            if over or self._last_batch:
                _end_epoch(trainer)
            else:
                _go_on_inside_epoch(trainer)
        elif self._at_epochs_end:
            _move_schedules(trainer)
            loop.epoch_progress.increment_completed()

    def _no_step_is_left(self, trainer: Trainer) -> bool:
        return _reached(self._step, trainer.fit_loop.epoch_loop.max_steps)


def _reached(count: int, limit: int | None) -> bool:
    return limit is not None and limit != -1 and count >= limit


def _log(trainer: Trainer, step: int, metrics: dict[str, float]) -> None:
    for logger in trainer.loggers:
        logger.log_metrics(metrics=metrics, step=step)
        logger.save()


def _validate(trainer: Trainer) -> None:
    """As Lightning does after a batch."""
    loop = trainer.fit_loop.epoch_loop.val_loop
    trainer.validating = True
    loop.restarting = False
    loop.run()
    trainer.training = True


def _end_batch(trainer: Trainer) -> None:
    """As Lightning does after a batch and its validation."""
    loop = trainer.fit_loop.epoch_loop
    loop.update_lr_schedulers("step", update_plateau_schedulers=True)
    if not loop._should_accumulate():
        loop._batches_that_stepped += 1


def _go_on_inside_epoch(trainer: Trainer) -> None:
    """Lets Lightning begin its loop over an epoch's batches at their counts. It begins one that is not restarted
    at 0, and advances the counts of a restarted one by what it believes to be missing.
    """
    loop = trainer.fit_loop
    loop._restart_stage = RestartStage.RESTARTED_MID_EPOCH  # the epoch has started
    epoch_loop, reset = loop.epoch_loop, loop.epoch_loop.reset

    def reset_but_for_counts() -> None:
        epoch_loop.reset = reset  # type: ignore[method-assign]
        counts = copy.deepcopy(epoch_loop.state_dict())
        epoch_loop.restarting = True  # Lightning then warns of loaders that do not keep their position
        reset()
        epoch_loop.load_state_dict(counts)
        epoch_loop.restarting = False

    epoch_loop.reset = reset_but_for_counts  # type: ignore[method-assign]


def _end_epoch(trainer: Trainer) -> None:
    """As Lightning does after the last batch of an epoch."""
    connector, loop = trainer._logger_connector, trainer.fit_loop
    connector.epoch_end_reached()
    loop.epoch_progress.increment_processed()
    call._call_callback_hooks(trainer, "on_train_epoch_end", monitoring_callbacks=False)
    call._call_lightning_module_hook(trainer, "on_train_epoch_end")
    call._call_callback_hooks(trainer, "on_train_epoch_end", monitoring_callbacks=True)
    connector.on_epoch_end()
    _move_schedules(trainer)
    loop.epoch_loop._batches_that_stepped -= 1  # as Lightning does, for the step of the log line
    connector.update_train_epoch_metrics()
    loop.epoch_loop._batches_that_stepped += 1
    loop.epoch_progress.increment_completed()


def _move_schedules(trainer: Trainer) -> None:
    """Those that follow a metric or epochs; the others stepped before the checkpoint."""
    loop = trainer.fit_loop.epoch_loop
    if loop._num_ready_batches_reached():
        loop.update_lr_schedulers("epoch", update_plateau_schedulers=True)


def load_positions(trainer: Trainer) -> None:
    """Give loaders the position that Lightning does not: that of a run bounded by epochs, resumed at an epoch's end."""
    loop = trainer.fit_loop
    if loop._combined_loader_states_to_load and loop._combined_loader is not None and loop._data_fetcher is not None:
        loop._combined_loader._load_state_dicts(loop._combined_loader_states_to_load)
        loop._combined_loader_states_to_load = []
        iter(loop._data_fetcher)  # the iterator made before knows nothing of the position
