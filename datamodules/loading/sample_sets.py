"""What data modules share whose samples can be had by number: one set to train on, and others to look at in order."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence, Sized
from typing import Any, TypeVar

import numpy as np
from lightning import LightningDataModule

from lightspan.core.batches import batch_type_of
from lightspan.core.collate import collated
from lightspan.core.errors import UserError
from lightspan.core.files.places import ReadPath
from lightspan.datamodules.loading.loader import EvaluationLoader, ExactLoader
from lightspan.datamodules.loading.order import Order
from lightspan.datamodules.loading.ranks import evaluation_loader, train_loader
from lightspan.datamodules.loading.workers import Dataset

S = TypeVar("S")


class SampleSets(LightningDataModule, ABC):
    """Loaders of `train`, `bank` and `val`, which `setup` of a subclass makes; the first is None before.

    Args:
        batch_size: samples of one optimiser step over all ranks.
        seed: of the order and of what is random in a training sample.
        num_workers: processes that fetch batches.
        selection: which of the training samples are trained on, or how often: a file of
            `lightspan.datamodules.loading.selection.DataSelection`, or the folder of the run that wrote it. None is
            all, each once. The bank stays whole.

    Attributes:
        bank: the training samples as they are, without anything random: what probes fit on.
        clusters: epoch -> the cluster of each training sample, int64, for orders with batches of one cluster each. A
            method that clusters its data sets it before training starts.
        sample_names: what the training samples are called, by `index`; empty where they have no names.
        more_samples: what a user does who has too few training samples, as a clause.
    """

    more_samples = "give more of them, or hold fewer out to validate on"
    clusters: Callable[[int], np.ndarray] | None = None
    sample_names: Sequence[str] = ()
    train: Dataset | None = None
    bank: Dataset
    val: Dataset

    def __init__(
        self, batch_size: int = 32, seed: int = 0, num_workers: int = 0, selection: ReadPath | None = None
    ) -> None:
        super().__init__()
        self.batch_size, self.seed, self.num_workers = batch_size, seed, num_workers
        self.selection = selection

    @property
    def batch_type(self) -> type | None:
        """Of training batches, as the training set declares it; before `setup` None, unless samples are `blank`."""
        return batch_type_of(self.blank() if self.train is None else self.train)

    @abstractmethod
    def setup(self, stage: str | None = None) -> None:
        """Makes the sets, once."""

    def blank(self) -> Dataset | None:
        """Two training samples of the right shapes, made of nothing, for plans where the data are not here; None where
        they are, or nobody knows the shapes without them.
        """
        return None

    def stand_in(self) -> dict[str, Any] | None:
        """A training batch of the `blank` samples, if there are any."""
        samples = self.blank()
        if samples is None:
            return None
        return collated([samples.sample(index, 0) for index in range(2)], batch_type_of(samples))

    def training_content(self) -> str:
        """What identifies the training samples beyond their number, so that a run that is resumed goes on with the same
        ones; empty if nothing does.
        """
        return ""

    def training_order(self) -> Order | None:
        """How training samples are shuffled; None is all of them in one order."""
        assert self.train is not None
        content = self.training_content()
        return Order((len(self.train),), content=content) if content else None

    def train_dataloader(self) -> ExactLoader:
        assert self.train is not None
        settings = self.batch_size, self.seed, self.num_workers, self.trainer
        return train_loader(self.train, *settings, self.training_order(), self.selection)

    def bank_dataloader(self) -> EvaluationLoader:
        """The bank in order."""
        return self._evaluate(self.bank)

    def val_dataloader(self) -> EvaluationLoader:
        return self._evaluate(self.val)

    def _evaluate(self, samples: Dataset) -> EvaluationLoader:
        return evaluation_loader(samples, self.batch_size, self.num_workers, self.trainer)


class SplitSampleSets(SampleSets):
    """Those with a set to test on as well, `test`, which `setup` of a subclass makes too."""

    test: Dataset

    def test_dataloader(self) -> EvaluationLoader:
        return self._evaluate(self.test)


def require_sizes(train_size: int | None, val_size: int) -> None:
    """Raises: UserError for fewer than one sample to train on (None is all), or fewer than none held out."""
    if train_size is not None and train_size < 1:
        raise UserError(f"train_size={train_size} leaves nothing to train on; it must be at least 1")
    if val_size < 0:
        raise UserError(f"val_size={val_size} is negative; 0 validates on the test samples")


def require_enough(train_size: int | None, val_size: int, count: int, samples: str) -> None:
    """Raises: UserError if both sizes together ask for more than `count`; of None at least one sample must be left.

    Args:
        samples: what they are called, such as "training images of Digits".
    """
    if val_size + (train_size or 1) > count:
        asked = "one to train on" if train_size is None else f"train_size={train_size}"
        way_out = "lower val_size, or give more" if train_size is None else "lower one of them"
        raise UserError(f"{asked} and val_size={val_size} ask for more than the {count} {samples}; {way_out}")


def require_split(samples: str, **parts: Sized) -> None:
    """Raises: UserError for a part without samples, such as `val`.

    Args:
        samples: what they are called, such as "readable pictures".
    """
    if empty := [name for name, part in parts.items() if not len(part)]:
        counts = ", ".join(f"{len(part):,} for {name}" for name, part in parts.items())
        raise UserError(
            f"no {samples} are left for {empty[0]}: {counts}; give more, since none is held out of a single one, "
            "nor of the only one of a class, or name others to validate on, where the data take a val_folder"
        )


def held_out_size(val_size: int | None, count: int, most: int) -> int:
    """How many of `count` samples of a user's file are held out: `val_size`, or for None a tenth, in [1, most]."""
    return min(most, max(1, count // 10)) if val_size is None else val_size


def require_val_size(val_size: int | None) -> None:
    """Raises: UserError for fewer than one row of a user's file to validate on; None is a share of them."""
    if val_size is not None and val_size < 1:
        raise UserError(f"val_size={val_size} must be at least 1")


def split_rows(
    read: Callable[[str, str], list[S]], path: str, val_path: str | None, val_size: int | None, what: str
) -> tuple[list[S], list[S]]:
    """(the rows to train on, those to validate on), of a user's file or of two.

    Args:
        read: (file, setting that names it) -> its rows.
        path, val_path: the files; without the second, rows of the first are held out.
        val_size: how many are, evenly spaced; None takes a tenth of all, at most 1,000.
        what: the rows are called, such as "pairs".
    Raises: UserError as `read`, and as `require_enough`.
    """
    rows = read(path, "path")
    if val_path is not None:
        return rows, read(val_path, "val_path")
    what = f"{what} of {path}"
    size = held_out_size(val_size, len(rows), most=1000)
    require_enough(None, size, len(rows), what)
    held = set(spaced(np.arange(len(rows)), size).tolist())
    return [row for i, row in enumerate(rows) if i not in held], [row for i, row in enumerate(rows) if i in held]


def spaced(indices: np.ndarray, count: int) -> np.ndarray:
    """`count` of the indices, evenly spaced."""
    return indices[np.arange(count) * len(indices) // max(count, 1)]
