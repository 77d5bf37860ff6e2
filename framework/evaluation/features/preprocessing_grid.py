"""Features of several encoders, each with images of several sizes, normalisations and bands."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal

import torch
from lightning import LightningDataModule
from torch import Tensor, nn

from lightspan.core.errors import UserError
from lightspan.evaluation.features.encoded import Encoded, Pool, split_loader
from lightspan.evaluation.features.features import Features
from lightspan.evaluation.features.input import Input
from lightspan.evaluation.features.preprocessing import (
    BandStatistics,
    Divided,
    Normalisation,
    Preprocess,
    Standardised,
    require_stated,
)
from lightspan.evaluation.features.store import FeatureStore
from lightspan.nn.bands import inflated


@dataclass(frozen=True)
class GridCell:
    """Features of one encoder and one preprocessing.

    Attributes:
        encoder, normalisation, bands: their names.
        size: in pixels; None for that of the images.
        preprocessing: what both sets of features have to state.
    """

    encoder: str
    size: int | None
    normalisation: str
    bands: str
    preprocessing: Mapping[str, Any]
    bank: Features
    query: Features


@dataclass(frozen=True)
class Grid:
    """What a benchmark compares.

    Attributes:
        cells: encoder by encoder.
    """

    cells: tuple[GridCell, ...]


class PreprocessingGrid(Input):
    """Each encoder on images of each size, normalisation and choice of bands, from the feature store.

    Statistics of bands are those of the training images alone, at their own size. Images that a data module has
    standardised (it has `bounds`) are first put back to what they are, in [0, 1] for pictures. The first convolution of
    an encoder takes as many bands as there are (`lightspan.nn.bands.inflated`); one with `learn`, such as
    `lightspan.backbones.image_statistics.PatchConvolutions`, first gets the training images, prepared like all others.

    Args:
        encoders: networks by name, [B C H W] -> [B D] or what `pool` makes that of.
        data: as in `lightspan.evaluation.features.encoded.Encoded`.
        sizes: in pixels; null for that of the images.
        normalisations: by name; None is {"divided": Divided(), "standardised": Standardised()}.
        bands: choices of bands by name, as numbers from 0 or, where data have `band_names`, by these; null for all.
            None is {"all": null}.
        query: "val" or "test": what is scored.
        pool, dtype: as in `Encoded`.
    Raises: UserError for an empty list.
    """

    def __init__(
        self,
        encoders: dict[str, nn.Module],
        data: LightningDataModule,
        sizes: list[int | None],
        normalisations: dict[str, Normalisation] | None = None,
        bands: dict[str, list[int | str] | None] | None = None,
        query: Literal["val", "test"] = "test",
        pool: Pool = "mean",
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    ) -> None:
        if normalisations is None:
            normalisations = {"divided": Divided(), "standardised": Standardised()}
        bands = {"all": None} if bands is None else bands
        for name, value in (
            ("encoders", encoders), ("sizes", sizes), ("normalisations", normalisations), ("bands", bands),
        ):  # fmt: skip
            if not value:
                raise UserError(f"PreprocessingGrid {name} is empty; give at least one")
        if wrong := [size for size in sizes if size is not None and size < 1]:
            raise UserError(f"PreprocessingGrid sizes={wrong} must be at least 1 pixel, or null")
        self.encoders, self.data, self.sizes = encoders, data, sizes
        self.normalisations, self.bands, self.query, self.pool, self.dtype = normalisations, bands, query, pool, dtype

    def load(self, store: FeatureStore) -> Grid:
        """Raises: UserError for bands, images or splits that are not there, and stored features of another
        preprocessing.
        """
        split_loader(self.data, "bank")  # sets it up
        raw = getattr(self.data, "bounds", None)
        statistics = BandStatistics.of(self._training(_as_they_are(raw)))
        cells = []
        for (name, encoder), size, (how, normalisation), (which, names) in product(
            self.encoders.items(), self.sizes, self.normalisations.items(), self.bands.items()
        ):
            bands = self._numbers(names, len(statistics.mean))
            affine = normalisation.affine(statistics.of_bands(bands))
            prepare = Preprocess(affine, how, size, bands, raw)
            network: Any = inflated(encoder, len(affine.shift))
            if hasattr(network, "learn"):
                network = copy.deepcopy(network)
                network.learn(self._training(prepare))
            settings: dict[str, Any] = {"transforms": [prepare], "pool": self.pool, "dtype": self.dtype}
            bank, query = (Encoded(network, self.data, split, **settings).load(store) for split in ("bank", self.query))
            for what, features in (("the bank", bank), ("the query", query)):
                require_stated(what, features, prepare.statement())
            cells.append(GridCell(name, size, how, which, prepare.statement(), bank, query))
        return Grid(tuple(cells))

    def outlook(self, store: FeatureStore) -> str:
        counts = [len(part) for part in (self.encoders, self.sizes, self.normalisations, self.bands)]
        return "features of {} encoders at {} sizes, {} normalisations and {} choices of bands".format(*counts)

    def _training(self, prepare: nn.Module) -> Iterator[Tensor]:
        with torch.no_grad():
            for batch in self.data.bank_dataloader():  # type: ignore[attr-defined]
                if "image" not in batch:
                    raise UserError(f"a batch for PreprocessingGrid has no image: it contains {sorted(batch)}")
                yield prepare(batch["image"])

    def _numbers(self, names: Sequence[int | str] | None, count: int) -> list[int] | None:
        if names is None:
            return None
        known = list(getattr(self.data, "band_names", ()))
        numbers = [known.index(name) if name in known else name for name in names]
        if wrong := [number for number in numbers if not isinstance(number, int) or not 0 <= number < count]:
            has = f"names {', '.join(known)}" if known else "no names"
            raise UserError(
                f"bands {wrong} are not among the {count} of {type(self.data).__name__}, which have numbers from 0 and "
                f"{has}"
            )
        return [number for number in numbers if isinstance(number, int)]


def _as_they_are(raw: tuple[Tensor, Tensor] | None) -> nn.Module:
    class Raw(nn.Module):
        def forward(self, image_BCHW: Tensor) -> Tensor:
            return image_BCHW if raw is None else (image_BCHW - raw[0]) / (raw[1] - raw[0])

    return Raw()
