"""Diagonal recurrences: three forms of one map, what they read, and what stays finite."""

from typing import Any

import numpy as np
import pytest
import torch
from scipy.signal import lfilter
from torch import Tensor

from lightspan.core.errors import UserError
from lightspan.nn.sequences.state_space import StateSpace, convolution, kernel, powers, recurrence, scan

LENGTHS = (1, 2, 15, 16, 17, 63, 200)
STARTS: tuple[Any, ...] = ("hippo", "random")


def layer(start: Any = "hippo", bidirectional: bool = False, width: int = 6, states: int = 4) -> StateSpace:
    torch.manual_seed(0)
    return StateSpace(width, states, bidirectional, start)


def parts(start: Any = "hippo") -> tuple[Tensor, Tensor]:
    lambda_DN, weight_KDN = layer(start).dynamics()
    return lambda_DN.detach(), weight_KDN[0].detach()


def values(length: int, width: int = 6, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, length, width, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("length", LENGTHS)
def test_steps_convolution_and_chunks_give_the_same(length: int, start: Any) -> None:
    lambda_DN, weight_DN = parts(start)
    x = values(length)
    y, state = recurrence(x, lambda_DN, weight_DN)
    torch.testing.assert_close(convolution(x, kernel(lambda_DN, weight_DN, length)), y, atol=1e-5, rtol=0)
    for chunk in (1, 7, 16, 1000):
        scanned, last = scan(x, lambda_DN, weight_DN, chunk=chunk)
        torch.testing.assert_close(scanned, y, atol=1e-5, rtol=0)
        torch.testing.assert_close(last, state, atol=1e-5 * float(state.abs().max()), rtol=0)


def test_each_state_is_the_filter_of_scipy() -> None:
    lambda_DN, weight_DN = (part.to(torch.complex128) for part in parts())
    x = values(50, dtype=torch.float64)
    expected = np.zeros(x.shape)
    for d in range(6):
        for n in range(4):
            pole, weight = lambda_DN[d, n].item(), weight_DN[d, n].item()
            expected[:, :, d] += 2 * lfilter([weight], [1, -pole], x[:, :, d].numpy(), axis=1).real
    torch.testing.assert_close(recurrence(x, lambda_DN, weight_DN)[0], torch.from_numpy(expected), atol=1e-12, rtol=0)


@pytest.mark.parametrize("cut", [1, 16, 33])
def test_pieces_with_their_state_are_the_whole(cut: int) -> None:
    built, x = layer(), values(50)
    whole, last = built.read(x)
    first, state = built.read(x[:, :cut])
    second, end = built.read(x[:, cut:], state)
    torch.testing.assert_close(torch.cat([first, second], dim=1), whole, atol=1e-5, rtol=0)
    torch.testing.assert_close(end, last, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(built(x), whole, atol=1e-5, rtol=0)
    nothing, same = built.read(x[:, :0], state)
    assert nothing.shape == (2, 0, 6)
    assert torch.equal(same, state)


def test_powers_are_those_of_numpy() -> None:
    lambda_DN = parts()[0].to(torch.complex128)
    expected = lambda_DN.numpy()[:, :, None] ** np.arange(23)
    np.testing.assert_allclose(powers(lambda_DN, 23).numpy(), expected, atol=1e-12)
    np.testing.assert_allclose(powers(lambda_DN, 1).numpy(), 1)


def test_both_directions_are_a_recurrence_forwards_and_one_backwards_over_what_follows() -> None:
    built, x = layer(bidirectional=True).double(), values(20, dtype=torch.float64)
    lambda_DN, (ahead_DN, behind_DN) = built.dynamics()
    forwards = recurrence(x, lambda_DN, ahead_DN)[0]
    backwards = recurrence(x.flip(1), lambda_DN, behind_DN)[0].flip(1)
    following = torch.cat([backwards[:, 1:], torch.zeros_like(x[:, :1])], dim=1)
    torch.testing.assert_close(built(x), forwards + following + built.skip_D * x, atol=1e-10, rtol=0)


def test_a_causal_layer_does_not_see_what_follows_and_the_other_does() -> None:
    x = values(30)
    changed = x.clone()
    changed[:, 11:] = 7.0
    causal, both = layer(), layer(bidirectional=True)
    torch.testing.assert_close(causal(changed)[:, :11], causal(x)[:, :11], atol=1e-5, rtol=0)
    assert (both(changed)[:, :11] - both(x)[:, :11]).abs().min() > 1e-5


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("decay", [-100.0, 0.0, 50.0])
def test_states_fade_whatever_the_weights_are(decay: float, start: Any) -> None:
    built = layer(start)
    assert (built.dynamics()[0].abs() < 1).all()
    torch.nn.init.constant_(built.log_decay_DN, decay)
    assert (built.dynamics()[0].abs() < 1).all()
    assert built(values(300)).isfinite().all()


@pytest.mark.parametrize("form", ["convolution", "scan"])
def test_gradients_are_those_of_finite_differences(form: str) -> None:
    x = values(7, 3, torch.float64).requires_grad_()
    built = layer(width=3, states=2).double()
    named = [(name, parameter.detach().requires_grad_()) for name, parameter in built.named_parameters()]

    def run(x: Tensor, *given: Tensor) -> Tensor:
        held = dict(zip([name for name, _ in named], given, strict=True))
        lambda_DN = torch.polar((-held["log_decay_DN"].exp()).exp(), held["angle_DN"])
        weight_DN = torch.view_as_complex(held["weight_KDN2"][0])
        if form == "scan":
            return scan(x, lambda_DN, weight_DN, chunk=3)[0]
        return convolution(x, kernel(lambda_DN, weight_DN, 7))

    inputs = (x, *(parameter for name, parameter in named))
    assert torch.autograd.gradcheck(run, inputs)


def test_the_hippo_start_is_s4d_lins() -> None:
    """lambda = exp(dt (-1/2 + i pi n)) up to the least decay; of 2 channels dt is each end of the range."""
    lambda_DN = StateSpace(2, 3, start="hippo", steps=(0.01, 0.1)).dynamics()[0].detach().to(torch.complex128)
    step_D1, n_N = torch.tensor([[0.01], [0.1]], dtype=torch.float64), torch.arange(3)
    expected = torch.exp(torch.complex(-step_D1 / 2, torch.zeros_like(step_D1)) + 1j * torch.pi * n_N * step_D1)
    torch.testing.assert_close(lambda_DN, expected, atol=3e-6, rtol=0)


def test_weights_start_with_the_spread_of_their_sources() -> None:
    """Of S4D-Lin a normal number times the hold of an input, of LRU's ring one that keeps the variance of noise."""
    torch.manual_seed(0)
    steps = StateSpace(4000, 2, start="hippo", steps=(0.05, 0.05))
    drawn_KDN = torch.view_as_complex(steps.weight_KDN2.detach())
    pole_N = torch.complex(torch.full((2,), -0.5), torch.pi * torch.arange(2.0))
    hold_N = ((0.05 * pole_N).exp() - 1) / pole_N
    torch.testing.assert_close(drawn_KDN.abs().square().mean(dim=(0, 1)), hold_N.abs().square(), rtol=0.06, atol=0)
    ring = StateSpace(4000, 3, start="random")
    radius_DN = ring.dynamics()[0].detach().abs()
    assert radius_DN.min() > 0.499
    assert radius_DN.max() < 0.991
    assert radius_DN.square().mean() == pytest.approx((0.99**2 + 0.5**2) / 2, rel=0.02)  # even over the ring's area
    ratio_KDN = torch.view_as_complex(ring.weight_KDN2.detach()).abs().square() / (1 - radius_DN.square())
    assert ratio_KDN.mean() == pytest.approx(1 / 6, rel=0.06)


def test_half_types_are_computed_in_float32_and_rounded_once() -> None:
    built, x = layer(bidirectional=True), values(40, dtype=torch.bfloat16)
    given = built(x)
    assert given.dtype == torch.bfloat16
    torch.testing.assert_close(given, built(x.float()).bfloat16(), atol=0, rtol=0)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(built(x), given, atol=0, rtol=0)


def test_no_row_gives_none_and_weights_a_gradient_of_zero() -> None:
    built = layer(bidirectional=True)
    built(values(9)[:0]).sum().backward()
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in built.parameters())


@pytest.mark.parametrize("length", [64, 1000, 4096])
def test_a_scan_has_a_few_products_and_rounds_that_grow_with_the_logarithm(length: int) -> None:
    lambda_DN, weight_DN = parts()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        scan(values(length), lambda_DN, weight_DN)
    counts = {event.key: event.count for event in profile.key_averages()}
    chunks = -(-length // 64)
    assert counts["aten::einsum"] == 4
    # One join for each round over the chunks, and for each of powers of lambda.
    assert counts["aten::cat"] <= chunks.bit_length() + 20


@pytest.mark.parametrize(
    "wrong", [{"width": 0}, {"states": 0}, {"start": "legs"}, {"steps": (0.0, 1.0)}, {"steps": (0.2, 0.1)}]
)
def test_settings_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="StateSpace width="):
        StateSpace(**{"width": 4, **wrong})


def test_a_layer_that_reads_both_ways_reads_no_pieces() -> None:
    with pytest.raises(UserError, match="needs whole sequences; set bidirectional=False"):
        layer(bidirectional=True).read(values(3))
