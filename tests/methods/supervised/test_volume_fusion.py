from typing import Any

import pytest
import torch
from torch import nn

from lightspan.backbones.dense import UNet
from lightspan.core.errors import UserError
from lightspan.methods.supervised.volume_fusion import VolumeFusion, enlarged
from lightspan.nn.masking.coefficient_maps import CoefficientMaps

MAPS = CoefficientMaps(levels=4, edges=(2, 4))


def method(**settings: Any) -> VolumeFusion:
    torch.manual_seed(0)
    return VolumeFusion(UNet(1, width=4, levels=2, axes=3), MAPS, optimizer=torch.optim.SGD, **settings)


def crops(rows: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    front, back = torch.rand(2, rows, 1, 8, 8, 4, generator=torch.Generator().manual_seed(1))
    return front, back, torch.arange(rows)


def test_a_mixture_is_one_crop_where_its_class_is_the_last_the_other_where_it_is_0_and_between_elsewhere() -> None:
    front, back, index = crops()
    fused, label = method(inversion=0.0).fused(front, back, index)
    assert torch.equal(label, torch.from_numpy(MAPS.draw((8, 8, 4), 0, index.tolist())))
    label = label[:, None]
    assert torch.equal(fused[label == 0], back[label == 0])
    assert torch.equal(fused[label == 4], front[label == 4])
    assert ((fused >= torch.minimum(front, back) - 1e-6) & (fused <= torch.maximum(front, back) + 1e-6)).all()
    torch.testing.assert_close(fused, back + label / 4 * (front - back))
    torch.testing.assert_close(method(inversion=0.0).fused(back, back, index)[0], back)


def test_inverting_both_crops_inverts_the_mixture_alone() -> None:
    front, back, index = crops(40)
    (plain, label), (inverted, same) = (method(inversion=share).fused(front, back, index) for share in (0.0, 1.0))
    assert torch.equal(label, same)
    torch.testing.assert_close(inverted, 1 - plain)
    torch.testing.assert_close(inverted, method(inversion=0.0).fused(1 - front, 1 - back, index)[0])
    some = method(inversion=0.25).fused(front, back, index)[0]
    share = (some != plain).flatten(1).any(dim=1).float().mean()
    assert 0 < share < 0.6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_constant_and_equal_crops_have_a_finite_loss(dtype: torch.dtype) -> None:
    built = method(supervised_scales=2).to(dtype)
    built.log_training = lambda *_, **__: None  # type: ignore[method-assign]
    for volume in (torch.zeros(1, 1, 8, 8, 4, dtype=dtype), torch.full((1, 1, 8, 8, 4), 1e4, dtype=dtype)):
        loss = built.training_step({"views": [volume, volume], "index": torch.arange(1)}, 0)
        loss.backward()
        assert loss.isfinite()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in built.parameters())


def test_scales_are_compared_at_the_size_of_the_sample() -> None:
    maps = torch.rand(2, 3, 4, 4, 2)
    assert enlarged(maps, maps.shape[2:]) is maps
    torch.testing.assert_close(enlarged(maps, (8, 8, 4)).mean(), maps.mean(), atol=0.05, rtol=0)
    assert enlarged(maps[..., 0], (8, 8)).shape == (2, 3, 8, 8)


def test_features_are_means_of_the_coarsest_maps() -> None:
    built, (front, _, index) = method(), crops()
    maps = built.backbone.scales(front)  # type: ignore[operator]
    assert [each.shape[1] for each in maps] == [4, 8]
    torch.testing.assert_close(built.features({"volume": front, "index": index}), maps[-1].mean(dim=(2, 3, 4)))


def test_what_cannot_be_trained_is_refused_by_name() -> None:
    with pytest.raises(UserError, match="scales"):
        VolumeFusion(nn.Conv3d(1, 4, 1), optimizer=torch.optim.SGD)
    with pytest.raises(UserError, match="supervised_scales"):
        method(supervised_scales=3)
    with pytest.raises(UserError, match="inversion"):
        method(inversion=1.5)
