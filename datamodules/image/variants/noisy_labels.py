"""An image set some of whose training labels are wrong."""

from typing import Any

from lightspan.datamodules.image.sets.small import ImageData, Labelled
from lightspan.datamodules.label_noise import flipped, require_rate


class NoisyLabels(ImageData):
    """The images of `source`, of whose training labels some are of another class. Test labels stay right, and so do
    those of validation if `val_size` is 0; images that are held out from training have its labels.

    Args:
        source: the whole set; of its settings those count that say which images it has.
        rate: share of wrong labels, in expectation, in [0, 1]; the wrong ones of a lower rate are wrong at a higher
            one.
        noise_seed: of what is wrong.
        settings: those of `ImageData`.
    """

    def __init__(self, source: ImageData, rate: float = 0.3, noise_seed: int = 0, **settings: Any) -> None:
        super().__init__(**settings)
        require_rate(self, rate)
        self.source, self.rate, self.noise_seed = source, rate, noise_seed
        self.num_classes, self.image_shape = source.num_classes, source.image_shape  # type: ignore[misc]

    def load(self) -> tuple[Labelled, Labelled]:
        training, test = self.source.load()
        return Labelled(training.images, flipped(training.labels, self.num_classes, self.rate, self.noise_seed)), test
