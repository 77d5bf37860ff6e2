"""An encoder with what its audit needs: images without labels, and those of a task that it never saw."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from lightning import LightningDataModule
from torch import Tensor, nn

from lightspan.core.distributed import gather_rows, raise_on_all_ranks
from lightspan.core.errors import UserError
from lightspan.core.ranges import require_in
from lightspan.evaluation.features.encoded import Pool, Split, split_loader, vectors
from lightspan.evaluation.features.input import Input
from lightspan.evaluation.features.store import FeatureStore
from lightspan.evaluation.rows import spaced_rows


@dataclass(frozen=True)
class AuditedEncoder:
    """An encoder of images in [0, 1], with some of them.

    Attributes:
        transforms: between images and encoder, in order, differentiable.
        surrogate: images [N C H W] of which nothing else is known.
        train, test: images of the task that the encoder is used for, of the same size, with `train_label_N` and
            `test_label_N`, their classes or None.
    """

    encoder: nn.Module
    transforms: Sequence[nn.Module]
    surrogate: Tensor
    train: Tensor
    train_label_N: Tensor | None
    test: Tensor
    test_label_N: Tensor | None
    pool: Pool = "mean"
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def features(self, x_BCHW: Tensor) -> Tensor:
        """[B D], with gradients if they are on. Raises: UserError for what are no vectors."""
        return vectors(self.encoder, self.transforms, x_BCHW.to(self.device), self.pool)

    def of(self, encoder: nn.Module) -> "AuditedEncoder":
        """The same images with another encoder."""
        return replace(self, encoder=encoder)


class EncoderToAudit(Input):
    """Images of two data modules in memory, put back into [0, 1] where a module has standardised them (it has
    `bounds`), so that one perturbation fits both.

    Args:
        encoder: the network or method, yours.
        surrogate: images of any kind; labels are not read.
        downstream: a task with classes, best of images that the encoder was not trained on.
        transforms: what the encoder expects of images in [0, 1]: a resize, a normalisation.
        most: largest number of images of each of the three sets, at least 2, evenly spaced.
        query: of the downstream task, "val" or "test".
        pool: as in `lightspan.evaluation.features.encoded.Encoded`.
    """

    def __init__(
        self,
        encoder: nn.Module,
        surrogate: LightningDataModule,
        downstream: LightningDataModule,
        transforms: list[nn.Module] | None = None,
        most: int = 2000,
        query: Split = "test",
        pool: Pool = "mean",
    ) -> None:
        require_in("[2, inf)", most=most)
        self.encoder, self.surrogate, self.downstream = encoder, surrogate, downstream
        self.transforms, self.most, self.query, self.pool = list(transforms or ()), most, query, pool

    def load(self, store: FeatureStore) -> AuditedEncoder:
        """Raises: UserError for data without these splits, or whose batches have no `image` or `index`."""
        surrogate, _ = self._images(self.surrogate, "bank")
        sides = [self._images(self.downstream, split) for split in ("bank", self.query)]
        for part in (self.encoder, *self.transforms):
            part.to(store.device)
        (train, known), (test, asked) = sides
        return AuditedEncoder(
            self.encoder, self.transforms, surrogate, train, known, test, asked, self.pool, store.device
        )

    def outlook(self, store: FeatureStore) -> str:
        return f"{type(self.encoder).__name__} and at most {self.most} images of each set, in memory"

    def _images(self, data: LightningDataModule, split: Split) -> tuple[Tensor, Tensor | None]:
        """(images of all ranks in [0, 1], their labels)."""
        loader = split_loader(data, split)
        images, labels, numbers = list[Tensor](), list[Tensor](), list[Tensor]()
        with raise_on_all_ranks("read the images"):
            for batch in loader:
                if lacking := [field for field in ("image", "index") if field not in batch]:
                    raise UserError(f"a batch for an audit has no {lacking[0]}: it contains {sorted(batch)}")
                images.append(batch["image"])
                numbers.append(batch["index"])
                labels += [batch["label"]] if "label" in batch else []
            if not images:
                raise UserError(f"{type(data).__name__} has no image in its split {split!r}; choose another one")
        number_N = gather_rows(torch.cat(numbers))[0]
        order_N = spaced_rows(number_N.argsort(stable=True), self.most)
        bounds = getattr(data, "bounds", None)
        low, high = bounds if bounds is not None else (0.0, 1.0)
        x = (gather_rows(torch.cat(images))[0][order_N] - low) / (high - low)
        return x.clamp(0, 1), gather_rows(torch.cat(labels))[0][order_N] if labels else None
