"""Scanned rooms as batches: the cloud is what the frames show, scenes move with their cameras, draws and the cache."""

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from furniture_files import catalogue

from lightspan.core.batches import require_declared
from lightspan.core.errors import UserError
from lightspan.datamodules.points.batch import PosedPointsBatch
from lightspan.datamodules.points.furnished import CLASSES, FurnishedRooms
from lightspan.datamodules.points.posed import SceneMoves, moved
from lightspan.datamodules.rendered.cameras import pixel_rays
from lightspan.datamodules.rendered.furnished import Sensor


def opened(folder: Path, **settings: Any) -> FurnishedRooms:
    pytest.importorskip("trimesh", reason="the extra `points` is not installed")
    if not (folder / "in").is_dir():
        catalogue(folder / "in", 2)
    given = {"rooms": 5, "val_size": 2, "frames": 3, "height": 8, "width": 10, "views": 2, "batch_size": 3}
    data = FurnishedRooms(furniture=str(folder / "in"), cache_dir=str(folder / "cache"), **given | settings)
    data.setup()
    return data


def seen_again(scene: dict[str, Any]) -> torch.Tensor:
    """The points of all pixels with a depth, of one scene."""
    lens, place, rotation, depth = (scene[name] for name in ("intrinsics", "place", "rotation", "depth"))
    views = []
    for view in range(len(depth)):
        rays = torch.from_numpy(pixel_rays(lens[view].numpy(), *depth.shape[1:])).float()
        points = place[view] + depth[view].reshape(-1, 1) * (rays @ rotation[view])
        views.append(points[depth[view].reshape(-1) > 0])
    return torch.cat(views)


def test_batches_are_as_declared_and_their_clouds_lie_on_what_frames_show(tmp_path: Path) -> None:
    data = opened(tmp_path, views=3, moves=SceneMoves(180, 0.5, (0.5, 2)))
    for loader in (data.train_dataloader(), data.val_dataloader()):
        batch = next(iter(loader))
        require_declared(batch, PosedPointsBatch, "FurnishedRooms")
        assert batch["classes"].min() >= 0
        assert batch["classes"].max() < len(CLASSES)
    for samples in (data.train, data.val):
        scene = samples.sample(0, 5)
        shown = seen_again(scene)
        assert 20 < len(scene["xyz"]) <= len(shown)
        assert torch.cdist(scene["xyz"], shown, compute_mode="donot_use_mm_for_euclid_dist").amin(dim=1).max() < 1e-4
        torch.testing.assert_close(scene["normal"].norm(dim=1), torch.ones(len(scene["xyz"])), atol=1e-5, rtol=0)
    assert data.class_names[data.train.labels()[0]] in ("living room", "bedroom", "kitchen", "office", "bathroom")
    assert [int(batch["label"][0]) for batch in [next(iter(data.bank_dataloader()))]] == data.train.labels()[
        :1
    ].tolist()


def test_one_point_of_each_cube_is_kept(tmp_path: Path) -> None:
    clouds = [opened(tmp_path, voxel=voxel).train.archive.read(0).xyz for voxel in (0.01, 0.5)]
    assert len(clouds[1]) < len(clouds[0]) <= 3 * 80
    cells = np.floor(clouds[1].astype(float) / 0.5)
    assert len(np.unique(cells, axis=0)) >= 0.9 * len(cells)  # rounding may move a point across a side


def test_scenes_that_move_are_seen_as_before() -> None:
    generator = np.random.default_rng(0)
    rotation = np.linalg.qr(generator.normal(size=(4, 3, 3)))[0]
    scene = {
        "xyz": torch.tensor(generator.normal(size=(9, 3)), dtype=torch.float32),
        "normal": torch.nn.functional.normalize(torch.randn(9, 3), dim=1),
        "place": torch.tensor(generator.normal(size=(4, 3)), dtype=torch.float32),
        "rotation": torch.tensor(rotation, dtype=torch.float32),
        "depth": torch.ones(4, 2, 2),
    }

    def seen(some: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.einsum("vij,vnj->vni", some["rotation"], some["xyz"] - some["place"][:, None])

    for flip in (0.0, 1.0):
        turn, factor = SceneMoves(180, flip, (0.5, 2)).draw(generator)
        assert np.linalg.det(turn) == pytest.approx(1 - 2 * flip, abs=1e-6)
        after = moved(scene, turn, factor)
        torch.testing.assert_close(seen(after), factor * seen(scene), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(after["depth"], factor * scene["depth"])
        before = torch.einsum("vij,nj->vni", scene["rotation"], scene["normal"])
        torch.testing.assert_close(torch.einsum("vij,nj->vni", after["rotation"], after["normal"]), before)
    assert SceneMoves().draw(generator)[0].tolist() == np.eye(3).tolist()
    for wrong in ({"degrees": 181.0}, {"flip": 2.0}, {"scale": (0.0, 1.0)}):
        with pytest.raises(UserError, match=next(iter(wrong))):
            SceneMoves(**wrong)


def test_rooms_and_draws_follow_from_seeds_and_the_cache_is_read_again(tmp_path: Path) -> None:
    moves = SceneMoves(90, 0.5)
    one = opened(tmp_path, points=50, views=1, moves=moves)
    again = opened(tmp_path, points=50, views=1, moves=moves)
    other = opened(tmp_path / "other", points=50, views=1, moves=moves, num_workers=1)
    assert one.training_content() == again.training_content() == other.training_content()
    assert one.training_content() != opened(tmp_path, draw_seed=1).training_content()
    for index, seed in ((0, 1), (2, 9)):
        for left, right in zip(*(data.train.sample(index, seed).values() for data in (one, other)), strict=True):
            torch.testing.assert_close(left, right, rtol=0, atol=0)
    first, second = (one.train.sample(0, seed) for seed in (1, 2))
    assert len(first["xyz"]) == 50
    assert not torch.equal(first["xyz"], second["xyz"])
    assert torch.equal(one.val.sample(0, 1)["xyz"], one.val.sample(0, 2)["xyz"])
    seen = {round(float(one.train.sample(0, seed)["place"].norm()), 4) for seed in range(12)}
    assert len(seen) == 3  # each of the three frames in some epoch


def test_clean_and_noisy_rooms_are_the_same_rooms(tmp_path: Path) -> None:
    clean, noisy = (opened(tmp_path, sensor=sensor) for sensor in (None, Sensor(0.01, 0.5, 0.1, 0.05, 0.2)))
    for number in range(5):
        ours, theirs = clean.train.archive.read(number), noisy.train.archive.read(number)
        np.testing.assert_array_equal(ours.pixel_classes, theirs.pixel_classes)
        np.testing.assert_array_equal(ours.place, theirs.place)
        assert (theirs.depth == 0).mean() == pytest.approx(0.5, abs=0.01)
        assert len(theirs.xyz) < len(ours.xyz)
    nothing = opened(tmp_path, sensor=Sensor(missing=1))
    batch = next(iter(nothing.train_dataloader()))
    assert batch["offsets"].tolist() == [0, 0, 0, 0]


def test_damaged_furniture_is_left_out_and_without_any_bare_rooms_stand_in(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("trimesh", reason="the extra `points` is not installed")
    catalogue(tmp_path / "in", 2, ({"name": "Chair", "model": "/test/piece0/m.mtl.obj"},))
    with zipfile.ZipFile(tmp_path / "in" / "Test.sh3f", "a") as files:
        files.writestr("test/piece0/m.mtl.obj", "f 1 2 3\n")
    opened(tmp_path)
    assert "1 of 23 pieces of furniture" in capsys.readouterr().out
    away = FurnishedRooms(furniture=str(tmp_path / "none"), frames=2, views=1, height=4, width=4)
    stand_in = away.stand_in()
    assert stand_in is not None
    require_declared(stand_in, PosedPointsBatch, "FurnishedRooms")
    with pytest.raises(UserError, match="sweethome3d-furniture"):
        away.setup()


@pytest.mark.parametrize(
    "wrong",
    [{"rooms": 1}, {"val_size": 5}, {"views": 4}, {"frames": 0}, {"voxel": 0.0}, {"points": 0}, {"height": 2**20}],
    ids=lambda wrong: next(iter(wrong)),
)
def test_settings_that_do_not_fit_are_named(wrong: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(wrong))):
        FurnishedRooms(**{"rooms": 5, "frames": 3, "views": 2} | wrong)
