"""Scenes of land as satellites see them, in any bands and on any days: what grows where, and how far it has grown.

The land cover is a mosaic of fields. A pixel is a mixture of materials with known spectra
(`lightspan.datamodules.rendered.spectra`); settlements are roads and buildings between gardens, thinner than the pixels
of a coarser picture. Relief shades the ground, and the air brightens short waves. Clouds hide parts of a date.

Shapes: B scenes, S materials of a scene, P fields, C bands, T dates, H W pixels.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from lightspan.core.errors import UserError
from lightspan.core.noise import interpolation
from lightspan.datamodules.multispectral.bands import Bands, wavelengths
from lightspan.datamodules.multispectral.batch import SeasonsBatch
from lightspan.datamodules.multispectral.moments import BandMoments, band_moments
from lightspan.datamodules.multispectral.resampling import SpectralCrops
from lightspan.datamodules.rendered.batch import LandBatch, LandSeriesBatch
from lightspan.datamodules.rendered.data import SEEDS, RenderedSamples, RenderedSets, require_pictures
from lightspan.datamodules.rendered.draws import Draws
from lightspan.datamodules.rendered.spectra import MATERIALS, YEAR, season, spectra

AT_ONCE = 32
FIELDS = 9
SEASONS = 4
MOST = 5  # materials of a scene
LEAST_SHARE = 0.02  # of a scene that a material must cover to be among its tags
GRASS, BUILT, BARE = (MATERIALS.index(name) for name in ("grass", "built", "bare"))
FIRST_DAY, LAST_DAY = 45.0, 320.0  # of a series
SIXTY_DEGREES = np.float32(np.pi / 3)


class Rendered(NamedTuple):
    """What B scenes show.

    reflectance: float32 [B C T H W], without clouds.
    cloudy: bool [B T H W].
    cover: int64 [B H W], places in `MATERIALS`.
    share: float32 [B M H W], how much of each of `MATERIALS` is in a pixel, before roads outside of settlements.
    """

    reflectance: np.ndarray
    cloudy: np.ndarray
    cover: np.ndarray
    share: np.ndarray


class Land(NamedTuple):
    """All scenes that may be rendered.

    side: of a scene in pixels.
    wavelengths: of the bands in nanometres.
    materials: which there may be, places in `MATERIALS`.
    clouds: share of the scenes that have clouds, in [0, 1]; of a series they lie over one date, drawn at random.
    noise: standard deviation of a pixel's reflectance.
    """

    side: int
    wavelengths: tuple[float, ...]
    materials: tuple[int, ...]
    clouds: float
    noise: float

    def scenes(self, seed: int, numbers: np.ndarray, day: np.ndarray) -> Rendered:
        """Those with these numbers, int64 [B], on these days, float32 [B T], as a function of seed, number and day. The
        land cover does not depend on the days.
        """
        parts = [slice(at, at + AT_ONCE) for at in range(0, max(len(numbers), 1), AT_ONCE)]
        rendered = [self._scenes(seed, numbers[part], day[part]) for part in parts]
        return Rendered(*(np.concatenate(field) for field in zip(*rendered, strict=True)))

    def _scenes(self, seed: int, numbers: np.ndarray, day: np.ndarray) -> Rendered:
        B, H, rows = len(numbers), self.side, np.arange(len(numbers))[:, None]
        plan = Draws(seed, numbers, 20)
        # Of the materials that there may be, S in random order, of which a scene has the first few.
        S = min(MOST, len(self.materials))
        of_scene = np.array(self.materials)[plan.uniform(len(self.materials)).argsort(axis=1)[:, :S]]
        count = 1 + plan.integers(S)
        slot_BP = plan.integers(2**31, FIELDS) % count[:, None]
        first = np.minimum(count, FIELDS)[:, None]
        slot_BP = np.where(np.arange(FIELDS) < first, np.arange(FIELDS), slot_BP)  # each has a field at least
        field_BHW = self._mosaic(plan)
        slot_BHW = np.take_along_axis(slot_BP, field_BHW.reshape(B, -1), axis=1).reshape(B, H, H)
        cover = np.take_along_axis(of_scene, slot_BHW.reshape(B, -1), axis=1).reshape(B, H, H)

        # Mixtures: mostly what the field grows, and some of the scene's other materials.
        score = 1.2 * fractal(plan, S, H) + np.float32(4) * (slot_BHW[:, None] == np.arange(S)[:, None, None])
        score[(np.arange(S) >= count[:, None])] = -np.inf
        share_BS = np.exp(score - score.max(axis=1, keepdims=True))
        share_BS /= share_BS.sum(axis=1, keepdims=True)
        gardens, settled = fractal(plan, 1, H)[:, 0], self._settled(plan)
        share = np.zeros((B, len(MATERIALS), H, H), dtype=np.float32)
        for place in range(S):
            share[rows[:, 0], of_scene[:, place]] = share_BS[:, place]
        town, green = share[:, BUILT].copy(), 1 / (1 + np.exp(-2 * gardens))
        share[:, BUILT] = town * settled
        share[:, GRASS] += town * (1 - settled) * green
        share[:, BARE] += town * (1 - settled) * (1 - green)

        reflectance = self._grown(plan, share, day)
        road = self._roads(plan)
        road_spectrum = spectra(self.wavelengths)[0][BUILT] * np.float32(0.9)
        reflectance += road[:, None, None] * (road_spectrum[:, None, None, None] - reflectance)
        self._weather(seed, numbers, day, plan, reflectance)
        return Rendered(reflectance, self._clouds(seed, numbers, day.shape[1]), cover.astype(np.int64), share)

    def _mosaic(self, plan: Draws) -> np.ndarray:
        """Which field a pixel lies in, int64 [B H W]: that with the nearest middle, by bent coordinates."""
        x, y = grid(self.side)
        middle = plan.between(-0.05, 1.05, FIELDS, 2)
        bend = np.float32(0.05) * fractal(plan, 2, self.side)
        dx = (x + bend[:, 0])[:, None] - middle[:, :, 0, None, None]
        dy = (y + bend[:, 1])[:, None] - middle[:, :, 1, None, None]
        return (dx * dx + dy * dy).argmin(axis=1)

    def _settled(self, plan: Draws) -> np.ndarray:
        """How much of a pixel roads and buildings would cover in a settlement, float32 [B H W]: a grid of streets with
        houses in some of its blocks.
        """
        x, y = (axis * np.float32(self.side) for axis in grid(self.side))
        angle, pitch, phase = plan.between(0, np.pi / 2), plan.between(8, 13), plan.uniform(2)
        key = plan.integers(2**31)[:, None, None]
        cos, sin = np.cos(angle)[:, None, None], np.sin(angle)[:, None, None]
        pitch = pitch[:, None, None]
        u, v = (
            (x * cos + y * sin) / pitch + phase[:, 0, None, None],
            (y * cos - x * sin) / pitch + phase[:, 1, None, None],
        )
        i, j = np.floor(u), np.floor(v)
        u, v = np.abs(u - i - np.float32(0.5)), np.abs(v - j - np.float32(0.5))  # 0 in the middle of a block
        street = np.clip(np.float32(0.5) + np.float32(0.7) - (np.float32(0.5) - np.maximum(u, v)) * pitch, 0, 1)
        built = ((i.astype(np.int64) * 73856093 ^ j.astype(np.int64) * 19349663 ^ key) >> 3) % 8 < 5
        house = np.clip(np.float32(0.5) + (np.float32(0.24) - np.maximum(u, v)) * pitch, 0, 1) * built
        return np.maximum(street, house)

    def _roads(self, plan: Draws) -> np.ndarray:
        """How much of a pixel roads through the land cover, float32 [B H W]: up to two straight ones."""
        x, y = (axis * np.float32(self.side) for axis in grid(self.side))
        angle, at = plan.between(0, np.pi, 2), plan.between(-0.35, 0.35, 2) * np.float32(self.side)
        there = plan.uniform(2) < np.float32(0.4)
        half = np.float32(self.side / 2)
        road = np.zeros((len(angle), self.side, self.side), dtype=np.float32)
        for number in range(2):
            across = (x - half) * np.cos(angle[:, number])[:, None, None]
            across = across + (y - half) * np.sin(angle[:, number])[:, None, None] - at[:, number, None, None]
            line = np.clip(np.float32(0.5) + np.float32(0.8) - np.abs(across), 0, 1)
            road = np.maximum(road, line * there[:, number, None, None])
        return road

    def _grown(self, plan: Draws, share: np.ndarray, day: np.ndarray) -> np.ndarray:
        """Reflectance [B C T H W] of mixtures: a scene's season may be early or late, and growth differs by place."""
        B, M, H, _ = share.shape
        low, high = spectra(self.wavelengths)
        late = plan.between(-10, 10, M)
        grown = season(np.arange(M)[:, None], day[:, None] - late[:, :, None])  # [B M T]
        vigour = np.clip(np.float32(0.85) + np.float32(0.15) * fractal(plan, 1, H)[:, 0], 0.3, 1.2).reshape(B, 1, -1)
        gain = (grown[..., None, :] * (high - low)[:, :, None]).reshape(B, M, -1)  # [B M C*T]
        flat = share.reshape(B, M, -1)
        still = low.T @ flat  # [B C HW]
        moved = (gain.transpose(0, 2, 1) @ flat) * vigour
        texture = np.float32(1) + np.float32(0.06) * fractal(plan, 1, H, rough=0.9)[:, 0].reshape(B, 1, 1, -1)
        made = (still[:, :, None] + moved.reshape(B, len(self.wavelengths), day.shape[1], -1)) * texture
        return made.reshape(B, len(self.wavelengths), day.shape[1], H, H)

    def _weather(self, seed: int, numbers: np.ndarray, day: np.ndarray, plan: Draws, reflectance: np.ndarray) -> None:
        """Light, air and noise of each date, in place."""
        height = fractal(plan, 1, self.side, rough=0.35)[:, 0] * np.float32(self.side / 12)
        slope_y, slope_x = np.gradient(height, axis=(1, 2))
        dates = np.stack([np.rint(day[:, t] * 64).astype(np.int64) for t in range(day.shape[1])], axis=1)
        blue = (np.float32(490) / np.array(self.wavelengths, dtype=np.float32)) ** 2
        for t in range(day.shape[1]):
            own = Draws(seed, numbers, 21, dates[:, t])
            towards = own.between(-0.5, 0.5) + np.float32(np.pi / 4)  # the sun stands in the south-east or so
            low_sun = np.float32(0.6) + np.float32(0.4) * np.cos(2 * np.pi * (day[:, t] - 355) / YEAR)
            slope = slope_x * np.cos(towards)[:, None, None] + slope_y * np.sin(towards)[:, None, None]
            shade = np.clip(1 + np.float32(0.25) * low_sun[:, None, None] * slope, 0.4, 1.6)
            gain, haze = own.between(0.92, 1.08), own.between(0, 0.03)
            date = reflectance[:, :, t]
            date *= (shade * gain[:, None, None])[:, None]
            date += (haze[:, None] * blue)[:, :, None, None]
            date += np.float32(self.noise) * own.normal(*date.shape[1:])

    def _clouds(self, seed: int, numbers: np.ndarray, dates: int) -> np.ndarray:
        draws = Draws(seed, numbers, 22)
        there, date = draws.uniform() < np.float32(self.clouds), draws.integers(dates)
        share, cloudy = draws.between(0.2, 0.6), np.zeros((len(numbers), dates, self.side, self.side), dtype=bool)
        if self.clouds:
            thick = fractal(draws, 1, self.side, rough=0.4)[:, 0]
            ordered = np.sort(thick.reshape(len(numbers), -1), axis=1)
            least = ordered[np.arange(len(numbers)), ((1 - share) * ordered.shape[1]).astype(int)]
            cloudy[np.arange(len(numbers)), date] = (thick >= least[:, None, None]) & there[:, None, None]
        return cloudy


@functools.cache
def grid(side: int) -> tuple[np.ndarray, np.ndarray]:
    """x and y of the middles of pixels in (0, 1), float32 [H W]."""
    middles = (np.arange(side, dtype=np.float32) + np.float32(0.5)) / np.float32(side)
    return middles[None, :] + np.zeros_like(middles)[:, None], middles[:, None] + np.zeros_like(middles)[None, :]


def fractal(draws: Draws, count: int, side: int, rough: float = 0.6) -> np.ndarray:
    """Smooth random fields of mean 0 and a deviation near 1, float32 [B count side side]: octaves of noise, each of
    twice as many points and `rough` times the size of the one before.
    """
    total = np.zeros((draws.count, count, side, side), dtype=np.float32)
    variance, size, points = 0.0, 1.0, 4
    while points <= max(side, 4):
        spread = interpolation(side, points).astype(np.float32)
        total = total + np.float32(size) * (spread @ draws.normal(count, points, points) @ spread.T)
        # Of what is between points the variance is smaller: 4/9 on average over both axes.
        variance, size, points = variance + size**2 * 4 / 9, size * rough, 2 * points - 1
    return total / np.float32(variance**0.5)


class LandSamples(RenderedSamples):
    """Samples of `LandBatch`, or, with `dates`, of `LandSeriesBatch`."""

    def __init__(
        self, first: int, count: int, land: Land, draw_seed: int, dates: int | None, moments: BandMoments
    ) -> None:
        super().__init__(first, count)
        self.land, self.draw_seed, self.dates, self.moments = land, draw_seed, dates, moments

    @property
    def batch_type(self) -> type:
        return LandBatch if self.dates is None else LandSeriesBatch

    def draw(self, numbers: np.ndarray, seeds: np.ndarray) -> dict[str, Any]:
        day = days(self.draw_seed, numbers, self.dates)
        made = self.land.scenes(self.draw_seed, numbers, day)
        seen = np.broadcast_to(~made.cloudy[:, None], made.reflectance.shape)
        values, valid = (torch.from_numpy(np.moveaxis(part, 1, 0).copy()) for part in (made.reflectance, seen))
        image, clear = (self.moments.standardised(values, of).transpose(0, 1) for of in (valid, torch.ones_like(valid)))
        valid = valid.transpose(0, 1).long()
        share = cover_shares(made.cover)
        tags = torch.from_numpy((share >= LEAST_SHARE).astype(np.int64))
        fields = {
            "label": torch.from_numpy(share.argmax(axis=1)),
            "cover": torch.from_numpy(made.cover),
            "tags": tags,
            "tags_known": torch.ones_like(tags),
        }
        if self.dates is None:
            return {"image": image[:, :, 0], "valid": valid[:, :, 0], "day": torch.from_numpy(day[:, 0]), **fields}
        return {"image": image, "valid": valid, "clear": clear, "day": torch.from_numpy(day), **fields}


def cover_shares(cover_BHW: np.ndarray) -> np.ndarray:
    """How much of each scene each of `MATERIALS` covers, float64 [B M]."""
    return np.stack([(cover_BHW == material).mean(axis=(1, 2)) for material in range(len(MATERIALS))], axis=1)


def days(seed: int, numbers: np.ndarray, dates: int | None) -> np.ndarray:
    """Of scenes: any day of the year, [B 1]; of series one in each of `dates` equal parts of its warmer part [B T]."""
    draws = Draws(seed, numbers, 23)
    if dates is None:
        return np.minimum(draws.between(0, YEAR, 1), np.float32(YEAR - 0.01))
    part = np.float32((LAST_DAY - FIRST_DAY) / dates)
    return np.float32(FIRST_DAY) + part * (np.arange(dates, dtype=np.float32) + draws.between(0.25, 0.75, dates))


class LandScenes(RenderedSets):
    """Rendered scenes of land on any day of the year: batches of `LandBatch`.

    Bands are standardised with mean and deviation of training scenes over what clouds do not hide.

    Args:
        side: of a scene in pixels, at least 8. Settlements and roads have widths in pixels, all else is as large as the
            scene is.
        bands: names of one sensor's bands, see `lightspan.datamodules.multispectral.bands.SENSORS`; None takes all.
        sensor: that sensor.
        materials: names of those that there may be, of `MATERIALS`; None takes all nine.
        clouds: share of the scenes that have some, in [0, 1]; they hide from a fifth to three fifths of one.
        noise: standard deviation of a pixel's reflectance, at least 0.
        settings: those of `RenderedSets`.

    Attributes:
        shown_bands: places of the bands that pictures of a batch show as red, green and blue.
    """

    num_classes = num_tags = len(MATERIALS)
    classes = MATERIALS
    dates: int | None = None

    def __init__(
        self,
        side: int = 64,
        bands: Sequence[str] | None = None,
        sensor: str = "sentinel-2",
        materials: Sequence[str] | None = None,
        clouds: float = 0.0,
        noise: float = 0.004,
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        chosen = [*MATERIALS] if materials is None else [*materials]
        if not chosen or len(set(chosen)) < len(chosen) or not set(chosen) <= set(MATERIALS):
            raise UserError(f"materials={chosen} must name some of {', '.join(MATERIALS)}, each once")
        if side < 8 or not 0 <= clouds <= 1 or noise < 0:
            raise UserError(
                f"land of side={side}, clouds={clouds} and noise={noise}: side must be at least 8, clouds in [0, 1] "
                "and noise at least 0"
            )
        self.bands = Bands(sensor, None if bands is None else [*bands])
        require_pictures(len(self.bands) * side**2, side=side)
        centres = tuple(wavelengths(sensor, self.bands.names).tolist())
        self.land = Land(side, centres, tuple(map(MATERIALS.index, chosen)), clouds, noise)

    @property
    def shown_bands(self) -> tuple[int, int, int]:
        return self.bands.shown()

    def pictures(self, numbers: np.ndarray) -> np.ndarray:
        """In natural colours, of the first date."""
        made = self.land.scenes(self.draw_seed, numbers, days(self.draw_seed, numbers, self.dates))
        colours = made.reflectance[:, list(self.shown_bands), 0]
        return np.rint(255 * np.clip(3 * colours, 0, 1)).astype(np.uint8)

    def moments(self, numbers: np.ndarray) -> BandMoments:  # type: ignore[override]
        made = self.land.scenes(self.draw_seed, numbers, days(self.draw_seed, numbers, self.dates))
        seen = np.broadcast_to(~made.cloudy[:, None], made.reflectance.shape)
        return band_moments(zip(made.reflectance, seen, strict=True), len(self.bands))

    def image_sides(self) -> tuple[int, ...]:
        return len(self.bands), *([] if self.dates is None else [self.dates]), self.land.side, self.land.side

    def samples(self, first: int, count: int, moments: BandMoments) -> LandSamples:  # type: ignore[override]
        return LandSamples(first, count, self.land, self.draw_seed, self.dates, moments)


class SeasonSamples(RenderedSamples):
    """Samples of `SeasonsBatch`: two of a scene's four days, drawn anew in each epoch, each cropped by itself."""

    batch_type = SeasonsBatch

    def __init__(self, scenes: LandSamples, crops: SpectralCrops) -> None:
        super().__init__(scenes.first, scenes.count)
        self.scenes, self.crops = scenes, crops

    def draw(self, numbers: np.ndarray, seeds: np.ndarray) -> dict[str, Any]:
        scenes = self.scenes
        day = days(scenes.draw_seed, numbers, SEASONS)
        two = Draws(scenes.draw_seed, numbers, 24, seeds).uniform(SEASONS).argsort(axis=1)[:, :2]
        made = scenes.land.scenes(scenes.draw_seed, numbers, np.take_along_axis(day, two, axis=1))
        seen = np.broadcast_to(~made.cloudy[:, None], made.reflectance.shape)
        views: list[Any] = [[], []]
        for values, valid, seed in zip(made.reflectance, seen, seeds.tolist(), strict=True):
            for number, view in enumerate(views):
                date = torch.from_numpy(values[:, number]), torch.from_numpy(valid[:, number].copy())
                view.append(scenes.moments.standardised(*self.crops(*date, (2 * seed + number) % SEEDS)))
        tags = torch.from_numpy((cover_shares(made.cover) >= LEAST_SHARE).astype(np.int64))
        return {"views": [torch.stack(view) for view in views], "tags": tags, "tags_known": torch.ones_like(tags)}


class LandSeasons(LandScenes):
    """Rendered scenes in two seasons: training batches of `SeasonsBatch`, all others of `LandBatch`.

    A scene has a day in each of four equal parts of the time from mid-February to mid-November, of which an epoch shows
    two. A tag may hold of what a crop has cut off.

    Args:
        scale: least and greatest share of a scene in a view, in (0, 1]; views are as large as the scenes.
        settings: those of `LandScenes`.
    """

    def __init__(self, side: int = 64, scale: tuple[float, float] = (0.5, 1.0), **settings: Any) -> None:
        super().__init__(side, **settings)
        self.crops = SpectralCrops(side, scale)

    def setup(self, stage: str | None = None) -> None:
        """As `LandScenes`, once."""
        if self.train is not None:
            return
        super().setup(stage)
        assert isinstance(self.bank, LandSamples)
        self.train = SeasonSamples(self.bank, self.crops)


class LandSeries(LandScenes):
    """Rendered series of one place at several dates of a year: batches of `LandSeriesBatch`.

    Args:
        dates: T, at least 1; one in each of as many equal parts of the time from mid-February to mid-November.
        side, sensor, clouds, settings: as in `LandScenes`; clouds lie over one date, drawn at random.
    """

    def __init__(
        self, dates: int = 3, side: int = 48, sensor: str = "hls", clouds: float = 1.0, **settings: Any
    ) -> None:
        if dates < 1:
            raise UserError(f"dates={dates} of a series; at least 1 is needed")
        super().__init__(side, sensor=sensor, clouds=clouds, **settings)
        require_pictures(len(self.bands) * dates * side**2, dates=dates, side=side)
        self.dates = dates
