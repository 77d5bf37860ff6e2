"""PointPillars: what moves with the points, what does not matter, clouds of any size, and sizes that do not fit."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightspan.backbones.pillars import Pillars
from lightspan.core.errors import UserError


def encoder(**settings: Any) -> Pillars:
    torch.manual_seed(0)
    given: dict[str, Any] = {"reach": 8, "cell": 1, "stem": 6, "widths": [5, 4], "depths": [1, 1], "strides": [1, 2]}
    model = Pillars(**given | {"up": 3} | settings).double().eval()
    for name, buffer in model.named_buffers():
        if name.endswith(("mean", "var")):
            buffer.copy_(0.5 + torch.rand(buffer.shape))
    return model


def cloud(points: int = 60, within: float = 2.0) -> Tensor:
    return within * (2 * torch.rand(points, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64) - 1)


def cut(*counts: int) -> Tensor:
    return torch.tensor([0, *counts]).cumsum(0)


def test_a_pillar_has_the_largest_numbers_of_its_points() -> None:
    model, xyz = encoder(), cloud()
    found = model.pillars(xyz, cut(60))[0]
    cells = (xyz[:, :2] + 8).floor().long()
    wanted = torch.zeros_like(found)
    for x, y in {(int(x), int(y)) for x, y in cells}:
        own = xyz[(cells == torch.tensor([x, y])).all(dim=1)]
        middle = torch.tensor([x - 7.5, y - 7.5])
        wanted[:, y, x] = model.point(torch.cat([own[:, :2] - middle, own[:, 2:], own - own.mean(0)], 1)).amax(dim=0)
    torch.testing.assert_close(found, wanted)
    assert (found[:, 0] == 0).all()


def test_a_cloud_moved_by_whole_cells_has_a_moved_field() -> None:
    model = encoder(reach=16)
    for layer in [*model.modules()]:  # else zeros around a field would be told from empty pillars
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.zeros_(layer.bias)
            layer.running_mean.zero_()  # type: ignore[union-attr]
    xyz, step = cloud(within=1.5), torch.tensor([2.0, -2.0, 0], dtype=torch.float64)
    field, moved = model(xyz, cut(60)), model(xyz + step, cut(60))
    torch.testing.assert_close(field.roll((-2, 2), (2, 3)), moved)
    assert field.abs().sum() > 0
    torch.testing.assert_close(model.pooled(field, xyz, cut(60)), model.pooled(moved, xyz + step, cut(60)))


def test_clouds_do_not_see_one_another_nor_what_lies_outside_nor_the_order_of_points() -> None:
    model, xyz = encoder(), cloud()
    alone = torch.cat([model(xyz[:20], cut(20)), model(xyz[:0], cut(0)), model(xyz[20:], cut(40))])
    torch.testing.assert_close(model(xyz, cut(20, 0, 40)), alone)
    torch.testing.assert_close(model(xyz.flip(0), cut(40, 0, 20)).flip(0), alone)
    far = torch.tensor([[9.0, 0, 0], [0, -8.5, 1], [float("nan"), 0, 0], [0, 0, float("inf")]], dtype=torch.float64)
    torch.testing.assert_close(model(torch.cat([xyz, far]), cut(20, 0, 44)), alone)


def test_coarser_blocks_end_on_the_cells_of_the_first() -> None:
    model = encoder(strides=[2, 2])
    assert model(cloud(), cut(60)).shape == (1, 6, 8, 8)
    assert model.num_features == 6


def test_a_single_point_and_no_cloud_train() -> None:
    model = encoder().train()
    loss = model(cloud(1), cut(1)).square().sum() + encoder().float()(torch.zeros(0, 3), cut()).sum()
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert all(buffer.isfinite().all() for buffer in model.buffers())


@pytest.mark.parametrize(
    ("name", "value"),
    [("reach", 0), ("cell", 3), ("cell", 16), ("strides", [1]), ("strides", [1, 0]), ("up", 0), ("depths", [1, -1])],
)
def test_sizes_that_do_not_fit_are_refused(name: str, value: Any) -> None:
    with pytest.raises(UserError, match=name):
        encoder(**{name: value})
