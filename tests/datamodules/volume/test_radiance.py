"""Radiance fields as volumes: drawn ones, files, padding, and fields that are fitted to posed views."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from lightspan.core.batches import require_declared
from lightspan.core.errors import UserError
from lightspan.datamodules.rendered.rooms import METRES, RoomSpace
from lightspan.datamodules.volume.augment import VolumeAugmentation
from lightspan.datamodules.volume.batch import CameraViews, VolumeBatch
from lightspan.datamodules.volume.radiance import RadianceFolder, opaque, radiance, write_grid
from lightspan.datamodules.volume.rooms import DrawnRooms
from lightspan.datamodules.volume.transforms import views_in
from lightspan.nn.rendering import Rays
from lightspan.nn.voxel_fields import VoxelField, fitted_field, view_rays


def rooms(**settings: object) -> DrawnRooms:
    data = DrawnRooms(**({"rooms": 6, "val_size": 2, "side": 16, "size": 16, "batch_size": 4} | settings))
    data.setup()
    return data


def test_drawn_rooms_are_the_rendered_ones_with_their_classes_and_say_what_pads_them() -> None:
    data = rooms(noise=0.0)
    grids = RoomSpace(16).grids(RoomSpace(16).rooms(0, np.arange(6)))
    for index in range(4):
        sample = data.train.sample(index, 0)
        d, h, w = grids.sides[index].tolist()
        first = [-((side - 16) // 2) for side in (d, h, w)]  # in the middle
        at = tuple(slice(a, a + side) for a, side in zip(first, (d, h, w), strict=True))
        assert int(sample["inside"].sum()) == d * h * w
        assert sample["inside"][at].all()
        own = np.concatenate([grids.colour[index], grids.alpha[index][None]])[:, :d, :h, :w]
        np.testing.assert_allclose(sample["volume"][:, *at], own, atol=1e-3)
        np.testing.assert_array_equal(sample["segmentation"][at], grids.classes[index, :d, :h, :w])
        assert (sample["volume"] * ~sample["inside"] == 0).all()
        assert (sample["segmentation"][~sample["inside"]] == -1).all()
        assert sample["spacing"].tolist() == [250.0] * 3
    assert data.classes == ("2 objects", "3 objects", "4 objects")
    noisy, clean = rooms(noise=0.05).train.sample(1, 0)["volume"], data.train.sample(1, 0)["volume"]
    assert 0.005 < float((noisy - clean).abs().mean()) < 0.05
    assert (noisy >= 0).all()
    assert (noisy <= 1).all()


def test_batches_of_all_sets_hold_what_they_declare_also_altered() -> None:
    data = rooms(augment=VolumeAugmentation(flip=(0.0, 0.5, 0.5), turn=1.0))
    assert data.batch_type is VolumeBatch
    for loader in (data.val_dataloader(), data.bank_dataloader()):
        batch = next(iter(loader))
        require_declared(batch, VolumeBatch, "rooms")
        assert "inside" in batch
    drawn = torch.utils.data.default_collate([data.train.sample(index, 5 + index) for index in range(4)])
    altered = data.on_after_batch_transfer(drawn, 0)
    require_declared(altered, VolumeBatch, "rooms")
    assert altered["inside"].sum() == drawn["inside"].sum()
    assert (altered["segmentation"] >= 0).equal(altered["inside"])
    assert not altered["inside"].equal(drawn["inside"])


def test_settings_of_drawn_rooms_that_do_not_fit_are_named() -> None:
    for settings, said in (
        ({"rooms": 1}, "rooms=1"), ({"val_size": 6}, "val_size=6"), ({"noise": -0.1}, "noise=-0.1"),
        ({"side": 4}, "side=4"), ({"most": 5}, "most=5"), ({"fewest": 5}, "fewest=5"), ({"draw_seed": -1}, "draw_seed"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=said):
            rooms(**settings)


def test_densities_become_opacities_of_a_hundredth_of_their_unit() -> None:
    density = np.array([-np.inf, -3.0, 0.0, 4.0, 1000.0, np.inf, np.nan], np.float32)
    positive = [0.0, math.exp(-3), 1.0, math.exp(4), np.inf, np.inf, 1.0]
    np.testing.assert_allclose(opaque(density, "exp"), [1 - math.exp(-each / 100) for each in positive], rtol=1e-5)
    positive = [0.0, 0.0, 0.0, 4.0, 1000.0, np.inf, 0.0]
    np.testing.assert_allclose(opaque(density, "relu"), [1 - math.exp(-each / 100) for each in positive], rtol=1e-5)
    np.testing.assert_array_equal(opaque(density, "alpha"), [0, 0, 0, 1, 1, 1, 0])
    grid = np.random.default_rng(0).random((3, 4, 5, 4), np.float32)
    found = radiance(grid, "relu")
    assert found.shape == (4, 5, 4, 3)
    np.testing.assert_array_equal(found[1, 2, 3, 1], grid[1, 3, 2, 1])
    np.testing.assert_allclose(radiance(np.full((2, 2, 2, 4), 255, np.uint8), "exp"), 1)
    for wrong in (np.zeros((3, 4, 5, 3)), np.zeros((3, 4, 4)), np.zeros((0, 4, 5, 4)), np.zeros((2, 2, 2, 4), bool)):
        with pytest.raises(ValueError, match=r"\[W, L, H, 4\]"):
            radiance(wrong, "exp")


def folder_of(folder: Path, count: int = 6) -> Path:
    folder.mkdir()
    for number in range(count):
        grid = np.random.default_rng(number).random((9, 7, 5 + number, 4), np.float32)
        np.savez(folder / f"scene{number}.npz", rgbsigma=grid)
    return folder


def test_a_folder_of_fields_is_read_padded_and_split_by_name(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "fields")
    data = RadianceFolder(str(folder), density="alpha", val_share=0.3, size=12, batch_size=2)
    data.setup()
    assert len(data.train) == 4
    assert len(data.val) == 2
    sample = data.val.sample(0, 0)
    assert sample["volume"].shape == (4, 12, 12, 12)
    assert sample["volume"].dtype == torch.float32
    with np.load(data.val.archive.files[data.val.numbers[0]]) as arrays:
        grid = arrays["rgbsigma"]
    assert int(sample["inside"].sum()) == grid[..., 0].size
    np.testing.assert_allclose(sample["volume"][:, sample["inside"]].sum(1), grid.sum((0, 1, 2)), rtol=1e-4)
    crop = RadianceFolder(str(folder), str(folder_of(tmp_path / "other", 1)), size=4)
    crop.setup()
    assert len(crop.train) == 6
    assert crop.train.sample(0, 0)["inside"].all()
    content = data.training_content()
    np.savez(data.train.archive.files[data.train.numbers[0]], rgbsigma=np.zeros((3, 3, 3, 4)))
    again = RadianceFolder(str(folder), density="alpha", val_share=0.3, size=12)
    again.setup()
    assert again.training_content() != content


def test_folders_and_files_that_hold_no_field_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"missing is no folder"):
        RadianceFolder(str(tmp_path / "missing")).setup()
    with pytest.raises(UserError, match=r"no \.npz files"):
        RadianceFolder(str(tmp_path)).setup()
    with pytest.raises(UserError, match="val_share=0"):
        RadianceFolder(str(tmp_path), val_share=0)
    folder = folder_of(tmp_path / "fields", 3)
    for write in (lambda path: path.write_bytes(b"PK"), lambda path: np.savez(path, other=np.zeros(3))):
        for number in range(3):
            write(folder / f"scene{number}.npz")
        data = RadianceFolder(str(folder), size=4)
        data.setup()
        with pytest.raises(UserError, match=r"scene\d.npz"):
            data.train.sample(0, 0)
    blank = RadianceFolder(str(tmp_path / "missing"), size=4).stand_in()
    require_declared(blank, VolumeBatch, "fields")
    assert blank["volume"].shape == (2, 4, 4, 4, 4)


def views_of_room(number: int, count: int, side: int) -> tuple[CameraViews, torch.Tensor, RoomSpace]:
    space, numbers = RoomSpace(16, cells=1, fewest=1, most=1), np.array([number])
    drawn = space.rooms(0, numbers)
    views = space.views(drawn, 0, numbers, count, side, side)
    lens = torch.from_numpy(views.intrinsics).expand(count, 3, 3)
    posed = CameraViews(*(torch.from_numpy(part[0]) for part in (views.images, views.place, views.rotation)), lens)
    return posed, torch.from_numpy(views.depth[0]), space


def test_a_field_of_one_density_is_as_opaque_as_its_alpha_says() -> None:
    field = VoxelField((4, 5, 6), (0, 0, 0), (6, 5, 4))
    assert field.voxel == pytest.approx(1.0)
    torch.testing.assert_close(field.grid()[3], torch.full((4, 5, 6), 0.005))
    rays = Rays(torch.tensor([[-1.0, 2.5, 2.0], [9.0, 9.0, 9.0]]), torch.tensor([[1.0, 0, 0], [1, 0, 0]]))
    colour, passes, length = (part.detach() for part in field.render(rays, 30))
    torch.testing.assert_close(passes, torch.tensor([0.995**6, 1.0]))
    torch.testing.assert_close(colour, 0.5 * (1 - passes)[:, None].expand(2, 3))
    assert float(length[0]) == pytest.approx(4.0, abs=0.02)
    assert float(length[1]) == 0
    with torch.no_grad():
        field.stored.copy_(torch.arange(480.0).view(1, 4, 4, 5, 6) / 480)
    _, shown = field(torch.tensor([[4.5, 2.5, 1.5]]))  # the middle of voxel d=1, h=2, w=4
    torch.testing.assert_close(shown[0], field.grid()[:3, 1, 2, 4])


def test_a_field_fitted_to_views_of_a_room_shows_them_and_its_depth() -> None:
    views, depth, space = views_of_room(1, 12, 12)
    size = [METRES * 1.0] * 3
    field = fitted_field(views, (16, 16, 16), (0, 0, 0), size, steps=150, rays=512, samples=32, seed=0)
    rays, colour = view_rays(views)
    flat = Rays(*(part.reshape(-1, 3) for part in rays))
    shown, _, length = field.render(flat, 48)
    error = float((shown - colour.reshape(-1, 3)).square().mean())
    plain = float((colour - colour.mean(dim=(0, 1, 2))).square().mean())
    assert error < 0.3 * plain
    assert float((length - depth.ravel()).abs().median()) < 0.35  # of rays of up to 4 metres
    again = fitted_field(views, (16, 16, 16), (0, 0, 0), size, steps=3, rays=64, samples=24, seed=1)
    same = fitted_field(views, (16, 16, 16), (0, 0, 0), size, steps=3, rays=64, samples=24, seed=1)
    assert torch.equal(again.grid(), same.grid())
    assert space.side == 16


def test_a_grid_that_was_written_is_read_back(tmp_path: Path) -> None:
    grid = torch.rand(4, 3, 5, 6)
    for number in range(3):
        write_grid(grid, tmp_path / f"{number}.npz")
    data = RadianceFolder(str(tmp_path), density="alpha", size=(3, 5, 6))
    data.setup()
    torch.testing.assert_close(data.train.sample(0, 0)["volume"], grid, atol=1e-3, rtol=1e-3)


def test_views_of_a_transforms_file_have_the_rays_of_their_cameras(tmp_path: Path) -> None:
    from PIL import Image

    views, _, _ = views_of_room(0, 3, 8)
    frames = []
    for number in range(3):
        Image.fromarray((255 * views.images[number].permute(1, 2, 0)).round().byte().numpy()).save(
            tmp_path / f"{number}.png"
        )
        pose = np.eye(4)
        pose[:3, :3] = views.rotation[number].numpy().T * [1, -1, -1]
        pose[:3, 3] = views.place[number]
        frames.append({"file_path": f"{number}" if number else "0.png", "transform_matrix": pose.tolist()})
    said = {"camera_angle_x": math.pi / 3, "frames": frames}
    (tmp_path / "transforms.json").write_text(json.dumps(said))
    found = views_in(tmp_path)
    torch.testing.assert_close(found.images, views.images, atol=1 / 255, rtol=0)
    for ours, theirs in zip(view_rays(found)[0], view_rays(views)[0], strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    small = views_in(tmp_path, reduced=2)
    direction = view_rays(views)[0].direction.unflatten(1, (4, 2)).unflatten(3, (4, 2)).mean(dim=(2, 4))
    direction = direction / direction.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(view_rays(small)[0].direction, direction, atol=3e-3, rtol=0)
    explicit = said | {"fl_x": 8 / 2 * 3**0.5, "cx": 4.0}
    (tmp_path / "transforms.json").write_text(json.dumps(explicit))
    torch.testing.assert_close(views_in(tmp_path).intrinsics, found.intrinsics)


def test_folders_of_views_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"transforms\.json"):
        views_in(tmp_path)
    for said, what in (
        ({"frames": []}, "no frames"),
        ({"frames": [{"file_path": "a.png", "transform_matrix": np.eye(4).tolist()}]}, "a.png"),
        ({"frames": [3]}, "no frames"),
        ({"frames": [{"file_path": "../a.png", "transform_matrix": np.eye(4).tolist()}]}, "outside"),
        ({"frames": [{"file_path": "/etc/hostname", "transform_matrix": np.eye(4).tolist()}]}, "outside"),
    ):
        (tmp_path / "transforms.json").write_text(json.dumps({"camera_angle_x": 1.0, **said}))
        with pytest.raises(UserError, match=what):
            views_in(tmp_path)
    with pytest.raises(UserError, match="reduced=0"):
        views_in(tmp_path, reduced=0)
    nothing = CameraViews(torch.zeros(0, 3, 4, 4), torch.zeros(0, 3), torch.zeros(0, 3, 3), torch.zeros(0, 3, 3))
    for settings, what in (({"steps": 0}, "steps=0"), ({"rate": 0.0}, "rate=0"), ({}, "images are")):
        with pytest.raises(UserError, match=what):
            fitted_field(nothing, (4, 4, 4), (0, 0, 0), (1, 1, 1), **settings)
    for box in ((0, 0, 0), (1, 1, 0)), ((0, 0), (1, 1)):
        with pytest.raises(UserError, match="low="):
            VoxelField((4, 4, 4), *box)
