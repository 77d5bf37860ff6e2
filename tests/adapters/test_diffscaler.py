from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightspan.adapters.diffscaler import Affiner, DiffScaler
from lightspan.adapters.inject import activate, adapt, adapted_layers, fold
from lightspan.adapters.state import load_adapter, save_adapter
from lightspan.core.errors import UserError


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5)).double()


def rows() -> Tensor:
    return torch.randn(7, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def moved(layer: nn.Module, rank: int = 2, seed: int = 0) -> Affiner:
    affiner = Affiner(layer, rank)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in affiner.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return affiner


def test_a_linear_layer_follows_the_published_formula() -> None:
    layer = network()[0]
    a, x = moved(layer), rows()
    wx = x @ layer.weight.T
    expected = (1 + a.scale_O) * wx + layer.bias + a.shift_O
    expected = expected + a.strength * (x @ a.down_RC.T).relu() @ a.up_OR.T
    y = layer(x)
    torch.testing.assert_close(y + a(x, y), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("stride", [1, 2])
def test_the_bottleneck_of_a_convolution_is_two_1x1_kernels(stride: int) -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(3, 5, kernel_size=3, padding=1, stride=stride).double()
    a, x = moved(layer), torch.randn(2, 3, 7, 7, dtype=torch.float64)
    y = layer(x)
    wx = F.conv2d(x, layer.weight, padding=1, stride=stride)
    down, up = a.down_RC[:, :, None, None], a.up_OR[:, :, None, None]
    expected = wx * (1 + a.scale_O[:, None, None]) + (layer.bias + a.shift_O)[:, None, None]
    expected = expected + a.strength * F.conv2d(F.conv2d(x, down, stride=stride).relu(), up)
    torch.testing.assert_close(y + a(x, y), expected, rtol=1e-12, atol=1e-12)
    assert sum(p.numel() for p in a.parameters()) == 2 * 5 + 1 + 2 * (3 + 5)


def test_the_bottlenecks_first_matrix_gets_a_gradient_only_once_the_second_has_moved() -> None:
    model = network()
    adapt(model, ["0", "2"], DiffScaler(rank=2), show=False)
    affiners = [layer.adapters["default"] for layer in adapted_layers(model).values()]

    def gradients() -> list[dict[str, bool]]:
        model.zero_grad()
        model(rows()).square().sum().backward()
        return [{name: bool(p.grad.any()) for name, p in a.named_parameters()} for a in affiners]

    first = {"scale_O": True, "shift_O": True, "strength": False, "down_RC": False, "up_OR": True}
    assert gradients() == [first, first]
    with torch.no_grad():
        for affiner in affiners:
            affiner.up_OR -= 0.1 * affiner.up_OR.grad
    assert gradients() == [dict.fromkeys(first, True)] * 2


def test_with_the_strength_at_zero_scale_and_shift_fold_into_plain_layers() -> None:
    model, x = network(), rows()
    adapt(model, ["0", "2"], DiffScaler(rank=2), show=False)
    with torch.no_grad():
        for layer in adapted_layers(model).values():
            layer.adapters["default"] = moved(layer.base)
            layer.adapters["default"].strength.zero_()
    expected = model(x)
    fold(model)
    assert [type(layer) for layer in model] == [nn.Linear, nn.Tanh, nn.Linear]
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-12)


def test_a_bottleneck_that_adds_something_can_be_neither_merged_nor_exported() -> None:
    affiner = moved(network()[0])
    for ask in (affiner.delta, affiner.low_rank):
        with pytest.raises(UserError, match=r"DiffScaler\(rank=2\) has a ReLU, .*neither merged nor exported"):
            ask()
    model = network()
    adapt(model, ["0"], DiffScaler(rank=2), show=False)
    with pytest.raises(UserError, match="no plain layer can represent it"):
        fold(model)


@pytest.mark.parametrize("order", [("left", "right"), ("right", "left")])
def test_banks_of_two_tasks_do_not_meet_whatever_the_order_they_are_loaded_in(
    tmp_path: Path, order: tuple[str, str]
) -> None:
    expected = {}
    for seed, task in enumerate(("left", "right")):
        model = network()
        adapt(model, ["0", "2"], DiffScaler(rank=2), name=task, show=False)
        for layer in adapted_layers(model).values():
            layer.adapters[task].load_state_dict(moved(layer.base, seed=seed).state_dict())
        expected[task] = model(rows())
        save_adapter(model, tmp_path / f"{task}.safetensors", task)
    both = network()
    plain = both(rows())
    for task in order:
        load_adapter(both, tmp_path / f"{task}.safetensors", show=False)
    for task in ("left", "right", "left"):
        activate(both, task)
        assert torch.equal(both(rows()), expected[task])
    activate(both)
    assert torch.equal(both(rows()), plain)
    assert not torch.allclose(expected["left"], expected["right"])


def test_a_layer_without_a_bias_is_scaled_and_not_shifted() -> None:
    layer = nn.Linear(4, 3, bias=False)
    affiner = Affiner(layer, 0)
    assert [name for name, _ in affiner.named_parameters()] == ["scale_O"]
    assert affiner.bias_delta() is None


def test_the_layer_is_no_part_of_its_adapter() -> None:
    affiner = Affiner(network()[0], 2)
    assert affiner.state_dict().keys() == {"scale_O", "shift_O", "strength", "down_RC", "up_OR"}
    assert not list(affiner.children())


def test_a_negative_rank_is_refused() -> None:
    with pytest.raises(UserError, match="rank=-1 must be at least 0"):
        DiffScaler(rank=-1)
