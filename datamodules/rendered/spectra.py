"""What materials reflect at any wavelength and on any day: smooth spectra, known exactly.

Reflectances are typical of each material and no measurements. Shapes: M materials, C wavelengths, T days.
"""

from collections.abc import Sequence

import numpy as np
from scipy.interpolate import PchipInterpolator

ANCHORS = (440, 490, 560, 665, 705, 740, 783, 842, 945, 1375, 1610, 2200)
"""Nanometres at which spectra are listed."""
# Material -> reflectance in percent at the anchors, out of season and at its height; the day of that height, and by how
# many days it takes exp(-1/2) of it. The nine are the classes of Dynamic World (Brown et al., 2022).
_SPECTRA: dict[str, tuple[tuple[float, ...], tuple[float, ...], float, float]] = {
    "water": (
        (6.0, 5.5, 5.0, 3.5, 3.0, 2.5, 2.0, 2.0, 1.5, 1.0, 0.8, 0.5),
        (5.0, 5.5, 8.0, 5.0, 6.0, 4.0, 3.0, 3.0, 2.0, 1.0, 0.8, 0.5), 220, 40,
    ),
    "trees": (
        (4.0, 4.5, 6.0, 6.5, 9.0, 14.0, 17.0, 19.0, 20.0, 12.0, 17.0, 10.0),
        (2.0, 2.5, 5.0, 2.5, 9.0, 27.0, 36.0, 40.0, 42.0, 20.0, 19.0, 8.0), 200, 60,
    ),
    "grass": (
        (5.0, 6.5, 9.0, 11.0, 14.0, 19.0, 22.0, 25.0, 28.0, 20.0, 28.0, 18.0),
        (3.0, 4.0, 8.0, 4.5, 12.0, 33.0, 42.0, 46.0, 46.0, 25.0, 25.0, 12.0), 140, 45,
    ),
    "flooded vegetation": (
        (5.0, 5.5, 6.5, 6.0, 7.0, 10.0, 11.0, 12.0, 12.0, 5.0, 7.0, 4.0),
        (3.0, 3.5, 6.0, 4.0, 9.0, 20.0, 26.0, 29.0, 28.0, 8.0, 10.0, 4.0), 230, 40,
    ),
    "crops": (
        (7.0, 9.0, 12.0, 16.0, 18.0, 20.0, 22.0, 24.0, 27.0, 24.0, 32.0, 26.0),
        (2.5, 3.5, 7.5, 3.0, 12.0, 38.0, 50.0, 54.0, 52.0, 25.0, 20.0, 9.0), 180, 28,
    ),
    "shrub": (
        (6.0, 8.0, 11.0, 14.0, 17.0, 21.0, 23.0, 25.0, 27.0, 22.0, 30.0, 22.0),
        (4.5, 5.5, 8.5, 8.0, 13.0, 24.0, 29.0, 31.0, 33.0, 22.0, 26.0, 16.0), 100, 40,
    ),
    "built": (
        (12.0, 14.0, 16.0, 18.0, 19.0, 20.0, 21.0, 22.0, 23.0, 22.0, 26.0, 24.0),
        (12.0, 14.0, 16.0, 18.0, 19.0, 20.0, 21.0, 22.0, 23.0, 22.0, 26.0, 24.0), 0, 365,
    ),
    "bare": (
        (10.0, 13.0, 18.0, 24.0, 27.0, 29.0, 31.0, 33.0, 36.0, 36.0, 44.0, 40.0),
        (6.0, 8.0, 11.0, 15.0, 17.0, 19.0, 20.0, 22.0, 24.0, 20.0, 27.0, 22.0), 20, 60,
    ),
    "snow": (
        (9.0, 10.0, 12.0, 14.0, 15.0, 16.0, 17.0, 17.0, 18.0, 18.0, 20.0, 18.0),
        (58.0, 60.0, 60.0, 58.0, 57.0, 56.0, 55.0, 53.0, 42.0, 12.0, 9.0, 7.0), 20, 70,
    ),
}  # fmt: skip
MATERIALS = tuple(_SPECTRA)
YEAR = 365.0


def spectra(wavelengths: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Reflectance of `MATERIALS` out of season and at its height, float32 [M C] each: shape-preserving cubics through
    the listed points, constant beyond them.
    """
    at = np.clip(np.asarray(wavelengths, dtype=np.float64), ANCHORS[0], ANCHORS[-1])
    lists = (np.array([of[state] for of in _SPECTRA.values()]).T / 100 for state in (0, 1))
    low, high = (PchipInterpolator(ANCHORS, values)(at).T.astype(np.float32) for values in lists)
    return low, high


def season(material: np.ndarray, day: np.ndarray) -> np.ndarray:
    """How far materials, places in `MATERIALS`, are in their season on a day, float32 in (0, 1] of the shape to which
    both spread: exp(-d^2 / 2w^2) of d days from its height, the shorter way round the year.
    """
    table = np.array([of[2:] for of in _SPECTRA.values()])
    height, width = table[material, 0], table[material, 1]
    days = np.abs((day - height + YEAR / 2) % YEAR - YEAR / 2)
    return np.exp(-((days / width) ** 2) / 2).astype(np.float32)
