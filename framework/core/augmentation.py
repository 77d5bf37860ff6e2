"""What makes random views of a sample, as far as one has to know of it to compare augmentations."""

from abc import ABC, abstractmethod

from torch import Tensor


class Augmentation(ABC):
    """Maps one sample to its views, a list of at least one. All randomness comes from torch's global CPU generator."""

    @abstractmethod
    def __call__(self, image: Tensor) -> list[Tensor]: ...
