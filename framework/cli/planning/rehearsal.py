"""The start of a run up to its first step, in this process and without writing: what `plan` counts and `fit --dry-run`
tries.
"""

import contextlib
import io
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import BaseFinetuning
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.optim import Optimizer
from torch.utils._pytree import tree_map

from lightspan.callbacks.training.adaptation import Adaptation
from lightspan.cli.config.blame import own_line, unfit_batch
from lightspan.cli.config.build import Built, Resolved, build, with_layer
from lightspan.cli.config.resolve import inside_run
from lightspan.cli.planning.one_process import in_one_process
from lightspan.cli.planning.step_memory import faked, in_words
from lightspan.core.errors import UserError
from lightspan.core.files.caches import isolated_caches
from lightspan.optim.matrices.matrix_optimizer import MatrixOptimizer
from lightspan.training.wiring.report import print_groups

_BEFORE_A_STEP = ("on_fit_start", "on_train_start", "on_train_epoch_start", "on_train_batch_start")
_SMALL = {
    "model": "lightning.pytorch.demos.boring_classes.BoringModel",
    "data": "lightning.pytorch.demos.boring_classes.BoringDataModule",
}


def rehearse(resolved: Resolved) -> list[str]:
    """Builds everything, sets up model and data, makes the optimisers as callbacks change them, reads a batch
    and passes it through `training_step`, without an optimiser step. What several ranks do together is left out: they
    are rehearsed as one.

    Prints what a run prints of its optimisers, and the groups of others. Returns: lines for the user, the last of them
    says what was not tried.
    Raises: UserError for whatever a run would stumble over.
    """
    with without_trace(resolved) as (resolved, folder):
        built = build(resolved, folder)
        ranks = built.trainer.world_size
        if ranks > 1 or "strategy" in resolved.config.get("trainer", {}):
            built = replace(built, trainer=_trainer_of_one_process(resolved, folder))
        try:
            untried = _start(built, ranks)
        except UserError:
            raise
        except Exception as error:  # from any part: nothing of it ran before
            if (known := unfit_batch(error)) is not None:
                raise UserError(known) from error
            text = " ".join(str(error).split())[:600]
            said = f"{resolved.name} builds but does not start: {type(error).__name__}: {text}{own_line(error)}"
            raise UserError(said) from error
    total = sum(parameter.numel() for parameter in built.model.parameters())
    return [
        f"{resolved.name}: builds and starts; {type(built.model).__name__} with {total:,} parameters. "
        "Nothing was written.",
        f"Not tried: {', '.join([*untried, 'a step of an optimiser', 'several ranks together'])}.",
    ]


@contextlib.contextmanager
def without_trace(resolved: Resolved) -> Iterator[tuple[Resolved, Path]]:
    """The configuration with a run folder that is gone afterwards, where everything is written that has to be: the
    index of a shard, pictures at the size of training. Caches are only read.
    """
    with tempfile.TemporaryDirectory(prefix="lightspan-") as folder, isolated_caches(Path(folder) / "cache"):
        yield inside_run(resolved), Path(folder) / "run"


def _trainer_of_one_process(resolved: Resolved, folder: Path) -> Trainer:
    """Only the trainer: model and data exist already, and may be large."""
    return build(with_small(in_one_process(resolved), *_SMALL), folder).trainer


def with_small(resolved: Resolved, *parts: str) -> Resolved:
    """The configuration with a tiny network of Lightning's as its `model`, or its tiny data as `data`."""
    return with_layer(resolved, {part: {"class_path": _SMALL[part]} for part in parts})


def _start(built: Built, ranks: int) -> list[str]:
    """Returns what was not tried."""
    data = built.datamodule
    untried = [reason] if data is not None and (reason := _not_at_hand(data)) is not None else []
    with silent():
        if data is not None and not untried:
            data.trainer = built.trainer
            data.setup("fit")
        prepare_model(built.trainer, built.model, data)
        batch = next(iter(data.train_dataloader())) if data is not None and not untried else None
    made, left_out = optimizers(built.trainer, built.model)  # some say what each parameter gets, as in a run
    for optimizer in made:
        if not isinstance(optimizer, MatrixOptimizer):
            print_groups(optimizer)
    with silent():
        if batch is None:
            untried.append("a forward pass")
        elif (reason := _forward(built, batch, ranks)) is not None:
            untried.append(reason)
    return [*untried, *left_out]


def _forward(built: Built, batch: Any, ranks: int) -> str | None:
    """One training_step on this batch; returns why it was not tried, or None.

    A run of one process on the CPU does here exactly what it will do. For others only shapes are passed through, since
    their model or the batch of all their ranks may be too large for this. What fails there, or because a hook that
    would run before the first step has not run, need not fail in the run, so it is reported without refusing the run.
    """
    trainer, module = built.trainer, built.model
    if not module.automatic_optimization:
        return f"a forward pass, since {type(module).__name__} uses manual optimisation in it"
    real = trainer.strategy.root_device.type == "cpu" and ranks == 1
    trainer.precision_plugin.convert_module(module.train())
    try:
        with without_logging(module):
            (loss_of if real else loss_on_shapes)(trainer, module, batch)
    except Exception as error:
        if real and not _prepared_by_hooks(trainer, module):
            raise
        how = "as it is here" if real else "on shapes alone"
        return f"a forward pass ({how} it stops, which may not happen in the run: {in_words(error)})"
    return None


def loss_on_shapes(trainer: Trainer, module: LightningModule, batch: Any) -> Any:
    """As `loss_of`, of the batch's shapes alone, once the module has read its numbers where a fit would."""
    batch = module._on_before_batch_transfer(trainer.precision_plugin.convert_input(batch))
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with faked(module, mode), mode:
        shapes = tree_map(lambda leaf: mode.from_tensor(leaf) if isinstance(leaf, Tensor) else leaf, batch)
        return _moved_and_stepped(trainer, module, shapes)


def _prepared_by_hooks(trainer: Trainer, module: LightningModule) -> bool:
    """Whether the user's own hooks run between making the optimisers and the first step."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # a connector of the trainer sets it
    own = [(callback, Callback) for callback in callbacks if not _ours(callback)]
    return any(is_overridden(hook, *part) for part in ((module, LightningModule), *own) for hook in _BEFORE_A_STEP)


def loss_of(trainer: Trainer, module: LightningModule, batch: Any) -> Any:
    """What `training_step` returns for a batch from a loader, transferred to the module by the hooks of a fit."""
    batch = trainer.precision_plugin.convert_input(batch)
    return _moved_and_stepped(trainer, module, module._on_before_batch_transfer(batch))


def _moved_and_stepped(trainer: Trainer, module: LightningModule, batch: Any) -> Any:
    batch = module._apply_batch_transfer_handler(batch, module.device)
    with trainer.precision_plugin.train_step_context():
        return module.training_step(*([batch, 0] if _takes_index(module) else [batch]))


def _takes_index(module: LightningModule) -> bool:
    return is_param_in_hook_signature(module.training_step, "batch_idx", min_args=2)


def prepare_model(trainer: Trainer, module: LightningModule, datamodule: LightningDataModule | None) -> None:
    """The model as it is in a fit before its optimisers are made, on the CPU."""
    trainer.strategy.connect(module)
    trainer._data_connector.attach_datamodule(module, datamodule)
    module.trainer = trainer
    Adaptation.act(trainer, module)
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # a connector of the trainer sets it
    for callback in callbacks:
        if getattr(callback, "prepares_model", False):  # it declares that its setup does nothing else
            callback.setup(trainer, module, "fit")
    module.setup("fit")
    module.configure_model()
    # Schedules ask for the length of the run. Any length will do here, and the true one may need all the data.
    trainer.fit_loop.max_epochs = -1
    trainer.fit_loop.epoch_loop.max_steps = max(trainer.max_steps, 1000)


def optimizers(trainer: Trainer, module: LightningModule) -> tuple[list[Optimizer], list[str]]:
    """The optimisers as the trainer sets them up and callbacks then change them; and which callbacks were left out.

    Lightning's fine-tuning callbacks freeze parameters. Others may save, search, print or start a service, and
    none of that belongs here: a callback itself declares that its on_fit_start only prepares optimisers.
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
def without_logging(module: LightningModule) -> Iterator[None]:
    """`self.log` needs a running loop; here it does nothing."""

    def ignore(*_args: Any, **_kwargs: Any) -> None: ...

    module.log = module.log_dict = ignore  # type: ignore[method-assign]
    try:
        yield
    finally:
        del module.log, module.log_dict


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """What a run prints at its start would only be repeated here."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield


def _not_at_hand(data: Any) -> str | None:
    """Why data cannot be set up without downloading them first, or None."""
    if type(data).prepare_data is not LightningDataModule.prepare_data:
        return "the data, which prepare_data prepares when a run starts"
    shards = (shard for kind in ("shards", "val_shards", "target_shards") for shard in getattr(data, kind, None) or ())
    if any("://" in str(shard) for shard in shards):
        return "the data, which come from elsewhere"
    return None
