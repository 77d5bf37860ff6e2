"""Scans of a camera with depth: clouds lie where frames saw them, from either kind of files; what is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from frame_scenes import LENS, written
from PIL import Image

from lightspan.core.batches import require_declared
from lightspan.core.errors import UserError
from lightspan.datamodules.points.batch import PosedPointsBatch
from lightspan.datamodules.points.posed import SceneMoves
from lightspan.datamodules.points.rgbd import RGBDFolder, SceneReader, normals
from lightspan.datamodules.rendered.cameras import pixel_rays


def opened(folder: Path, **settings: Any) -> RGBDFolder:
    given = {"frames": 3, "height": 12, "width": 16, "views": 2, "batch_size": 2, "voxel": 0.001, "val_share": 0.3}
    data = RGBDFolder(str(folder / "in"), cache_dir=str(folder / "cache"), **given | settings)
    data.setup()
    return data


@pytest.mark.parametrize("kind", ["exported", "listed"])
def test_points_lie_where_the_frames_saw_them(tmp_path: Path, kind: str) -> None:
    for number in range(4):
        written(tmp_path / "in" / f"s{number}", kind, seed=number)
    data = opened(tmp_path, moves=SceneMoves(180, 0.5, (1, 2)))
    assert (len(data.train), len(data.val)) == (3, 1)
    for loader in (data.train_dataloader(), data.val_dataloader()):
        batch = next(iter(loader))
        require_declared(batch, PosedPointsBatch, "RGBDFolder")
        assert batch["xyz"][:, 2].abs().max() < 1e-5  # the floor, which is now at 0
    scene = data.val.sample(0, 0)
    assert scene["pictures"].shape == (2, 3, 12, 16)
    torch.testing.assert_close(scene["place"][:, 2], torch.tensor([1.0, 1.2]))  # of frames 0, 2 and 3 the first two
    # What each of the views sees, cast anew, is in the cloud with that view's colour.
    v, u = torch.meshgrid(torch.arange(12.0), torch.arange(16.0), indexing="ij")
    for view in range(2):
        lens = scene["intrinsics"][view]
        ray = torch.stack([(u - lens[0, 2]) / lens[0, 0], (v - lens[1, 2]) / lens[1, 1], torch.ones_like(u)], dim=-1)
        ray = torch.nn.functional.normalize(ray, dim=-1) @ scene["rotation"][view]
        seen = (scene["place"][view] + scene["depth"][view][..., None] * ray)[scene["depth"][view] > 0]
        assert len(seen) == 12 * 16 - 1
        gap, nearest = torch.cdist(seen, scene["xyz"], compute_mode="donot_use_mm_for_euclid_dist").min(dim=1)
        assert gap.max() < 2e-3
        exact = gap < 1e-6  # others gave way to the point of another frame in the same cube
        assert exact.float().mean() > 0.8
        torch.testing.assert_close(
            scene["colour"][nearest[exact]].median(dim=0).values, scene["pictures"][view].amax(dim=(1, 2))
        )
    up = scene["normal"][scene["normal"].norm(dim=1) > 0]
    assert len(up) > len(scene["normal"]) / 2
    torch.testing.assert_close(up, torch.tensor([0.0, 0, 1]).expand_as(up), atol=1e-4, rtol=0)


def test_both_kinds_of_files_give_the_same_scene(tmp_path: Path) -> None:
    for kind in ("exported", "listed"):
        for number in range(2):
            written(tmp_path / kind / "in" / f"s{number}", kind)
    one, other = (opened(tmp_path / kind).train.sample(0, 3) for kind in ("exported", "listed"))
    for name in one:
        torch.testing.assert_close(one[name], other[name], atol=1e-4, rtol=1e-4, msg=name)


def test_where_two_pixels_of_a_depth_map_are_equally_near_it_is_always_the_later_one() -> None:
    """As for pictures of 160 x 120 and depth maps of 640 x 480."""
    depth_lens = np.array([[577.87, 0, 319.5], [0, 577.87, 239.5], [0, 0, 1]], np.float32)
    lens = np.array([[577.87 / 4, 0, 79.5], [0, 577.87 / 4, 59.5], [0, 0, 1]])
    for axis, count in ((1, 160), (0, 120)):
        z = np.broadcast_to(np.expand_dims(np.arange(4.0 * count), 1 - axis), (480, 640))
        length = SceneReader(1, 120, 160, voxel=0.01, unit=1.0)._lengths(z, lens, depth_lens)
        found = length * pixel_rays(lens, 120, 160)[:, 2].reshape(120, 160)
        expected = np.broadcast_to(np.expand_dims(4 * np.arange(count) + 2, 1 - axis), found.shape)
        np.testing.assert_allclose(found, expected, atol=1e-3)


def test_normals_of_a_slope_are_exact_and_face_the_camera() -> None:
    v, u = np.mgrid[:7, :9].astype(float)
    ray = np.stack([(u - LENS[0, 2]) / 30, (v - LENS[1, 2]) / 28, np.ones_like(u)])
    slope = np.array([0.3, -0.2, -1.0])  # slope . point = -2
    depth = -2 / np.einsum("i,ivu->vu", slope, ray)
    length = (depth * np.linalg.norm(ray, axis=0)).astype(np.float32)
    length[3, 4] = 0
    found = normals(length, LENS)
    known = np.linalg.norm(found, axis=0) > 0
    assert known.sum() == 5 * 7 - 5
    unit = slope / np.linalg.norm(slope)
    np.testing.assert_allclose(found[:, known], np.repeat(unit[:, None], known.sum(), axis=1), atol=1e-5)
    assert normals(length[:2], LENS).any() == np.False_


def test_frames_whose_tracking_was_lost_are_left_out_and_frames_are_evenly_spaced(tmp_path: Path) -> None:
    for number in range(2):
        scene = written(tmp_path / "in" / f"s{number}", "exported", count=12)
        np.savetxt(scene / "pose" / "0.txt", np.full((4, 4), -np.inf))
    scan = opened(tmp_path, frames=3, views=3).train.archive.read(0)
    assert scan.pictures[:, 0].max(axis=(1, 2)).tolist() == [20, 120, 220]  # frames 1, 6 and 11


def test_the_cache_follows_what_the_files_say(tmp_path: Path) -> None:
    for number in range(2):
        written(tmp_path / "in" / f"s{number}", "exported")
    first = opened(tmp_path)
    assert opened(tmp_path).training_content() == first.training_content()
    assert opened(tmp_path, voxel=0.5).training_content() != first.training_content()
    before = [known["content"] for known in first.train.archive.known]
    shutil.rmtree(tmp_path / "in" / "s0")
    written(tmp_path / "in" / "s0", "exported", count=6)
    after = [known["content"] for known in opened(tmp_path).train.archive.known]
    assert (after[0] == before[0], after[1] == before[1]) == (False, True)


def test_a_plan_needs_no_scenes(tmp_path: Path) -> None:
    batch = RGBDFolder(str(tmp_path / "none"), height=6, width=8).stand_in()
    assert batch is not None
    require_declared(batch, PosedPointsBatch, "RGBDFolder")


def test_scenes_that_cannot_be_read_are_named_and_skipped_only_if_asked(tmp_path: Path) -> None:
    for number in range(3):
        written(tmp_path / "in" / f"good{number}", "listed")
    few = written(tmp_path / "in" / "few", "exported", count=2)
    flat = written(tmp_path / "in" / "flat", "exported")
    for file in (flat / "depth").iterdir():
        Image.fromarray(np.zeros((12, 16), np.uint16)).save(file)
    cut = written(tmp_path / "in" / "cut", "exported")
    (cut / "depth" / "0.png").write_bytes(b"\x89PNG")
    words = written(tmp_path / "in" / "words", "exported")
    (words / "pose" / "1.txt").write_text("a b")
    short = written(tmp_path / "in" / "short", "exported")
    (short / "intrinsic" / "intrinsic_depth.txt").write_text("1 2 3")
    (tmp_path / "in" / "empty").mkdir()
    away = written(tmp_path / "in" / "away", "listed")
    said = json.loads((away / "transforms.json").read_text())
    said["frames"][0]["depth_file_path"] = "../good0/depth/0.png"
    (away / "transforms.json").write_text(json.dumps(said))
    far = written(tmp_path / "in" / "far", "listed")
    long = written(tmp_path / "in" / "long", "listed")
    for scene, change in ((far, {"frames": [{"transform_matrix": [[10**400] * 4] * 4}]}), (long, {"fl_x": 10**400})):
        said = json.loads((scene / "transforms.json").read_text())
        (scene / "transforms.json").write_text(json.dumps(said | change))
    with pytest.raises(UserError, match="skip_damaged") as caught:
        opened(tmp_path)
    for folder, why in {
        few: "below frames=3", flat: "no pixel with a depth", cut: "frame 0", words: "pose/1.txt", short: "3 numbers",
        tmp_path / "in" / "empty": "neither", away: "outside",
        far: "transform_matrix", long: "fl_x",
    }.items():  # fmt: skip
        assert any(str(folder) in line and why in line for line in str(caught.value).splitlines()), (folder, why)
    data = opened(tmp_path, skip_damaged=True)
    assert len(data.train) + len(data.val) == 3


@pytest.mark.parametrize("wrong", [{"views": 4}, {"frames": 0}, {"voxel": 0.0}, {"unit": 0.0}, {"val_share": 1.0}])
def test_settings_out_of_range_are_refused(tmp_path: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(wrong))):
        opened(tmp_path, **wrong)
    with pytest.raises(UserError, match="is no folder"):
        opened(tmp_path)
