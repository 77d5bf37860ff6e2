"""Rooms of real furniture as clouds of points with normals and classes, fused of posed pictures with depth.

Rooms are `lightspan.datamodules.rendered.furnished`, their furniture `lightspan.datamodules.points.sets.furniture`.
Shapes: N points of a cloud, F frames of a room, V views of a batch, H W pixels.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from lightspan.core.errors import UserError
from lightspan.core.files.atomic import expanded
from lightspan.core.files.places import CachePath, PathUse, ReadPath
from lightspan.core.ranges import require_in, require_numbers
from lightspan.datamodules.loading.damage import report_damage
from lightspan.datamodules.loading.found_sets import Archive, KeptSamples
from lightspan.datamodules.loading.packs import PackCache, file_state
from lightspan.datamodules.loading.ranks import say
from lightspan.datamodules.loading.sample_sets import SampleSets, held_out_size
from lightspan.datamodules.points.packed import MOST_KEPT, PackedShapes, PointCache, known_of
from lightspan.datamodules.points.posed import PackedScenes, PosedSceneSamples, SceneMoves, SceneScan, fused, written
from lightspan.datamodules.points.sets.furniture import CATALOGUES, KINDS, Piece, find_pieces, held_out, read_piece
from lightspan.datamodules.points.shapes import Shape
from lightspan.datamodules.rendered.furnished import (
    SURFACES,
    USES,
    RoomPlan,
    Sensor,
    cameras_of,
    frames_of,
    furnished,
    layout_of,
)

CLASSES = (*SURFACES, *KINDS)
"""What the numbers of classes mean."""
VERSION = 1  # of how rooms are drawn; another one draws anew


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

    def scan(self, layout: RoomPlan, shapes: Sequence[Shape], kinds: np.ndarray, number: int) -> SceneScan:
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
        return {"known": json.dumps(written(scan, index, self.to))}


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
        self.train: PosedSceneSamples | None = None

    @property
    def num_classes(self) -> int:
        return len(USES)

    @property
    def class_names(self) -> tuple[str, ...]:
        """What rooms are for."""
        return self.classes

    def blank(self) -> PosedSceneSamples:
        """Two bare rooms, also where the furniture is here: a plan need not draw all rooms."""
        return self._samples(KeptSamples([self._bare(0), self._bare(1)]), 0, 2)

    def _bare(self, number: int) -> SceneScan:
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

    def _samples(self, archive: Archive[SceneScan], first: int, end: int, random: bool = False) -> PosedSceneSamples:
        moves = self.moves if random else None
        return PosedSceneSamples(archive, np.arange(first, end), self.points, self.views, random, moves)

    def _packed(self, pieces: Sequence[Piece]) -> PackedScenes:
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
        return PackedScenes(folder, about["known"])

    def training_content(self) -> str:
        return self._content


def _read(root: Path, pieces: Sequence[Piece], number: int) -> Shape:
    return read_piece(root, pieces[number])


def _write(rooms: partial[_Rooms], num_workers: int, to: Path) -> dict[str, Any]:
    return known_of(rooms(to), num_workers, "furnishing rooms")
