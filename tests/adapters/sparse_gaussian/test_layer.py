"""A layer with a Gaussian posterior over few weights: what it stores, what it gives, what its gradients are."""

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from lightspan.adapters.sparse_gaussian.inject import Start, drawing, plain_means, sparsify
from lightspan.adapters.sparse_gaussian.layer import Mean, OneDraw, Outputs, SparseGaussian, normal
from lightspan.core.errors import UserError

START = Start(mean_std=None, std=0.2, std_spread=0.1)
CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(7, 5), (4, 7)),
    "linear over positions": (lambda: nn.Linear(7, 5, bias=False), (4, 3, 7)),
    "convolution": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), (4, 4, 8, 9)),
    "reflecting borders": (lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect", dilation=1), (4, 2, 6, 6)),
    "one axis": (lambda: nn.Conv1d(3, 4, 5), (4, 3, 11)),
    "three axes": (lambda: nn.Conv3d(2, 3, 2, bias=False), (4, 2, 4, 4, 4)),
}


def sparse(base: nn.Module, density: float = 0.4, start: Start = START) -> SparseGaussian:
    return sparsify(nn.Sequential(base), ["0"], density, start=start)["0"]


def made(case: str, dtype: torch.dtype = torch.float64) -> tuple[SparseGaussian, Tensor]:
    torch.manual_seed(0)
    build, shape = CASES[case]
    return sparse(build().to(dtype)), torch.randn(shape, dtype=dtype)


def dense_weight(layer: SparseGaussian, values_k: Tensor) -> Tensor:
    return layer.subspace.push(values_k)


def test_stored_are_places_and_two_numbers_of_each_active_weight() -> None:
    layer = sparse(nn.Linear(100, 50), density=0.02)
    stored = {name: t for name, t in [*layer.named_parameters(), *layer.named_buffers()] if name != "base.bias"}
    assert {name: (t.dtype, t.numel()) for name, t in stored.items()} == {
        "mu": (torch.float32, 100), "rho": (torch.float32, 100), "places": (torch.int32, 100)
    }  # fmt: skip
    assert sum(t.untyped_storage().nbytes() for t in stored.values()) == 12 * 100
    assert set(layer.state_dict()) == {"mu", "rho", "places", "base.bias"}


@pytest.mark.parametrize("case", CASES)
def test_the_mean_network_is_the_plain_one_with_the_means_as_weights(case: str) -> None:
    layer, x = made(case)
    given = layer(x)
    model = nn.Sequential(copy.deepcopy(layer))
    plain_means(model)
    assert type(model[0]) is type(layer.base)
    assert int((model[0].weight != 0).sum()) == len(layer.mu)
    assert torch.allclose(model(x), given, rtol=1e-12)


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_dense_weights_at_active_places(case: str) -> None:
    layer, x = made(case)
    x.requires_grad_()
    weights_k = (layer.mu.detach() * 3).requires_grad_()
    watched: list[Tensor] = []
    layer.output(x, weights_k, watched.append).sin().sum().backward()
    base = copy.deepcopy(layer).plain()
    base.weight = nn.Parameter(dense_weight(layer, weights_k.detach()))
    other = x.detach().clone().requires_grad_()
    base(other).sin().sum().backward()
    torch.testing.assert_close(watched[0], base.weight.grad)
    torch.testing.assert_close(weights_k.grad, layer.subspace.pull(base.weight.grad))
    torch.testing.assert_close(x.grad, other.grad)


def test_the_loss_of_outputs_has_right_gradients_of_mu_and_rho() -> None:
    layer, x = made("convolution")
    draw = Outputs(0, 0, torch.arange(4))

    def loss(mu_k: Tensor, rho_k: Tensor) -> Tensor:
        with drawing(nn.Sequential(layer), draw):
            values = {"mu": mu_k, "rho": rho_k}
            return torch.func.functional_call(layer, values, (x,)).square().mean()

    assert torch.autograd.gradcheck(loss, (layer.mu, layer.rho))


class Storages(TorchDispatchMode):
    """Every storage that operations make, by a reference that does not keep it."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[int, StorageWeakRef]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.made.append((out.untyped_storage().nbytes(), StorageWeakRef(out.untyped_storage())))
        return out

    def largest_alive(self) -> int:
        return max(size for size, storage in self.made if not storage.expired())


@pytest.mark.parametrize("kept", [False, True])
def test_nothing_dense_is_kept_for_the_backward_pass(kept: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if kept:  # as autograd would by itself, or the test could not fail
        monkeypatch.setattr("lightspan.adapters.sparse_gaussian.layer._made_again", lambda *args: nullcontext())
    layer, x = sparse(nn.Linear(300, 200), density=0.01), torch.randn(2, 300, requires_grad=True)
    with Storages() as storages, drawing(nn.Sequential(layer), Outputs(0, 0, torch.arange(2))):
        y = layer(x)
    dense_bytes = 4 * 300 * 200
    assert max(size for size, _ in storages.made) == dense_bytes
    assert storages.largest_alive() == (dense_bytes if kept else 8 * len(layer.mu))  # places, for the way back
    y.sum().backward()
    assert layer.mu.grad is not None


@pytest.mark.parametrize("case", ["linear", "convolution"])
def test_drawing_outputs_has_mean_and_variance_of_drawing_weights(case: str) -> None:
    layer, x = made(case)
    model, networks, repeats = nn.Sequential(layer), 300, 2000
    drawn: list[Tensor] = []
    with torch.no_grad():
        exact_mean, exact_variance = layer(x), layer.variance(x)
        for number in range(networks):
            with drawing(model, OneDraw(0, number)):
                drawn.append(layer(x))
        with drawing(model, Outputs(0, 0, torch.arange(repeats * len(x)))):
            outputs = layer(x.repeat(repeats, *[1] * (x.ndim - 1))).unflatten(0, (repeats, len(x)))
    reached = exact_variance > 1e-3
    # Mean squares of standardised errors are 1; four standard errors of them, in which drawn weights, which outputs
    # share, count as few.
    most = 1 + 4 * (2 / len(layer.mu)) ** 0.5
    for samples in (torch.stack(drawn), outputs):
        n, variance = len(samples), exact_variance[reached]
        off = (samples.mean(0) - exact_mean)[reached] / (variance / n).sqrt()
        assert off.square().mean() < most
        off = (samples.var(0)[reached] - variance) / (variance * (2 / n) ** 0.5)
        assert off.square().mean() < most


def test_zero_is_a_value_like_any_other() -> None:
    layer, x = made("linear")
    with torch.no_grad():
        layer.mu.zero_()
        layer.rho.zero_()  # sigma = log 2
    assert layer.kl(1.0).item() > 0
    assert (layer.variance(x) > 0).any()
    layer.kl(1.0).backward()
    assert (layer.rho.grad != 0).all()
    before = layer.places.clone()
    layer.move(layer.places.long())
    assert torch.equal(layer.places, before)


def test_noise_is_that_of_the_sample_whatever_batch_it_is_in() -> None:
    layer, x = made("convolution", torch.float32)
    index_B = torch.tensor([7, 3, 900, 12])

    def noise(rows: Tensor, step: int = 5) -> Tensor:
        with torch.no_grad(), drawing(nn.Sequential(layer), Outputs(1, step, index_B[rows])):
            return layer(x[rows])

    everything = noise(torch.arange(4))
    for rows in (torch.tensor([2, 0]), torch.tensor([3])):
        torch.testing.assert_close(noise(rows), everything[rows], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(noise(torch.arange(4), step=6), everything)


def test_parts_of_a_sample_have_noise_of_their_own_and_odd_numbers_of_rows_are_refused() -> None:
    layer = sparse(nn.Linear(7, 5))
    x = torch.randn(1, 7).expand(6, 7)
    with torch.no_grad(), drawing(nn.Sequential(layer), Outputs(1, 0, torch.tensor([4, 9]))):
        y = layer(x)
        assert len(y.unique(dim=0)) == 6
        with pytest.raises(UserError, match="0 sees 5 rows of a batch of 2 samples"):
            layer(x[:5])


def test_normal_numbers_are_normal() -> None:
    n = 100_000
    noise = normal(0, 0, "a", (n,), torch.arange(n))
    assert abs(noise.mean()) < 4 / n**0.5
    assert abs(noise.var() - 1) < 4 * (2 / n) ** 0.5
    assert abs(noise.pow(4).mean() - 3) < 4 * (96 / n) ** 0.5
    assert noise.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", ["linear", "convolution"])
def test_autocast_computes_in_half_precision_and_keeps_a_tiny_variance(case: str, dtype: torch.dtype) -> None:
    layer, x = made(case, torch.float32)
    with torch.no_grad():
        layer.rho.fill_(-7.6)  # sigma = 5e-4, whose square is no number of float16
    exact = layer.variance(x)
    with torch.autocast("cpu", dtype):
        y, variance = layer(x), layer.variance(x)
        with drawing(nn.Sequential(layer), Outputs(0, 0, torch.arange(4))):
            drawn = layer(x)
    assert y.dtype == drawn.dtype == dtype
    torch.testing.assert_close(variance.float(), exact, rtol=3e-2, atol=1e-9)
    drawn.float().sum().backward()
    assert layer.mu.grad.dtype == layer.rho.grad.dtype == torch.float32
    assert (layer.rho.grad != 0).any()


def test_a_layer_of_bfloat16_answers_in_it() -> None:
    layer, x = made("linear", torch.bfloat16)
    with drawing(nn.Sequential(layer), Outputs(0, 0, torch.arange(4))):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert layer.mu.grad.isfinite().all()
    assert layer.rho.grad.isfinite().all()
    assert layer(x[:0]).shape == (0, 5)


def test_where_no_active_weight_reaches_gradients_are_finite() -> None:
    layer = sparse(nn.Linear(50, 50), density=1e-4)
    assert len(layer.mu) == 1
    with drawing(nn.Sequential(layer), Outputs(0, 0, torch.arange(2))):
        layer(torch.zeros(2, 50)).square().sum().backward()
    assert layer.mu.grad.isfinite().all()
    assert layer.rho.grad.isfinite().all()


def test_draws_are_put_back_after_an_error() -> None:
    layer = sparse(nn.Linear(3, 3))
    with pytest.raises(ZeroDivisionError), drawing(nn.Sequential(layer), OneDraw(0, 0)):
        raise ZeroDivisionError
    assert isinstance(layer.draw, Mean)
