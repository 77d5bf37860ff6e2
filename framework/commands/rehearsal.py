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
from torch.optim import Optimizer

from lightspan.callbacks.adaptation import Adaptation
from lightspan.config.build import Built, Resolved, build, with_layer
from lightspan.errors import UserError

ONE_PROCESS = {"strategy": "auto", "devices": 1, "num_nodes": 1}


def rehearse(resolved: Resolved) -> list[str]:
    """Builds everything, sets up model and data, reads a batch, and makes the optimisers with what callbacks make of
    them. What several ranks do together is left out: they are rehearsed as one.

    Returns: lines for the user, the last of them says what was not tried.
    Raises: UserError for whatever a run would stumble over.
    """
    with tempfile.TemporaryDirectory(prefix="lightspan-") as folder:  # for the index of a shard, and the like
        built = build(resolved, Path(folder))
        if built.trainer.world_size > 1 or "strategy" in resolved.config.get("trainer", {}):
            built = build(alone(resolved), Path(folder))
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


def alone(resolved: Resolved) -> Resolved:
    """The same run in one process, where its ranks, and a GPU that is elsewhere, need not exist."""
    elsewhere = {} if resolved.config.get("trainer", {}).get("accelerator") == "cpu" else {"accelerator": "auto"}
    return with_layer(resolved, {"trainer": {**ONE_PROCESS, **elsewhere}})


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
        optimizers(built.trainer, built.model)
    return [] if reason is None else [reason]


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


def optimizers(trainer: Trainer, module: LightningModule) -> list[Optimizer]:
    """As the trainer sets them up, with whatever the callbacks then make of them."""
    strategy = trainer.strategy
    strategy.setup_optimizers(trainer)
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # a connector of the trainer sets it
    for callback in callbacks:
        if _prepares_optimizers(callback):
            callback.on_fit_start(trainer, module)
    return list(strategy.optimizers)


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """What a run prints when it starts would only repeat itself here."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield


def _prepares_optimizers(callback: Callback) -> bool:
    """Whether a callback's `on_fit_start` belongs to the step: not where it only watches, by its own word. Lightning's
    own save, search or print there, except the fine-tuning ones, which freeze parameters.
    """
    if isinstance(callback, BaseFinetuning):
        return True
    if type(callback).__module__.startswith("lightning."):
        return False
    return vars(type(callback)).get("alters_training", True) is not False


def _not_at_hand(data: Any) -> str | None:
    """Why data cannot be set up without fetching them first, or None."""
    if type(data).prepare_data is not LightningDataModule.prepare_data:
        return "the data, which prepare_data makes ready when a run starts"
    if any("://" in str(shard) for shard in getattr(data, "shards", ())):
        return "the data, which come from elsewhere"
    return None
