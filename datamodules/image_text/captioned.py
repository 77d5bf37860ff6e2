"""What sets of pictures with captions share. Shapes: N pairs of a set, T tokens, C H W image."""

from abc import abstractmethod
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from lightspan.core.errors import UserError
from lightspan.datamodules.image.augment.views import Views, view_as_image
from lightspan.datamodules.image.sets.small import ImageSamples, Labelled, channel_moments, evenly
from lightspan.datamodules.image_text.batch import LabelledImageTextBatch
from lightspan.datamodules.loading.ranks import say
from lightspan.datamodules.loading.sample_sets import SplitSampleSets, require_sizes
from lightspan.datamodules.text.tokenized import require_length, tokenized


class Captioned(NamedTuple):
    """images: uint8 [N, C, H, W]; captions: N texts; labels: int64 [N]."""

    images: np.ndarray
    captions: list[str]
    labels: np.ndarray

    def kept(self, indices: np.ndarray) -> "Captioned":
        """The pairs at these places."""
        return Captioned(self.images[indices], [self.captions[i] for i in indices], self.labels[indices])


class PairSamples:
    """Samples of `LabelledImageTextBatch`: those of `images`, whose views, if any, are one, with tokens and mask."""

    batch_type = LabelledImageTextBatch

    def __init__(self, images: ImageSamples, tokens: np.ndarray, mask: np.ndarray) -> None:
        assert len(images) == len(tokens) == len(mask)
        self.images, self.tokens, self.mask = images, tokens, mask

    def __len__(self) -> int:
        return len(self.images)

    def sample(self, index: int, seed: int) -> dict[str, Any]:
        sample = view_as_image(self.images.sample(index, seed))
        text = {"tokens": torch.from_numpy(self.tokens[index]), "mask": torch.from_numpy(self.mask[index])}
        return sample | text


class CaptionedImages(SplitSampleSets):
    """Pictures, each with a caption and a class: batches of `LabelledImageTextBatch`.

    Images are standardised with the mean and deviation of the training images. `class_names` says what the classes
    are called, so that zero-shot classification can ask for them in sentences.

    Args:
        tokenizer: turns a caption into tokens, special tokens included.
        length: T, tokens of a caption that are read, special ones included, at least 3.
        batch_size: pairs of one optimiser step over all ranks.
        view: makes the one view of a training image; None trains on the images themselves.
        train_size: train on this many pairs, with the classes in turn; None uses all.
        val_size: validate on this many pairs held out from training, so that settings can be chosen without the test
            pairs. 0 trains on all and validates on the test pairs.
        train_classes: train on pairs of these classes alone; None on all. Validation and test pairs have all classes.
        settings: the others of `SampleSets`.
    """

    image_shape: ClassVar[tuple[int, int, int]]  # C H W
    class_names: tuple[str, ...]

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        length: int = 32,
        batch_size: int = 128,
        view: Views | None = None,
        train_size: int | None = None,
        val_size: int = 0,
        train_classes: list[int] | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(batch_size, **settings)
        require_length(length)
        require_sizes(train_size, val_size)
        if view is not None and getattr(view, "count", 1) != 1:
            raise UserError(f"pairs have one view of each image, but view gives {view.count}; set its count to 1")  # type: ignore[attr-defined]
        if train_classes is not None and not set(train_classes) <= set(range(self.num_classes)):
            raise UserError(
                f"train_classes={train_classes} must name classes of {type(self).__name__}, from 0 to "
                f"{self.num_classes - 1}"
            )
        self.tokenizer, self.length, self.view = tokenizer, length, view
        self.train_size, self.val_size, self.train_classes = train_size, val_size, train_classes
        self.train: PairSamples | None = None

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @abstractmethod
    def load(self) -> tuple[Captioned, Captioned]:
        """(training pairs, test pairs)."""

    def setup(self, stage: str | None = None) -> None:
        """Load, split and tokenise, once. Raises: UserError if there are too few pairs for the requested sizes."""
        if self.train is not None:
            return
        training, test = self.load()
        held_out = evenly(training.labels, self.val_size)
        validation = training.kept(held_out) if self.val_size else test
        training = training.kept(np.setdiff1d(np.arange(len(training.labels)), held_out))
        if self.train_classes is not None:
            training = training.kept(np.flatnonzero(np.isin(training.labels, self.train_classes)))
        if (self.train_size or 1) > len(training.labels):
            raise UserError(
                f"train_size={self.train_size}, val_size={self.val_size} and train_classes leave only "
                f"{len(training.labels)} training pairs of {type(self).__name__}; lower a size or name more classes"
            )
        training = training.kept(evenly(training.labels, self.train_size or len(training.labels)))
        self.moments = channel_moments(training.images)
        self.train = self._samples(training, self.view)
        self.bank, self.val, self.test = (self._samples(pairs) for pairs in (training, validation, test))
        say(
            f"pairs: {type(self).__name__}, {len(self.train)} training, {len(self.val)} validation and "
            f"{len(self.test)} test images of {' x '.join(map(str, self.image_shape))} with captions"
        )

    @property
    def bounds(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Black and white after standardising: the least and greatest value of an image, each [C, 1, 1]."""
        mean, std = self.moments
        return -mean / std, (1 - mean) / std

    def _samples(self, pairs: Captioned, view: Views | None = None) -> PairSamples:
        images = ImageSamples(Labelled(pairs.images, pairs.labels), *self.moments, view)
        return PairSamples(images, *tokenized(self.tokenizer, pairs.captions, self.length))
