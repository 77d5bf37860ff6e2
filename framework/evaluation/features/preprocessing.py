"""What becomes of an image before an encoder sees it, as a part that says so: bands, size, normalisation.

Source: Corley, Robinson, Dodhia, Lavista Ferres, Najafirad, "Revisiting pre-trained remote sensing model benchmarks:
resizing and normalization matters", 2023, arXiv 2305.13456: features of one network differ by tens of points with these
three, so that none may be implicit. Resizing comes first, bilinear.
Shapes: B images, C bands, H W pixels.
"""

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightspan.core.distributed import all_reduce_max
from lightspan.core.errors import UserError, one_line
from lightspan.evaluation.features.features import Features
from lightspan.evaluation.geometry.moments import Moments


@dataclass(frozen=True)
class BandStatistics:
    """Of the pixels of the training images, each a tuple of C numbers. std is that of all pixels, not of a sample."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    least: tuple[float, ...]
    most: tuple[float, ...]

    @classmethod
    def of(cls, images: Iterable[Tensor]) -> "BandStatistics":
        """Of batches [B C H W], those of all ranks, computed in float64. Raises: UserError for no image."""
        moments: Moments | None = None
        ends_2C = torch.zeros(0)  # the most, and of the negative numbers
        for image_BCHW in images:
            pixels_NC = image_BCHW.double().movedim(1, -1).flatten(0, -2)
            infinite = pixels_NC.new_full((1, pixels_NC.shape[1]), -torch.inf)
            both_2C = torch.stack([torch.cat([sign * pixels_NC, infinite]).amax(0) for sign in (1, -1)])
            moments = Moments.of(pixels_NC) if moments is None else moments + Moments.of(pixels_NC)
            ends_2C = torch.maximum(ends_2C, both_2C) if len(ends_2C) else both_2C
        moments = None if moments is None else moments.over_ranks()
        if moments is None or not moments.count:
            raise UserError("there is no training image of whose bands to take statistics; give at least one")
        ends_2C = all_reduce_max(ends_2C)
        std_C = moments.covariance(correction=0).diagonal().sqrt()
        columns = moments.mean_CD[0], std_C, -ends_2C[1], ends_2C[0]
        return cls(*(tuple(column.tolist()) for column in columns))

    def of_bands(self, bands: Sequence[int] | None) -> "BandStatistics":
        return self if bands is None else BandStatistics(*(tuple(of[b] for b in bands) for of in vars(self).values()))


@dataclass(frozen=True)
class Affine:
    """(x - shift) / scale by band, cut to [0, 1] if `clips`, then (x - mean) / std. All are tuples of C numbers."""

    shift: tuple[float, ...]
    scale: tuple[float, ...]
    clips: bool = False
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None


class Normalisation(ABC):
    """How the bands of an image are brought to the numbers that an encoder reads."""

    @abstractmethod
    def affine(self, statistics: BandStatistics) -> Affine:
        """For bands of these statistics. Raises: UserError for settings of another number of bands."""


class Divided(Normalisation):
    """x / by: 10,000 for the reflectances of Sentinel-2, 1 for pictures, which are in [0, 1] here.

    Args:
        by: finite and not 0.
    """

    def __init__(self, by: float = 1.0) -> None:
        if by == 0 or not math.isfinite(by):
            raise UserError(f"Divided by={by} must be finite and not 0")
        self.by = by

    def affine(self, statistics: BandStatistics) -> Affine:
        count = len(statistics.mean)
        return Affine((0.0,) * count, (self.by,) * count)


class Standardised(Normalisation):
    """By the mean and the standard deviation of the training images; a constant band becomes 0."""

    def affine(self, statistics: BandStatistics) -> Affine:
        return Affine(statistics.mean, _without_zeros(statistics.std))


class MinMax(Normalisation):
    """To [0, 1] by the least and the most of the training images; a constant band becomes 0."""

    def affine(self, statistics: BandStatistics) -> Affine:
        ranges = tuple(most - least for least, most in zip(statistics.least, statistics.most, strict=True))
        return Affine(statistics.least, _without_zeros(ranges))


class Given(Normalisation):
    """(x - mean) / std by numbers that an encoder was trained with, for each band, or one number for all.

    Args:
        mean, std: of the bands that are encoded, in their order; std above 0.
    """

    def __init__(self, mean: list[float], std: list[float]) -> None:
        _require_scale("Given std", std)
        self.mean, self.std = mean, std

    def affine(self, statistics: BandStatistics) -> Affine:
        mean, std = (_each_band(f"Given {name}", getattr(self, name), statistics) for name in ("mean", "std"))
        return Affine(mean, std)


class Window(Normalisation):
    """From [low, high] to [0, 1], cut there, then standardised by other numbers: SeCo's, with those of ImageNet.

    Args:
        low, high: for each band, or one number for all; high above low.
        mean, std: likewise; std above 0.
    """

    def __init__(self, low: list[float], high: list[float], mean: list[float], std: list[float]) -> None:
        _require_scale("Window std", std)
        self.low, self.high, self.mean, self.std = low, high, mean, std

    def affine(self, statistics: BandStatistics) -> Affine:
        low, high, mean, std = (_each_band(f"Window {name}", value, statistics) for name, value in vars(self).items())
        widths = tuple(b - a for a, b in zip(low, high, strict=True))
        _require_scale("Window high minus low", widths)
        return Affine(low, widths, True, mean, std)


class Preprocess(nn.Module):
    """Bands, then resizing, then normalisation: [B C H W] -> float32 [B C' H' W'].

    Args:
        affine: of the chosen bands.
        name: of the normalisation, for reading.
        size: height and width in pixels, >= 1; None leaves images as they are.
        bands: numbers of those that are kept, in this order; None keeps all.
        raw: least and greatest value of images as they come, [C 1 1] each, which mean 0 and 1; None: they come as
            they are.
    Raises: UserError for a size or bands out of range, and in `forward` for images that lack a band.
    """

    shift: Tensor
    scale: Tensor
    mean: Tensor | None
    std: Tensor | None
    low: Tensor | None
    width: Tensor | None

    def __init__(
        self,
        affine: Affine,
        name: str,
        size: int | None = None,
        bands: Sequence[int] | None = None,
        raw: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        super().__init__()
        if size is not None and size < 1:
            raise UserError(f"Preprocess size={size} must be at least 1 pixel, or null for images as they are")
        if bands is not None and (not bands or min(bands) < 0):
            raise UserError(f"Preprocess bands={[*bands]} must be numbers of bands from 0 up, at least one")
        self.affine, self.name, self.size = affine, name, size
        self.bands = None if bands is None else list(bands)
        for key in ("shift", "scale", "mean", "std"):
            value = getattr(affine, key)
            self.register_buffer(key, None if value is None else _column(value))
        low, high = (None, None) if raw is None else raw
        self.register_buffer("low", low)
        self.register_buffer("width", None if high is None or low is None else high - low)

    def statement(self) -> dict[str, Any]:
        """Plain data: what an entry of the feature store says of its images."""
        return {
            "bands": self.bands,
            "size": self.size,
            "normalisation": {"name": self.name, **_plain(asdict(self.affine))},
        }

    def raw(self, image_BCHW: Tensor) -> Tensor:
        """The chosen bands of images as they are, without standardisation by their data module."""
        x = image_BCHW.float()
        if self.low is not None and self.width is not None:
            x = (x - self.low) / self.width
        if self.bands is None:
            return x
        if max(self.bands) >= x.shape[1]:
            raise UserError(f"bands={self.bands} of images that have {x.shape[1]}; count from 0")
        return x[:, self.bands]

    def resized(self, x_BCHW: Tensor) -> Tensor:
        if self.size is None or x_BCHW.shape[-2:] == (self.size, self.size):
            return x_BCHW
        return F.interpolate(x_BCHW, (self.size, self.size), mode="bilinear", align_corners=False)

    def normalised(self, x_BCHW: Tensor) -> Tensor:
        if x_BCHW.shape[1] != len(self.shift):
            raise UserError(
                f"normalisation {self.name!r} is of {len(self.shift)} bands, but images have {x_BCHW.shape[1]}"
            )
        x_BCHW = (x_BCHW - self.shift) / self.scale
        if self.affine.clips:
            x_BCHW = x_BCHW.clamp(0, 1)
        return x_BCHW if self.mean is None or self.std is None else (x_BCHW - self.mean) / self.std

    def inverse(self, y_BCHW: Tensor) -> Tensor:
        """What `normalised` was given, as far as nothing was cut."""
        if self.mean is not None and self.std is not None:
            y_BCHW = y_BCHW * self.std + self.mean
        return y_BCHW * self.scale + self.shift

    def forward(self, image_BCHW: Tensor) -> Tensor:
        return self.normalised(self.resized(self.raw(image_BCHW)))


def stated(parts: Iterable[Callable[..., Any]]) -> dict[str, Any] | None:
    """What transforms before an encoder say of themselves; None unless exactly one says something."""
    said = [part.statement() for part in parts if hasattr(part, "statement")]
    return said[0] if len(said) == 1 else None


def preprocessing_of(features: Features) -> dict[str, Any] | None:
    """What is stated with features; None if nothing is."""
    try:
        found = json.loads(features.key).get("preprocessing")
    except (ValueError, AttributeError):
        return None
    return found if isinstance(found, dict) else None


def in_words(preprocessing: dict[str, Any] | None) -> str:
    """A statement in a sentence for people: "all bands at 32 px, standardised (shift 0.13, scale 0.31)"; one that
    another program made in its own way as it is.
    """
    if preprocessing is None:
        return "unstated preprocessing"
    try:
        size, bands, how = (preprocessing[key] for key in ("size", "bands", "normalisation"))
        name = how["name"]
        numbers = ", ".join(f"{key} {' '.join(f'{value:.4g}' for value in how[key])}" for key in ("shift", "scale"))
        named = "all bands" if bands is None else f"bands {' '.join(map(str, bands))}"
    except (TypeError, ValueError, KeyError):
        return one_line(json.dumps(preprocessing))
    return f"{named} at {'their own size' if size is None else f'{size} px'}, {name} ({numbers})"


def require_stated(what: str, features: Features, asked: dict[str, Any] | None) -> None:
    """Raises: UserError for features that do not say how their images were prepared, or say something else.

    Args:
        what: they are called, such as "the query".
        asked: how they are to be prepared.
    """
    found = preprocessing_of(features)
    if found is None or found != asked:
        raise UserError(
            f"{what} has features of {in_words(found)}, where {in_words(asked)} is asked for, so that a figure would "
            "compare preprocessing and not features; encode it anew with the same, or state it in the file's metadata "
            "as `preprocessing`"
        )


def _plain(value: Any) -> Any:
    """As JSON gives it back."""
    return json.loads(json.dumps(value))


def _column(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)[:, None, None]


def _without_zeros(values: tuple[float, ...]) -> tuple[float, ...]:
    return tuple(value if value > 0 else 1.0 for value in values)


def _require_scale(what: str, values: Sequence[float]) -> None:
    if not values or not all(0 < value < math.inf for value in values):
        raise UserError(f"{what}={[*values]} must be above 0 and finite for each band")


def _each_band(what: str, values: Sequence[float], statistics: BandStatistics) -> tuple[float, ...]:
    count = len(statistics.mean)
    if len(values) not in (1, count):
        raise UserError(f"{what} has {len(values)} numbers, but {count} bands are encoded; give one for each")
    if not all(map(math.isfinite, values)):
        raise UserError(f"{what}={[*values]} must be finite for each band")
    return tuple(values) * (count if len(values) == 1 else 1)
