"""The start of a run up to its first step, in this process and without writing: what `plan` counts and `fit --dry-run`
tries.
"""

import contextlib
import io
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import BaseFinetuning
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch.optim import Optimizer

from lightspan.callbacks.training.adaptation import Adaptation
from lightspan.config.build import Built, Resolved, build
from lightspan.errors import UserError
from lightspan.planning.one_process import in_one_process


def rehearse(resolved: Resolved) -> list[str]:
    """Builds everything, sets up model and data, reads a batch, and makes the optimisers with what callbacks make of
    them. What several ranks do together is left out: they are rehearsed as one.

    Returns: lines for the user, the last of them says what was not tried.
    Raises: UserError for whatever a run would stumble over.
    """
    with tempfile.TemporaryDirectory(prefix="lightspan-") as folder:  # for the index of a shard, and the like
        built = build(resolved, Path(folder))
        if built.trainer.world_size > 1 or "strategy" in resolved.config.get("trainer", {}):
            built = build(in_one_process(resolved), Path(folder))
        try:
            untried = _start(built)
        except UserError:
            raise
        except Exception as error:  # of whichever part: nothing of it ran before
            text = " ".join(str(error).split())[:600]
            raise UserError(f"{resolved.name} builds but does not start: {type(error).__name__}: {text}") from error
    total = sum(parameter.numel() for parameter in built.model.parameters())
    return [
        f"{resolved.name}: builds and starts; {type(built.model).__name__} with {total:,} parameters. "
        "Nothing was written.",
        f"Not tried: {', '.join([*untried, 'a step', 'several ranks together'])}.",
    ]


def _start(built: Built) -> list[str]:
    """Returns what was not tried."""
    data = built.datamodule
    reason = None if data is None else _not_at_hand(data)
    with silent():
        if data is not None and reason is None:
            data.trainer = built.trainer
            data.setup("fit")
        prepare_model(built.trainer, built.model)
        if data is not None and reason is None:
            next(iter(data.train_dataloader()))
        _, left_out = optimizers(built.trainer, built.model)
    return left_out if reason is None else [reason, *left_out]


def prepare_model(trainer: Trainer, module: LightningModule) -> None:
    """The model as a fit finds it before its optimisers, on the CPU."""
    trainer.strategy.connect(module)
    module.trainer = trainer
    Adaptation.act(trainer, module)
    module.setup("fit")
    module.configure_model()
    # Schedules ask how long the run is. Here any length is the same, and the true one may need all the data.
    trainer.fit_loop.max_epochs = -1
    trainer.fit_loop.epoch_loop.max_steps = max(trainer.max_steps, 1000)


def optimizers(trainer: Trainer, module: LightningModule) -> tuple[list[Optimizer], list[str]]:
    """As the trainer sets them up, with what callbacks then make of them; and what callbacks were left out of that.

    Lightning's fine-tuning callbacks freeze parameters. All else may save, search, print or start a service, and
    nothing of that belongs here: a callback says itself that its on_fit_start only prepares optimisers.
    """
    strategy, left_out = trainer.strategy, []
    strategy.setup_optimizers(trainer)
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # a connector of the trainer sets it
    for callback in callbacks:
        if isinstance(callback, BaseFinetuning) or getattr(callback, "prepares_optimizers", False):
            callback.on_fit_start(trainer, module)
        elif is_overridden("on_fit_start", callback, Callback) and not _ours(callback):
            what = f"{type(callback).__name__}.on_fit_start"
            left_out.append(f"without what {what} does; prepares_optimizers = True in the class plans with it")
    return list(strategy.optimizers), left_out


def _ours(callback: Callback) -> bool:
    return type(callback).__module__.startswith(("lightspan.", "lightning."))


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """What a run prints when it starts would only repeat itself here."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield


def _not_at_hand(data: Any) -> str | None:
    """Why data cannot be set up without fetching them first, or None."""
    if type(data).prepare_data is not LightningDataModule.prepare_data:
        return "the data, which prepare_data makes ready when a run starts"
    if any("://" in str(shard) for shard in getattr(data, "shards", ())):
        return "the data, which come from elsewhere"
    return None
