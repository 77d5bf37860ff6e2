"""Pairs of images and texts of which some have the text of another image."""

from typing import Any

from lightspan.datamodules.image_text.captioned import Captioned, CaptionedImages
from lightspan.datamodules.label_noise import require_rate, swapped


class SwappedCaptions(CaptionedImages):
    """The pairs of `source`, of whose training captions some have changed places. Classes, and test pairs, stay right.

    Args:
        source: the whole set, whose tokenizer and length are taken; of its other settings those count that say which
            pairs it has.
        rate: share of swapped captions, in expectation, in [0, 1].
        noise_seed: of what is swapped.
        settings: those of `CaptionedImages` but tokenizer and length.
    """

    def __init__(self, source: CaptionedImages, rate: float = 0.3, noise_seed: int = 0, **settings: Any) -> None:
        super().__init__(source.tokenizer, source.length, **settings)
        require_rate(self, rate)
        self.source, self.rate, self.noise_seed = source, rate, noise_seed
        self.class_names, self.image_shape = source.class_names, source.image_shape  # type: ignore[misc]

    def load(self) -> tuple[Captioned, Captioned]:
        training, test = self.source.load()
        places = swapped(len(training.captions), self.rate, self.noise_seed)
        return Captioned(training.images, [training.captions[place] for place in places], training.labels), test
