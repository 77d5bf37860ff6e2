"""FLoRA: the three small convolutions against the one big one, LoRA as its plain case, and what a core can hold."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightspan.adapters.flora import FLoRA, FLoRAUpdate
from lightspan.adapters.lora import LoRA
from lightspan.core.errors import UserError
from lightspan.subspaces.tucker import compose

LAYERS = {
    "linear": (nn.Linear(9, 6), (5, 9)),
    "conv1d": (nn.Conv1d(6, 8, 3, padding=1, dilation=2), (2, 6, 11)),
    "conv2d": (nn.Conv2d(6, 8, 3, stride=2, padding=1), (2, 6, 9, 9)),
    "strip": (nn.Conv2d(6, 8, (1, 5), padding=(0, 2)), (2, 6, 9, 9)),
    "grouped": (nn.Conv2d(6, 8, 3, groups=2), (2, 6, 9, 9)),
    "depthwise": (nn.Conv2d(6, 12, 3, padding=1, groups=6), (2, 6, 9, 9)),
    "reflected": (nn.Conv2d(6, 8, 3, padding=1, padding_mode="reflect"), (2, 6, 9, 9)),
    "conv3d": (nn.Conv3d(4, 8, (2, 3, 1)), (2, 4, 5, 6, 4)),
}
EVERY = pytest.mark.parametrize("name", LAYERS)


def drawn(name: str, **settings: float) -> tuple[nn.Module, FLoRAUpdate, torch.Tensor]:
    torch.manual_seed(0)
    layer, shape = LAYERS[name]
    layer = layer.double()
    adapter = FLoRA(rank=3, kernel_rank=2, scale=0.7, **settings).build(layer, name)
    nn.init.normal_(adapter.core)
    return layer, adapter, torch.randn(shape).double()


@EVERY
def test_the_chain_is_a_second_layer_with_the_whole_change_as_its_weight(name):
    layer, adapter, x = drawn(name)
    plain = layer(x)
    change = adapter(x, plain)
    with torch.no_grad():
        zero_bias = layer.bias.clone()
        expected = torch.func.functional_call(layer, {"weight": adapter.delta(), "bias": 0 * zero_bias}, (x,))
    torch.testing.assert_close(change, expected, rtol=1e-10, atol=1e-10)


@EVERY
def test_a_zero_core_adds_nothing_and_gets_the_first_gradient_alone(name):
    layer, adapter, x = drawn(name)
    nn.init.zeros_(adapter.core)
    change = adapter(x, layer(x))
    assert not change.any()
    change.pow(2).sum().backward()
    adapter.zero_grad()
    (adapter(x, layer(x)) * torch.randn_like(change)).sum().backward()
    assert adapter.core.grad.any()
    assert not any(factor.grad.any() for factor in adapter.factors)


@EVERY
def test_ranks_of_all_unfoldings_are_bounded(name):
    _, adapter, _ = drawn(name)
    delta = adapter.delta()
    for axis, rank in enumerate(adapter.core.shape):
        assert torch.linalg.matrix_rank(delta.movedim(axis, 0).flatten(1)) <= rank
    assert adapter.core.shape[0] == 3
    assert all(rank <= size for rank, size in zip(adapter.core.shape, delta.shape, strict=True))


def test_an_identity_core_makes_a_linear_change_lora():
    layer, adapter, x = drawn("linear")
    lora = LoRA(rank=3, alpha=3 * 0.7).build(layer, "linear")
    with torch.no_grad():
        adapter.core.copy_(torch.eye(3))
        lora.up_OR.copy_(adapter.factors[0])
        lora.down_RI.copy_(adapter.factors[1].T)
    torch.testing.assert_close(adapter(x, x), lora(x, x), rtol=1e-12, atol=1e-12)


def test_at_full_ranks_any_change_can_be_held():
    layer = nn.Conv2d(4, 5, 3).double()
    adapter = FLoRA(rank=5, kernel_rank=3, scale=0.5).build(layer, "conv")
    assert adapter.core.shape == (5, 4, 3, 3)
    target = torch.randn_like(layer.weight)
    factors = [torch.linalg.qr(torch.randn(size, size, dtype=torch.float64)).Q for size in adapter.core.shape]
    core = compose(target / 0.5, [factor.mT for factor in factors])
    with torch.no_grad():
        adapter.core.copy_(core)
        for own, factor in zip(adapter.factors, factors, strict=True):
            own.copy_(factor)
    torch.testing.assert_close(adapter.delta(), target, rtol=1e-8, atol=1e-8)


def test_full_kernel_modes_are_the_chain_1x1_core_1x1():
    layer, _, x = drawn("conv2d")
    adapter = FLoRA(rank=3, kernel_rank=3, scale=1.0).build(layer, "conv")
    nn.init.normal_(adapter.core)
    with torch.no_grad():
        for factor in adapter.factors[2:]:
            factor.copy_(torch.eye(3))
    z = F.conv2d(x, adapter.factors[1].T[:, :, None, None])
    z = F.conv2d(z, adapter.core, stride=2, padding=1)
    expected = F.conv2d(z, adapter.factors[0][:, :, None, None])
    torch.testing.assert_close(adapter(x, layer(x)), expected, rtol=1e-10, atol=1e-10)


def test_the_paper_counts_9228_numbers_for_a_3x3_convolution_of_256_channels():
    adapter = FLoRA(rank=16, kernel_rank=2).build(nn.Conv2d(256, 256, 3), "conv")
    assert sum(p.numel() for p in adapter.parameters()) == 9228


def test_gradients_are_those_of_finite_differences():
    _, adapter, x = drawn("grouped")
    assert torch.autograd.gradcheck(lambda x: adapter(x, x), x[:1, :, :4, :4].requires_grad_())


def test_bad_settings_are_named():
    for bad, message in (
        ({"rank": 0}, "rank=0 must"),
        ({"scale": 0.0}, "scale=0.0 must be above 0"),
        ({"dropout": 1.0}, "dropout=1.0 must"),
    ):
        with pytest.raises(UserError, match=message):
            FLoRA(**bad)
    with pytest.raises(UserError, match="rank=16 is above the 8 output features of stem; lower it"):
        FLoRA().build(nn.Conv2d(3, 8, 3), "stem")
