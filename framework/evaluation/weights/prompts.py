"""What a network is run on, step by step: denoising from prompts, or a pass over samples.

Shapes: B prompts of a batch, C H W image.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any, Literal, Self

import torch
from lightning import LightningDataModule
from torch import Tensor, nn

from lightspan.core.errors import UserError
from lightspan.evaluation.features.input import Input
from lightspan.evaluation.features.store import FeatureStore


class Prompts(Input):
    """Prompts of one kind, and how a network is run on all of them."""

    def load(self, store: FeatureStore) -> Self:
        return self

    @abstractmethod
    def run(self, network: nn.Module, entering: Callable[[int], None]) -> None:
        """Runs the network on all prompts; `entering(t)` comes before whatever it does in step t."""


class DrawnImages(Prompts):
    """Images that a diffusion method draws from labels; a step is one level of noise.

    Args:
        labels: prompts, as the method's network takes them: classes, captions, `num_classes` for no prompt at all.
        shape: C H W of an image.
        draws: images of each label, from noise of their own.
        steps: levels of a whole image.
        first: of which only so many are looked at, the noisiest ones; the paper takes 10 of 50. None takes all.
        eta, guidance: of the sampler, see `DenoisingDiffusion.draw`. With guidance the network sees each prompt twice,
            once without its label, and both count, as in the published code.
        seed: of the noise, the same for the same places in lists of labels.
        batch_size: images drawn at once.
    """

    def __init__(
        self,
        labels: list[int],
        shape: tuple[int, int, int],
        draws: int = 1,
        steps: int = 50,
        first: int | None = 10,
        eta: float = 0.0,
        guidance: float = 1.0,
        seed: int = 0,
        batch_size: int = 256,
    ) -> None:
        if not labels or min(labels) < 0:
            raise UserError(f"DrawnImages labels={labels} must be one whole number or more, none below 0")
        if min(draws, steps, batch_size) < 1 or not (first is None or 1 <= first <= steps):
            raise UserError(
                f"DrawnImages draws={draws}, steps={steps} and batch_size={batch_size} must be at least 1, and "
                f"first={first} lie in [1, steps]"
            )
        self.labels, self.shape, self.draws, self.steps = list(labels), tuple(shape), draws, steps
        self.first, self.eta, self.guidance, self.seed, self.batch_size = first, eta, guidance, seed, batch_size

    def outlook(self, store: FeatureStore) -> str:
        return f"{len(self.labels) * self.draws} images of {len(self.labels)} labels, {self.first or self.steps} steps"

    def run(self, network: nn.Module, entering: Callable[[int], None]) -> None:
        for images in self._batches(network):
            for step in range(self.first or self.steps):
                entering(step)
                next(images)

    def images(self, network: nn.Module) -> tuple[Tensor, Tensor]:
        """(label [B], image [B C H W] on the CPU) of whole images, all steps."""
        last = [next(islice(images, self.steps - 1, None)).cpu() for images in self._batches(network)]
        return self._label(), torch.cat(last)

    def _label(self) -> Tensor:
        return torch.tensor(self.labels).repeat_interleave(self.draws)

    def _batches(self, network: nn.Module) -> Iterator[Iterator[Tensor]]:
        draw: Any = getattr(network, "draw", None)
        if not callable(draw):
            raise UserError(
                f"DrawnImages runs diffusion methods, which have `draw`, and {type(network).__name__} is none; name "
                "lightspan.methods.generative.denoising_diffusion.DenoisingDiffusion as the network"
            )
        most = getattr(getattr(network, "backbone", None), "num_classes", None)
        if most is not None and max(self.labels) > most:
            raise UserError(f"DrawnImages labels go to {max(self.labels)}, and the network knows {most} classes")
        device = next((p.device for p in network.parameters()), torch.device("cpu"))
        for i, label_B in enumerate(self._label().split(self.batch_size)):
            yield draw(label_B.to(device), self.shape, self.steps, self.eta, self.guidance, seed=self.seed + i)


class Samples(Prompts):
    """Samples of a data module, through any network in one step.

    Args:
        data: its `bank_dataloader` and the like yield mappings.
        split: "bank" (training samples without augmentation), "val" or "test".
        field: of the batch, what the network is called with.
        labels: of the samples that are taken; None takes all.
    """

    def __init__(
        self,
        data: LightningDataModule,
        split: Literal["bank", "val", "test"] = "bank",
        field: str = "image",
        labels: list[int] | None = None,
    ) -> None:
        self.data, self.split, self.field, self.labels = data, split, field, labels

    def run(self, network: nn.Module, entering: Callable[[int], None]) -> None:
        self.data.prepare_data()
        self.data.setup("test" if self.split == "test" else "fit")
        device = next((p.device for p in network.parameters()), torch.device("cpu"))
        seen = 0
        for batch in getattr(self.data, f"{self.split}_dataloader")():
            if self.field not in batch or (self.labels is not None and "label" not in batch):
                raise UserError(f"a batch has no {self.field!r} or no label; it holds {sorted(batch)}; set field")
            x = batch[self.field]
            if self.labels is not None:
                x = x[torch.isin(batch["label"], torch.tensor(self.labels))]
            if len(x):
                entering(0)
                network(x.to(device))
                seen += len(x)
        if not seen:
            raise UserError(f"Samples: no sample of {type(self.data).__name__} has one of the labels {self.labels}")
