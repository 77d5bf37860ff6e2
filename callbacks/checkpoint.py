"""Checkpoints at the right moments, and refused in words when they do not fit.

`Checkpoint` is the callback; it brings `WholeFileCheckpointIO` with it, so that one line in a Trainer is enough.
"""

from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from lightspan import __version__
from lightspan.callbacks.checkpoint_io import FORMAT, WholeFileCheckpointIO
from lightspan.callbacks.jsonl_logger import JsonlLogger
from lightspan.errors import UserError
from lightspan.files import remove_leftovers


class Checkpoint(ModelCheckpoint):
    """Keeps `last.ckpt` and `step=N.ckpt`, each a whole file, at every validation or every `every_n_train_steps`.

    On top of Lightning's ModelCheckpoint: files are whole or absent; a failed write names the last whole one and leaves
    it; a checkpoint of another model, a torn or a foreign file is refused in words; the last step of a run is always
    kept, as taken between two steps, so that a run which `max_steps` cut inside an epoch resumes on its very next
    batch; a JsonlLogger drops the lines after the step that training resumes from.

    Args:
        dirpath: folder; by default `trainer.default_root_dir`/checkpoints.
        filename: template with {step}, {epoch} and logged metrics.
        monitor, mode: metric to rank by and its direction; without one the newest is kept.
        save_top_k: how many ranked files stay; without `monitor` 1 (newest), -1 (all) or 0 (only last.ckpt).
        every_n_train_steps: optimiser steps between checkpoints; None: at every validation, or at every epoch's end
            where there is none.
        train_time_interval: time between checkpoints, instead of steps.
        save_weights_only: leave out optimiser and loop state; such a file cannot be resumed from.
    """

    def __init__(
        self,
        dirpath: str | None = None,
        filename: str = "{step}",
        monitor: str | None = None,
        mode: Literal["min", "max"] = "min",
        save_top_k: int = 1,
        every_n_train_steps: int | None = None,
        train_time_interval: timedelta | None = None,
        save_weights_only: bool = False,
    ) -> None:
        if dirpath is not None and "://" in dirpath:
            raise UserError(
                f"dirpath={dirpath!r}: whole files are promised on local and mounted file systems only; give a folder "
                "and copy it from there"
            )
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
        self._kept_step: int | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self.dirpath is None:
            self.dirpath = str(Path(trainer.default_root_dir).absolute() / "checkpoints")
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = WholeFileCheckpointIO()
        super().setup(trainer, pl_module, stage)
        if trainer.is_global_zero and stage == "fit":
            remove_leftovers(self.dirpath)
        # Lightning calls no callback between reading a checkpoint and filling the model; a hook of the module is there.
        self._fit_check = pl_module.register_load_state_dict_pre_hook(_refuses_other_models(trainer))

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["lightspan"] = {
            "version": __version__,
            "format": FORMAT,
            "model": class_path(pl_module),
            "optimizers": [class_path(optimizer) for optimizer in trainer.optimizers],
        }

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn != TrainerFn.FITTING:
            return
        self._wrote = checkpoint.get("lightspan", {})
        for logger in trainer.loggers:
            if isinstance(logger, JsonlLogger):
                logger.rewind(checkpoint["global_step"])

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Here the optimisers exist and their state is not restored yet.
        before, now = self._wrote.get("optimizers"), [class_path(optimizer) for optimizer in trainer.optimizers]
        if before is not None and before != now:
            raise UserError(
                f"checkpoint {trainer.ckpt_path} was trained with {', '.join(before)}, this run uses {', '.join(now)}: "
                "their states do not fit; resume with the optimiser that wrote it"
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._drop_fit_check()
        _load_positions(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._drop_fit_check()
        super().on_exception(trainer, pl_module, exception)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._drop_fit_check()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if (_stops_inside_epoch(trainer) or _reached_max_steps(trainer)) and not self._should_skip_saving_checkpoint(
            trainer
        ):
            # A validation at this same step may still have to rank and save, so this save leaves no trace in that test.
            saved_before = self._last_global_step_saved
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))
            self._last_global_step_saved = saved_before

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Lightning counts a cut epoch as done by now: resuming from here would skip the rest of its data.
        if _stops_inside_epoch(trainer):
            return
        super().on_train_epoch_end(trainer, pl_module)
        ends = trainer.should_stop or trainer.current_epoch + 1 == trainer.max_epochs
        if ends or (self._every_n_epochs and self._should_save_on_train_epoch_end(trainer)):
            self._keep_last(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_validation_end(trainer, pl_module)
        if self._every_n_epochs and not self._should_save_on_train_epoch_end(trainer):
            self._keep_last(trainer)

    def _keep_last(self, trainer: Trainer) -> None:
        # Lightning writes last.ckpt only where it also ranked a file, so not when the metric did not improve.
        if self._kept_step != trainer.global_step and not self._should_skip_saving_checkpoint(trainer):
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        try:
            super()._save_checkpoint(trainer, filepath)
            self._kept_step = trainer.global_step
        except UserError as error:
            whole = sorted(Path(filepath).parent.glob("*.ckpt"), key=lambda path: path.stat().st_mtime)
            kept = f"the last whole checkpoint is {whole[-1]}" if whole else "there is no checkpoint yet"
            raise UserError(f"{error}; {kept}") from error

    def _drop_fit_check(self) -> None:
        if self._fit_check is not None:
            self._fit_check.remove()
            self._fit_check = None


def _stops_inside_epoch(trainer: Trainer) -> bool:
    loop = trainer.fit_loop.epoch_loop
    return loop.done and not loop.batch_progress.is_last_batch


def _reached_max_steps(trainer: Trainer) -> bool:
    return trainer.max_steps != -1 and trainer.global_step >= trainer.max_steps


def _load_positions(trainer: Trainer) -> None:
    """Give loaders the position that Lightning does not: that of a run bounded by epochs, resumed at an epoch's end."""
    loop = trainer.fit_loop
    if loop._combined_loader_states_to_load and loop._combined_loader is not None and loop._data_fetcher is not None:
        loop._combined_loader._load_state_dicts(loop._combined_loader_states_to_load)
        loop._combined_loader_states_to_load = []
        iter(loop._data_fetcher)  # the iterator made before knows nothing of the position


def _refuses_other_models(trainer: Trainer) -> Callable[..., None]:
    def check(
        module: torch.nn.Module, state_dict: Mapping[str, Any], prefix: str, _: Any, strict: bool, *rest: Any
    ) -> None:
        io = trainer.strategy.checkpoint_io
        written_by = io.loaded_stamp.get("model") if isinstance(io, WholeFileCheckpointIO) else None
        check_fits(state_dict, module, str(trainer.ckpt_path), written_by, strict)

    return check


def check_fits(
    state_dict: Mapping[str, Any],
    module: torch.nn.Module,
    origin: str,
    written_by: str | None = None,
    strict: bool = True,
) -> None:
    """Raise a UserError when `state_dict` belongs to another model than `module`.

    Args:
        origin: path of the checkpoint, for the message.
        written_by: class that wrote it, when known.
        strict: when False, missing and unexpected names pass and only shapes count.
    """
    wanted = module.state_dict()
    missing = [name for name in wanted if name not in state_dict] if strict else []
    unexpected = [name for name in state_dict if name not in wanted] if strict else []
    reshaped = [
        f"{name} {list(state_dict[name].shape)} there, {list(tensor.shape)} here"
        for name, tensor in wanted.items()
        if isinstance(tensor, Tensor)
        and isinstance(state_dict.get(name), Tensor)
        and state_dict[name].shape != tensor.shape
    ]
    groups = {"missing in it": missing, "only in it": unexpected, "of another shape": reshaped}
    if differences := "; ".join(f"{what}: {_first(names)}" for what, names in groups.items() if names):
        author = f" (written by {written_by})" if written_by else ""
        raise UserError(
            f"checkpoint {origin}{author} belongs to another model than {class_path(module)}: {differences}; "
            "load it with the recipe and settings that wrote it, or start without it"
        )


def class_path(instance: object) -> str:
    """Full import path of the class of `instance`."""
    return f"{type(instance).__module__}.{type(instance).__qualname__}"


def _first(names: Sequence[str], shown: int = 3) -> str:
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more
