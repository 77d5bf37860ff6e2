"""Sub-networks: the paper's formula, gradients, and features widened for a layer that knows the whole width only."""

import pytest
import torch
from torch import nn
from torch.func import functional_call

from lightspan.nn.slices import first_of_groups, linear_weight, sub_weights, widened


@pytest.mark.parametrize("width", [1, 2, 5])
def test_a_narrow_linear_layer_scales_its_inputs_up(width: int) -> None:
    layer, x = nn.Linear(5, 4).double(), torch.randn(3, width, dtype=torch.float64)
    small = nn.Linear(width, 2, device="meta")
    expected = (5 / width * x) @ layer.weight[:2, :width].T + layer.bias[:2]
    torch.testing.assert_close(functional_call(small, sub_weights(layer, small), (x,)), expected)


def test_groups_are_cut_one_by_one_and_whole_shapes_are_the_parameters_themselves() -> None:
    weight = torch.arange(24.0).view(6, 4)
    assert first_of_groups(weight, (3, 2), 3).tolist() == [[0, 1], [8, 9], [16, 17]]
    assert first_of_groups(weight, (6, 4), 3) is weight
    assert linear_weight(weight, (6, 4), 3) is weight


def test_a_widened_feature_passes_a_linear_layer_as_its_slice_would() -> None:
    layer, x = nn.Linear(6, 3), torch.randn(2, 4)
    expected = x @ linear_weight(layer.weight, (3, 4)).T + layer.bias
    torch.testing.assert_close(layer(widened(x, 6)), expected)
    whole = torch.randn(2, 6)
    assert widened(whole, 6) is whole
    layer(widened(x, 6)).sum().backward()
    assert layer.weight.grad is not None
    assert (layer.weight.grad[:, 4:] == 0).all()
