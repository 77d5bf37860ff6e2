"""Scenes that posed cameras with depth have seen: the cloud of all pixels, and samples with some of the views.

Shapes: N points of a cloud, F frames of a scene, V views of a sample, H W pixels.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch

from lightspan.core.files.places import PathUse
from lightspan.core.ranges import require_in
from lightspan.datamodules.loading.found_sets import ArchiveSamples
from lightspan.datamodules.points.batch import PosedPointsBatch
from lightspan.datamodules.points.packed import arrays_in
from lightspan.datamodules.rendered.cameras import PosedFrames, pixel_rays


class SceneScan(NamedTuple):
    """A scene as it is kept: what a scanner's frames have, and the cloud that they make. z is up, and 0 on the floor.

    xyz: float32 [N 3], in metres. colour: uint8 [N 3]. normal: float32 [N 3].
    classes: uint8 [N]; None where nobody has named them.
    pictures: uint8 [F 3 H W]. depth: float32 [F H W], 0 where it is missing.
    pixel_classes: uint8 [F H W]; None as `classes`.
    place: float32 [F 3]. rotation: float32 [F 3 3]. intrinsics: float32 [3 3] of all frames, or [F 3 3].
    label: int64 [], of the scene.
    """

    xyz: np.ndarray
    colour: np.ndarray
    normal: np.ndarray
    classes: np.ndarray | None
    pictures: np.ndarray
    depth: np.ndarray
    pixel_classes: np.ndarray | None
    place: np.ndarray
    rotation: np.ndarray
    intrinsics: np.ndarray
    label: np.ndarray


def fused(frames: PosedFrames, voxel: float, label: int) -> SceneScan:
    """The cloud of all pixels with a depth: of those in a cube of `voxel` metres a side the first.

    A cube's points keep their own places, colours and normals: a mean of two surfaces would be of none.
    """
    V, _, H, W = frames.pictures.shape
    pictures = np.rint(frames.pictures * 255).astype(np.uint8)
    lenses = np.broadcast_to(frames.intrinsics, (V, 3, 3))
    own = np.stack([pixel_rays(lens, H, W) for lens in lenses])
    rays = np.einsum("vni,vij->vnj", own, frames.rotation.astype(float))
    depth = frames.depth.reshape(V, -1, 1)
    points = (frames.place[:, None] + depth * rays).reshape(-1, 3)
    colour, normal = (np.moveaxis(field, 1, -1).reshape(-1, 3) for field in (pictures, frames.normal))
    there = np.flatnonzero(depth.reshape(-1) > 0)
    cells = np.floor(points[there] / voxel).astype(np.int64)
    first = there[np.sort(np.unique(cells, axis=0, return_index=True)[1])]
    classes = None if frames.classes is None else frames.classes.astype(np.uint8)
    return SceneScan(
        xyz=points[first].astype(np.float32),
        colour=colour[first],
        normal=normal[first].astype(np.float32),
        classes=None if classes is None else classes.reshape(-1)[first],
        pictures=pictures,
        depth=frames.depth,
        pixel_classes=classes,
        place=frames.place,
        rotation=frames.rotation,
        intrinsics=frames.intrinsics,
        label=np.array(label, np.int64),
    )


def written(scan: SceneScan, number: int, to: Path) -> dict[str, Any]:
    """Writes a scene to a folder of `PackedScenes`, and gives what is known of it."""
    arrays = {name: array for name, array in scan._asdict().items() if array is not None}
    np.savez(to / f"{number}.npz", **arrays)
    content = hashlib.sha256(b"".join(np.ascontiguousarray(array).tobytes() for array in arrays.values())).hexdigest()
    return {"content": content, "label": int(scan.label)}


@dataclass(frozen=True)
class PackedScenes:
    """Scenes in files, by number. known: of each the sha256 of its arrays, `content`, and its `label`, or `damage`."""

    folder: Annotated[Path, PathUse.READ]
    known: Sequence[Mapping[str, Any]]

    @property
    def labels(self) -> np.ndarray:
        """int64 [N]."""
        return np.array([known.get("label", 0) for known in self.known], np.int64)

    def read(self, number: int) -> SceneScan:
        arrays = arrays_in(self.folder / f"{number}.npz")
        return SceneScan(*(arrays.get(name) for name in SceneScan._fields))  # type: ignore[arg-type]


@dataclass(frozen=True)
class SceneMoves:
    """How scenes are moved, their points and their cameras alike. By default nothing changes.

    Args:
        degrees: angles about the vertical are uniform in [-degrees, degrees], in [0, 180].
        flip: probability that a scene is mirrored, in [0, 1].
        scale: factors are uniform between these, each above 0.
    Raises: UserError for settings outside of these.
    """

    degrees: float = 0.0
    flip: float = 0.0
    scale: tuple[float, float] = (1.0, 1.0)

    def __post_init__(self) -> None:
        require_in("[0, 180]", degrees=self.degrees)
        require_in("[0, 1]", flip=self.flip)
        require_in("(0, inf)", scale=self.scale)

    def draw(self, generator: np.random.Generator) -> tuple[np.ndarray, float]:
        """(turn, and mirror, float32 [3 3]; factor)."""
        angle = np.deg2rad(generator.uniform(-self.degrees, self.degrees))
        side = -1.0 if generator.random() < self.flip else 1.0
        cos, sin = np.cos(angle), np.sin(angle)
        turn = np.array([[side * cos, -sin, 0], [side * sin, cos, 0], [0, 0, 1]], np.float32)
        return turn, float(generator.uniform(*self.scale))


def moved(scene: Mapping[str, Any], turn: np.ndarray, factor: float) -> dict[str, Any]:
    """A scene of `PosedPointsBatch`, without or with an axis of samples, turned about 0 and scaled: what its cameras
    see stays what it is.

    Args:
        turn: orthogonal, float [3 3]. factor: above 0.
    """
    by = torch.as_tensor(turn, dtype=torch.float32)
    found = dict(scene)
    for name in scene.keys() & {"xyz", "place"}:
        found[name] = factor * scene[name] @ by.T
    for name in scene.keys() & {"normal", "rotation"}:  # rows of a rotation are directions
        found[name] = scene[name] @ by.T
    found["depth"] = factor * scene["depth"]
    return found


@dataclass(frozen=True)
class PosedSceneSamples(ArchiveSamples[SceneScan]):
    """Samples of `PosedPointsBatch`: a function of number and seed.

    Args:
        points: of a cloud, at most; other ones in each epoch if `random`.
        views: of the frames, other ones in each epoch if `random`, else the first.
    """

    points: int
    views: int
    random: bool = False
    moves: SceneMoves | None = None

    batch_type = PosedPointsBatch

    def sample(self, index: int, seed: int) -> dict[str, Any]:
        number = int(self.numbers[index])
        scan, generator = self.archive.read(number), np.random.default_rng([seed, 1] if self.random else [number, 0])
        some = np.arange(len(scan.xyz))
        if len(some) > self.points:
            some = np.sort(generator.choice(len(some), self.points, replace=False))
        frames = np.arange(self.views)
        if self.random:
            frames = np.sort(generator.choice(len(scan.depth), self.views, replace=False))
        # From the middle of the floor: scenes are turned about it.
        middle = np.array([*(scan.xyz.min(axis=0) + scan.xyz.max(axis=0))[:2] / 2, 0], np.float32) if len(some) else 0
        fields = {
            "xyz": scan.xyz[some] - middle,
            "colour": scan.colour[some] / np.float32(255),
            "normal": scan.normal[some],
            "pictures": scan.pictures[frames] / np.float32(255),
            "depth": scan.depth[frames],
            "place": scan.place[frames] - middle,
            "rotation": scan.rotation[frames],
            "intrinsics": np.broadcast_to(scan.intrinsics, (len(scan.depth), 3, 3))[frames],
        }
        if scan.classes is not None and scan.pixel_classes is not None:
            fields |= {
                "classes": scan.classes[some].astype(np.int64),
                "pixel_classes": scan.pixel_classes[frames].astype(np.int64),
            }
        scene: dict[str, Any] = {name: torch.from_numpy(np.ascontiguousarray(field)) for name, field in fields.items()}
        if self.moves is not None:
            scene = moved(scene, *self.moves.draw(generator))
        return {**scene, "label": int(scan.label), "index": index}
