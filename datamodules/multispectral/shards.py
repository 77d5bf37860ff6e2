"""Pictures of many bands from tar shards, of one date or of several, such as fMoW-Sentinel or chips of HLS.

Shapes: S bands stored, C bands taken, T dates, H W pixels.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from lightspan.core.errors import UserError, one_line
from lightspan.core.files.places import ReadPath
from lightspan.core.ranges import require_numbers
from lightspan.datamodules.loading.ranks import say
from lightspan.datamodules.loading.workers import Damaged
from lightspan.datamodules.multispectral.bands import Bands
from lightspan.datamodules.multispectral.batch import MultispectralBatch, MultispectralSeriesBatch
from lightspan.datamodules.multispectral.moments import BandMoments, band_moments
from lightspan.datamodules.multispectral.resampling import SpectralCrops, square
from lightspan.datamodules.multispectral.tiffs import bands_first, read_tiff
from lightspan.datamodules.shards.decoders import decode_array, decode_class, place_of
from lightspan.datamodules.shards.headers import UNDECODABLE
from lightspan.datamodules.shards.stand_ins import NOWHERE, npy
from lightspan.datamodules.shards.stream import Decoding, Shards

TIFFS, CLOUDS = ("tif", "tiff"), "clouds.npy"


@dataclass(frozen=True)
class SpectralDecoding(Decoding):
    """Makes samples of `MultispectralBatch`, or, with dates, of `MultispectralSeriesBatch`.

    Args:
        bands, dates, size: those of `MultispectralShards`.
        moments: for standardising; None leaves reflectance as it is, to be measured.
        crops: those of training.
    """

    bands: Bands
    dates: int | None
    moments: BandMoments | None
    crops: SpectralCrops | None

    @property
    def batch_type(self) -> type:
        return MultispectralBatch if self.dates is None else MultispectralSeriesBatch

    def __call__(self, members: dict[str, Any], seed: int) -> dict[str, Any]:
        where = place_of(members)
        try:
            values, valid = self._read(members)
            label = decode_class(members["cls"]) if "cls" in members else 0
        except UNDECODABLE as error:
            raise UserError(f"{where} cannot be used: {error}") from error
        if self.image_size is not None:
            values, valid = square(values, valid, self.image_size)
        if self.crops is not None:
            values, valid = self.crops(values, valid, seed)
        image = values if self.moments is None else self.moments.standardised(values, valid)
        return {"image": image, "valid": valid.long(), "label": torch.tensor(label)}

    def _read(self, members: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """Reflectance [C H W] or [C T H W], and where it is valid. Raises: ValueError for what is not as described."""
        ending = next((ending for ending in ("npy", *TIFFS) if ending in members), None)
        if ending is None:
            there = one_line(", ".join(name for name in members if not name.startswith("__")))
            raise ValueError(f"it has no .npy, .tif or .tiff member, but {there}")
        count, content = len(self.bands.stored_names), members[ending]
        if ending == "npy":
            stored = decode_array(content).numpy()
        else:
            stored = read_tiff(content, count if self.dates is None else count * self.dates)
        if self.dates is None:
            values, valid = self.bands.reflectance(bands_first(stored, count, False if ending in TIFFS else None))
        else:
            stored = stored.reshape(self.dates, count, *stored.shape[1:]) if ending in TIFFS else stored
            if stored.ndim != 4 or stored.shape[:2] != (self.dates, count):
                raise ValueError(
                    f"its shape is {list(stored.shape)}, and a series is [T S H W] of T={self.dates} dates and "
                    f"S={count} bands"
                )
            values, valid = self.bands.reflectance(np.moveaxis(stored, 1, 0))
        return under_clouds(members, values, valid)


def under_clouds(members: dict[str, Any], values: np.ndarray, valid: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Both as tensors, with what a .clouds.npy member of the sample marks as not valid, and 0 there.

    Raises: ValueError for clouds of another shape than a band's.
    """
    if CLOUDS in members:
        clouds = decode_array(members[CLOUDS]).numpy()
        if clouds.shape != values.shape[1:]:
            raise ValueError(f"its .{CLOUDS} is of {list(clouds.shape)}, and the picture of {[*values.shape[1:]]}")
        valid = valid & ~clouds.astype(bool)
        values = np.where(valid, values, 0)
    return torch.from_numpy(values), torch.from_numpy(valid)


class MultispectralShards(Shards):
    """Batches of `MultispectralBatch`, or, with `dates`, of `MultispectralSeriesBatch`. Order, resume, damage and
    memory are those of `Shards`.

    Args:
        shards, val_shards: as in `Shards`. A sample has KEY.tif, KEY.tiff or KEY.npy, its stored bands, the first or
            the last axis; of a series KEY.npy [T S H W], or a TIFF that has the bands of one date after those of
            another. KEY.cls, its class, may be absent, as may KEY.clouds.npy, [H W] or [T H W], which is not 0 where a
            pixel is not to be trusted.
        bands: what is stored and what of it is taken.
        dates: T, at least 1, of a series; None for pictures of one date.
        crops: random crops of a training sample, of all dates alike.
        mean, std: of each band's reflectance, for standardising. None measures them, over valid pixels alone, on
            `measured` training samples, spread evenly.
        measured: at least 1.
        settings: those of `Shards` but `fields` and `views`; `image_size` takes the square in the middle.
    """

    def __init__(
        self,
        shards: list[ReadPath],
        bands: Bands,
        val_shards: list[ReadPath] | None = None,
        dates: int | None = None,
        crops: SpectralCrops | None = None,
        mean: list[float] | None = None,
        std: list[float] | None = None,
        measured: int = 500,
        **settings: Any,
    ) -> None:
        if (dates is not None and dates < 1) or measured < 1:
            raise UserError(f"MultispectralShards dates={dates} and measured={measured} must be at least 1")
        given = mean is not None or std is not None
        if given and not (mean and std and len(mean) == len(std) == len(bands) and min(std) > 0):
            raise UserError(
                f"mean={mean} and std={std} must have a number for each of the {len(bands)} bands, and std be above 0; "
                "leave both out to have them measured"
            )
        super().__init__(shards, val_shards, fields={"image": "npy"}, **settings)
        side, of_crops = self.decode.image_size or 264, 0 if crops is None else crops.size
        numbers = (dates or 1) * len(bands.stored_names) * max(side, of_crops) ** 2
        require_numbers(numbers, dates=dates, image_size=self.decode.image_size, size=of_crops or None)
        moments = (
            BandMoments(torch.tensor(mean, dtype=torch.float32), torch.tensor(std, dtype=torch.float32))
            if mean and std
            else None
        )
        self.bands, self.measured = bands, measured
        self.decode: SpectralDecoding = SpectralDecoding(
            **vars(self.decode), bands=bands, dates=dates, moments=moments, crops=crops
        )

    @property
    def shown_bands(self) -> tuple[int, int, int]:
        """Places of the bands that pictures of a batch show as red, green and blue."""
        return self.bands.shown()

    def setup(self, stage: str | None = None) -> None:
        """As `Shards.setup`, and measures the bands."""
        if self.train is not None:
            return
        super().setup(stage)
        assert self.train is not None
        assert self.val is not None
        if self.decode.moments is None:
            self.decode = replace(self.decode, moments=self._measure())
            self.train = self.train.decoded_by(self.decode)
        plain = replace(self.decode, crops=None)
        self.bank, self.val = (samples.decoded_by(plain) for samples in (self.train, self.val))

    def _measure(self) -> BandMoments:
        """On all ranks the same samples, without a collective. A damaged one, if the user allows it, counts not."""
        assert self.train is not None
        raw = self.train.decoded_by(replace(self.decode, crops=None))
        numbers = np.unique(np.linspace(0, len(raw) - 1, min(len(raw), self.measured)).astype(int)).tolist()

        def pictures() -> Any:
            for number in numbers:
                try:
                    sample = raw.sample(number, 0)
                except Damaged:
                    continue
                yield sample["image"].numpy(), sample["valid"].numpy().astype(bool)

        moments = band_moments(pictures(), len(self.bands))
        listed = ", ".join(
            f"{name} {mean:.4g} ± {std:.4g}"
            for name, mean, std in zip(self.bands.names, *(part.tolist() for part in moments), strict=True)
        )
        say(f"shards: reflectance of {len(numbers):,} training samples: {listed}")
        return moments

    @property
    def bounds(self) -> None:  # type: ignore[override]
        """Reflectance has no black and white: pictures show the range of most of it."""

    def example(self) -> dict[str, Any]:
        """An empty picture of 264 x 264, or a series of them."""
        dates = [] if self.decode.dates is None else [self.decode.dates]
        empty = np.zeros((*dates, len(self.bands.stored_names), 264, 264), np.float32)
        return self.decode(NOWHERE | {"npy": npy(empty)}, seed=0)
