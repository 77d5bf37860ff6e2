"""A part of the training samples of any data module, chosen so that smaller parts lie inside larger ones.

Shapes: N samples, n of them chosen.
"""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from lightspan.core.batches import batch_type_of
from lightspan.core.errors import UserError, printable
from lightspan.datamodules.loading.order import Order
from lightspan.datamodules.loading.workers import BatchDataset, Dataset

_STREAM = 2  # of random numbers; those of orders are 0 and 1


@runtime_checkable
class LabelledDataset(Protocol):
    """A dataset that knows the classes of its samples without reading them."""

    def labels(self) -> np.ndarray:
        """int64 [N]."""


def nested_order(count: int, seed: int, labels: np.ndarray | None = None) -> np.ndarray:
    """All samples in an order whose first n are the part of size n, int64 [N]: each part lies inside larger ones.

    With labels every part has the classes in the shares in which all samples have them: the k-th sample of a class with
    m comes at (k - 1/2) / m of the way, ties at random. Of a class that should have less than half a sample there is
    none, so that a part of fewer samples than classes misses some.

    Args:
        count: N.
        seed: of the order, >= 0, on which alone it depends.
        labels: int64 [N]; None draws without regard to them.
    """
    mixed = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, 0, _STREAM]))).permutation(count)
    if labels is None or not count:
        return mixed
    _, place, members = np.unique(labels[mixed], return_inverse=True, return_counts=True)
    by_class = np.argsort(place, kind="stable")
    firsts = np.cumsum(members) - members
    number = np.empty(count, np.int64)  # of each sample within its class
    number[by_class] = np.arange(count) - np.repeat(firsts, members)
    return mixed[np.argsort((number + 0.5) / members[place], kind="stable")]


def balanced_part(labels: np.ndarray, each: int, seed: int) -> np.ndarray:
    """Places of `each` samples of every class that there is, in ascending order, int64 [n]. Of a class that has fewer
    all are taken. With one seed, smaller parts lie inside larger ones.

    Args:
        labels: int64 [N].
        each: at least 1.
        seed: of the choice, >= 0, on which alone it depends.
    """
    mixed = nested_order(len(labels), seed)
    parts = [mixed[labels[mixed] == label][:each] for label in np.unique(labels)]
    return np.sort(np.concatenate([np.empty(0, np.int64), *parts]))


class SubsetSamples:
    """The samples of a set at these places, which keep their numbers in the set as `index`."""

    def __init__(self, dataset: Dataset, chosen: np.ndarray) -> None:
        self.whole, self.chosen = dataset, chosen
        self.batch_type = batch_type_of(dataset)

    def __len__(self) -> int:
        return len(self.chosen)

    def labels(self) -> np.ndarray:
        assert isinstance(self.whole, LabelledDataset)
        return self.whole.labels()[self.chosen]

    def sample(self, index: int, seed: int) -> Mapping[str, Any]:
        return self.whole.sample(int(self.chosen[index]), seed)

    def numbers(self) -> tuple[np.ndarray, int]:
        """(number of each sample in the set of which all this is a part, int64 [n]; samples of that set)."""
        if isinstance(self.whole, SubsetSamples):
            numbers, count = self.whole.numbers()
            return numbers[self.chosen], count
        return self.chosen, len(self.whole)


class SubsetOfBatches(SubsetSamples):
    """Of a set that makes whole batches."""

    def batch(self, indices: Sequence[int], seeds: Sequence[int]) -> dict[str, Any]:
        assert isinstance(self.whole, BatchDataset)
        return self.whole.batch(self.chosen[np.asarray(indices)].tolist(), seeds)


def known_labels(dataset: Dataset) -> np.ndarray | None:
    """The classes of samples, int64 [N], if they are known without reading the samples."""
    if isinstance(dataset, SubsetSamples):
        of_whole = known_labels(dataset.whole)
        return None if of_whole is None else of_whole[dataset.chosen]
    return dataset.labels() if isinstance(dataset, LabelledDataset) else None


class TrainingSubset(Callback):
    """Trains on a part of the data, whatever data module has them; validation, test and the bank of probes stay whole.

    It is a callback and not a setting of each data module: `lightspan.datamodules.loading.ranks.train_loader` asks for
    it. The part depends on `size`, `seed` and `classes` alone, on every rank and worker, and lies inside the parts of
    larger sizes. Each of its samples is seen once in an epoch, unless the data have an order of their own that goes by
    class. A run resumes exactly, and refuses a checkpoint of another part.

    Args:
        size: n, at least 1.
        seed: of the part, >= 0.
        by_class: whether classes keep their shares in each part; None: where the data know them without reading every
            sample, as picture sets and folders do, and shards do not.
        classes: train on so many classes alone, drawn by the seed, the same ones for each size; None is all.
    Raises: UserError here for a size below 1; when data are loaded, for more samples than there are, or classes of data
        that do not know them; when training starts, for data that no `train_loader` loads.
    """

    def __init__(self, size: int, seed: int = 0, by_class: bool | None = None, classes: int | None = None) -> None:
        if size < 1 or seed < 0 or (classes is not None and classes < 1):
            raise UserError(
                f"TrainingSubset size={size} and classes={classes} must be at least 1, and seed={seed} at least 0"
            )
        if by_class is False and classes is not None:
            raise UserError(f"TrainingSubset classes={classes} needs the classes, which by_class=false leaves out")
        self.size, self.seed, self.by_class, self.classes = size, seed, by_class, classes

    def choose(self, dataset: Dataset) -> np.ndarray:
        """Places of the part in ascending order, int64 [n]. Raises: UserError."""
        order = self.candidates(dataset)
        if self.size > len(order):
            of = "" if self.classes is None else f" of the {self.classes} classes"
            raise UserError(
                f"TrainingSubset size={self.size} is more than the {len(order):,} training samples{of}; lower it"
            )
        return np.sort(order[: self.size])

    def candidates(self, dataset: Dataset) -> np.ndarray:
        """All samples of which a part may have any, in their `nested_order`. Raises: UserError."""
        labels = None if self.by_class is False else known_labels(dataset)
        if labels is None and (self.by_class or self.classes is not None):
            asked = "by_class=true" if self.classes is None else f"classes={self.classes}"
            raise UserError(
                f"TrainingSubset {asked}: {type(dataset).__name__} does not know the classes of its samples without "
                "reading them all (it has no labels()); leave it out"
            )
        if labels is None or self.classes is None:
            return nested_order(len(dataset), self.seed, labels)
        present = np.unique(labels)
        if self.classes > len(present):
            raise UserError(
                f"TrainingSubset classes={self.classes} is more than the {len(present)} of the data; lower it"
            )
        drawn = present[nested_order(len(present), self.seed)[: self.classes]]
        own = np.flatnonzero(np.isin(labels, drawn))
        return own[nested_order(len(own), self.seed, labels[own])]

    def taken(self, dataset: Dataset, order: Order | None) -> tuple[SubsetSamples, Order]:
        """The part, and its samples in the order that the whole would have had."""
        chosen = self.choose(dataset)
        digest = hashlib.sha256(chosen.astype("<i8").tobytes()).hexdigest()[:16]
        kind = SubsetOfBatches if isinstance(dataset, BatchDataset) else SubsetSamples
        return kind(dataset, chosen), (order or Order((len(dataset),))).of_part(chosen, digest)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        part = getattr(trainer.train_dataloader, "dataset", None)
        if not isinstance(part, SubsetSamples):
            raise UserError(
                "TrainingSubset cannot take a part of these data: a "
                f"{type(trainer.train_dataloader).__name__} loads them; return `train_loader(...)` of "
                "lightspan.datamodules.loading.ranks from train_dataloader()"
            )
        if trainer.is_global_zero:
            labels = None if self.by_class is False else known_labels(part)
            of = "" if labels is None else f" of {len(np.unique(labels))} classes"
            print(
                printable(f"training subset: {len(part):,} of {len(part.whole):,} samples{of}, seed {self.seed}"),
                flush=True,
            )


def subset_of(trainer: Trainer | None) -> TrainingSubset | None:
    """That of a trainer. Raises: UserError for two."""
    found = [one for one in (trainer.callbacks if trainer else ()) if isinstance(one, TrainingSubset)]  # type: ignore[attr-defined]
    if len(found) > 1:
        raise UserError(f"{len(found)} callbacks TrainingSubset; training has one part of the data")
    return found[0] if found else None
