"""Several image sets as the tasks of one network, and sets turned or shuffled into further tasks.

Shapes: N images of a set, K tasks, C H W image.
"""

from typing import Any, Literal

import numpy as np
import torch
from lightning import LightningDataModule

from lightspan.core.errors import UserError
from lightspan.datamodules.image.batch import TasksBatch
from lightspan.datamodules.image.sets.small import ImageData, Labelled
from lightspan.datamodules.loading.loader import EvaluationLoader, ExactLoader
from lightspan.datamodules.loading.ranks import evaluation_loader, train_loader
from lightspan.datamodules.loading.workers import Dataset


class TaskSamples:
    """Samples of `TasksBatch`: as many as the largest task has, the others from their beginning again."""

    batch_type = TasksBatch

    def __init__(self, tasks: list[Dataset]) -> None:
        self.tasks = tasks

    def __len__(self) -> int:
        return max(len(task) for task in self.tasks)

    def sample(self, index: int, seed: int) -> dict[str, Any]:
        samples = [task.sample(index % len(task), seed) for task in self.tasks]
        images, labels = ([torch.as_tensor(each[field]) for each in samples] for field in ("image", "label"))
        return {"image": torch.stack(images), "label": torch.stack(labels), "index": torch.tensor(index)}


class TaskImages(LightningDataModule):
    """Trains on `TasksBatch` of all tasks side by side; validates and tests on one loader a task, of `ImageBatch`.

    Args:
        tasks: the sets by name, of one shape of image, each an `ImageData` or `Shards`; their own batch sizes count for
            nothing.
        batch_size: samples of one optimiser step over all ranks, each with an image of every task.
        adapt_on: the images that are trained on: "train", "val" (those that a set's `val_size` holds out of its
            training), or "test", which is what is scored too, as test-time adaptation of published merges has it.
        score_on: the images of the validation loaders.
        seed: of the order.
        num_workers: processes that fetch batches.
    """

    batch_type = TasksBatch

    def __init__(
        self,
        tasks: dict[str, LightningDataModule],
        batch_size: int = 16,
        adapt_on: Literal["train", "val", "test"] = "val",
        score_on: Literal["train", "val", "test"] = "test",
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        if not tasks:
            raise UserError("TaskImages needs at least one set; name it under tasks")
        shapes = {name: data.image_shape for name, data in tasks.items() if isinstance(data, ImageData)}
        if len(set(shapes.values())) > 1:
            raise UserError(f"TaskImages: the sets have images of different shapes, {shapes}; one network reads one")
        if adapt_on == "val" and (none := [n for n, data in tasks.items() if not getattr(data, "val_size", 1)]):
            raise UserError(
                f"TaskImages adapt_on=val, and {none[0]} holds no images out of its training; set its val_size, or "
                "adapt on train or test"
            )
        self.tasks, self.batch_size, self.adapt_on, self.score_on = tasks, batch_size, adapt_on, score_on
        self.seed, self.num_workers = seed, num_workers

    def setup(self, stage: str | None = None) -> None:
        for data in self.tasks.values():
            data.trainer = self.trainer
            data.setup(stage)  # type: ignore[arg-type]  # our modules take None too

    def train_dataloader(self) -> ExactLoader:
        samples = TaskSamples(self._of(self.adapt_on))
        return train_loader(samples, self.batch_size, self.seed, self.num_workers, self.trainer)

    def bank_dataloader(self) -> EvaluationLoader:
        """The training samples in order."""
        samples = TaskSamples(self._of(self.adapt_on))
        return evaluation_loader(samples, self.batch_size, self.num_workers, self.trainer)

    def val_dataloader(self) -> list[EvaluationLoader]:
        return self._each(self.score_on)

    def test_dataloader(self) -> list[EvaluationLoader]:
        return self._each("test")

    def _each(self, part: str) -> list[EvaluationLoader]:
        return [evaluation_loader(s, self.batch_size, self.num_workers, self.trainer) for s in self._of(part)]

    def _of(self, part: str) -> list[Dataset]:
        found = {n: getattr(data, "bank" if part == "train" else part, None) for n, data in self.tasks.items()}
        for name, samples in found.items():
            if not samples:
                raise UserError(f"{name} of TaskImages has no images in {part}; choose other ones to adapt or score on")
        return list(found.values())  # type: ignore[arg-type]


class Derived(ImageData):
    """The images of `source`, each changed in one way: a task of its own with the same classes.

    Args:
        source: the set; of its settings those count that say which images it has.
        quarter_turns: counter-clockwise.
        pixels: seed of one order of the pixels that all images get; None leaves them.
        settings: those of `ImageData`.
    """

    def __init__(self, source: ImageData, quarter_turns: int = 0, pixels: int | None = None, **settings: Any) -> None:
        super().__init__(**settings)
        _, height, width = source.image_shape
        if quarter_turns % 2 and height != width:
            raise UserError(f"quarter_turns={quarter_turns} would change images of {height} x {width}; turn by 2")
        self.source, self.quarter_turns, self.pixels = source, quarter_turns, pixels
        self.num_classes, self.image_shape = source.num_classes, source.image_shape  # type: ignore[misc]

    def load(self) -> tuple[Labelled, Labelled]:
        training, test = self.source.load()
        return self._changed(training), self._changed(test)

    def _changed(self, data: Labelled) -> Labelled:
        images = np.rot90(data.images, self.quarter_turns, axes=(-2, -1))
        if self.pixels is not None:
            height, width = images.shape[-2:]
            order = np.random.default_rng(self.pixels).permutation(height * width)
            images = images.reshape(*images.shape[:-2], -1)[..., order].reshape(images.shape)
        return Labelled(np.ascontiguousarray(images), data.labels)
