"""Bands of satellites by name, and what the stored numbers of a scene mean.

Shapes: S bands stored in a file, C bands taken into a batch, H W pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from lightspan.core.errors import UserError

SENSORS: dict[str, dict[str, float]] = {
    "sentinel-2": {
        "B1": 442.7, "B2": 492.4, "B3": 559.8, "B4": 664.6, "B5": 704.1, "B6": 740.5, "B7": 782.8, "B8": 832.8,
        "B8A": 864.7, "B9": 945.1, "B10": 1373.5, "B11": 1613.7, "B12": 2202.4,
    },
    "landsat-7": {"B1": 485.0, "B2": 560.0, "B3": 660.0, "B4": 835.0, "B5": 1650.0, "B7": 2220.0},
    "landsat-8": {
        "B1": 443.0, "B2": 482.0, "B3": 561.4, "B4": 654.6, "B5": 864.7, "B6": 1608.9, "B7": 2200.7, "B9": 1373.4,
    },
    "hls": {"blue": 490.0, "green": 560.0, "red": 665.0, "nir": 865.0, "swir1": 1610.0, "swir2": 2190.0},
    "landsat-mss": {"B4": 550.0, "B5": 650.0, "B6": 750.0, "B7": 950.0},
}  # fmt: skip
"""Sensor -> band -> centre in nanometres, in the order in which products list them. Sentinel-2 is satellite A of ESA's
user guide; Landsat is USGS' (of 7 and 8 the reflective bands without the panchromatic one); HLS the six bands that
Landsat and Sentinel-2 share; MSS as Landsat 4 and 5 number it.
"""
BLUE_GREEN_RED = (490.0, 560.0, 660.0)


def wavelengths(sensor: str, names: Sequence[str] | None = None) -> np.ndarray:
    """Centres in nanometres of bands, float64 [C]; None are all of the sensor.

    Raises: UserError for a sensor or a band that is not in `SENSORS`.
    """
    known = _sensor(sensor)
    names = [*known] if names is None else names
    if unknown := [name for name in names if name not in known]:
        raise UserError(f"{sensor} has no band {unknown[0]}; its bands are {', '.join(known)}")
    return np.array([known[name] for name in names])


def _sensor(sensor: str) -> dict[str, float]:
    if sensor not in SENSORS:
        raise UserError(f"the sensor {sensor} is not known; known are {', '.join(SENSORS)}")
    return SENSORS[sensor]


@dataclass(frozen=True)
class Bands:
    """Which bands a file stores, which of them a batch has, and how their numbers become reflectance.

    reflectance = (stored + offset) * scale. Nothing is guessed from the numbers: of Sentinel-2 level 2A scale is
    1.0e-4, and from processing baseline 04.00 (January 2022) on offset is -1000; of HLS scale is 1.0e-4. Left out, the
    stored numbers are taken as they are.

    Args:
        stored: names of the bands in the order of the file, or the name of a sensor for all of its bands in their
            order. The names need not be those of a sensor.
        taken: names of the bands of a batch, in its order; None takes all as they are stored.
        scale, offset: as above; scale is above 0.
        nodata: the stored number that means that a pixel was not seen, one for all bands or one by name. NaN and
            infinities always mean that.
        fill_absent: let a band of `taken` be absent from `stored`: its pixels are marked as not valid. Otherwise that
            is an error.
        sensor: where `stored` is a list, the sensor whose centres the bands have; None where no one needs to know.
    Raises: UserError for a name that is missing or comes twice.
    """

    stored: str | list[str]
    taken: list[str] | None = None
    scale: float = 1.0
    offset: float = 0.0
    nodata: float | dict[str, float] | None = None
    fill_absent: bool = False
    sensor: str | None = None
    stored_names: list[str] = field(init=False)
    names: list[str] = field(init=False)

    def __post_init__(self) -> None:
        stored = [*_sensor(self.stored)] if isinstance(self.stored, str) else [*self.stored]
        taken = stored if self.taken is None else [*self.taken]
        for setting, names in (("stored", stored), ("taken", taken)):
            if not names or len(set(names)) < len(names):
                raise UserError(f"bands.{setting}={names} must name at least one band, and each once")
        absent = [name for name in taken if name not in stored]
        if absent and (not self.fill_absent or len(absent) == len(taken)):
            raise UserError(
                f"bands.taken asks for {', '.join(absent)}, which bands.stored ({', '.join(stored)}) does not have; "
                "correct the names, or set bands.fill_absent=true to have such bands marked as not valid (one at least "
                "must be there)"
            )
        if isinstance(self.nodata, dict) and (unknown := [name for name in self.nodata if name not in stored]):
            raise UserError(f"bands.nodata names {unknown[0]}, which is not in bands.stored ({', '.join(stored)})")
        if not self.scale > 0:
            raise UserError(f"bands.scale={self.scale} must be above 0")
        if self.sensor is not None:
            _sensor(self.sensor)
        object.__setattr__(self, "stored_names", stored)
        object.__setattr__(self, "names", taken)

    def __len__(self) -> int:
        return len(self.names)

    def reflectance(self, stored_S: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What numbers [S ...] mean: float32 [C ...], 0 where they mean nothing, and bool [C ...], whether they do.

        Raises: ValueError for another number of bands, without a pixel, and for what are no real numbers.
        """
        if not stored_S.size or stored_S.dtype.kind not in "buif":
            raise ValueError(
                f"it is {stored_S.dtype} {[*stored_S.shape]}; whole numbers and floats are read, of one pixel at least"
            )
        if len(stored_S) != len(self.stored_names):
            raise ValueError(
                f"it has {len(stored_S)} bands, and bands.stored names {len(self.stored_names)}: "
                f"{', '.join(self.stored_names)}"
            )
        values = np.zeros((len(self), *stored_S.shape[1:]), dtype=np.float32)
        valid = np.zeros(values.shape, dtype=bool)
        for at, name in enumerate(self.names):
            if name not in self.stored_names:
                continue
            band = stored_S[self.stored_names.index(name)]
            valid[at] = np.isfinite(band) & (band != self._nodata(name))
            # In float64: a float32 holds no 32-bit number exactly.
            means = (np.where(valid[at], band, 0).astype(np.float64) + self.offset) * self.scale
            values[at] = np.where(valid[at], means, 0)
        return values, valid

    def _nodata(self, name: str) -> float:
        """NaN, which equals nothing, where no number has that meaning."""
        of = self.nodata.get(name) if isinstance(self.nodata, dict) else self.nodata
        return np.nan if of is None else of

    def shown(self) -> tuple[int, int, int]:
        """Places of the bands to show as red, green and blue: those nearest in wavelength, or the first three."""
        sensor = self.stored if isinstance(self.stored, str) else self.sensor
        if sensor is None or any(name not in SENSORS[sensor] for name in self.names):
            last = len(self) - 1
            return 0, min(1, last), min(2, last)
        centres = wavelengths(sensor, self.names)
        blue, green, red = (int(np.abs(centres - colour).argmin()) for colour in BLUE_GREEN_RED)
        return red, green, blue
