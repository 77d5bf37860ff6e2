"""A captured step, taken once more up to the optimiser, by the Trainer and with the settings of its run."""

import contextlib
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.utilities.apply_func import move_data_to_device
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from lightspan.callbacks.resilience.random_state import restore_random_states
from lightspan.cli.config.allow import refusal
from lightspan.cli.config.build import Built, Resolved, build, with_layer
from lightspan.cli.config.identity import alters_training
from lightspan.cli.replay.findings import Findings, NotFinite
from lightspan.cli.replay.rank_state import RankState
from lightspan.core.distributed import end_process_group, world_size
from lightspan.core.errors import UserError
from lightspan.core.sharded import local, own_part
from lightspan.nn.image_numbers import keep_on_host
from lightspan.training.captures import Capture, read_weights


class _Done(Exception):
    """Ends the replay: the step is as far as it is to go."""


def replayed(resolved: Resolved, folder: Path, capture: Capture, rank: int | None) -> list[NotFinite]:
    """What is not finite when the captured step is taken again, in the order in which it happens; empty if nothing is.

    Args:
        resolved: what the run was trained with, for the ranks of this replay.
        folder: the capture's.
        rank: whose micro-batches and random states are taken; None takes those of this process's rank.
    Raises: UserError for a capture that is not whole, or that does not fit the model.
    """
    with tempfile.TemporaryDirectory(prefix="lightspan-") as scratch:
        built = build(_without_watchers(resolved, capture), Path(scratch))
        if rank is None and built.trainer.world_size != capture.ranks:
            raise UserError(
                f"{folder} was captured on {capture.ranks} ranks, and this replay has {built.trainer.world_size}; "
                "replay it without --all-ranks, or start it as the run was started"
            )
        step = _Step(built, folder, capture, rank, lambda name: refusal(name, resolved.allow_modules))
        callbacks: list[Callback] = built.trainer.callbacks  # type: ignore[attr-defined]
        callbacks.append(step)
        with warnings.catch_warnings(), torch.compiler.set_stance("force_eager"):
            warnings.filterwarnings("ignore", message="Anomaly Detection")
            with contextlib.suppress(_Done), step.blames_batch():
                built.trainer.fit(built.model, **step.data())
    return step.findings.found


def replayed_together(resolved: Resolved, folder: Path, capture: Capture) -> dict[int, list[NotFinite]]:
    """`replayed` on all ranks at once, each with what it saw: for losses that see the batches of all ranks.

    Returns: the findings by rank, on all ranks. Raises: UserError for another number of ranks than the run had.
    """
    found = replayed(resolved, folder, capture, None)
    if world_size() == 1:
        return {0: found}
    everyone: list[Any] = [None] * world_size()
    dist.all_gather_object(everyone, found)
    end_process_group()
    return dict(enumerate(everyone))


def _without_watchers(resolved: Resolved, capture: Capture) -> Resolved:
    """Nothing is logged, validated or saved, and only callbacks that alter steps take part."""
    callbacks = resolved.config.get("trainer", {}).get("callbacks") or {}
    watchers = {name: None for name, spec in callbacks.items() if not alters_training(spec)}
    quiet: dict[str, Any] = {"logger": False, "limit_val_batches": 0, "num_sanity_val_steps": 0}
    quiet |= {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    quiet |= {"accumulate_grad_batches": capture.accumulate, "callbacks": watchers}
    return with_layer(resolved, {"trainer": quiet})


@dataclass
class _MicroBatches:
    """Stands in for the training loader; as long as that, since schedules ask for the run's length."""

    batches: list[Any]
    length: int | None

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)

    def __len__(self) -> int:
        if self.length is None:
            raise TypeError("a stream has no length")
        return max(self.length, len(self.batches))


class _Step(Callback):
    """The last callback: it sets the scene when all others have, and ends the run before the optimiser's step."""

    def __init__(
        self,
        built: Built,
        folder: Path,
        capture: Capture,
        rank: int | None,
        may_name: Callable[[str], str | None],
    ) -> None:
        self.built, self.folder, self.capture, self.may_name = built, folder, capture, may_name
        self.findings = Findings(built.model)
        whose = built.trainer.global_rank if rank is None else rank
        self.state = RankState.read(folder, whose, may_name)
        self._parts = self.state.micro_batches
        self._taken, self._inside = 0, False

    def data(self) -> dict[str, Any]:
        """Arguments of `Trainer.fit`: the run's data module, which may say what the model asks, with other batches."""
        batches = [part.batch for part in self._parts]
        data, model = self.built.datamodule, self.built.model
        # They have been on their device and through the data module's hooks already.
        model._on_before_batch_transfer = lambda batch, dataloader_idx=0: batch  # type: ignore[method-assign]
        model._apply_batch_transfer_handler = _to_device  # type: ignore[method-assign]
        if data is None:
            return {"train_dataloaders": _MicroBatches(batches, None)}
        given = data.train_dataloader
        data.train_dataloader = lambda: _MicroBatches(batches, _length(given()))  # type: ignore[method-assign]
        return {"datamodule": data}

    @contextlib.contextmanager
    def blames_batch(self) -> Iterator[None]:
        """An error inside the training step is reported as that of the micro-batch on which it was to be taken."""
        try:
            yield
        except (UserError, _Done):
            raise
        except Exception as error:
            if not self._inside:
                raise
            with self.state.blamed(f"micro_batches[{self._taken - 1}].batch", "cannot be trained on"):
                raise error

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        for callback in callbacks:
            if (key := callback.state_key) in self.state.callbacks:
                with self.state.blamed(f"callbacks.{key}", "is no state of this callback"):
                    callback.load_state_dict(self.state.callbacks[key])

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        torch.set_float32_matmul_precision(self.state.matmul_precision)
        _put(read_weights(self.folder), pl_module, self.folder)
        loop = trainer.fit_loop
        loop.epoch_progress.current.completed = self.capture.epoch
        loop.epoch_progress.current.processed = self.capture.epoch  # type: ignore[attr-defined]  # of a subclass
        loop.epoch_loop.automatic_optimization.optim_progress.optimizer.step.total.completed = self.capture.step
        loop.epoch_loop.manual_optimization.optim_step_progress.total.completed = self.capture.step
        loop.epoch_loop._batches_that_stepped = self.capture.step
        self.findings.look_at_weights()
        self.findings.__enter__()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        torch.autograd.set_detect_anomaly(True, check_nan=False)  # records where operations come from; the fit ends it
        self.findings.look_at_batch(batch)
        restore_random_states(self._parts[self._taken].random)
        self._taken += 1
        self._inside = True

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        self.findings.look_at_loss(loss)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        self.findings.look_at_gradients()
        # A module that optimises by itself may have more to do in this step.
        if pl_module.automatic_optimization or self.findings.found:
            raise _Done

    def on_train_batch_end(self, *_: Any) -> None:
        self._inside = False
        if self._taken == len(self._parts):
            self.findings.look_at_gradients()
            raise _Done

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.findings.__exit__()


def _to_device(batch: Any, device: torch.device | None = None, dataloader_idx: int = 0) -> Any:
    moved = move_data_to_device(batch, device or torch.device("cpu"))
    keep_on_host(batch, moved)
    return moved


def _length(loader: Any) -> int | None:
    try:
        return len(loader)
    except (TypeError, NotImplementedError):
        return None


@torch.no_grad()
def _put(state: dict[str, Tensor], module: LightningModule, folder: Path) -> None:
    """Raises: UserError for weights of another model."""
    own: dict[str, Tensor] = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    other = sorted(own.keys() ^ state.keys())
    other = other or [name for name, tensor in own.items() if tensor.shape != state[name].shape]
    if other:
        raise UserError(
            f"{folder} was captured from another model: they differ in {', '.join(other[:3])}"
            + (f" and {len(other) - 3} more" if len(other) > 3 else "")
            + "; replay it with the code and the configuration of its run"
        )
    for name, tensor in own.items():
        local(tensor).copy_(own_part(state[name], tensor))
