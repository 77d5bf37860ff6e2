"""Food reviews with a verdict, from the R package modeldata. Nothing is downloaded. Shapes: T tokens."""

from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from lightspan.core.files.places import ReadPath
from lightspan.datamodules.loading.ranks import say, sizes
from lightspan.datamodules.loading.sample_sets import SplitSampleSets, require_enough, require_sizes, spaced
from lightspan.datamodules.r_data import read_r_data
from lightspan.datamodules.text.labelled import LabelledTextSamples, LabelledTokens
from lightspan.datamodules.text.tokenized import require_length


class FoodReviews(SplitSampleSets):
    """4,000 training and 1,000 test reviews of food (McAuley and Leskovec 2013), batches of `LabelledTextBatch`.

    Label 1 is the verdict `great` (the best score), 0 any other; about two thirds are great. Each review is truncated
    or padded to one length. Training reviews that occur twice, or among the test reviews, are left out (about 25).

    Args:
        tokenizer: turns a review into tokens, special tokens included.
        length: T, tokens of a review that are read; half of the reviews have fewer than 70 words.
        train_size: train on this many reviews, evenly spaced; None uses all.
        val_size: validate on this many training reviews, evenly spaced and held out from training, so that settings can
            be chosen without the test reviews. 0 trains on all and validates on the test reviews.
        library: folder of R packages that contains modeldata; None searches the usual places.
        settings: those of `SampleSets`.

    Raises: UserError at setup if the reviews are not installed or too few for the requested sizes.
    """

    num_classes = 2

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        length: int = 128,
        train_size: int | None = None,
        val_size: int = 0,
        library: ReadPath | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        require_length(length)
        require_sizes(train_size, val_size)
        self.tokenizer, self.length, self.library = tokenizer, length, library
        self.train_size, self.val_size = train_size, val_size

    def setup(self, stage: str | None = None) -> None:
        """Read, split and tokenise, once."""
        if self.train is not None:
            return
        first, second = read_r_data("modeldata", ("training_data", "testing_data"), self.library)
        first = first[~first["review"].isin(second["review"]) & ~first["review"].duplicated()]
        training, test = (self._tokenize(f["review"].tolist(), f["score"].tolist()) for f in (first, second))
        count = len(training.labels)
        require_enough(self.train_size, self.val_size, count, "training reviews")
        held_out = spaced(np.arange(count), self.val_size)
        rest = np.setdiff1d(np.arange(count), held_out)
        rest = spaced(rest, self.train_size or len(rest))
        validation = training.at(held_out) if self.val_size else test
        self.train = self.bank = LabelledTextSamples(training.at(rest))
        self.val, self.test = LabelledTextSamples(validation), LabelledTextSamples(test)
        validated = len(self.val) if self.val_size else None
        say(
            f"reviews: {sizes(len(self.train), validated, len(self.test), 'reviews')}, "
            f"{self.val.data.labels.mean():.1%} of the validation reviews great"
        )

    def _tokenize(self, texts: list[str], scores: list[str]) -> LabelledTokens:
        return LabelledTokens.of(self.tokenizer, texts, [score == "great" for score in scores], self.length)
