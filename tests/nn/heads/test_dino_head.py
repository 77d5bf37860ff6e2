"""Heads: unit lengths, shapes, kinds of their parameters."""

import pytest
import torch
from torch.nn import functional as F

from lightspan.core.errors import UserError
from lightspan.nn.heads.dino_head import DINOHead, Prototypes
from lightspan.optim.groups import ParameterGroups


def test_prototypes_give_cosines_whatever_the_lengths_and_zero_for_a_zero_vector() -> None:
    prototypes = Prototypes(4, 7)
    x = torch.randn(3, 4)
    expected = F.cosine_similarity(x[:, None], prototypes.weight[None], dim=2)
    torch.testing.assert_close(prototypes(x), expected)
    with torch.no_grad():
        prototypes.weight.mul_(3)
    torch.testing.assert_close(prototypes(5 * x), expected)
    assert prototypes(torch.zeros(1, 4)).abs().max() == 0
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(prototypes(x), expected)
    halves = prototypes.bfloat16()(x.bfloat16())
    torch.testing.assert_close(halves, expected, rtol=0, atol=0.03)


def test_prototypes_start_as_rows_of_a_linear_layer_at_any_width() -> None:
    torch.manual_seed(0)
    for width in (16, 256):
        lengths = Prototypes(width, 1000).weight.norm(dim=1)
        assert lengths.mean().item() == pytest.approx(3**-0.5, rel=0.02)


def test_a_head_maps_any_leading_axes_and_no_hidden_width_is_linear() -> None:
    head = DINOHead(6, 9, hidden=(8, 8), bottleneck=5)
    assert head(torch.randn(2, 3, 6)).shape == (2, 3, 9)
    assert head(torch.randn(0, 6)).shape == (0, 9)
    assert len(DINOHead(6, 9, hidden=(), bottleneck=5).mlp) == 1


def test_layers_start_as_dinos_with_a_deviation_of_0_02_and_no_biases() -> None:
    torch.manual_seed(0)
    for layer in DINOHead(256, 9, hidden=(256,), bottleneck=256).mlp[::2]:
        assert layer.weight.std().item() == pytest.approx(0.02, rel=0.03)
        assert layer.weight.mean().item() == pytest.approx(0, abs=3e-4)
        assert not layer.bias.any()


def test_directions_are_neither_decayed_nor_projected() -> None:
    kinds = {name: group["name"] for group in ParameterGroups().build(DINOHead(6, 9)) for name, _ in group["params"]}
    assert kinds["prototypes.weight"] == "embeddings"
    assert kinds["mlp.0.weight"] == "matrices"


def test_widths_below_one_are_refused() -> None:
    with pytest.raises(UserError, match=r"hidden=\[0\] must"):
        DINOHead(6, 9, hidden=(0,))
    with pytest.raises(UserError, match="count=0 must"):
        DINOHead(6, 0)
