"""Scans of your own by a camera with depth, as a data module: a folder of scenes, each of frames with poses.

Shapes: F frames of a scene, H W pixels, h w those of a depth map.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from torch.nn import functional as F

from lightspan.core.errors import UserError, one_line
from lightspan.core.files.atomic import expanded
from lightspan.core.files.foreign import content_of
from lightspan.core.files.places import CachePath, PathUse, ReadPath
from lightspan.core.ranges import require_in, require_numbers
from lightspan.datamodules.image.data import held_out
from lightspan.datamodules.loading.damage import report_damage
from lightspan.datamodules.loading.found_sets import Archive, FoundSamples, FoundSets, KeptSamples
from lightspan.datamodules.loading.frame_files import FrameFiles, frames_in
from lightspan.datamodules.loading.packs import PackCache, file_state
from lightspan.datamodules.points.packed import known_of
from lightspan.datamodules.points.posed import PackedScenes, PosedSceneSamples, SceneMoves, SceneScan, fused, written
from lightspan.datamodules.rendered.cameras import PosedFrames, pixel_rays
from lightspan.datamodules.shards.decoders import decode_image, decode_mask
from lightspan.datamodules.shards.headers import UNDECODABLE

VERSION = 1  # of what becomes of a scene; another one reads anew


@dataclass(frozen=True)
class SceneReader:
    """How scenes are read: `frames` evenly spaced ones of each, at a size of `height` x `width` pixels, one point for
    each cube of `voxel` metres; a step of a depth map is `unit` metres.
    """

    frames: int
    height: int
    width: int
    voxel: float
    unit: float

    def scan(self, folder: Path) -> SceneScan:
        """Raises: ValueError for a scene that cannot be read, has too few frames with a pose, or no depth."""
        found = [frame for frame in frames_in(folder) if frame.depth is not None]
        if len(found) < self.frames:
            raise ValueError(f"it has {len(found)} frames with depth and a pose, below frames={self.frames}")
        chosen = [found[round(at)] for at in np.linspace(0, len(found) - 1, self.frames)]
        views = [self._view(frame) for frame in chosen]
        pictures, depth, lenses = (np.stack(parts) for parts in zip(*views, strict=True))
        rotation = np.stack([frame.rotation for frame in chosen])
        normal = np.stack([normals(one, lens) for one, lens in zip(depth, lenses, strict=True)])
        normal = np.einsum("vihw,vij->vjhw", normal, rotation)
        place = np.stack([frame.place for frame in chosen])
        scan = fused(PosedFrames(pictures, depth, normal, None, place, rotation, lenses), self.voxel, 0)
        if not len(scan.xyz):
            raise ValueError("its frames have no pixel with a depth")
        floor = np.array([0, 0, scan.xyz[:, 2].min()], np.float32)
        return scan._replace(xyz=scan.xyz - floor, place=scan.place - floor)

    def _view(self, frame: FrameFiles) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(picture [3 H W] in [0, 1], length of the rays [H W], intrinsics [3 3]) at the size of this reader."""
        assert frame.depth is not None
        try:
            picture_3hw = decode_image(content_of(frame.picture)).float() / 255
            z_hw = decode_mask(content_of(frame.depth)).numpy() * np.float32(self.unit)
            lens = frame.lens(*picture_3hw.shape[1:]).astype(float)
            depth_lens = frame.depth_lens(*z_hw.shape)
        except UNDECODABLE as error:
            raise ValueError(f"its frame {one_line(frame.name)} cannot be read: {error}") from error
        size = np.array([self.width / picture_3hw.shape[2], self.height / picture_3hw.shape[1]])
        picture_3HW = F.interpolate(picture_3hw[None], (self.height, self.width), mode="bilinear", antialias=True)[0]
        lens[:2, 2] += 0.5
        lens[:2] *= size[:, None]
        lens[:2, 2] -= 0.5
        return picture_3HW.clamp(0, 1).numpy(), self._lengths(z_hw, lens, depth_lens), lens.astype(np.float32)

    def _lengths(self, z_hw: np.ndarray, lens: np.ndarray, depth_lens: np.ndarray) -> np.ndarray:
        """Along the rays of the picture's pixels, from the nearest pixel of the depth map, whose camera is taken to be
        at the same place.
        """
        across, down, ahead = pixel_rays(lens, self.height, self.width).T.reshape(3, self.height, self.width)
        # Two are equally near wherever a depth map has an even multiple of the picture's pixels: the later one.
        half = 0.5 + 1e-3
        column = np.floor(depth_lens[0, 0] * across / ahead + depth_lens[0, 2] + half).astype(np.int64)
        row = np.floor(depth_lens[1, 1] * down / ahead + depth_lens[1, 2] + half).astype(np.int64)
        inside = (row >= 0) & (row < z_hw.shape[0]) & (column >= 0) & (column < z_hw.shape[1])
        z = np.where(inside, z_hw[row.clip(0, z_hw.shape[0] - 1), column.clip(0, z_hw.shape[1] - 1)], 0)
        return (z / ahead).astype(np.float32)


def normals(length_HW: np.ndarray, lens: np.ndarray) -> np.ndarray:
    """Of the surface that a depth map shows, from the places of the four neighbours of each pixel: float32 [3 H W] in
    the camera's axes, of length 1 towards it, or 0 where one of the five has no depth, and at the border.

    Args:
        length_HW: of the rays, 0 where it is missing.
        lens: float [3 3].
    """
    H, W = length_HW.shape
    point = length_HW * pixel_rays(lens, H, W).T.reshape(3, H, W)
    known = length_HW > 0
    found = np.zeros((3, H, W))
    if H > 2 and W > 2:
        across, down = point[:, 1:-1, 2:] - point[:, 1:-1, :-2], point[:, 2:, 1:-1] - point[:, :-2, 1:-1]
        inner = np.cross(down, across, axis=0)  # right x down is ahead, so that this is towards the camera
        around = known[1:-1, 2:] & known[1:-1, :-2] & known[2:, 1:-1] & known[:-2, 1:-1] & known[1:-1, 1:-1]
        long = np.linalg.norm(inner, axis=0)
        found[:, 1:-1, 1:-1] = np.where(around & (long > 0), inner / np.maximum(long, 1e-300), 0)
    return found.astype(np.float32)


@dataclass(frozen=True)
class _Scenes:
    """Scenes as a loader reads them: each writes its own arrays."""

    reader: SceneReader
    folders: Annotated[Sequence[Path], PathUse.READ]
    to: Annotated[Path, PathUse.CACHE]

    def __len__(self) -> int:
        return len(self.folders)

    def sample(self, index: int, seed: int) -> dict[str, Any]:
        try:
            known = written(self.reader.scan(self.folders[index]), index, self.to)
        except UserError:  # of this machine, not of the scene
            raise
        except (ValueError, OSError, MemoryError) as error:
            known = {"damage": str(error) or type(error).__name__}
        return {"known": json.dumps(known)}


class RGBDFolder(FoundSets[SceneScan]):
    """Scenes scanned by a camera with depth: batches of `PosedPointsBatch` without labels. Each sub-folder is a scene:
    either with a transforms.json whose frames have a `depth_file_path`, as nerfstudio, Polycam and Record3D export
    it, or with the folders color, depth, pose and intrinsic, as ScanNet's SensReader writes them. z is up.

    Pixels of all frames that are read make the cloud, and some of the frames are the views of a batch. Pictures are
    brought to one size; a depth is that of the nearest pixel of the depth map. Scenes are read once and kept in a
    cache on disk.

    Args:
        folder: of the scenes.
        val_folder: of scenes for validation; None holds out `val_share` of those of `folder`, by a hash of their names.
        val_share: in (0, 1).
        frames: of a scene, evenly spaced. height, width: of a frame in pixels.
        views: of a batch, 1 <= views <= frames, drawn anew in each epoch; the first ones in evaluation.
        points: of a cloud, at most, drawn anew in each epoch.
        voxel: sides of cubes of which one point is kept, in metres, above 0.
        unit: metres of a step of the depth maps, above 0.
        moves: of training scenes; None leaves them as they are.
        batch_size: scenes of one optimiser step over all ranks.
        seed: of order, points and views.
        num_workers: processes that fetch batches.
        skip_damaged: True trains without scenes that cannot be read and names them; False refuses to start.
        cache_dir, cache_gib: as in `lightspan.datamodules.points.folder.PointFolder`.
        selection: as in `lightspan.datamodules.loading.sample_sets.SampleSets`.
    Raises: UserError for a folder without scenes, and for damaged ones, all of which are named.
    """

    called = "scenes"

    def __init__(
        self,
        folder: ReadPath,
        val_folder: ReadPath | None = None,
        val_share: float = 0.1,
        frames: int = 8,
        height: int = 120,
        width: int = 160,
        views: int = 4,
        points: int = 8192,
        voxel: float = 0.04,
        unit: float = 0.001,
        moves: SceneMoves | None = None,
        batch_size: int = 8,
        seed: int = 0,
        num_workers: int = 0,
        skip_damaged: bool = False,
        cache_dir: CachePath | None = None,
        cache_gib: float = 32,
        selection: ReadPath | None = None,
    ) -> None:
        super().__init__(batch_size, seed, num_workers, selection)
        require_in("[1, inf)", frames=frames, height=height, width=width, points=points)
        require_in(f"[1, {frames}]", views=views)
        require_in("(0, inf)", voxel=voxel, unit=unit)
        require_in("(0, 1)", val_share=val_share)
        require_numbers(16 * frames * height * width, frames=frames, height=height, width=width)
        require_numbers(12 * points, points=points)
        self.folder = expanded(folder, "data.init_args.folder")
        self.val_folder = None if val_folder is None else expanded(val_folder, "data.init_args.val_folder")
        self.val_share, self.views, self.points, self.moves = val_share, views, points, moves
        self.reader = SceneReader(frames, height, width, float(voxel), float(unit))
        self.skip_damaged, self.packs = skip_damaged, PackCache(cache_dir, "scenes", cache_gib)
        self.train: PosedSceneSamples | None = None

    def blank(self) -> PosedSceneSamples | None:
        """Two scenes of a wall, where the folder is not here."""
        if self.folder.exists():
            return None
        count, height, width = self.reader.frames, self.reader.height, self.reader.width
        lens = np.array([[width, 0, (width - 1) / 2], [0, width, (height - 1) / 2], [0, 0, 1]], np.float32)
        frames = PosedFrames(
            np.zeros((count, 3, height, width), np.float32),
            np.ones((count, height, width), np.float32),
            np.zeros((count, 3, height, width), np.float32),
            None,
            np.zeros((count, 3), np.float32),
            np.repeat(np.eye(3, dtype=np.float32)[None], count, axis=0),
            lens,
        )
        wall = fused(frames, self.reader.voxel, 0)
        return self.training(KeptSamples([wall, wall]), np.arange(2))

    def find(self) -> FoundSamples[SceneScan]:
        sets = [_scenes(each) for each in (self.folder, self.val_folder) if each is not None]
        folders = [folder for found in sets for folder in found]
        archive = self._packed(folders)
        damage = [(folder, known["damage"]) for folder, known in zip(folders, archive.known, strict=True)
                  if "damage" in known]  # fmt: skip
        report_damage(damage, len(folders), "scenes", self.skip_damaged)
        sound = np.flatnonzero(["damage" not in known for known in archive.known])
        validates = sound >= len(sets[0])
        if self.val_folder is None:
            names = [folders[at].name for at in sound]
            validates = held_out(names, np.zeros(len(sound), np.int64), self.val_share)
        train, val = sound[~validates], sound[validates]
        contents = json.dumps([archive.known[at]["content"] for at in train])
        return FoundSamples(archive, train, val, (), hashlib.sha256(contents.encode()).hexdigest()[:32])

    def _packed(self, folders: Sequence[Path]) -> PackedScenes:
        states = [
            [one_line(folder), sorted((file.name, *file_state(file)) for file in _files(folder))] for folder in folders
        ]
        key = hashlib.sha256(json.dumps([VERSION, asdict(self.reader), states]).encode()).hexdigest()[:32]
        size = len(folders) * self.reader.frames * self.reader.height * self.reader.width * 40
        self.packs.require_room(size, f"{len(folders):,} scenes", "or lower frames, height or width")
        scenes = partial(_Scenes, self.reader, folders)
        pack, about = self.packs.pack(key, size, partial(_write, scenes, self.num_workers))
        return PackedScenes(pack, about["known"])

    def training(self, archive: Archive[SceneScan], numbers: np.ndarray) -> PosedSceneSamples:
        return PosedSceneSamples(archive, numbers, self.points, self.views, True, self.moves)

    def unchanging(self, archive: Archive[SceneScan], numbers: np.ndarray) -> PosedSceneSamples:
        return PosedSceneSamples(archive, numbers, self.points, self.views)

    def described(self) -> str:
        return f"of {self.reader.frames} frames and up to {self.points:,} points"


def _scenes(folder: Path) -> list[Path]:
    """Raises: UserError for a folder that is not there or has no sub-folder."""
    found = sorted(each for each in folder.iterdir() if each.is_dir()) if folder.is_dir() else []
    if not found:
        what = "has no sub-folder" if folder.is_dir() else "is no folder"
        raise UserError(f"{folder} {what}; name one with a folder for each scene")
    return found


def _files(scene: Path) -> list[Path]:
    """Those by whose state a change of a scene shows, also of the depth maps and poses: one level of folders."""
    return [file for place in (scene, *(each for each in scene.iterdir() if each.is_dir())) for file in place.iterdir()]


def _write(scenes: partial[_Scenes], num_workers: int, to: Path) -> dict[str, Any]:
    return known_of(scenes(to), num_workers, "reading scenes")
