"""Features of several encoders of the same samples, some of them fitted to the samples without labels."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from lightning import LightningDataModule
from torch import Tensor, nn

from lightspan.core.batches import batch_type_of, single_field
from lightspan.core.errors import UserError
from lightspan.core.files.places import ReadPath
from lightspan.evaluation.features.encoded import Encoded, FeatureFile, Pool, split_loader
from lightspan.evaluation.features.features import Features
from lightspan.evaluation.features.input import Input
from lightspan.evaluation.features.store import FeatureStore


@dataclass(frozen=True)
class ComparedFeatures:
    """Features by encoder, in the order in which they were named.

    Attributes:
        banks, queries: of the same training and evaluation samples.
    """

    banks: dict[str, Features]
    queries: dict[str, Features]


class ComparedEncoders(Input):
    """What encoders make of the training samples and of those of another split, from the feature store.

    An encoder with `learn(batches)`, such as `lightspan.nn.latent_models.FactorModel`, is first fitted to the
    training samples, transformed, without their labels.

    Args:
        encoders: networks or methods by name, as in `lightspan.evaluation.features.encoded.Encoded`.
        data: their samples.
        query: what is scored, "val" or "test".
        without_transforms: names of encoders that get samples as they are, such as those that read pixels.
        transforms, field, pool, dtype: as in `Encoded`.
    Raises: UserError for no encoder, or names that no encoder has.
    """

    def __init__(
        self,
        encoders: dict[str, nn.Module],
        data: LightningDataModule,
        query: Literal["val", "test"] = "test",
        transforms: list[nn.Module] | None = None,
        without_transforms: list[str] | None = None,
        field: str | None = None,
        pool: Pool = "mean",
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    ) -> None:
        if not encoders:
            raise UserError("ComparedEncoders encoders is empty; give at least one")
        if unknown := sorted(set(without_transforms or ()) - encoders.keys()):
            raise UserError(
                f"ComparedEncoders without_transforms={unknown} are not among the encoders {', '.join(encoders)}"
            )
        self.encoders, self.data, self.query, self.field = encoders, data, query, field
        self.transforms, self.plain = list(transforms or ()), set(without_transforms or ())
        self.pool, self.dtype = pool, dtype

    def load(self, store: FeatureStore) -> ComparedFeatures:
        """Raises: UserError as `Encoded`, and for samples that an encoder cannot learn from."""
        banks, queries = dict[str, Features](), dict[str, Features]()
        for name, encoder in self.encoders.items():
            transforms = [] if name in self.plain else self.transforms
            network: Any = encoder
            if hasattr(encoder, "learn"):
                network = copy.deepcopy(encoder)
                network.learn(self._samples(transforms))
            settings: dict[str, Any] = {"field": self.field, "pool": self.pool, "dtype": self.dtype}
            banks[name], queries[name] = (
                Encoded(network, self.data, split, transforms=transforms, **settings).load(store)
                for split in ("bank", self.query)
            )
        return ComparedFeatures(banks, queries)

    def outlook(self, store: FeatureStore) -> str:
        return f"features of {', '.join(self.encoders)}"

    def _samples(self, transforms: list[nn.Module]) -> Iterator[Tensor]:
        loader = split_loader(self.data, "bank")
        field = self.field or single_field(batch_type_of(getattr(loader, "dataset", None), self.data))
        with torch.no_grad():
            for batch in loader:
                if field not in batch:
                    raise UserError(f"a batch has no {field!r}; it contains {sorted(batch)}; set field")
                x = batch[field]
                for transform in transforms:
                    x = transform(x)
                yield x


class ComparedFiles(Input):
    """Features that other programs made, as `lightspan.evaluation.features.encoded.FeatureFile` reads them.

    Args:
        banks, queries: files of the training samples and of those that are scored, by the encoder's name.
    Raises: UserError for no file, or encoders that only one of both has.
    """

    def __init__(self, banks: dict[str, ReadPath], queries: dict[str, ReadPath]) -> None:
        if not banks or banks.keys() != queries.keys():
            raise UserError(
                f"ComparedFiles banks are of {[*banks]} and queries of {[*queries]}; give both for each encoder"
            )
        self.banks, self.queries = banks, queries

    def load(self, store: FeatureStore) -> ComparedFeatures:
        """Raises: UserError as `FeatureFile`."""
        sides = (self.banks, {name: self.queries[name] for name in self.banks})
        return ComparedFeatures(
            *({name: FeatureFile(path).load(store) for name, path in side.items()} for side in sides)
        )

    def outlook(self, store: FeatureStore) -> str:
        return f"features of {', '.join(self.banks)} in files"
