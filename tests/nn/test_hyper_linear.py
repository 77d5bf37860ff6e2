"""HyperLinear: the sum it stands for, its two linearities, and its start."""

import pytest
import torch

from lightspan.core.errors import UserError
from lightspan.nn.heads.hyper_linear import HyperLinear


def test_the_output_is_the_einsum_of_condition_weights_and_input() -> None:
    torch.manual_seed(0)
    layer = HyperLinear(4, 5, 3).double()
    x, z = torch.randn(6, 5, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64)
    torch.testing.assert_close(layer(x, z), torch.einsum("bk,kij,bj->bi", z, layer.weight, x), rtol=1e-12, atol=1e-12)


def test_it_is_linear_in_the_condition_and_in_the_input_and_zero_at_zero() -> None:
    torch.manual_seed(0)
    layer = HyperLinear(2, 5, 5).double()
    x, z, other = (torch.randn(6, n, dtype=torch.float64) for n in (5, 2, 2))
    torch.testing.assert_close(layer(x, 3 * z - other), 3 * layer(x, z) - layer(x, other))
    torch.testing.assert_close(layer(2 * x, z), 2 * layer(x, z))
    assert layer(x, 0 * z).abs().max() == layer(0 * x, z).abs().max() == 0


def test_a_condition_of_length_one_keeps_the_size_of_its_input_at_the_start() -> None:
    torch.manual_seed(0)
    x, z = torch.randn(500, 64), torch.nn.functional.normalize(torch.randn(500, 4), dim=1)
    assert HyperLinear(4, 64, 64)(x, z).square().mean().item() == pytest.approx(1, rel=0.1)


def test_widths_below_one_are_named() -> None:
    with pytest.raises(UserError, match="condition_features=0 must"):
        HyperLinear(0, 5, 5)
