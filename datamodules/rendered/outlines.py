"""Outlines of shapes as signed distances, and how much of each pixel they cover.

Shapes: N shapes, H W picture in pixels.
"""

from collections.abc import Callable, Sequence

import numpy as np

# A shape's function is above 0 inside it, and falls with slope about 1 across the outline; u, v in units of its radius.
_OUTLINES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "disc": lambda u, v: 0.9 - np.hypot(u, v),
    "ring": lambda u, v: 0.2 - np.abs(np.hypot(u, v) - 0.75),
    "half disc": lambda u, v: np.minimum(1 - np.hypot(u, v), v + 0.1),
    "square": lambda u, v: 0.75 - np.maximum(np.abs(u), np.abs(v)),
    "frame": lambda u, v: 0.17 - np.abs(np.maximum(np.abs(u), np.abs(v)) - 0.62),
    "triangle": lambda u, v: 0.5 - np.maximum(np.maximum(0.866 * u - 0.5 * v, -0.866 * u - 0.5 * v), v),
    "cross": lambda u, v: np.maximum(_box(u, v, 0.95, 0.25), _box(u, v, 0.25, 0.95)),
    "bar": lambda u, v: _box(u, v, 1.0, 0.3),
    "two bars": lambda u, v: _box(u, np.abs(v) - 0.5, 0.9, 0.22),
    "flower": lambda u, v: 0.65 + 0.3 * np.cos(5 * np.arctan2(v, u)) - np.hypot(u, v),
}
NAMES = tuple(_OUTLINES)
REACH = 1.1  # no shape reaches further from its centre, in radii


def _box(u: np.ndarray, v: np.ndarray, half_width: float, half_height: float) -> np.ndarray:
    return np.minimum(half_width - np.abs(u), half_height - np.abs(v))


def frames(
    centre: np.ndarray, radius: np.ndarray, angle: np.ndarray, height: int, width: int
) -> tuple[np.ndarray, np.ndarray]:
    """Where each pixel lies as each shape sees it, in units of its radius: u and v, each [N, H, W], dtype of `centre`.

    Args:
        centre: x and y in pixels, [N, 2]; the first pixel's middle is at 0.
        radius, angle: in pixels, > 0, and in radians, [N].
    """
    y, x = (axis.astype(centre.dtype) for axis in np.mgrid[:height, :width])
    r, cos, sin = radius[:, None, None], np.cos(angle)[:, None, None], np.sin(angle)[:, None, None]
    dx, dy = (x - centre[:, :1, None]) / r, (y - centre[:, 1:, None]) / r
    return cos * dx + sin * dy, cos * dy - sin * dx


def cover(kind: np.ndarray, names: Sequence[str], u: np.ndarray, v: np.ndarray, radius: np.ndarray) -> np.ndarray:
    """The share of each pixel that lies inside a shape, so that outlines are smooth: of u's shape and dtype, in [0, 1].

    Args:
        kind: which of `names` is asked for, int64, for each place along u's first axis; -1 covers nothing.
        names: of outlines, see `NAMES`.
        u, v: where the pixels lie in the frames of their shapes, in units of the radius.
        radius: in pixels, > 0; spreads over u.
    """
    distance = np.full_like(u, -np.inf)
    for number, name in enumerate(names):
        of = kind == number
        if of.any():
            distance[of] = _OUTLINES[name](u[of], v[of])
    return np.clip(0.5 + radius * distance, 0, 1)
