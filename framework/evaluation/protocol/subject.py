"""An encoder, the same network with random weights, and the pictures on which both are judged.

Shapes: B images [C H W] of a batch, N training samples, M evaluation samples, D features, P samples of a part.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
import torch
from lightning import LightningDataModule
from torch import Tensor, nn

from lightspan.core.distributed import world_size
from lightspan.core.errors import UserError
from lightspan.datamodules.loading.loader import ExactLoader
from lightspan.datamodules.loading.subset import SubsetSamples
from lightspan.datamodules.loading.workers import Dataset
from lightspan.evaluation.features.encoded import Encoded, Pool, Split, split_loader, vectors
from lightspan.evaluation.features.features import Features
from lightspan.evaluation.features.input import Input
from lightspan.evaluation.features.store import FeatureStore
from lightspan.nn.views import image_of


class Evaluated(Protocol):
    """Batches of the evaluation samples, the same in each pass."""

    def __iter__(self) -> Iterator[Any]: ...


class Rescaled(nn.Module):
    """x scale + shift, by channel.

    Args:
        scale, shift: [C, 1, 1].
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, scale: Tensor, shift: Tensor) -> None:
        super().__init__()
        self.register_buffer("scale", scale)
        self.register_buffer("shift", shift)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return x_BCHW * self.scale + self.shift


@dataclass(frozen=True)
class Judged:
    """One network.

    Attributes:
        network: a network or a method, in evaluation mode.
        bank: features of the training samples without augmentation, [N D].
        query: of the evaluation samples, [M D].
        transforms: between the images of the data and the network.
    """

    network: nn.Module
    bank: Features
    query: Features
    transforms: tuple[nn.Module, ...] = ()


@dataclass(frozen=True)
class ProtocolSubject:
    """What the protocol is run on.

    Attributes:
        encoder, floor: the network that is judged, and the same one with random weights.
        training: the N training samples, each with whatever augmentation the data have.
        evaluated: batches of the M evaluation samples, in the order of `query`.
        batch_size: samples of a training step, at least 1.
        num_workers: processes that fetch them.
    """

    encoder: Judged
    floor: Judged
    training: Dataset
    evaluated: Evaluated
    batch_size: int = 256
    num_workers: int = 0
    pool: Pool = "mean"
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def steps(self, samples: int, epochs: int) -> int:
        """Optimiser steps that so many epochs of so many samples take; an epoch has one at least."""
        return epochs * max(1, samples // min(self.batch_size, samples))

    def batches(self, rows_P: Tensor, epochs: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """(images [B C H W], labels [B]) on the device, in a new order and with new augmentation each epoch.

        A last batch that is not full is dropped, as in the published protocols; all samples are one batch where they
        are fewer than `batch_size`.

        Args:
            rows_P: places of the training samples, at least one.
        Raises: UserError for data whose batches are not one view of each image with its class.
        """
        samples = SubsetSamples(self.training, rows_P.numpy().astype(np.int64))
        size = min(self.batch_size, len(samples))
        loader = ExactLoader(samples, size, seed=seed, num_workers=self.num_workers)
        for _ in range(epochs):
            for batch in loader:
                if "drawn" in batch:
                    raise UserError("the protocol makes views where batches are fetched; set views_on=workers")
                yield image_of(batch, "ImageNetProtocol").to(self.device), batch["label"].long().to(self.device)

    def features(self, network: nn.Module, judged: Judged, x_BCHW: Tensor) -> Tensor:
        """What a copy of a judged network makes of images of the data, [B D]."""
        return vectors(network, judged.transforms, x_BCHW.to(self.device), self.pool)

    @torch.no_grad()
    def logits(self, network: nn.Module, head: nn.Module, judged: Judged) -> Tensor:
        """Of the evaluation samples, [M K], on the CPU, from a network in evaluation mode."""
        parts = [
            head(self.features(network, judged, image_of(batch, "ImageNetProtocol"))).cpu() for batch in self.evaluated
        ]
        return torch.cat(parts)


class EncoderAndFloor(Input):
    """An encoder of images and the same network with random weights, with the samples of a data module.

    The data module's `views`, of which there is one an image, are the augmentation of heads and of fine-tuning. Its
    samples are had by number (`lightspan.datamodules.loading.sample_sets.SampleSets`): any folder, data set of Hugging
    Face or shipped set, and no shards.

    Args:
        encoder: the network or method.
        floor: the same with random weights.
        data: with classes.
        query: what is scored, "val" or "test".
        standardised: as the "data" standardise, or as the network of "timm" says that its weights expect, in its
            `pretrained_cfg`.
        pool: as in `lightspan.evaluation.features.encoded.Encoded`.
    Raises: UserError for two networks whose weights differ in name or shape.
    """

    def __init__(
        self,
        encoder: nn.Module,
        floor: nn.Module,
        data: LightningDataModule,
        query: Split = "val",
        standardised: Literal["data", "timm"] = "data",
        pool: Pool = "mean",
    ) -> None:
        shapes = [{name: p.shape for name, p in network.named_parameters()} for network in (encoder, floor)]
        if shapes[0] != shapes[1]:
            differ = sorted({name for name, _ in shapes[0].items() ^ shapes[1].items()})
            raise UserError(
                f"floor is to be the encoder's network with random weights, but {len(differ)} weights differ, such as "
                f"{differ[0]}; give it the same class and settings"
            )
        self.encoder, self.floor, self.data, self.query = encoder, floor, data, query
        self.standardised, self.pool = standardised, pool

    def load(self, store: FeatureStore) -> ProtocolSubject:
        """Raises: UserError for several ranks, data whose samples cannot be had by number or without that split, and a
        network that cannot read the images.
        """
        if world_size() > 1:
            raise UserError("the protocol trains heads in one process; start it without a launcher")
        evaluated = split_loader(self.data, self.query)
        training = getattr(self.data, "train", None)
        if training is None or not hasattr(training, "sample"):
            raise UserError(
                f"{type(self.data).__name__} has no samples by number, of which 1 % and 10 % are chosen; take data "
                "such as lightspan.datamodules.image.folder.ImageFolder, or PictureDataset"
            )
        transforms = self._transforms()
        encoder, floor = (self._judged(network, transforms, store) for network in (self.encoder, self.floor))
        size, workers = getattr(self.data, "batch_size", 256), getattr(self.data, "num_workers", 0)
        return ProtocolSubject(encoder, floor, training, evaluated, size, workers, self.pool, store.device)

    def outlook(self, store: FeatureStore) -> str:
        count = sum(p.numel() for p in self.encoder.parameters())
        return f"{type(self.encoder).__name__} of {count:,} parameters, and the same with random weights"

    def _judged(self, network: nn.Module, transforms: list[nn.Module], store: FeatureStore) -> Judged:
        settings: dict[str, Any] = {"transforms": transforms, "pool": self.pool}
        bank, query = (Encoded(network, self.data, split, **settings).load(store) for split in ("bank", self.query))
        for part in (network, *transforms):
            part.to(store.device).eval()
        return Judged(network, bank, query, tuple(transforms))

    def _transforms(self) -> list[nn.Module]:
        """From images as the data standardise them to what the encoder expects."""
        if self.standardised == "data":
            return []
        told, bounds = getattr(self.encoder, "pretrained_cfg", None) or {}, getattr(self.data, "bounds", None)
        if not {"mean", "std"} <= told.keys() or bounds is None:
            lacking = "statistics of its images" if bounds is not None else "data that say how they standardise images"
            raise UserError(
                f"standardised=timm needs a network with {lacking}; set it to data, and data.mean and data.std"
            )
        mean, std = (torch.tensor(told[name]).view(-1, 1, 1) for name in ("mean", "std"))
        low, high = bounds
        return [Rescaled(1 / ((high - low) * std), -(low / (high - low) + mean) / std)]


def tuned_copy(network: nn.Module) -> nn.Module:
    """A copy of which everything trains."""
    own = copy.deepcopy(network).train()
    for parameter in own.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    return own
