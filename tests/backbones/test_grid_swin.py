"""Swin transformers of any number of axes: torchvision's on images, plain attention with a mask everywhere."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.models.swin_transformer import SwinTransformer

from lightspan.backbones.grid_swin import GridSwin, WindowAttention
from lightspan.core.errors import UserError
from lightspan.nn.sequences.positions import sincos


def torchvision_weights(network: SwinTransformer) -> dict[str, Tensor]:
    """Under the names of a `GridSwin`."""
    found = {}
    for name, value in network.state_dict().items():
        part, *rest = name.replace("relative_position_bias_table", "relative").split(".")
        if part == "norm":
            found[name] = value
        if part != "features" or rest[-1] == "relative_position_index":
            continue
        number = int(rest[0])
        if number == 0:
            place = {"0": "patch_embed.proj", "2": "embed_norm"}[rest[1]]
        elif number % 2:  # blocks, which stand behind the merging of their stage
            stage = number // 2
            place = f"stages.{stage}.{int(rest[1]) + (stage > 0)}"
        else:
            place = f"stages.{number // 2}.0"
        found[".".join([place, *rest[1 + (number % 2 or number == 0) :]])] = value
    return found


def test_on_images_it_is_torchvisions() -> None:
    torch.manual_seed(0)
    theirs = SwinTransformer([2, 2], 8, [2, 2], [2, 4], [4, 4], stochastic_depth_prob=0.0, num_classes=3).eval()
    ours = GridSwin((2, 2), (4, 4), 3, 8, (2, 2), (2, 4)).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    ours.load_state_dict(torchvision_weights(theirs))
    image = torch.randn(2, 3, 16, 32)
    wanted = theirs.norm(theirs.features(image))
    torch.testing.assert_close(ours.maps(image)[-1].movedim(1, -1), wanted, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(ours(image), wanted.mean(dim=(1, 2)), atol=1e-4, rtol=1e-4)


def test_a_volume_of_one_slice_is_an_image() -> None:
    torch.manual_seed(0)
    flat, deep = GridSwin((2, 2), (4, 4), 1, 8, (2,), (2,)), GridSwin((1, 2, 2), (1, 4, 4), 1, 8, (2,), (2,))
    weights = flat.state_dict()
    deep.load_state_dict({name: value.view(deep.state_dict()[name].shape) for name, value in weights.items()})
    image = torch.randn(2, 1, 18, 22)
    torch.testing.assert_close(deep(image[:, :, None]), flat(image))


def plain(attention: WindowAttention, x_BD: Tensor) -> Tensor:
    """Attention among all tokens, of which only those of a window see one another."""
    grid = x_BD.shape[1:-1]
    places = np.array([*np.ndindex(*grid)])
    allowed, number = np.ones((len(places),) * 2, bool), np.zeros((len(places),) * 2, int)
    for axis, (length, side) in enumerate(zip(grid, attention.window, strict=True)):
        own = min(side, length)
        shift = own // 2 if attention.shifted and own < length else 0
        padded = -(-length // own) * own
        at = places[:, axis]
        window, wrapped = (at - shift) % padded // own, at < shift
        allowed &= (window[:, None] == window) & (wrapped[:, None] == wrapped)
        number = number * (2 * side - 1) + (at[:, None] - at + side - 1).clip(0, 2 * side - 2)
    q, k, v = attention.qkv(x_BD.flatten(1, -2)).unflatten(-1, (3, attention.heads, -1)).permute(2, 0, 3, 1, 4)
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]) + attention.relative[number].permute(2, 0, 1)
    weights = scores.masked_fill(~torch.from_numpy(allowed), -math.inf).softmax(dim=-1)
    return attention.proj((weights @ v).transpose(1, 2).flatten(2)).view_as(x_BD)


def test_windows_shifts_and_padding_are_a_mask_on_attention_among_all() -> None:
    torch.manual_seed(0)
    for grid, window in (
        ((8,), (4,)),
        ((7,), (3,)),
        ((2,), (5,)),
        ((4, 7), (3, 2)),
        ((3, 5, 4), (2, 3, 4)),
        ((1, 1, 1), (2, 2, 2)),
    ):
        for shifted in (False, True):
            attention = WindowAttention(6, 2, window, shifted)
            torch.nn.init.normal_(attention.relative)
            x_BD = torch.randn(2, *grid, 6)
            torch.testing.assert_close(attention(x_BD), plain(attention, x_BD), atol=1e-5, rtol=1e-5)


def test_any_size_and_its_layers() -> None:
    network = GridSwin((2, 2, 2), (3, 3, 3), 2, 8, (1, 1), (2, 2), drop_path=0.1)
    for sides in ((8, 8, 8), (5, 9, 3), (1, 1, 1)):
        volume = torch.randn(2, 2, *sides, requires_grad=True)
        maps = network.maps(volume)
        assert [one.shape[1] for one in maps] == network.widths == [8, 16]
        halves = [-(-side // 2) for side in sides]
        assert [[*one.shape[2:]] for one in maps] == [halves, [-(-side // 2) for side in halves]]
        network(volume).sum().backward()
        assert volume.grad.isfinite().all()
    assert network(volume).shape == (2, network.num_features)
    low = GridSwin((2, 2, 2), (3, 3, 3), 1, 8, (2,), (2,)).bfloat16()
    assert low(torch.randn(1, 1, 5, 5, 5).bfloat16()).isfinite().all()


def test_positions_tell_equal_patches_apart_and_follow_any_grid() -> None:
    torch.manual_seed(0)
    with_positions = GridSwin((2, 2), (4, 4), 1, 8, (1,), (2,), positions=True)
    without = GridSwin((2, 2), (4, 4), 1, 8, (1,), (2,))
    without.load_state_dict(with_positions.state_dict())
    for sides in ((6, 4), (2, 10)):
        image = torch.ones(1, 1, *sides)
        grid = [side // 2 for side in sides]
        added = (with_positions.patches(image) - without.patches(image))[0].flatten(0, 1)
        torch.testing.assert_close(added, sincos(grid, 8))
        assert torch.equal(with_positions.maps(image)[0], with_positions.stage_maps(with_positions.patches(image))[0])


def test_settings_that_do_not_fit_are_named() -> None:
    for settings, said in (
        ({"patch": (2, 2)}, "window="),
        ({"patch": (2, 2, 0)}, "patch="),
        ({"heads": (3, 6)}, "heads="),
        ({"width": 10}, "heads="),
        ({"drop_path": 1.0}, "drop_path=1.0"),
        ({"width": 8, "depths": (1,), "heads": (1,), "positions": True}, "width"),
    ):
        with pytest.raises(UserError, match=said):
            GridSwin(**settings)
    with pytest.raises(UserError, match="in_chans=1"):
        GridSwin(width=12, depths=(1,), heads=(2,))(torch.zeros(1, 1, 8, 8))
