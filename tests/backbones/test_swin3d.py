"""Swin3D: its size, what it depends on and what not, and clouds of few points or none."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from scipy.spatial import cKDTree
from timm.layers import DropPath
from torch import Tensor

from lightspan.backbones.swin3d import ContextTables, NearestPooling, Swin3D, Swin3DEncoder, VoxelBlock, VoxelStage
from lightspan.backbones.voxel_points import VoxelPoints
from lightspan.backbones.weights import with_weights
from lightspan.core.errors import UserError
from lightspan.nn.voxels.levels import Level, coarser_level, level_of
from lightspan.nn.voxels.windows import windows_of

SIZE = 0.25
SMALL: dict[str, Any] = {
    "widths": (4, 6, 8), "depths": (2, 2, 1), "heads": (2, 2, 2), "windows": (2, 2, 2), "strides": (2, 2),
    "drop_path": 0.0, "neighbours": 4,
}  # fmt: skip


def small(blocks_up: int = 0, fields: tuple[Any, ...] = ("colour",), **settings: Any) -> VoxelPoints:
    torch.manual_seed(0)
    encoder = Swin3DEncoder(**SMALL | {"signals": len(fields)} | settings)
    for part in encoder.modules():  # as far from zero as trained ones
        if isinstance(part, ContextTables):
            for table in part:
                torch.nn.init.normal_(table)
    return VoxelPoints(Swin3D(encoder, blocks_up), SIZE, fields)


def cloud(points: int = 60, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Places in steps of a power of two, so that no sum is rounded, and colours."""
    generator = torch.Generator().manual_seed(seed)
    xyz = torch.rand(points, 3, generator=generator) * 2 - 1
    return (xyz * 64).round() / 64, torch.rand(points, 3, generator=generator)


@pytest.mark.parametrize(("widths", "heads", "millions"), [
    ((48, 96, 192, 384, 384), (6, 6, 12, 24, 24), 23.57),
    ((80, 160, 320, 640, 640), (10, 10, 20, 40, 40), 60.75),
])  # fmt: skip
def test_the_published_networks_have_their_sizes(widths: Any, heads: Any, millions: float) -> None:
    with torch.device("meta"):
        net = Swin3D(Swin3DEncoder(widths=widths, heads=heads))
    assert sum(p.numel() for p in net.parameters()) / 1e6 == pytest.approx(millions, abs=0.005)


def test_clouds_say_nothing_of_one_another_and_the_order_of_points_nothing() -> None:
    net = small(1).eval()
    (a, colour_a), (b, colour_b) = cloud(50), cloud(70, 1)
    both = net(torch.cat([a, b]), torch.tensor([0, 50, 120]), torch.cat([colour_a, colour_b]))
    assert both.shape == (120, 4)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(net(a[order], torch.tensor([0, 50]), colour_a[order]), both[order], rtol=1e-4, atol=1e-5)


def test_moving_a_cloud_by_whole_coarsest_windows_alone_changes_nothing() -> None:
    net, (xyz, colour), offsets = small(1).eval(), cloud(), torch.tensor([0, 60])
    given, whole = net(xyz, offsets, colour), SIZE * 2 * 4  # two voxels of the third stage
    moved = xyz + whole * torch.tensor([2, -3, 1])
    torch.testing.assert_close(net(moved, offsets, colour), given, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(net(xyz + SIZE, offsets, colour), given, rtol=1e-2, atol=1e-3)


def test_adding_to_all_colours_changes_what_enters_and_not_the_encoding() -> None:
    net, (xyz, colour), offsets = small().eval(), cloud(), torch.tensor([0, 60])
    colour = (colour * 32).round() / 64
    with torch.no_grad():
        net.network.encoder.stem.weight[:, 3:] = 0
    torch.testing.assert_close(net(xyz, offsets, colour + 0.5), net(xyz, offsets, colour))
    blind = small(encoded=0).eval()
    with torch.no_grad():
        blind.network.encoder.stem.weight[:, 3:] = 0
    assert torch.equal(blind(xyz, offsets, colour.flip(0)), blind(xyz, offsets, colour))
    assert not torch.allclose(net(xyz, offsets, colour.flip(0)), net(xyz, offsets, colour))


def test_training_goes_on_without_points_and_with_few() -> None:
    for points in (0, 1, 2, 5):
        net = small(1, ("colour", "normal")).train()
        xyz, colour = cloud(points)
        given = net(xyz, torch.tensor([0, 0, points]), colour, colour)
        given.sum().backward()
        assert given.isfinite().all()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
        assert all(buffer.isfinite().all() for buffer in net.buffers())


def test_equal_points_and_half_types_are_finite() -> None:
    net, offsets = small(), torch.tensor([0, 40])
    assert net(torch.full((40, 3), 0.3), offsets, torch.full((40, 3), 0.5)).isfinite().all()
    xyz, colour = cloud(40)
    with torch.autocast("cpu", torch.bfloat16):
        near = net.eval()(xyz, offsets, colour)
    torch.testing.assert_close(near.float(), net(xyz, offsets, colour), rtol=0.1, atol=0.1)
    half = net.bfloat16()(xyz.bfloat16(), offsets, colour.bfloat16())
    assert half.dtype == torch.bfloat16
    assert half.isfinite().all()


def voxel_row(*places: int) -> Level:
    """Voxels along x, each with the point in its middle."""
    xyz = torch.tensor([[place + 0.5, 0.5, 0.5] for place in places])
    return level_of(xyz, torch.tensor([0, len(places)]), 1.0)[0]


@pytest.mark.parametrize(("depth", "reached"), [(1, {0, 1}), (2, {0, 1, 2, 3})])
def test_every_second_block_has_its_windows_moved_by_half_a_side(depth: int, reached: set[int]) -> None:
    torch.manual_seed(0)
    stage, level = VoxelStage(4, 2, 4, 2, 0, [torch.nn.Identity()] * depth), voxel_row(1, 3, 4, 5, 8)
    x = torch.randn(5, 4, requires_grad=True)
    (gradient,) = torch.autograd.grad(stage(x, level)[1].square().sum(), x)
    assert {*gradient.any(dim=1).nonzero()[:, 0].tolist()} == reached


def test_a_block_without_its_branches_is_the_identity() -> None:
    level, x = voxel_row(0, 1, 2), torch.randn(3, 4)
    block = VoxelBlock(4, 2, 4, 2, 0, DropPath(1 - 1e-9))
    assert torch.equal(block.train()(x, level, windows_of(level.voxels, 4)), x)
    assert not torch.equal(block.eval()(x, level, windows_of(level.voxels, 4)), x)


def test_coarser_voxels_have_the_largest_of_the_voxels_nearest_to_their_point() -> None:
    xyz, _ = cloud(200)
    fine, _ = level_of(xyz, torch.tensor([0, 200]), 0.2)
    coarse, _ = coarser_level(fine, 3)
    pool, x = NearestPooling(4, 5, 6), torch.randn(len(fine.xyz_V3), 4)
    near = cKDTree(fine.xyz_V3.numpy()).query(3 * coarse.xyz_V3.numpy(), k=6)[1]
    torch.testing.assert_close(pool(x, fine, coarse, 3), pool.linear(pool.norm(x))[near].amax(dim=1))


def test_what_enters_is_where_in_its_voxel_a_point_is() -> None:
    xyz = torch.tensor([[0.5, 1.25, -2.0]])
    level, _ = level_of(xyz, torch.tensor([0, 1]), 0.5, [torch.full((1, 3), 0.3)])
    torch.testing.assert_close(level.inputs, torch.tensor([[-1.0, 0.0, -1.0, 0.3, 0.3, 0.3]]))


def test_an_encoder_takes_the_weights_of_another_run_alone(tmp_path: Path) -> None:
    trained = small(1)
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.add_(1)
    save_file({f"backbone.{name}": x for name, x in trained.state_dict().items()}, tmp_path / "model.safetensors")
    loaded = with_weights(Swin3DEncoder(**SMALL), str(tmp_path / "model.safetensors"), "backbone.network.encoder.")
    for name, tensor in trained.network.encoder.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
    assert not torch.equal(Swin3D(loaded, 1).ups[0].fine[1].weight, trained.network.ups[0].fine[1].weight)


def test_settings_that_do_not_fit_are_refused() -> None:
    offsets = torch.tensor([0, 60])
    for make, said in (
        (lambda: Swin3DEncoder(**SMALL | {"heads": (2, 2)}), "heads"),
        (lambda: Swin3DEncoder(**SMALL | {"strides": (2, 2, 2)}), "strides"),
        (lambda: Swin3DEncoder(**SMALL | {"heads": (2, 4, 2)}), "heads=4"),
        (lambda: Swin3DEncoder(**SMALL | {"windows": (2, 0, 2)}), "windows"),
        (lambda: Swin3DEncoder(**SMALL | {"windows": (2, 32, 2)}), "windows"),
        (lambda: Swin3DEncoder(**SMALL | {"strides": (1, 2)}), "strides"),
        (lambda: Swin3DEncoder(**SMALL, encoded=2), "encoded=2"),
        (lambda: Swin3DEncoder(**SMALL | {"drop_path": 1.0}), "drop_path"),
        (lambda: Swin3D(Swin3DEncoder(**SMALL), -1), "blocks_up"),
        (lambda: Swin3D(torch.nn.Identity()), "encoder=Identity"),
        (lambda: small(signals=2)(*cloud()[:1], offsets, cloud()[1]), "signals=2"),
    ):
        with pytest.raises(UserError, match=said):
            make()
