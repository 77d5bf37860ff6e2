"""Bottlenecks in blocks of a transformer: nothing changes at first, and then what the equations say."""

import copy

import pytest
import torch
from torch import nn

from lightspan.backbones.vit import vit
from lightspan.core.errors import UserError
from lightspan.nn.bottlenecks import Behind, Beside, Bottleneck, add_bottlenecks


def network() -> nn.Module:
    torch.manual_seed(0)
    return vit(16, 2, 2, img_size=8, patch_size=4, layer_scale=0.5).eval()


def filled(module: nn.Module) -> None:
    torch.manual_seed(1)
    for part in module.modules():
        if isinstance(part, Bottleneck):
            nn.init.normal_(part.up.weight)
            nn.init.normal_(part.up.bias)


def test_they_change_nothing_before_they_train_and_are_all_that_is_new() -> None:
    plain, image = network(), torch.randn(2, 3, 8, 8)
    changed = copy.deepcopy(plain)
    add_bottlenecks(changed.feature_modules, 16, 5)  # type: ignore[arg-type]
    torch.testing.assert_close(changed.tokens(image), plain.tokens(image), rtol=0, atol=0)  # type: ignore[operator]
    sizes = [sum(p.numel() for p in module.parameters()) for module in (plain, changed)]
    assert sizes[1] - sizes[0] == 2 * 2 * (2 * 16 * 5 + 16 + 5)


def test_a_block_is_what_the_equations_say() -> None:
    plain = network()
    changed = copy.deepcopy(plain)
    add_bottlenecks(changed.feature_modules, 16, 5, scale=0.3)  # type: ignore[arg-type]
    filled(changed)
    old, new, x = plain.feature_modules[0], changed.feature_modules[0], torch.randn(2, 5, 16)  # type: ignore[index]

    def small(bottleneck: Bottleneck, u: torch.Tensor) -> torch.Tensor:
        return bottleneck.up.weight @ (bottleneck.down(u).relu()).mT + bottleneck.up.bias[:, None]

    attended = old.attn(old.norm1(x))
    one = x + 0.5 * (attended + small(new.attn.bottleneck, attended).mT)
    u = old.norm2(one)
    expected = one + 0.5 * (old.mlp(u) + 0.3 * small(new.mlp.bottleneck, u).mT)
    torch.testing.assert_close(new(x), expected)


def test_other_blocks_and_a_second_time_are_refused_and_nothing_is_changed() -> None:
    blocks = [*network().feature_modules]  # type: ignore[arg-type]
    with pytest.raises(UserError, match="attn and mlp"):
        add_bottlenecks([*blocks, nn.Linear(2, 2)], 16, 5)
    assert not any(isinstance(part, Behind | Beside) for block in blocks for part in block.modules())
    add_bottlenecks(blocks, 16, 5)
    with pytest.raises(UserError, match="already"):
        add_bottlenecks(blocks, 16, 5)
    with pytest.raises(UserError, match="hidden"):
        Bottleneck(4, 0)
