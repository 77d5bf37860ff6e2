"""A few images of each class, several times each, as random views: what few-shot classifiers are made from."""

import math
from typing import Any

import numpy as np

from lightspan.core.errors import UserError
from lightspan.core.ranges import require_numbers
from lightspan.datamodules.image.augment.views import Views
from lightspan.datamodules.image.batch import ImageBatch
from lightspan.datamodules.image.sets.small import ImageData, ImageSamples, Labelled
from lightspan.datamodules.loading.loader import EvaluationLoader
from lightspan.datamodules.loading.order import sample_seeds


class _Epochs:
    """All samples of a set, `epochs` times over, each time with another view."""

    batch_type = ImageBatch

    def __init__(self, samples: ImageSamples, epochs: int, seed: int) -> None:
        self.samples, self.epochs, self.seed = samples, epochs, seed

    def __len__(self) -> int:
        return self.epochs * len(self.samples)

    def sample(self, index: int, seed: int) -> dict[str, Any]:
        epoch, place = divmod(index, len(self.samples))
        own = int(sample_seeds(self.seed, epoch, len(self.samples))[place])
        sample = self.samples.sample(place, own)
        [view] = sample.pop("views")
        return {"image": view, **sample, "index": sample["index"] + epoch * len(self.samples)}


class FewShots(ImageData):
    """Trains, and fills the bank, with `shots` images of each class of `source`; `val_size` more are held out.

    Args:
        source: the whole set; of its settings those count that say which images it has.
        shots: of each class, at least 1.
        epochs: times that the bank has each image.
        bank_views: gives one view of an image; None leaves the images as they are, and then epochs is 1.
        chosen_by: seed of the choice of images.
        train_classes: train and validate on images of these classes alone; None on all. Test images are of all.
        settings: those of `ImageData` but train_size.
    """

    def __init__(
        self,
        source: ImageData,
        shots: int = 16,
        epochs: int = 1,
        bank_views: Views | None = None,
        chosen_by: int = 0,
        train_classes: list[int] | None = None,
        **settings: Any,
    ) -> None:
        classes = sorted(set(range(source.num_classes) if train_classes is None else train_classes))
        if shots < 1 or epochs < 1 or (bank_views is None and epochs > 1):
            raise UserError(
                f"FewShots shots={shots} and epochs={epochs} must be at least 1, and epochs 1 without bank_views"
            )
        if not classes or not 0 <= classes[0] <= classes[-1] < source.num_classes:
            raise UserError(
                f"FewShots train_classes={train_classes} must name labels of {type(source).__name__}, from 0 to "
                f"{source.num_classes - 1}"
            )
        require_numbers(shots * len(classes) * epochs, shots=shots, epochs=epochs)
        super().__init__(train_size=shots * len(classes), **settings)
        self.source, self.shots, self.epochs, self.classes = source, shots, epochs, classes
        self.bank_views, self.chosen_by = bank_views, chosen_by
        self.num_classes, self.image_shape = source.num_classes, source.image_shape  # type: ignore[misc]

    def load(self) -> tuple[Labelled, Labelled]:
        """Raises: UserError for a class with fewer images than are asked for."""
        training, test = self.source.load()
        each = self.shots + math.ceil(self.val_size / len(self.classes))
        generator, chosen = np.random.default_rng(self.chosen_by), []
        for label in self.classes:
            own = np.flatnonzero(training.labels == label)
            if len(own) < each:
                raise UserError(
                    f"FewShots takes {each} images of each class, {each - self.shots} of them for validation, but "
                    f"class {label} of {type(self.source).__name__} has {len(own)}; lower shots or val_size"
                )
            chosen.append(generator.permutation(own)[:each])
        rows = np.concatenate(chosen)
        return Labelled(training.images[rows], training.labels[rows]), test

    def bank_dataloader(self) -> EvaluationLoader:
        if self.bank_views is None:
            return super().bank_dataloader()
        viewed = ImageSamples(self.bank.data, self.bank.mean, self.bank.std, self.bank_views)
        return self._evaluate(_Epochs(viewed, self.epochs, self.seed))
