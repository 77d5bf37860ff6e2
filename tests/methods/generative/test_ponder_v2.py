"""PonderV2: what its losses are, what they may not depend on, scenes of any size, and sizes that do not fit."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Trainer
from method_cases import posed_scenes
from method_runs import Served, fit, resumes, stays_finite
from torch import Tensor, nn

from lightspan.backbones.sparse_unet import SparseUNet
from lightspan.backbones.voxel_points import VoxelPoints
from lightspan.core.errors import UserError
from lightspan.datamodules.points.posed import moved
from lightspan.methods.generative.ponder_v2 import PonderV2, Targets, rendering_losses, scene_boxes
from lightspan.nn.decoders.grid_unet import GridUNet
from lightspan.nn.points.grids import pooled_grid
from lightspan.nn.rendering import Rays, camera_rays, crossing
from lightspan.nn.signed_fields import RayView, SignedField


class Coloured(VoxelPoints):
    """Each point's own colour and height as its features, whatever the other points."""

    def __init__(self) -> None:
        network = nn.Module()
        network.num_features = 4  # type: ignore[assignment]
        super().__init__(network, 0.5)

    def forward(self, xyz_N3: Tensor, offsets: Tensor, *fields: Tensor) -> Tensor:
        return torch.cat([*fields, xyz_N3[:, 2:]], dim=1)


def method(backbone: VoxelPoints | None = None, **settings: Any) -> PonderV2:
    torch.manual_seed(0)
    backbone = backbone or VoxelPoints(SparseUNet(6, 4, (4, 6), (1, 1)), size=0.5)
    small = {"grid": (4, 6, 6), "rays": 8, "pieces": 6, "finer": 3, "optimizer": partial(torch.optim.AdamW, lr=3e-3)}
    return PonderV2(
        backbone, GridUNet(backbone.num_features, 7, (4, 4)), SignedField(4, 3, hidden=5), **small | settings
    )


def seen_of(true: Tensor, at: Tensor, distance: Tensor, **changed: Tensor) -> RayView:
    """What rays see that are right in all but `changed`."""
    rays = true.shape
    slope = torch.tensor([0.0, 0, 1]).expand(*at.shape, 3)
    given = RayView(torch.zeros(*rays, 3), true, at, at, distance, slope, torch.ones(rays, dtype=torch.bool))
    return given._replace(**changed)


def test_losses_vanish_for_the_true_distances_and_are_worked_out_by_hand_for_others() -> None:
    depth, at = torch.tensor([[0.5, 0.8]]), torch.tensor([0.1, 0.48, 0.52, 0.9]).expand(1, 2, 4)
    truth, targets = depth[..., None] - at, Targets(torch.zeros(1, 2, 3), depth)
    losses = partial(rendering_losses, targets=targets, drawn_B=torch.tensor([True]), truncation=0.05)
    for name, value in losses(seen_of(depth, at, truth)).items():
        assert float(value) == pytest.approx(0, abs=1e-6), name
    off = losses(seen_of(depth, at, truth - 0.02, depth=depth + 0.1, colour=torch.full((1, 2, 3), 0.3)))
    # All that lies in the open has a distance of 0.28 or more, above tau.
    wanted = {"colour": 0.3, "depth": 0.1, "surface": 0.02, "free": 0.0, "slope": 0.0}
    assert {name: float(value) for name, value in off.items()} == pytest.approx(wanted, abs=1e-6)
    flat = losses(seen_of(depth, at, torch.zeros_like(at), slope=torch.zeros(1, 2, 4, 3)))
    # Two pieces of the first ray are within tau, at 0.02 on either side, none of the second; four are in the open.
    assert float(flat["surface"]) == pytest.approx(0.02, abs=1e-6)
    assert float(flat["free"]) == pytest.approx(0.05, abs=1e-6)
    assert float(flat["slope"]) == pytest.approx(1, abs=1e-5)


def test_rays_beside_the_box_and_pixels_without_depth_have_no_part() -> None:
    depth, at = torch.tensor([[0.5, 0.0, 0.7]]), torch.tensor([0.3, 0.49]).expand(1, 3, 2)
    wrong = torch.full((1, 3, 3), 0.5) * torch.tensor([1.0, 2, 100])[:, None]
    seen = seen_of(depth, at, depth[..., None] - at, colour=wrong, crosses=torch.tensor([[True, True, False]]))
    both = partial(rendering_losses, seen._replace(depth=depth + 0.2), Targets(torch.zeros(1, 3, 3), depth))
    losses = both(drawn_B=torch.tensor([True]), truncation=0.05)
    assert float(losses["colour"]) == pytest.approx(0.75)
    assert float(losses["depth"]) == pytest.approx(0.2)
    assert float(losses["surface"]) == float(losses["free"]) == pytest.approx(0, abs=1e-6)
    nothing = both(drawn_B=torch.tensor([False]), truncation=0.05)
    assert all(float(value) == 0 for value in nothing.values())


def test_the_loss_is_the_weighted_sum_of_what_its_field_shows() -> None:
    weights = {"colour": 2.0, "depth": 3.0, "surface": 5.0, "free": 7.0, "slope": 11.0}
    model, batch = method(**weights).eval(), posed_scenes(4, 0)
    model.log_training = lambda figures, **options: None  # type: ignore[method-assign]
    losses, _ = model.losses(batch, 0)
    assert all(float(value) > 0 for value in losses.values())
    wanted = sum(weights[name] * float(value) for name, value in losses.items())
    assert float(model.training_step(batch, 0)) == pytest.approx(wanted, rel=1e-5)


def test_boxes_hold_all_points_and_targets_are_what_the_pixels_of_the_rays_show() -> None:
    model, batch = method(), posed_scenes(4, 3)
    boxes = scene_boxes(batch["xyz"], batch["offsets"])
    for scene, cloud in enumerate(batch["xyz"].split(batch["offsets"].diff().tolist())):
        inside = (cloud - boxes.middle_B3[scene]) / boxes.side_B[scene]
        assert (inside.abs() <= boxes.half_B3[scene] + 1e-6).all()
    assert (boxes.half_B3 <= 0.5 + 1e-6).all()
    rays, targets = model.drawn_rays(batch, boxes, torch.arange(4))
    colours = batch["pictures"].movedim(2, -1).reshape(4, -1, 3)
    found = set[int]()
    for scene in range(4):
        place, rotation, lens = (batch[name][scene] for name in ("place", "rotation", "intrinsics"))
        all_rays = camera_rays(place, rotation, lens, 3, 4)
        origin = (all_rays.origin.reshape(-1, 3) - boxes.middle_B3[scene]) / boxes.side_B[scene]
        for ray in range(16):
            own = torch.cat([rays.origin[scene, ray], rays.direction[scene, ray]])
            apart = (torch.cat([origin, all_rays.direction.reshape(-1, 3)], dim=1) - own).norm(dim=1)
            pixel = int(apart.argmin())
            assert apart[pixel] < 1e-5
            assert pixel // 12 == ray // 8  # of its view
            torch.testing.assert_close(targets.colour_BR3[scene, ray], colours[scene, pixel])
            depth = batch["depth"][scene].reshape(-1)[pixel] / boxes.side_B[scene]
            torch.testing.assert_close(targets.depth_BR[scene, ray], depth)
            found.add(pixel)
    assert len(found) > 15


def test_a_grid_of_features_reaches_as_far_as_the_box_along_every_axis() -> None:
    xyz = torch.tensor([[0.0, 0, 0], [4.0, 2.0, 1.0]])
    batch = {"xyz": xyz, "offsets": torch.tensor([0, 2]), "colour": torch.ones(2, 3), "index": torch.tensor([0])}
    model, seen = method(Coloured(), keep=1.0, grid=(3, 3, 3)), list[Tensor]()
    model.volume.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model.rendered_field(batch, scene_boxes(xyz, batch["offsets"]), torch.tensor([0]))
    assert seen[0][0, 0].nonzero().tolist() == [[0, 0, 0], [2, 2, 2]]


def test_a_camera_that_is_none_shows_nothing() -> None:
    model, batch = method(), posed_scenes(3, 0)
    before = model.losses(batch, 0)[0]
    batch["intrinsics"] = batch["intrinsics"].clone()
    for name, value in (("intrinsics", 0.0), ("rotation", 0.0), ("place", float("nan"))):
        broken = {**batch, name: batch[name].clone()}
        broken[name][:2] = value
        losses = model.losses(broken, 0)[0]
        assert all(loss.isfinite() for loss in losses.values())
        assert any(float(losses[name]) != float(before[name]) for name in losses)
        broken[name][:] = value
        assert all(float(loss) == 0 for loss in model.losses(broken, 0)[0].values())


def test_boxes_are_met_where_a_plain_search_finds_them() -> None:
    generator = torch.Generator().manual_seed(0)
    origin, direction = torch.randn(2, 50, 3, generator=generator).unbind()
    rays = Rays(2 * origin, nn.functional.normalize(0.4 * direction - 2 * origin, dim=-1))
    high = torch.tensor([0.5, 0.3, 0.4])
    near, far = crossing(rays, -high, high)
    along = torch.linspace(0, 12, 12001)
    inside = ((rays.origin[:, None] + along[:, None] * rays.direction[:, None]).abs() <= high).all(dim=-1)
    assert 5 < inside.any(dim=1).sum() < 45
    assert ((far - near)[~inside.any(dim=1)] < 2e-3).all()
    for ray in torch.nonzero(inside.any(dim=1)).flatten().tolist():
        assert abs(float(near[ray]) - float(along[inside[ray]][0])) < 2e-3
        assert abs(float(far[ray]) - float(along[inside[ray]][-1])) < 2e-3


def test_cells_hold_the_mean_of_their_points() -> None:
    at = torch.tensor([[0.1, 0.1, 0.1], [0.2, 0.2, 0.3], [0.9, 0.1, 0.1], [0.6, 0.6, 0.6], [1.0, 1.2, -0.3]])
    cloud, x = torch.tensor([0, 0, 0, 1, 1]), torch.tensor([[1.0], [3], [5], [7], [9]])
    grid = pooled_grid(x, at, cloud, 3, (2, 2, 2))
    wanted = torch.zeros(3, 1, 2, 2, 2)
    wanted[0, 0, 0, 0, 0], wanted[0, 0, 0, 0, 1], wanted[1, 0, 1, 1, 1], wanted[1, 0, 0, 1, 1] = 2, 5, 7, 9
    assert torch.equal(grid, wanted)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_cells_of_many_points_hold_their_mean_in_half_types(dtype: torch.dtype) -> None:
    x = torch.full((2000, 1), 64.0, dtype=dtype)
    grid = pooled_grid(x, torch.full((2000, 3), 0.1), torch.zeros(2000, dtype=torch.int64), 1, (2, 2, 2))
    assert grid.dtype == dtype
    assert grid[0, 0, 0, 0, 0] == 64


def test_features_and_losses_do_not_depend_on_the_order_of_points_or_on_other_scenes() -> None:
    model, batch = method(keep=1.0).eval(), posed_scenes(4, 0)
    order = torch.cat([start + torch.randperm(count) for start, count in
                       zip(batch["offsets"].tolist(), batch["offsets"].diff().tolist(), strict=False)])  # fmt: skip
    mixed = batch | {name: batch[name][order] for name in ("xyz", "colour")}
    torch.testing.assert_close(model.features(mixed), model.features(batch))
    for left, right in zip(model.losses(mixed, 1)[0].values(), model.losses(batch, 1)[0].values(), strict=True):
        torch.testing.assert_close(left, right)
    first = {name: value[:1] for name, value in batch.items() if name not in ("xyz", "colour", "offsets")}
    count = int(batch["offsets"][1])
    first |= {"offsets": batch["offsets"][:2], "xyz": batch["xyz"][:count], "colour": batch["colour"][:count]}
    torch.testing.assert_close(model.features(first), model.features(batch)[:1])


def test_scenes_that_are_moved_with_their_cameras_lose_as_much() -> None:
    """For an encoder that does not see the move: by whole turns of the grid, mirrored, shifted and scaled."""
    model, batch = method(Coloured(), grid=(4, 5, 5)).eval(), posed_scenes(3, 5)
    model.volume = nn.Conv3d(4, 7, 1)  # of each cell alone
    model.volume.in_chans = 4
    with torch.no_grad():  # the colour of a place may depend on directions, which turn
        model.field.paint.layers[0].weight[:, :3] = model.field.paint.layers[0].weight[:, -3:] = 0
    quarter = torch.tensor([[0.0, -1, 0], [1, 0, 0], [0, 0, 1]])
    before = model.losses(batch, 2)
    for turn in (quarter, torch.diag(torch.tensor([-1.0, 1, 1])), torch.eye(3)):
        after = model.losses(moved(batch, turn.numpy(), 1.0), 2)
        for name, value in before[0].items():
            torch.testing.assert_close(after[0][name], value, atol=2e-4, rtol=2e-3)
        torch.testing.assert_close(after[1], before[1], atol=2e-4, rtol=2e-3)
    shifted = batch | {name: batch[name] + torch.tensor([3.0, -2, 0]) for name in ("xyz", "place")}
    for name, value in model.losses(shifted, 2)[0].items():
        torch.testing.assert_close(value, before[0][name], atol=2e-4, rtol=2e-3)


def test_a_fifth_of_the_points_is_seen_and_other_ones_in_each_step() -> None:
    model = method(keep=0.2)
    offsets = torch.tensor([0, 2000, 2000, 5000])
    kept = [model.kept_points(offsets, 5000, torch.tensor(seeds)) for seeds in ([1, 2, 3], [1, 2, 3], [4, 2, 3])]
    assert kept[0].float().mean() == pytest.approx(0.2, abs=0.02)
    assert torch.equal(kept[0], kept[1])
    assert not torch.equal(kept[0][:2000], kept[2][:2000])
    assert torch.equal(kept[0][2000:], kept[2][2000:])
    seen: list[int] = []
    model.backbone.register_forward_pre_hook(lambda module, given: seen.append(len(given[0])))
    batch = posed_scenes(4, 0)
    for step in range(8):
        model.losses(batch, step)
    assert len(set(seen)) > 1
    assert max(seen) < len(batch["xyz"])


def test_classes_of_points_and_pixels_change_nothing() -> None:
    model, batch = method(), posed_scenes(3, 0)
    batch["classes"], batch["pixel_classes"] = torch.full((len(batch["xyz"]),), -1), torch.zeros(3, 2, 3, 4).long()
    before = model.losses(batch, 0)[0]
    batch["classes"], batch["label"] = batch["classes"] + 7, batch["label"] + 3
    assert all(torch.equal(value, before[name]) for name, value in model.losses(batch, 0)[0].items())


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_scenes_of_one_point_none_and_without_depth_train(precision: str, tmp_path: Path) -> None:
    batches = []
    for seed, (counts, depth) in enumerate((((1,), 1.0), ((0,), 1.0), ((3, 0, 1), 0.0), ((2, 30), 1.0))):
        batch = posed_scenes(len(counts), seed)
        points = sum(counts)
        offsets = torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()])
        xyz = torch.zeros(points, 3) if points < 30 else torch.randn(points, 3)
        batch |= {"offsets": offsets, "xyz": xyz, "colour": torch.rand(points, 3), "depth": depth * batch["depth"]}
        batches.append(batch)
    stays_finite(method(), batches, tmp_path, precision=precision)


def test_a_run_learns_and_resumes_bit_for_bit(tmp_path: Path) -> None:
    batches = [posed_scenes(4, 0)] * 40
    losses = fit(method(keep=1.0, rays=32, optimizer=partial(torch.optim.AdamW, lr=1e-2)), batches, tmp_path)
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    resumes(method, batches[:3], tmp_path)


def test_it_validates_without_gradients(tmp_path: Path) -> None:
    model, batch = method(), posed_scenes(4, 0)
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    (figures,) = trainer.validate(model, Served([batch]), verbose=False)
    model.eval()
    losses, error = model.losses(batch, 0)
    assert figures["val/depth_error"] == pytest.approx(float(error), rel=1e-5)
    assert figures["val/slope_loss"] == pytest.approx(float(losses["slope"]), rel=1e-5)


def test_what_does_not_fit_is_named() -> None:
    for setting, value in {"grid": (2, 2), "keep": 0.0, "rays": 0, "pieces": 1, "finer": -1, "truncation": 1.0,
                           "free": -1.0, "seed": -1}.items():  # fmt: skip
        with pytest.raises(UserError, match=setting):
            method(**{setting: value})
    backbone = VoxelPoints(SparseUNet(6, 4, (4, 6), (1, 1)), size=0.5)
    for volume in (GridUNet(5, 7, (4,)), GridUNet(6, 8, (4,))):
        with pytest.raises(UserError, match=r"volume\.in_chans"):
            PonderV2(backbone, volume, SignedField(4, 3, hidden=5), optimizer=torch.optim.SGD)
    batch = posed_scenes(3, 0)
    for name, wrong in (("pictures", None), ("depth", batch["depth"][:, :1]), ("rotation", batch["rotation"][:2])):
        with pytest.raises(UserError, match="pictures"):
            method().losses(batch | {name: wrong}, 0)
    with pytest.raises(UserError, match="widths"):
        GridUNet(1, 1, ())
