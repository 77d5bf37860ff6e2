"""SVFit: the gradient and the reach of the singular values, and what its file can and cannot bring back."""

import copy

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightspan.adapters.inject import adapt, adapted_layers
from lightspan.adapters.lora import LoRA
from lightspan.adapters.state import load_adapter, save_adapter
from lightspan.adapters.svfit import SVFit, SVFitUpdate, frames
from lightspan.core.errors import UserError


def linear(out: int = 6, inputs: int = 9) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(inputs, out).double()


def test_the_gradient_is_the_diagonal_of_the_weights_gradient_in_its_singular_frame():
    layer = linear()
    adapter = SVFit().build(layer, "layer")
    x, target = torch.randn(20, 9).double(), torch.randn(20, 6).double()
    (layer(x).detach() + adapter(x, layer(x)) - target).square().mean().backward()
    layer.weight.grad = None
    (layer(x) - target).square().mean().backward()
    expected = (adapter.left_OR.T @ layer.weight.grad @ adapter.right_RI.T).diagonal()
    torch.testing.assert_close(adapter.shift_R.grad, expected, rtol=1e-10, atol=1e-10)


def test_a_shift_moves_the_weight_inside_the_span_of_its_singular_pairs():
    adapter = SVFit().build(linear(), "layer")
    nn.init.normal_(adapter.shift_R)
    core = adapter.left_OR.T @ adapter.delta() @ adapter.right_RI.T
    torch.testing.assert_close(core, adapter.shift_R.diag(), rtol=1e-12, atol=1e-12)
    rest = adapter.delta() - adapter.left_OR * core.diagonal() @ adapter.right_RI
    assert rest.abs().max() < 1e-12


def test_values_beyond_the_rank_stay():
    layer = linear()
    adapter = SVFit(rank=2).build(layer, "layer")
    nn.init.normal_(adapter.shift_R)
    left_OR, values_R, right_RI = frames(layer)
    moved = (left_OR.T @ (layer.weight + adapter.delta()) @ right_RI.T).diagonal() - values_R
    torch.testing.assert_close(moved[:2], adapter.shift_R)
    assert moved[2:].abs().max() < 1e-12


def test_at_full_rank_nothing_of_the_weight_is_left_over():
    layer = linear()
    adapter = SVFit().build(layer, "layer")
    rest = layer.weight - adapter.left_OR * adapter.values_R @ adapter.right_RI
    assert rest.abs().max() < 1e-12


def test_a_weight_whose_singular_values_are_all_equal_still_trains():
    layer = linear(8, 8)
    with torch.no_grad():
        layer.weight.copy_(torch.linalg.qr(layer.weight).Q)
    adapter = SVFit().build(layer, "layer")
    x, target = torch.randn(30, 8).double(), torch.randn(30, 8).double()
    optimizer, losses = torch.optim.Adam([adapter.shift_R], lr=0.05), []
    for _ in range(40):
        loss = (layer(x).detach() + adapter(x, layer(x)) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


def test_energy_keeps_the_fewest_values_that_have_it():
    layer = linear(4, 4)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([3.0, 2.0, 1.0, 0.0]).diag())
    ranks = {energy: len(SVFit(energy=energy).build(layer, "l").shift_R) for energy in (9 / 14, 0.65, 13 / 14, 0.95, 1)}
    assert ranks == {9 / 14: 1, 0.65: 2, 13 / 14: 2, 0.95: 3, 1: 3}


def test_trained_numbers_are_sixteen_times_fewer_than_those_of_lora_at_rank_8_in_roberta_base():
    query = nn.Linear(768, 768, device="meta")
    trained = [
        sum(p.numel() for p in spec.build(query, "query").parameters() if p.requires_grad)
        for spec in (LoRA(rank=8), SVFit())
    ]
    assert trained == [8 * (768 + 768), 768]
    assert trained[0] / trained[1] == 16


class Products(TorchDispatchMode):
    """Collects the dtypes of all products of matrices, and the fused multiply-adds of convolutions."""

    def __init__(self):
        super().__init__()
        self.dtypes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in ("mm", "addmm", "bmm", "convolution", "convolution_backward"):
            self.dtypes += [args[0].dtype]
        return out


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layer", [nn.Linear(24, 16), nn.Conv2d(4, 16, 3)], ids=["linear", "convolution"])
def test_half_precision_layers_have_frames_and_products_in_their_dtype_and_sums_in_float32(layer, dtype):
    layer = copy.deepcopy(layer).to(dtype)
    exact = SVFit().build(copy.deepcopy(layer).float(), "layer")
    adapter = SVFit().build(layer, "layer")
    with torch.no_grad():
        for each in (adapter, exact):
            each.shift_R.copy_(torch.linspace(-1, 1, len(each.shift_R)))
    x = torch.randn(32, 24) if isinstance(layer, nn.Linear) else torch.randn(8, 4, 6, 6)
    y = layer(x.to(dtype))
    with Products() as products:
        out = adapter(x.to(dtype).requires_grad_(), y)
        out.backward(torch.ones_like(out))
    assert set(products.dtypes) == {dtype}
    assert len(products.dtypes) >= 4
    frames_of = sum(p.nbytes for p in (adapter.left_OR, adapter.right_RI))
    assert frames_of == sum(p.numel() for p in (exact.left_OR, exact.right_RI)) * dtype.itemsize
    expected = exact(x.to(dtype).float(), y.float())
    expected.backward(torch.ones_like(expected))
    error = torch.finfo(dtype).eps
    assert (out - expected).norm() < error * expected.norm()  # what the output itself is rounded to
    assert adapter.shift_R.grad.dtype == torch.float32
    assert (adapter.shift_R.grad - exact.shift_R.grad).norm() < error * exact.shift_R.grad.norm()
    assert (adapter.delta() - exact.delta()).norm() < error * exact.delta().norm()


def test_shifts_come_back_bit_for_bit_and_a_file_from_float32_frames_still_fits_a_half_precision_layer():
    layer = linear(16, 24).bfloat16()
    wide, first, second = (SVFit().build(each, "layer") for each in (copy.deepcopy(layer).float(), layer, layer))
    for written in (wide, first):
        nn.init.normal_(written.shift_R)
        second.restore(written.stored())
        assert torch.equal(second.shift_R, written.shift_R)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda file: file.pop("probe_O"), "not the shifts of 8 singular values and what they do"),
        (lambda file: file.pop("shift_R"), "not the shifts of 8 singular values"),
        (lambda file: file.update(shift_R=torch.zeros(7)), "not the shifts of 8 singular values"),
        (lambda file: file.update(probe_O=torch.zeros(3)), "not the shifts of a layer with 8 outputs"),
        (lambda file: file["shift_R"].fill_(torch.nan), "the shifts are not finite"),
        (lambda file: file["probe_O"].fill_(torch.nan), r"computed here differ \(by nan"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_and_changes_nothing(change, message):
    adapter = SVFit().build(linear(8, 8), "layer")
    nn.init.normal_(adapter.shift_R)
    before, file = adapter.shift_R.detach().clone(), {key: value.clone() for key, value in adapter.stored().items()}
    change(file)
    with pytest.raises(UserError, match=message):
        adapter.restore(file)
    assert torch.equal(adapter.shift_R, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_weight_of_zeros_or_of_one_row_has_frames_that_train(dtype):
    for out, inputs in ((6, 9), (1, 9)):
        layer = linear(out, inputs).to(dtype)
        nn.init.zeros_(layer.weight)
        for spec in (SVFit(), SVFit(energy=0.9)):
            adapter = spec.build(layer, "layer")
            adapter(torch.ones(2, inputs, dtype=dtype), torch.zeros(2, out, dtype=dtype)).sum().backward()
            assert adapter.shift_R.grad.isfinite().all()


def test_a_file_holds_the_shifts_and_refuses_frames_that_come_out_differently(tmp_path, monkeypatch):
    model = nn.Sequential(linear(8, 8))
    adapt(model, ["0"], SVFit(), show=False)
    nn.init.normal_(adapted_layers(model)["0"].adapters["default"].shift_R)
    save_adapter(model, tmp_path / "s.safetensors")
    assert (tmp_path / "s.safetensors").stat().st_size < 1500

    def turned(layer: nn.Module) -> tuple[torch.Tensor, ...]:
        left_OR, values_R, right_RI = frames(layer)
        return left_OR.roll(1, 1), values_R, right_RI.roll(1, 0)

    monkeypatch.setattr("lightspan.adapters.svfit.frames", turned)
    with pytest.raises(UserError, match=r"s.safetensors, 0: the singular vectors computed here differ"):
        load_adapter(nn.Sequential(linear(8, 8)), tmp_path / "s.safetensors", show=False)


def test_bad_settings_are_named():
    for bad, message in (
        ({"rank": 2, "energy": 0.9}, "rank=2 or energy=0.9, not both"),
        ({"rank": 0}, "rank=0 must be at least 1"),
        ({"energy": 1.5}, "energy=1.5 must"),
    ):
        with pytest.raises(UserError, match=message):
            SVFit(**bad)
    with pytest.raises(UserError, match=r"rank=7 is above 6, the largest for fc of shape 6 x 9"):
        SVFit(rank=7).build(linear(), "fc")
    assert isinstance(SVFit(rank=6).build(linear(), "fc"), SVFitUpdate)
