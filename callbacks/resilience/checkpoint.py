"""Checkpoints at the right moments, with a clear message if one does not fit.

`Checkpoint` is the callback; it adds `WholeFileCheckpointIO`, and `FolderCheckpoints` for sharded models, so
that one line in a Trainer is enough.
"""

from collections.abc import Callable, Mapping
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal
from weakref import proxy

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins.precision import DoublePrecision
from lightning.pytorch.trainer.states import TrainerFn
from torch.utils.hooks import RemovableHandle

from lightspan.callbacks.resilience.stamp import KEY, go_on_drawing, refuse_other_optimizers, stamp
from lightspan.callbacks.resilience.writer import Writer
from lightspan.core.errors import UserError
from lightspan.core.files.atomic import remove_leftovers
from lightspan.core.files.places import PathName, PathUse, RunPath
from lightspan.core.files.runs import CHECKPOINTS
from lightspan.training.checkpoints.copies import checked
from lightspan.training.checkpoints.fit import check_fits
from lightspan.training.checkpoints.io import WholeFileCheckpointIO
from lightspan.training.checkpoints.names import OwnFiles
from lightspan.training.checkpoints.pending_work import PendingWork, load_positions, rewind_logs
from lightspan.training.checkpoints.restore import (
    explained_restoring,
    guard,
    refuse_unresumable,
    unfreeze,
    warn_of_unresumable,
)


class Checkpoint(OwnFiles):
    """Keeps `last.ckpt` and `step=N.ckpt`, each complete, at every validation or every `every_n_train_steps`.

    Beyond Lightning's ModelCheckpoint: checkpoints are whole or absent, also the folders of a sharded model; each
    has a manifest, and the pointer `latest` follows the newest whole one; a failed write names the last whole one and
    leaves it; a checkpoint of another model, a torn or a foreign file is refused with a message; a run's last step is
    always kept, as taken between two steps, so that a run that `max_steps` ended inside an epoch resumes with exactly
    the next batch; two names that are due at the same moment are one file on disk; what a killed process could not
    remove is removed when the run is resumed, and only files of this folder with a name of this pattern are; the random
    states of every rank and the run ids of the loggers are included; a resumed run drops what was logged after the
    checkpoint, and first does what was still to do there (`PendingWork`).

    Args:
        dirpath: folder; by default `trainer.default_root_dir`/checkpoints.
        filename: template with {step}, {epoch} and logged metrics; a / in the name of a metric becomes _.
        monitor, mode: metric to rank by and its direction; without one the newest is kept.
        save_top_k: how many ranked files stay; without `monitor` 1 (newest), -1 (all) or 0 (only last.ckpt).
        every_n_train_steps: optimiser steps between checkpoints; None: at every validation, or at every epoch's end
            if there is none.
        train_time_interval: time between checkpoints, instead of steps.
        save_weights_only: leave out optimiser and loop state; a run cannot be resumed from such a file.
        in_background: copy the state to CPU memory at the step and write it while training continues. The next
            save and the end of fit wait for it. It needs the checkpoint's size in CPU memory.
        copies: SCHEME://BUCKET/NAME in an object store, into which each new checkpoint is copied while training
            continues (`lightspan.training.checkpoints.copies`); `fit --resume` continues from there. Only the command
            line may set it. A copy that fails gives a warning and does not stop the run; the end of fit waits for the
            last one.
    """

    alters_training = False  # see config.identity

    def __init__(
        self,
        dirpath: RunPath | None = None,
        filename: PathName = "{step}",
        monitor: str | None = None,
        mode: Literal["min", "max"] = "min",
        save_top_k: int = 1,
        every_n_train_steps: int | None = None,
        train_time_interval: timedelta | None = None,
        save_weights_only: bool = False,
        in_background: bool = False,
        copies: Annotated[str, PathUse.SERVER] | None = None,
    ) -> None:
        if dirpath is not None and "://" in dirpath:
            raise UserError(
                f"dirpath={dirpath!r}: checkpoints can only be written safely to local and mounted file systems; "
                "give a folder, and copies=s3://BUCKET/NAME for copies in a store"
            )
        self._copies = None if copies is None else checked(copies, "copies")
        super().__init__(
            dirpath=dirpath,
            filename=filename,
            monitor=monitor,
            mode=mode,
            save_top_k=save_top_k,
            save_last=True,
            every_n_train_steps=every_n_train_steps,
            train_time_interval=train_time_interval,
            save_weights_only=save_weights_only,
            enable_version_counter=False,  # the folder belongs to one run; last.ckpt is replaced in one step
        )
        self._fit_check: RemovableHandle | None = None
        self._wrote: dict[str, Any] = {}
        self._rest: PendingWork | None = None
        self._kept_step: int | None = None
        self._keeps_only = False
        self._stored: dict[str, Any] = {}
        self._in_background = in_background
        self._writer = Writer(Path(dirpath or ""), in_background=False)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self.dirpath is None:
            self.dirpath = str(Path(trainer.default_root_dir).absolute() / CHECKPOINTS)
        super().setup(trainer, pl_module, stage)
        fits = stage == "fit"
        self._writer = Writer(Path(self.dirpath or ""), self._in_background and fits, self._copies if fits else None)
        self._writer.use_whole_files(trainer, partial(_refuse_shards, trainer))
        if trainer.is_global_zero and fits:
            remove_leftovers(self.dirpath)
        self.look(trainer)
        guard(trainer)
        if isinstance(trainer.precision_plugin, DoublePrecision):
            pl_module.double()  # Lightning does so after loading the weights, which float32 would have rounded
        # Between reading a checkpoint and filling the model, Lightning calls no callback, but a hook of the module.
        self._fit_check = pl_module.register_load_state_dict_pre_hook(_refuses_other_models(trainer))

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint[KEY] = stamp(trainer, pl_module)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn != TrainerFn.FITTING:
            return
        refuse_unresumable(trainer, checkpoint)
        self._wrote = checkpoint.get(KEY, {})
        with explained_restoring(trainer.ckpt_path, "lightspan.trained"):
            unfreeze(trainer, pl_module, self._wrote.get("trained"))
        log = self._wrote.get("log", {})
        with explained_restoring(trainer.ckpt_path, "lightspan.log"):
            rewind_logs(trainer, checkpoint["global_step"], log.get("lines"))
        with explained_restoring(trainer.ckpt_path, "loops.fit_loop"):
            self._rest = PendingWork(checkpoint, log)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Here the optimisers exist and their state is not restored yet.
        refuse_other_optimizers(trainer, self._wrote)
        warn_of_unresumable(trainer)
        if self._rest is not None:
            self._rest.begin(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._drop_fit_check()
        with explained_restoring(trainer.ckpt_path, "loops.fit_loop"):
            load_positions(trainer)
        with explained_restoring(trainer.ckpt_path, "lightspan.random_states"):
            go_on_drawing(self._wrote.get("random_states"))
        if trainer.strategy.broadcast(self._is_last(trainer.ckpt_path)):
            self._take_up(trainer)
        if trainer.is_global_zero and trainer.ckpt_path:
            for path in self.forgotten(trainer, Path(trainer.ckpt_path)):
                self._remove_checkpoint(trainer, str(path))
        if self._rest is not None:
            self._rest.finish(trainer)
            self._rest = None

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._writer.new_moment()
        super().on_train_end(trainer, pl_module)
        self._writer.finish()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._drop_fit_check()
        self._writer.new_moment()
        super().on_exception(trainer, pl_module, exception)
        try:
            self._writer.finish()
        except UserError as error:  # the run ends by its own exception
            exception.add_note(str(error))
        self._writer.close()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._drop_fit_check()
        self._writer.close()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._writer.new_moment()
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if (_stops_inside_epoch(trainer) or _reached_max_steps(trainer)) and not self._should_skip_saving_checkpoint(
            trainer
        ):
            self._keep_step(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Lightning counts a cut epoch as done by now: resuming from here would skip the rest of its data.
        self._writer.new_moment()
        if _stops_inside_epoch(trainer):
            return
        super().on_train_epoch_end(trainer, pl_module)
        ends = trainer.should_stop or trainer.current_epoch + 1 == trainer.max_epochs
        if ends or (self._every_n_epochs and self._should_save_on_train_epoch_end(trainer)):
            self._keep_last(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._writer.new_moment()
        super().on_validation_end(trainer, pl_module)
        if self._every_n_epochs and not self._should_save_on_train_epoch_end(trainer):
            self._keep_last(trainer)

    def _is_last(self, path: str | Path | None) -> bool:
        return path is not None and self._last.exists() and self._last.samefile(path)

    def _take_up(self, trainer: Trainer) -> None:
        """From now on training continues from a save of this process: what was saved at its step is not saved
        again, which at the end of a run would change nothing but counters and positions.
        """
        self.last_model_path = self._last_checkpoint_saved = str(self._last)
        self._kept_step = trainer.global_step
        if self._stored.get("keeps_only", True):
            self._defer_save_until_validation = self._stored.get("deferred", False)
        else:
            self._last_global_step_saved = trainer.global_step

    @property
    def _last(self) -> Path:
        return Path(self.dirpath or "") / f"{self.CHECKPOINT_NAME_LAST}{self.FILE_EXTENSION}"

    def state_dict(self) -> dict[str, Any]:
        """In addition to the ranking: whether this save only keeps a step, at which another one may still be due, and
        whether it is because a save waits for the metric of a validation.
        """
        deferred = self._keeps_only and self._defer_save_until_validation
        return {**super().state_dict(), "keeps_only": self._keeps_only, "deferred": deferred}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._stored = state_dict

    def _keep_step(self, trainer: Trainer) -> None:
        """Writes only last.ckpt. What is due at a validation at this same step still ranks and saves: this save leaves
        no trace in Lightning's test for it.
        """
        saved_before, self._keeps_only = self._last_global_step_saved, True
        try:
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))
        finally:
            self._last_global_step_saved, self._keeps_only = saved_before, False

    def _keep_last(self, trainer: Trainer) -> None:
        # Lightning writes last.ckpt only if it also ranked a file, so not if the metric did not improve.
        if self._kept_step != trainer.global_step and not self._should_skip_saving_checkpoint(trainer):
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        if self._writer.save(trainer, filepath, partial(super()._save_checkpoint, trainer, filepath)):
            self._last_checkpoint_saved = filepath
            for logger in trainer.loggers if trainer.is_global_zero else []:
                logger.after_save_checkpoint(proxy(self))
        self._kept_step = trainer.global_step

    def _remove_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        if trainer.is_global_zero and self.may_remove(Path(filepath)):
            self._writer.afterwards(filepath, trainer.strategy.checkpoint_io.remove_checkpoint)

    def save_now(self, trainer: Trainer) -> None:
        """Writes last.ckpt at the end of an optimiser step, on all ranks; returns once it is whole."""
        self._writer.new_moment()
        self._keep_step(trainer)
        self._writer.finish()

    def _drop_fit_check(self) -> None:
        if self._fit_check is not None:
            self._fit_check.remove()
            self._fit_check = None


def _stops_inside_epoch(trainer: Trainer) -> bool:
    loop = trainer.fit_loop.epoch_loop
    return loop.done and not loop.batch_progress.is_last_batch


def _reached_max_steps(trainer: Trainer) -> bool:
    return trainer.max_steps != -1 and trainer.global_step >= trainer.max_steps


def _refuse_shards(trainer: Trainer, checkpoint: dict[str, Any], path: Path) -> None:
    """Raises: UserError for the checkpoint of a sharded model that does not fit."""
    written, module = checkpoint.get(KEY, {}), trainer.lightning_module
    check_fits(checkpoint["state_dict"], module, str(path), written.get("model"), module.strict_loading)
    if trainer.state.fn == TrainerFn.FITTING:
        refuse_other_optimizers(trainer, written)


def _refuses_other_models(trainer: Trainer) -> Callable[..., None]:
    def check(
        module: torch.nn.Module, state_dict: Mapping[str, Any], prefix: str, _: Any, strict: bool, *rest: Any
    ) -> None:
        io = trainer.strategy.checkpoint_io
        written_by = io.loaded_stamp.get("model") if isinstance(io, WholeFileCheckpointIO) else None
        check_fits(state_dict, module, str(trainer.ckpt_path), written_by, strict)

    return check
