"""Rooms of real furniture as clouds of points with normals and classes, fused of posed pictures with depth.

Rooms are `lightspan.datamodules.rendered.furnished`, their furniture `lightspan.datamodules.points.sets.furniture`.
Shapes: N points of a cloud, F frames of a room, V views of a batch, H W pixels.
"""

import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
from rich.progress import track

from lightspan.core.errors import UserError
from lightspan.core.files.atomic import expanded
from lightspan.core.files.places import CachePath, PathUse, ReadPath
from lightspan.core.ranges import require_in, require_numbers
from lightspan.datamodules.loading.damage import report_damage
from lightspan.datamodules.loading.loader import EvaluationLoader
from lightspan.datamodules.loading.packs import PackCache, file_state
from lightspan.datamodules.loading.ranks import say
from lightspan.datamodules.loading.sample_sets import SampleSets, held_out_size
from lightspan.datamodules.points.batch import PosedPointsBatch
from lightspan.datamodules.points.packed import MOST_KEPT, PackedShapes, PointCache, arrays_in
from lightspan.datamodules.points.sets.furniture import CATALOGUES, KINDS, Piece, find_pieces, held_out, read_piece
from lightspan.datamodules.points.shapes import Shape
from lightspan.datamodules.rendered.furnished import (
    SURFACES,
    USES,
    RoomFrames,
    RoomPlan,
    Sensor,
    cameras_of,
    frames_of,
    furnished,
    layout_of,
    pixel_rays,
)

CLASSES = (*SURFACES, *KINDS)
"""What the numbers of classes mean."""
VERSION = 1  # of how rooms are drawn; another one draws anew


class RoomScan(NamedTuple):
    """A room as it is kept: what a scanner's frames have, and the cloud that they make.

    xyz: float32 [N 3], metres from a corner of the room. colour: uint8 [N 3]. normal: float32 [N 3].
    classes: uint8 [N].
    pictures: uint8 [F 3 H W]. depth: float32 [F H W], 0 where it is missing. pixel_classes: uint8 [F H W].
    place: float32 [F 3]. rotation: float32 [F 3 3]. intrinsics: float32 [3 3].
    label: int64 [], what the room is for, a place in `USES`.
    """

    xyz: np.ndarray
    colour: np.ndarray
    normal: np.ndarray
    classes: np.ndarray
    pictures: np.ndarray
    depth: np.ndarray
    pixel_classes: np.ndarray
    place: np.ndarray
    rotation: np.ndarray
    intrinsics: np.ndarray
    label: np.ndarray


def fused(frames: RoomFrames, voxel: float, label: int) -> RoomScan:
    """The cloud of all pixels with a depth: of those in a cube of `voxel` metres a side the first.

    A cube's points keep their own places, colours and normals: a mean of two surfaces would be of none.
    """
    V, _, H, W = frames.pictures.shape
    pictures = np.rint(frames.pictures * 255).astype(np.uint8)
    rays = np.einsum("ni,vij->vnj", pixel_rays(frames.intrinsics, H, W), frames.rotation.astype(float))
    depth = frames.depth.reshape(V, -1, 1)
    points = (frames.place[:, None] + depth * rays).reshape(-1, 3)
    colour, normal = (np.moveaxis(field, 1, -1).reshape(-1, 3) for field in (pictures, frames.normal))
    there = np.flatnonzero(depth.reshape(-1) > 0)
    cells = np.floor(points[there] / voxel).astype(np.int64)
    first = there[np.sort(np.unique(cells, axis=0, return_index=True)[1])]
    return RoomScan(
        points[first].astype(np.float32),
        colour[first],
        normal[first].astype(np.float32),
        frames.classes.reshape(-1)[first].astype(np.uint8),
        pictures,
        frames.depth,
        frames.classes.astype(np.uint8),
        frames.place,
        frames.rotation,
        frames.intrinsics,
        np.array(label, np.int64),
    )


@dataclass(frozen=True)
class Scanning:
    """How rooms are scanned: the number of frames and their sides in pixels, the sides of cubes of which one point is
    kept, what the scanner gets wrong, and the seed of all draws.
    """

    frames: int
    height: int
    width: int
    voxel: float
    sensor: Sensor
    draw_seed: int

    def scan(self, layout: RoomPlan, shapes: Sequence[Shape], kinds: np.ndarray, number: int) -> RoomScan:
        """Room `number`, with these shapes as its pieces."""
        place, rotation = cameras_of(layout, self.draw_seed, number, self.frames)
        surfaces = furnished(layout, shapes, kinds)
        clean = frames_of(layout, surfaces, place, rotation, self.height, self.width)
        return fused(self.sensor.scanned(clean, self.draw_seed, number), self.voxel, layout.use)


@dataclass(frozen=True)
class _Rooms:
    """Rooms as a loader draws them: each writes its own arrays, and gives their sha256.

    kinds, sizes: of the pieces. parts: which pieces training rooms have, and which the others.
    train: rooms to train on.
    """

    scanning: Scanning
    pieces: PackedShapes
    kinds: np.ndarray
    sizes: np.ndarray
    parts: tuple[np.ndarray, np.ndarray]
    train: int
    rooms: int
    to: Annotated[Path, PathUse.CACHE]

    def __len__(self) -> int:
        return self.rooms

    def sample(self, index: int, seed: int) -> dict[str, Any]:
        own = self.parts[index >= self.train]
        layout = layout_of(self.scanning.draw_seed, index, KINDS, self.kinds[own], self.sizes[own])
        chosen = own[layout.piece]
        shapes = [self.pieces.read(number) for number in chosen.tolist()]
        scan = self.scanning.scan(layout, shapes, self.kinds[chosen], index)
        np.savez(self.to / f"{index}.npz", **scan._asdict())
        content = hashlib.sha256(b"".join(np.ascontiguousarray(array).tobytes() for array in scan)).hexdigest()
        return {"known": json.dumps({"content": content, "label": layout.use})}


@dataclass(frozen=True)
class PackedRooms:
    """Rooms in files, by number. known: of each the sha256 of its arrays, `content`, and its `label`."""

    folder: Annotated[Path, PathUse.READ]
    known: Sequence[Mapping[str, Any]]

    def read(self, number: int) -> RoomScan:
        return RoomScan(**arrays_in(self.folder / f"{number}.npz"))


@dataclass(frozen=True)
class KeptRooms:
    """Rooms in memory."""

    scans: Sequence[RoomScan]

    def read(self, number: int) -> RoomScan:
        return self.scans[number]


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
class RoomSamples:
    """Samples of `PosedPointsBatch`: a function of number and seed.

    Args:
        numbers: of the archive's rooms, int64 [N]. labels: of these.
        points: of a cloud, at most; other ones in each epoch if `random`.
        views: of the frames, other ones in each epoch if `random`, else the first.
    """

    archive: PackedRooms | KeptRooms
    numbers: np.ndarray
    kept_labels: np.ndarray
    points: int
    views: int
    random: bool = False
    moves: SceneMoves | None = None

    batch_type = PosedPointsBatch

    def __len__(self) -> int:
        return len(self.numbers)

    def labels(self) -> np.ndarray:
        """int64 [N]."""
        return self.kept_labels

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
            "classes": scan.classes[some].astype(np.int64),
            "pictures": scan.pictures[frames] / np.float32(255),
            "depth": scan.depth[frames],
            "pixel_classes": scan.pixel_classes[frames].astype(np.int64),
            "place": scan.place[frames] - middle,
            "rotation": scan.rotation[frames],
            "intrinsics": np.repeat(scan.intrinsics[None], self.views, axis=0),
        }
        scene: dict[str, Any] = {name: torch.from_numpy(np.ascontiguousarray(field)) for name, field in fields.items()}
        if self.moves is not None:
            scene = moved(scene, *self.moves.draw(generator))
        return {**scene, "label": int(scan.label), "index": index}


class FurnishedRooms(SampleSets):
    """Rooms of real furniture of Sweet Home 3D (system package sweethome3d-furniture, CC BY 3.0 and CC0): batches of
    `PosedPointsBatch`, whose labels are what rooms are for and whose classes are `CLASSES`.

    A room is seen by frames from random places. Their pixels make the cloud, and some of them are the views of a
    batch. Rooms to validate on have furniture that no other has. All are drawn once, functions of (draw_seed, number),
    and kept in a cache on disk.

    Args:
        rooms: at least 2.
        frames: of a room. height, width: of a frame in pixels.
        views: of a batch, 1 <= views <= frames, drawn anew in each epoch; the first ones in evaluation.
        points: of a cloud, at most, drawn anew in each epoch.
        voxel: sides of cubes of which one point is kept, in metres, above 0.
        sensor: what the scanner gets wrong; None is a clean scan.
        moves: of training scenes; None leaves them as they are.
        furniture: folder of the catalogues; None is that of the system package.
        draw_seed: of the rooms. `seed` is that of order, points and views.
        val_size: rooms for validation, the last ones; None is a tenth.
        batch_size: rooms of one optimiser step over all ranks.
        cache_dir, cache_gib: as in `lightspan.datamodules.points.folder.PointFolder`.
        settings: the others of `SampleSets`.
    Raises: UserError at setup for catalogues that are not there, and without the extra `points`.
    """

    def __init__(
        self,
        rooms: int = 200,
        frames: int = 8,
        height: int = 48,
        width: int = 48,
        views: int = 4,
        points: int = 8192,
        voxel: float = 0.04,
        sensor: Sensor | None = None,
        moves: SceneMoves | None = None,
        furniture: ReadPath | None = None,
        draw_seed: int = 0,
        val_size: int | None = None,
        batch_size: int = 8,
        cache_dir: CachePath | None = None,
        cache_gib: float = 32,
        **settings: Any,
    ) -> None:
        super().__init__(batch_size, **settings)
        require_in("[1, inf)", frames=frames, height=height, width=width, views=views, points=points)
        require_in(f"[1, {frames}]", views=views)
        require_in("(0, inf)", voxel=voxel)
        require_in("[0, inf)", draw_seed=draw_seed)
        val_size = held_out_size(val_size, rooms, rooms - 1)
        if rooms < 2 or not 1 <= val_size < rooms:
            raise UserError(f"FurnishedRooms rooms={rooms} must be at least 2, and more than val_size={val_size} >= 1")
        require_numbers(16 * frames * height * width, frames=frames, height=height, width=width)
        require_numbers(rooms, rooms=rooms)
        require_numbers(12 * points, points=points)
        self.rooms, self.views, self.points, self.moves, self.val_size = rooms, views, points, moves, val_size
        self.scanning = Scanning(frames, height, width, float(voxel), sensor or Sensor(), draw_seed)
        self.furniture = CATALOGUES if furniture is None else expanded(furniture, "data.init_args.furniture")
        self.packs, self.shapes = PackCache(cache_dir, "rooms", cache_gib), PointCache(cache_dir, cache_gib)
        self.labelled, self.classes = True, tuple(USES)
        self.train: RoomSamples | None = None

    @property
    def num_classes(self) -> int:
        return len(USES)

    @property
    def class_names(self) -> tuple[str, ...]:
        """What rooms are for."""
        return self.classes

    def blank(self) -> RoomSamples:
        """Two bare rooms, also where the furniture is here: a plan need not draw all rooms."""
        return self._samples(KeptRooms([self._bare(0), self._bare(1)]), 0, 2)

    def _bare(self, number: int) -> RoomScan:
        layout = layout_of(self.scanning.draw_seed, number, KINDS, np.zeros(0, np.int64), np.zeros((0, 3)))
        return self.scanning.scan(layout, [], np.zeros(0, np.int64), number)

    def setup(self, stage: str | None = None) -> None:
        """Draws the rooms or finds them in the cache, once."""
        if self.train is not None:
            return
        packed = self._packed(find_pieces(self.furniture))
        first = self.rooms - self.val_size
        self.train = self._samples(packed, 0, first, random=True)
        self.bank, self.val = self._samples(packed, 0, first), self._samples(packed, first, self.rooms)
        contents = json.dumps([known["content"] for known in packed.known[:first]])
        self._content = hashlib.sha256(contents.encode()).hexdigest()[:32]
        say(f"rooms: {first:,} for training and {self.val_size:,} for validation, furnished for {', '.join(USES)}")

    def _samples(self, archive: PackedRooms | KeptRooms, first: int, end: int, random: bool = False) -> RoomSamples:
        known = archive.known[first:end] if isinstance(archive, PackedRooms) else []
        labels = np.array([one["label"] for one in known] or [0] * (end - first), np.int64)
        moves = self.moves if random else None
        return RoomSamples(archive, np.arange(first, end), labels, self.points, self.views, random, moves)

    def _packed(self, pieces: Sequence[Piece]) -> PackedRooms:
        states = [[path.name, *file_state(path)] for path in sorted(self.furniture.glob("*.sh3f"))]
        listed = [[VERSION, MOST_KEPT], states, [list(piece) for piece in pieces]]
        key = hashlib.sha256(json.dumps(listed).encode()).hexdigest()[:32]
        kinds = np.array([piece.kind for piece in pieces])
        read = partial(_read, self.furniture, pieces)
        shapes = self.shapes.written(key, len(pieces) * 2**19, read, kinds, self.num_workers)
        damage = [(self.furniture / piece.model, known["damage"])
                  for piece, known in zip(pieces, shapes.known, strict=True) if "damage" in known]  # fmt: skip
        report_damage(damage, len(pieces), "pieces of furniture", skips=True)
        sound, held = np.array(["damage" not in known for known in shapes.known]), held_out(pieces)
        parts = np.flatnonzero(sound & ~held), np.flatnonzero(sound & held)
        settings = [VERSION, key, asdict(self.scanning), self.rooms, self.val_size]
        name = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:32]
        pixels = self.scanning.frames * self.scanning.height * self.scanning.width
        size = self.rooms * pixels * 40
        self.packs.require_room(size, f"{self.rooms:,} rooms", "or lower rooms, frames, height or width")
        sizes = np.array([piece.size for piece in pieces])
        rooms = partial(_Rooms, self.scanning, shapes, kinds, sizes, parts, self.rooms - self.val_size, self.rooms)
        folder, about = self.packs.pack(name, size, partial(_write, rooms, self.num_workers))
        return PackedRooms(folder, about["known"])

    def training_content(self) -> str:
        return self._content


def _read(root: Path, pieces: Sequence[Piece], number: int) -> Shape:
    return read_piece(root, pieces[number])


def _write(rooms: partial[_Rooms], num_workers: int, to: Path) -> dict[str, Any]:
    loader = EvaluationLoader(rooms(to), 1, num_workers=num_workers)
    silent = not sys.stdout.isatty()
    known = [
        json.loads(text)
        for batch in track(loader, "furnishing rooms", transient=True, disable=silent)
        for text in batch["known"]
    ]
    return {"known": known}
