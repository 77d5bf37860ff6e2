"""Convolutions of voxels are the dense ones at the voxels that are there."""

import pytest
import torch
from torch.autograd import gradcheck
from torch.nn import functional as F

from lightspan.core.errors import UserError
from lightspan.nn.voxels.convolution import VoxelConv, around, inside
from lightspan.nn.voxels.grid import coarser, voxels_at

SIDE = 6


def scene(channels: int = 3, dtype: torch.dtype = torch.float64):
    """Voxels of two clouds in a cube, their features, and the same as a dense grid [B C SIDE SIDE SIDE]."""
    generator = torch.Generator().manual_seed(1)
    place = torch.randint(0, SIDE, (90, 3), generator=generator)
    voxels, _ = voxels_at(place, torch.tensor([0, 50, 90]))
    x = torch.randn(len(voxels.key_V), channels, generator=generator, dtype=dtype)
    return voxels, x, dense(voxels, x, SIDE)


def at(voxels) -> tuple[torch.Tensor, ...]:
    return voxels.cloud_V, *voxels.place_V3.unbind(1)


def dense(voxels, x: torch.Tensor, side: int) -> torch.Tensor:
    cloud, *place = at(voxels)
    return x.new_zeros(2, side, side, side, x.shape[1]).index_put((cloud, *place), x).movedim(-1, 1)


def read(maps: torch.Tensor, voxels) -> torch.Tensor:
    return maps.movedim(1, -1)[at(voxels)]


@pytest.mark.parametrize("kernel", [1, 3, 5])
def test_around_a_voxel_it_is_the_dense_one_with_its_gradients(kernel: int) -> None:
    voxels, x, _ = scene()
    conv = VoxelConv(3, 4, kernel, bias=True).double()
    own, whole = x.clone().requires_grad_(), x.clone().requires_grad_()
    given = conv(own, around(voxels, kernel))
    expected = read(F.conv3d(dense(voxels, whole, SIDE), conv.weight, conv.bias, padding=kernel // 2), voxels)
    torch.testing.assert_close(given, expected, rtol=0, atol=1e-12)
    weights = torch.randn_like(given)
    for mine, theirs in zip(
        torch.autograd.grad((given * weights).sum(), (own, conv.weight, conv.bias)),
        torch.autograd.grad((expected * weights).sum(), (whole, conv.weight, conv.bias)),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-11)


def test_inside_a_coarser_voxel_and_back_it_is_the_dense_one() -> None:
    voxels, x, grid = scene()
    coarse, parent = coarser(voxels, 2)
    pairs, conv = inside(voxels, parent, len(coarse.key_V), 2), VoxelConv(3, 4, 2).double()
    down = conv(x, pairs)
    torch.testing.assert_close(down, read(F.conv3d(grid, conv.weight, stride=2), coarse), rtol=0, atol=1e-12)
    back = VoxelConv(4, 3, 2).double()
    up = F.conv_transpose3d(dense(coarse, down, SIDE // 2), back.weight.transpose(0, 1), stride=2)
    torch.testing.assert_close(back(down, pairs.turned()), read(up, voxels), rtol=0, atol=1e-12)


def test_gradients_are_those_of_differences() -> None:
    voxels, x, _ = scene(2)
    conv = VoxelConv(2, 2, 3).double()
    few, pairs = x.clone().requires_grad_(), around(voxels, 3)

    def given(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(conv, {"weight": weight}, (x, pairs))

    assert gradcheck(given, (few, conv.weight), fast_mode=True)


def test_half_types_are_summed_in_float32() -> None:
    voxels, x, _ = scene(dtype=torch.float32)
    conv, pairs = VoxelConv(3, 4, 3), around(voxels, 3)
    with torch.autocast("cpu", torch.bfloat16):
        half = conv(x, pairs)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), conv(x, pairs), rtol=0.02, atol=0.02)
    assert conv.bfloat16()(x.bfloat16(), pairs).dtype == torch.bfloat16


def test_no_voxels_and_a_single_one_are_ordinary() -> None:
    empty, _ = voxels_at(torch.zeros(0, 3, dtype=torch.int64), torch.zeros(3, dtype=torch.int64))
    conv = VoxelConv(3, 4, 3)
    conv(torch.zeros(0, 3), around(empty, 3)).sum().backward()
    assert not conv.weight.grad.any()
    one, _ = voxels_at(torch.tensor([[5, -7, 2]]), torch.tensor([0, 1]))
    x = torch.randn(1, 3)
    torch.testing.assert_close(conv(x, around(one, 3)), x @ conv.weight[:, :, 1, 1, 1].T)


def test_kernels_without_a_middle_are_refused() -> None:
    voxels, _, _ = scene()
    for kernel in (2, 0, 33):
        with pytest.raises(UserError, match=f"kernel={kernel}"):
            around(voxels, kernel)
