"""The sparse U-Net: its size, what it depends on, and clouds of few points or none."""

import pytest
import torch

from lightspan.backbones.sparse_unet import SparseUNet
from lightspan.backbones.voxel_points import VoxelPoints
from lightspan.core.errors import UserError
from lightspan.nn.voxels.convolution import around


def small(**settings) -> VoxelPoints:
    torch.manual_seed(0)
    return VoxelPoints(SparseUNet(6, 4, (4, 6, 6, 5), (1, 1, 1, 1)), size=0.25, **settings)


def cloud(points: int = 60, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(points, 3, generator=generator) * 2 - 1, torch.rand(points, 3, generator=generator)


def test_the_published_network_has_its_39_million_weights() -> None:
    with torch.device("meta"):
        net = SparseUNet(6)
    assert sum(p.numel() for p in net.parameters()) == pytest.approx(39.16e6, rel=1e-3)


def test_clouds_say_nothing_of_one_another_and_the_order_of_points_nothing() -> None:
    net = small().eval()
    (a, colour_a), (b, colour_b) = cloud(50), cloud(70, 1)
    both = net(torch.cat([a, b]), torch.tensor([0, 50, 120]), torch.cat([colour_a, colour_b]))
    assert both.shape == (120, 5)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(2))
    alone = net(a[order], torch.tensor([0, 50]), colour_a[order])
    torch.testing.assert_close(alone, both[order], rtol=1e-4, atol=1e-5)


def test_moving_a_cloud_by_whole_coarsest_voxels_changes_nothing() -> None:
    net, (xyz, colour) = small().eval(), cloud()
    xyz = (xyz * 64).round() / 64  # so that no sum is rounded
    offsets = torch.tensor([0, 60])
    moved = xyz + 0.25 * 4 * torch.tensor([2, -3, 1])
    torch.testing.assert_close(net(moved, offsets, colour), net(xyz, offsets, colour), rtol=1e-4, atol=1e-5)


def test_points_of_a_voxel_have_its_features() -> None:
    net = small().eval()
    xyz = torch.tensor([[0.01, 0.01, 0.01], [0.2, 0.2, 0.2], [0.6, 0.6, 0.6]])
    given = net(xyz, torch.tensor([0, 3]), torch.rand(3, 3))
    assert torch.equal(given[0], given[1])
    assert not torch.equal(given[0], given[2])


@pytest.mark.parametrize("momentum", [0.01, 0.5])
def test_running_statistics_are_moved_by_the_momentum(momentum: float) -> None:
    net = SparseUNet(6, 4, (4, 4), (1, 1), momentum=momentum)
    points = VoxelPoints(net, size=0.25).train()
    points(*cloud()[:1], torch.tensor([0, 60]), cloud()[1])
    first = points.level(*cloud()[:1], torch.tensor([0, 60]), cloud()[1])[0]
    given = net.stem.conv(first.inputs, around(first.voxels, 5))
    torch.testing.assert_close(net.stem.norm.running_mean, momentum * given.detach().mean(dim=0))


def test_training_goes_on_without_points_and_with_a_single_one() -> None:
    for points in (0, 1, 2):
        net = small().train()
        given = net(*cloud(points)[:1], torch.tensor([0, points]), cloud(points)[1])
        given.sum().backward()
        assert given.isfinite().all()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
        assert all(buffer.isfinite().all() for buffer in net.buffers())


def test_settings_that_do_not_fit_are_refused() -> None:
    for make, said in (
        (lambda: SparseUNet(widths=(4, 4, 4), depths=(1, 1, 1)), "as many"),
        (lambda: SparseUNet(widths=(4, 4), depths=(1,)), "depths"),
        (lambda: SparseUNet(widths=(4, 4), depths=(1, 0)), "way up"),
        (lambda: SparseUNet(widths=(4, 0), depths=(1, 1)), "widths"),
        (lambda: SparseUNet(widths=(4, 4), depths=(1, 1), momentum=0.0), "momentum"),
        (lambda: small(fields=())(*cloud()[:1], torch.tensor([0, 60])), "in_chans=6"),
        (lambda: VoxelPoints(torch.nn.Identity()), "num_features"),
        (lambda: VoxelPoints(SparseUNet(), size=0.0), "size"),
    ):
        with pytest.raises(UserError, match=said):
            make()
