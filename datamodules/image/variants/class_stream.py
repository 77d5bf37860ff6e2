"""Classes of an image set that come task by task, for learners that must not forget."""

from typing import Any

import numpy as np

from lightspan.core.errors import UserError
from lightspan.core.ranges import require_numbers
from lightspan.datamodules.image.sets.small import ImageData, ImageSamples, Labelled
from lightspan.datamodules.loading.loader import EvaluationLoader, ExactLoader
from lightspan.datamodules.loading.order import InSequence
from lightspan.datamodules.loading.ranks import train_loader
from lightspan.datamodules.loading.subset import SubsetSamples


class ClassStream(ImageData):
    """Tasks of disjoint classes. One epoch of training is the whole stream: all batches of the first task, then all of
    the second. A batch never mixes tasks; what does not fill a task's last batch is left out.

    Labels stay as they are. Validation has a loader for each task, so that `trainer.val_check_interval` of the batches
    of a task shows after each task what is known of the others; bank and test have the whole sets.

    Args:
        source: the whole set; of its settings those count that say which images it has.
        tasks: how many, of as equal numbers of classes as possible, larger ones first; at most a class each.
        passes: times that each image of a task is seen before the next task begins.
        order: seed of the order of the classes, or the labels themselves in their order; None keeps that of the labels.
        settings: those of `ImageData`.

    Attributes:
        tasks: the classes of each task, in the order in which they come.
    """

    def __init__(
        self,
        source: ImageData,
        tasks: int = 5,
        passes: int = 1,
        order: int | list[int] | None = 0,
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        classes = source.num_classes
        if not 1 <= tasks <= classes or passes < 1:
            raise UserError(
                f"ClassStream tasks={tasks} must be in [1, {classes}], the classes of {type(source).__name__}, and "
                f"passes={passes} at least 1"
            )
        self.tasks = [part.tolist() for part in np.array_split(_in_order(order, classes), tasks)]
        self.source, self.passes = source, passes
        self.num_classes, self.image_shape = classes, source.image_shape  # type: ignore[misc]

    def load(self) -> tuple[Labelled, Labelled]:
        return self.source.load()

    def train_dataloader(self) -> ExactLoader:
        """Raises: UserError for a task that does not fill a batch."""
        assert self.train is not None
        places = self._places()
        classes = " | ".join(" ".join(map(str, task)) for task in self.tasks)
        said = f"classes {classes}, each seen {'once' if self.passes == 1 else f'{self.passes} times'}"
        order = InSequence(tuple(map(len, places)), content=said)
        samples = SubsetSamples(self.train, np.concatenate(places))
        settings = self.batch_size, self.seed, self.num_workers, self.trainer
        return train_loader(samples, *settings, order, self.selection)

    def task_steps(self) -> list[int]:
        """Optimiser steps of each task, after `setup`. Raises: UserError as `train_dataloader`."""
        return [len(own) // self.batch_size for own in self._places()]

    def task_bank(self, number: int) -> EvaluationLoader:
        """The training images of a task as they are, each once, after `setup`."""
        assert isinstance(self.bank.data, Labelled)
        own = np.isin(self.bank.data.labels, self.tasks[number])
        part = Labelled(*(column[own] for column in self.bank.data))
        return self._evaluate(ImageSamples(part, self.bank.mean, self.bank.std))

    def _places(self) -> list[np.ndarray]:
        """Of the images of each task, as often as they are seen, in whole batches."""
        assert self.train is not None
        assert isinstance(self.train.data, Labelled)
        places = []
        for number, task in enumerate(self.tasks):
            own = np.flatnonzero(np.isin(self.train.data.labels, task))
            require_numbers(len(own) * self.passes, passes=self.passes)
            own = np.tile(own, self.passes)
            _require_images(number, len(own), "training")
            if len(own) < self.batch_size:
                raise UserError(
                    f"task {number} of ClassStream has {len(own)} images, fewer than batch_size={self.batch_size}; "
                    "lower it, or raise passes"
                )
            places.append(own[: len(own) // self.batch_size * self.batch_size])
        return places

    def val_dataloader(self) -> list[EvaluationLoader]:  # type: ignore[override]
        """Raises: UserError for a task without validation images: its loader would be left out silently."""
        assert isinstance(self.val.data, Labelled)
        labels = self.val.data.labels
        parts = [Labelled(*(column[np.isin(labels, task)] for column in self.val.data)) for task in self.tasks]
        for number, part in enumerate(parts):
            _require_images(number, part.total(), "validation")
        return [self._evaluate(ImageSamples(part, self.val.mean, self.val.std)) for part in parts]


def _in_order(order: int | list[int] | None, classes: int) -> np.ndarray:
    """The labels in the order in which they come, int64 [classes]."""
    if isinstance(order, list):
        if sorted(order) != list(range(classes)):
            raise UserError(f"ClassStream order={order} must name each label from 0 to {classes - 1} once")
        return np.array(order)
    if order is not None and order < 0:
        raise UserError(f"ClassStream order={order} must be a seed from 0 up, or null for the order of the labels")
    return np.arange(classes) if order is None else np.random.default_rng(order).permutation(classes)


def _require_images(task: int, count: int, kind: str) -> None:
    if not count:
        size = "val_size" if kind == "validation" else "train_size"
        raise UserError(f"task {task} of ClassStream has no {kind} images; raise {size}, or lower tasks")
