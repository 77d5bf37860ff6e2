"""The selective scan against its definition step by step, and what it must be where coefficients are constant."""

import pytest
import torch
from torch import Tensor

from lightspan.core.errors import UserError
from lightspan.nn.sequences.selective_scan import SelectiveScan, linear_recurrence, selective_scan


def given(length: int, seed: int = 0) -> list[Tensor]:
    """u, delta, A, B, C of two sequences, three sets of weights, two channels and three states, float64."""
    draws = torch.Generator().manual_seed(seed)
    u, delta = (torch.randn(2, 3, length, 2, generator=draws, dtype=torch.float64) for _ in range(2))
    A = -torch.rand(3, 2, 3, generator=draws, dtype=torch.float64) * 3
    B, C = (torch.randn(2, 3, length, 3, generator=draws, dtype=torch.float64) for _ in range(2))
    return [u, delta.exp(), A, B, C]


def step_by_step(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    h, found = torch.zeros(len(u), *A.shape, dtype=u.dtype) if state is None else state, []
    for t in range(u.shape[2]):
        d = delta[:, :, t, :, None]
        h = (d * A).exp() * h + d * B[:, :, t, None] * u[:, :, t, :, None]
        found.append((h * C[:, :, t, None]).sum(dim=3))
    return torch.stack(found, dim=2), h


def test_it_is_the_recurrence_step_by_step_and_so_are_its_gradients() -> None:
    for length, chunk in ((1, 256), (2, 256), (7, 256), (16, 256), (7, 3), (8, 4), (9, 1)):
        inputs = [each.requires_grad_() for each in given(length, length)]
        found, expected = selective_scan(*inputs, chunk=chunk), step_by_step(*inputs)
        torch.testing.assert_close(found, expected, atol=1e-10, rtol=1e-10)
        weight = torch.randn_like(expected[0])
        grads = [torch.autograd.grad((y * weight).sum() + state.sum(), inputs) for y, state in (found, expected)]
        torch.testing.assert_close(*grads, atol=1e-10, rtol=1e-10)


def test_a_sequence_in_two_pieces_is_one_sequence() -> None:
    u, delta, A, B, C = given(11)
    first, state = selective_scan(u[:, :, :4], delta[:, :, :4], A, B[:, :, :4], C[:, :, :4])
    second, end = selective_scan(u[:, :, 4:], delta[:, :, 4:], A, B[:, :, 4:], C[:, :, 4:], state, chunk=2)
    whole, expected = selective_scan(u, delta, A, B, C)
    torch.testing.assert_close((torch.cat([first, second], dim=2), end), (whole, expected), atol=1e-12, rtol=1e-12)


def test_first_and_second_derivatives_of_the_recurrence_are_right() -> None:
    for length in (1, 2, 5):
        a, x = (torch.rand(2, length, 2, dtype=torch.float64, requires_grad=True) for _ in range(2))
        assert torch.autograd.gradcheck(linear_recurrence, (a, x))
        assert torch.autograd.gradgradcheck(linear_recurrence, (a, x))


def test_constant_coefficients_are_a_causal_convolution() -> None:
    u, _, A, _, _ = given(9)
    delta, B, C = torch.full_like(u, 0.3), *(torch.full((2, 3, 9, 3), value, dtype=u.dtype) for value in (0.7, -1.2))
    lags = torch.arange(9, dtype=u.dtype)
    kernel_KDl = (C[0, 0, 0, 0] * (0.3 * A[..., None] * lags).exp() * 0.3 * 0.7).sum(dim=2)
    expected = torch.stack(
        [(u[:, :, : t + 1].flip(2) * kernel_KDl[..., : t + 1].transpose(1, 2)).sum(2) for t in range(9)], dim=2
    )
    torch.testing.assert_close(selective_scan(u, delta, A, B, C)[0], expected)


def test_without_decay_it_sums_and_with_endless_decay_it_forgets() -> None:
    u = given(300)[0].float()
    ones_B = torch.ones(2, 3, 300, 1)
    summed, _ = selective_scan(u, torch.ones_like(u), torch.zeros(3, 2, 1), ones_B, ones_B)
    torch.testing.assert_close(summed, u.cumsum(dim=2), atol=1e-4, rtol=1e-4)
    A = torch.full((3, 2, 1), -1e4, requires_grad=True)  # exp underflows
    forgot, _ = selective_scan(u, torch.ones_like(u), A, ones_B, ones_B)
    assert torch.equal(forgot, u)
    forgot.sum().backward()
    assert A.grad is not None
    assert A.grad.isfinite().all()


def test_a_layer_chooses_by_the_step_alone_and_looks_back() -> None:
    torch.manual_seed(0)
    layer = SelectiveScan(4, copies=3, states=2)
    x = torch.randn(2, 3, 10, 4)
    later = x.clone()
    later[:, :, 6:] = torch.randn(2, 3, 4, 4)
    before, after = layer(x), layer(later)
    torch.testing.assert_close(before[:, :, :6], after[:, :, :6])
    assert not torch.allclose(before[:, :, 6:], after[:, :, 6:])
    alone = SelectiveScan(4, copies=1, states=2)
    alone.load_state_dict({name: weight[1:2] for name, weight in layer.state_dict().items()})
    torch.testing.assert_close(alone(x[:, 1:2]), before[:, 1:2])


def test_a_layer_starts_as_published_and_computes_in_float32() -> None:
    torch.manual_seed(0)
    layer = SelectiveScan(40, copies=2, states=3)
    delta = torch.nn.functional.softplus(layer.delta_bias_KD)
    assert 1e-3 <= delta.min() < 1.5e-3
    assert 7e-2 < delta.max() <= 1e-1 + 1e-6
    torch.testing.assert_close(layer.log_decay_KDN.exp(), torch.tensor([1.0, 2.0, 3.0]).expand(2, 40, 3))
    assert (layer.skip_KD == 1).all()
    assert layer.delta_KDR.shape == (2, 40, 3)
    assert layer.bfloat16()(torch.randn(1, 2, 5, 40).bfloat16()).dtype == torch.float32
    assert layer(torch.zeros(0, 2, 5, 40)).shape == (0, 2, 5, 40)


def test_sizes_that_do_not_fit_are_named() -> None:
    for settings in ({"width": 0}, {"states": 0}, {"rank": 0}, {"steps": (0.1, 0.01)}, {"steps": (0.0, 0.1)}):
        with pytest.raises(UserError, match=next(iter(settings))):
            SelectiveScan(**{"width": 4, **settings})
