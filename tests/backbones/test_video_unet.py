"""The 2+1-D U-Net: at the start an image U-Net of each frame, then one that sees time; hints, contexts, odd sides."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightspan.backbones.video_unet import SpaceTimeLayer, VideoUNet
from lightspan.core.errors import UserError

LEVELS = torch.tensor([-0.7, 0.9])


def network(**settings: Any) -> VideoUNet:
    """With a last layer that is not zero, or everything would be."""
    torch.manual_seed(0)
    net = VideoUNet(**({"in_chans": 4, "out_chans": 3, "widths": (8, 12)} | settings))
    nn.init.normal_(net.last.weight, std=0.1)
    return net.eval()


def clip(*sides: int, rows: int = 2, seed: int = 0) -> Tensor:
    return torch.randn(rows, 4, *sides, generator=torch.Generator().manual_seed(seed))


class Same(nn.Module):
    def forward(self, x: Tensor, *_: Any) -> Tensor:
        return x


def without_time(net: VideoUNet) -> VideoUNet:
    for layer in net.modules():
        if isinstance(layer, SpaceTimeLayer):
            layer.time = Same()  # type: ignore[assignment]
            if layer.time_attention is not None:
                layer.time_attention = Same()  # type: ignore[assignment]
    return net


@pytest.mark.parametrize("settings", [{}, {"attend_from": 0, "depth": 2}, {"widths": (6,)}])
def test_at_the_start_each_frame_is_what_the_network_makes_of_it_as_a_picture(settings: dict[str, Any]) -> None:
    x = clip(3, 6, 5)
    whole = network(**settings)(x, LEVELS)
    assert torch.equal(whole, without_time(network(**settings))(x, LEVELS))
    alone = torch.cat([network(**settings)(x[:, :, t : t + 1], LEVELS) for t in range(3)], dim=2)
    torch.testing.assert_close(whole, alone, rtol=0, atol=1e-5)
    assert whole.abs().max() > 0.01


def test_layers_along_time_see_other_frames_once_they_are_not_zero() -> None:
    for part in ("time", "time_attention"):
        net, x = network(), clip(5, 6, 6)
        for layer in net.modules():
            if isinstance(layer, SpaceTimeLayer) and getattr(layer, part) is not None:
                last = layer.time.conv if part == "time" else layer.time_attention.attention.out  # type: ignore[union-attr]
                nn.init.normal_(last.weight, std=0.1)
        changed = x.clone()
        changed[:, :, 4] += 1
        assert (net(changed, LEVELS) - net(x, LEVELS))[:, :, 0].abs().max() > 1e-6, part


def test_hints_are_added_to_the_first_features_and_nothing_is_nothing() -> None:
    net, x = network(context=5), clip(2, 6, 6)
    plain = net(x, LEVELS)
    assert torch.equal(net(x, LEVELS, torch.zeros(2, 8, 2, 6, 6), torch.zeros(2, 5)), plain)
    hint = torch.randn(2, 8, 1, 1, 1, generator=torch.Generator().manual_seed(1))
    moved = net(x, LEVELS, hint.expand(2, 8, 2, 6, 6))
    assert (moved - plain).abs().max() > 1e-3
    net.first.bias.data += hint[0, :, 0, 0, 0]  # type: ignore[union-attr]
    torch.testing.assert_close(net(x, LEVELS)[:1], moved[:1], rtol=0, atol=1e-5)
    assert (net(x, LEVELS, None, torch.ones(2, 5)) - net(x, LEVELS)).abs().max() > 1e-3


@pytest.mark.parametrize("sides", [(1, 1, 1), (2, 7, 5), (3, 4, 9)])
def test_any_sides_are_kept_and_clips_do_not_see_one_another(sides: tuple[int, int, int]) -> None:
    net, x = network(widths=(4, 6, 8)), clip(*sides)
    whole = net(x, LEVELS)
    assert whole.shape == (2, 3, *sides)
    torch.testing.assert_close(net(x[1:], LEVELS[1:]), whole[1:], rtol=0, atol=1e-5)
    assert net(x[:0], LEVELS[:0]).shape == (0, 3, *sides)


def test_every_weight_has_a_gradient_once_nothing_is_zero() -> None:
    net = network(context=2).train()
    for weight in net.parameters():
        nn.init.normal_(weight, std=0.2)
    net(clip(3, 4, 4), LEVELS, torch.ones(2, 8, 3, 4, 4), torch.ones(2, 2)).square().sum().backward()
    assert [name for name, weight in net.named_parameters() if weight.grad is None or not weight.grad.any()] == []


def test_half_precision_is_finite() -> None:
    assert network().bfloat16()(clip(2, 5, 5).bfloat16(), LEVELS).isfinite().all()


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("widths", {"widths": (7,)}),
        ("widths", {"widths": ()}),
        ("depth", {"depth": 0}),
        ("attend_from", {"attend_from": 2}),
    ],
)
def test_sizes_that_do_not_fit_are_refused(name: str, settings: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=name):
        network(**settings)
