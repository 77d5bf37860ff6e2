"""What a file of points or of a surface shows, and points drawn from it. Without torch.

Shapes: N points, F triangles, P points that are drawn.
"""

from typing import NamedTuple

import numpy as np

from lightspan.core.files.foreign import NUMBERS, TRIANGLES

FARTHEST = 1e12
"""A coordinate beyond is none: scanners write such numbers where they saw nothing."""


class Shape(NamedTuple):
    """Points, or triangles by their corners.

    Attributes:
        xyz: float32 [N 3] or [F 3 3], in the unit of the file, from the middle of the box around all.
        colour: red, green and blue of each point or corner, uint8 of the shape of `xyz`; None without.
        normal: of points, float32 [N 3]; None without. Triangles have their own.
    """

    xyz: np.ndarray
    colour: np.ndarray | None = None
    normal: np.ndarray | None = None

    @property
    def is_surface(self) -> bool:
        return self.xyz.ndim == 3

    def drawn(self, count: int, generator: np.random.Generator) -> "Shape":
        """At most `count` points: of the surface evenly by area, or of the points without repetition, all of them in
        their order if there are no more.

        A surface without area gives points of each triangle alike.
        """
        if self.is_surface:
            return self._on_surface(count, generator)
        if len(self.xyz) <= count:
            return self
        chosen = np.sort(generator.choice(len(self.xyz), count, replace=False))
        return Shape(*(None if column is None else column[chosen] for column in self))  # type: ignore[arg-type]

    def _on_surface(self, count: int, generator: np.random.Generator) -> "Shape":
        unit = max(float(np.abs(self.xyz).max()), np.finfo(np.float32).tiny)  # squares stay in the range of numbers
        first, second = ((self.xyz[:, corner] - self.xyz[:, 0]) / unit for corner in (1, 2))
        across = np.cross(first, second)
        ends = np.cumsum(np.linalg.norm(across, axis=1), dtype=np.float64)
        if not ends[-1] > 0:
            ends = np.arange(1.0, len(ends) + 1)
        # Up to the last triangle with an area, as rounding may reach the end.
        at = np.minimum(
            np.searchsorted(ends, generator.random(count) * ends[-1], "right"), np.searchsorted(ends, ends[-1])
        )
        low_P, high_P = np.sort(generator.random((2, count)), axis=0).astype(np.float32)
        xyz, colour = (
            None if corners is None else _within(corners[at], high_P - low_P, 1 - high_P)
            for corners in (self.xyz, self.colour)
        )
        long_P1 = np.linalg.norm(across[at], axis=1, keepdims=True)
        normal = np.divide(across[at], long_P1, out=np.zeros_like(across[at]), where=long_P1 > 0)
        return Shape(xyz, None if colour is None else np.rint(colour).astype(np.uint8), normal)  # type: ignore[arg-type]


def _within(corners_P33: np.ndarray, second_P: np.ndarray, third_P: np.ndarray) -> np.ndarray:
    """[P 3], from the first corner shares of the ways to the others, so that what all have alike stays exactly so."""
    corners_P33 = corners_P33.astype(np.float32)
    first_P3 = corners_P33[:, 0]
    ways = (share_P[:, None] * (corners_P33[:, corner] - first_P3) for corner, share_P in ((1, second_P), (2, third_P)))
    return first_P3 + sum(ways)


def shape_of(xyz: np.ndarray, colour: np.ndarray | None = None, normal: np.ndarray | None = None) -> Shape:
    """A shape of what a file says, without the points or triangles of which a coordinate is not finite or beyond
    `FARTHEST`.

    Args:
        xyz: [N 3] or [F 3 3], float64 where the file has that: survey coordinates need it.
        colour: uint8 of the same shape. normal: [N 3]; those of no length stay so.
    Raises: ValueError if nothing is left; TooMuchError for more numbers or triangles than the limits.
    """
    (TRIANGLES if xyz.ndim == 3 else NUMBERS).require(len(xyz) if xyz.ndim == 3 else xyz.size)
    xyz = np.asarray(xyz, np.float64)
    with np.errstate(invalid="ignore"):
        sound = (np.abs(xyz) <= FARTHEST).all(axis=tuple(range(1, xyz.ndim)))  # False of NaN
    if not sound.any():
        raise ValueError(
            f"it has no point with coordinates between -{FARTHEST:g} and {FARTHEST:g}"
            if len(xyz)
            else "it has no point"
        )
    if not sound.all():
        xyz = xyz[sound]
        colour, normal = (None if column is None else column[sound] for column in (colour, normal))
    rows = xyz.reshape(-1, 3)
    middle = (rows.min(axis=0) + rows.max(axis=0)) / 2
    return Shape((xyz - middle).astype(np.float32), colour, None if normal is None else unit_normals(normal))


def unit_normals(normal: np.ndarray) -> np.ndarray:
    """float32 [N 3] of length 1, or 0 where there is no direction."""
    finite = np.where(np.isfinite(normal).all(axis=1, keepdims=True), normal, 0).astype(np.float64)
    finite /= np.abs(finite).max(axis=1, keepdims=True).clip(1e-300)
    return (finite / np.linalg.norm(finite, axis=1, keepdims=True).clip(1e-300)).astype(np.float32)
