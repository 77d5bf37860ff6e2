"""What is looked at before the first run of a curve: how many samples there are, and whether each size can be taken."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lightspan.cli.config.build import build
from lightspan.cli.config.resolve import Resolved, with_layer
from lightspan.cli.planning.one_process import in_one_process
from lightspan.cli.studies.scaling.study import SUBSET, Policy, Study
from lightspan.core.errors import UserError

if TYPE_CHECKING:
    from lightspan.datamodules.loading.loader import ExactLoader

_SMALL = "lightning.pytorch.demos.boring_classes.BoringModel"
_PROBES = tuple(f"lightspan.callbacks.watching.{name}" for name in ("online_probes.OnlineProbes", "zero_shot.ZeroShot"))
_CHECKPOINT = "lightspan.callbacks.resilience.checkpoint.Checkpoint"
_NEVER = 10**6  # epochs between measurements that are made at the end in any case
_CHECKPOINTS = 4  # of a run


@dataclass(frozen=True)
class Whole:
    """The training data of a recipe, in one process."""

    loader: "ExactLoader"

    @property
    def samples(self) -> int:
        return len(self.loader.dataset)

    def require(self, size: int, seed: int, classes: int | None) -> str | None:
        """Raises: UserError if a run could not train on so many samples. Returns what to say of them."""
        import numpy as np

        from lightspan.datamodules.loading.subset import LabelledDataset, TrainingSubset

        if size < self.loader.batch_size:
            raise UserError(
                f"--sizes {size}: one step has batch_size={self.loader.batch_size} samples, so that no batch would be "
                "full; leave it out, or lower data.init_args.batch_size"
            )
        most = len(TrainingSubset(1, seed, classes=classes).candidates(self.loader.dataset))
        if size > most:
            of = "" if classes is None else f" of the {classes} classes of seed {seed}"
            raise UserError(f"--sizes {size} is more than the {most:,} training samples{of}; leave it out")
        part, _ = TrainingSubset(size, seed, classes=classes).taken(self.loader.dataset, self.loader.order)
        if not isinstance(self.loader.dataset, LabelledDataset) or classes is not None:
            return None
        known, found = len(np.unique(self.loader.dataset.labels())), len(np.unique(part.labels()))
        return None if known == found else f"{size:,} samples have {found} of the {known} classes, as shares are kept"


def whole_of(resolved: Resolved) -> Whole:
    """Builds the data of a recipe. Raises: UserError for data of which no part can be taken."""
    from lightspan.datamodules.loading.loader import ExactLoader

    for entry in _callbacks(resolved).values():
        if entry.get("class_path") == SUBSET:
            raise UserError(f"{resolved.name} has a TrainingSubset of its own; leave it out: --sizes makes one")
    data = build(with_layer(in_one_process(resolved), {"model": {"class_path": _SMALL}})).datamodule
    if data is None:
        raise UserError(f"{resolved.name} has no data module, of which a part could be taken; set data")
    data.prepare_data()
    data.setup("fit")
    loader = data.train_dataloader()
    if not isinstance(loader, ExactLoader):
        raise UserError(
            f"{type(data).__name__} loads its training data by a {type(loader).__name__}, of which no part can be "
            "taken; return `train_loader(...)` of lightspan.datamodules.loading.ranks from train_dataloader()"
        )
    return Whole(loader)


def study_of(resolved: Resolved, whole: Whole, policy: Policy, classes: int | None) -> Study:
    """How long each run trains: as long as the recipe does on all of its data, in steps or in epochs.

    Raises: UserError for a recipe that says neither, or trains for less than an epoch where epochs are to be equal.
    """
    trainer = resolved.config.get("trainer", {})
    per_epoch, until_limit = whole.samples // whole.loader.batch_size, _steps_until_limit(trainer, whole)
    steps, epochs = (trainer.get(name) for name in ("max_steps", "max_epochs"))
    steps, epochs = (None if value is None or value < 0 else value for value in (steps, epochs))
    lengths = [length for length in (steps, epochs and epochs * until_limit) if length]
    if not lengths:
        raise UserError(f"{resolved.name} does not say how long it trains; set trainer.max_steps or trainer.max_epochs")
    found = min(lengths)
    length = found if policy == "equal" else round(found / per_epoch)
    if not length:
        raise UserError(
            f"{resolved.name} trains for {found:,} steps, which is less than half an epoch of its {whole.samples:,} "
            "samples, so that epochs cannot be equal; set trainer.max_epochs, or take --steps equal"
        )
    return Study(policy, length, whole.samples, whole.loader.batch_size, classes)


def _steps_until_limit(trainer: dict[str, Any], whole: Whole) -> int:
    """Optimiser steps of an epoch of the recipe, which trainer.limit_train_batches may end early."""
    share, limit = trainer.get("accumulate_grad_batches") or 1, trainer.get("limit_train_batches")
    batches = whole.samples // whole.loader.batch_size * share
    if limit is not None:
        batches = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
    return -(-batches // share)


def length_flags(resolved: Resolved, study: Study) -> list[str]:
    """The flags that make each run so long, with validation and probes at its end and a few checkpoints on the way."""
    trainer = resolved.config.get("trainer", {})
    batches = study.length * (trainer.get("accumulate_grad_batches") or 1)
    flags = (
        [
            f"trainer.max_steps={study.length}",
            "trainer.max_epochs=-1",
            f"trainer.val_check_interval={batches}",
            "trainer.check_val_every_n_epoch=null",
        ]
        if study.policy == "equal"
        else [
            "trainer.max_steps=-1",
            f"trainer.max_epochs={study.length}",
            "trainer.val_check_interval=1.0",
            f"trainer.check_val_every_n_epoch={study.length}",
        ]
    )
    if trainer.get("limit_train_batches") is not None:  # the length is counted; an epoch sees each sample of a part
        flags.append("trainer.limit_train_batches=1.0")
    for name, entry in _callbacks(resolved).items():
        given = entry.get("init_args") or {}
        if entry.get("class_path") in _PROBES and given.get("every_n_steps") is None:
            flags.append(f"trainer.callbacks.{name}.init_args.every_n_epochs={_NEVER}")
        often = {"every_n_train_steps", "train_time_interval"} & given.keys()
        if entry.get("class_path") == _CHECKPOINT and not often and study.policy == "equal":
            steps = max(1, study.length // _CHECKPOINTS)
            flags.append(f"trainer.callbacks.{name}.init_args.every_n_train_steps={steps}")
    return flags


def _callbacks(resolved: Resolved) -> dict[str, Any]:
    found = resolved.config.get("trainer", {}).get("callbacks")
    return {k: v for k, v in found.items() if isinstance(v, dict)} if isinstance(found, dict) else {}
