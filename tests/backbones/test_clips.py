"""R(2+1)D is torchvision's, at any width."""

import pytest
import torch
from torch import nn
from torchvision.models.video import r2plus1d_18

from lightspan.backbones.clips import R2Plus1D
from lightspan.core.errors import UserError


def test_it_is_torchvisions_network_with_its_names() -> None:
    oracle = r2plus1d_18()
    oracle.fc = nn.Identity()
    network = R2Plus1D()
    assert network.num_features == 512
    network.load_state_dict(oracle.state_dict())
    clip = torch.randn(2, 3, 4, 24, 20, generator=torch.Generator().manual_seed(0))
    for module in (oracle.train(), network.train()):
        module(clip)  # statistics of norms move alike
    with torch.no_grad():
        torch.testing.assert_close(network.eval()(clip), oracle.eval()(clip))
    assert network.state_dict().keys() == oracle.state_dict().keys()


def test_weights_start_as_torchvisions_do() -> None:
    torch.manual_seed(0)
    network = R2Plus1D(8)
    for name, weight in network.named_parameters():
        if weight.ndim == 5:
            outputs = weight.shape[0] * weight[0, 0].numel()
            assert float(weight.std()) == pytest.approx((2 / outputs) ** 0.5, rel=0.25), name
        else:
            assert torch.equal(weight, torch.full_like(weight, float(name.endswith("weight"))))


def test_any_width_depth_and_clip() -> None:
    for width, depths, clip in ((4, (1, 1), (1, 1, 1, 1)), (6, (1, 2, 1), (2, 1, 5, 9)), (1, (1,), (3, 3, 7, 8))):
        batch, frames, height, side = clip
        network = R2Plus1D(width, depths, in_chans=2).eval()
        made = network(torch.randn(batch, 2, frames, height, side))
        assert made.shape == (batch, network.num_features) == (batch, width * 2 ** (len(depths) - 1))
        assert len(network.feature_modules) == len(depths)
    for wrong in ({"width": 0}, {"depths": ()}, {"depths": (1, 0)}, {"in_chans": 0}):
        with pytest.raises(UserError, match=next(iter(wrong))):
            R2Plus1D(**wrong)  # type: ignore[arg-type]
