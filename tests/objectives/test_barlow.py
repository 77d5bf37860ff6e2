import numpy as np
import pytest
import torch
from host_reads import HostReads
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lightspan.objectives.barlow import barlow_twins_loss, cross_correlation, mixed_regulariser, standardise


def double(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def test_loss_of_a_case_worked_by_hand() -> None:
    # Columns (1, -1) have standard deviation 1, so Z = (1, -1) and every |C_ij| = 1.
    a = torch.tensor([[1.0, 1.0], [-1.0, -1.0]], dtype=torch.float64)
    b = torch.tensor([[1.0, -1.0], [-1.0, 1.0]], dtype=torch.float64)
    za, zb = standardise(a), standardise(b)
    torch.testing.assert_close(cross_correlation(za, zb), torch.tensor([[1, -1], [1, -1]], dtype=torch.float64))
    expected = (1 - 1) ** 2 + (-1 - 1) ** 2 + 0.1 * (1**2 + 1**2)
    torch.testing.assert_close(barlow_twins_loss(za, zb, 0.1), scalar(expected), rtol=1e-11, atol=0)


@given(rows=st.integers(6, 30), width=st.integers(1, 9), weight=st.floats(0, 2), seed=st.integers(0, 99))
def test_loss_equals_the_one_from_numpys_correlation_coefficients(
    rows: int, width: int, weight: float, seed: int
) -> None:
    a, b = 3 * double(rows, width, seed=seed) + 1, double(rows, width, seed=seed + 1000) - 2
    c = np.corrcoef(a.numpy().T, b.numpy().T)[:width, width:]
    expected = sum((c[i, j] - 1) ** 2 if i == j else weight * c[i, j] ** 2 for i in range(width) for j in range(width))
    loss = barlow_twins_loss(standardise(a), standardise(b), weight)
    assert loss.item() == pytest.approx(expected, rel=1e-8, abs=1e-10)


@pytest.mark.parametrize("rows", [2, 5, 64])
def test_equal_views_cost_nothing_but_the_correlations_of_different_features(rows: int) -> None:
    """C is Pearson's coefficient, and C_ii = 1, whatever the batch."""
    x = double(rows, 6)
    z = standardise(x)
    torch.testing.assert_close(cross_correlation(z, z).diagonal(), torch.ones(6, dtype=torch.float64))
    assert barlow_twins_loss(z, standardise(3 * x - 1), 0.0) < 1e-18
    white = torch.linalg.qr(torch.cat([torch.ones(64, 1, dtype=torch.float64), double(64, 6)], dim=1)).Q[:, 1:]
    assert barlow_twins_loss(standardise(white), standardise(2 * white), 1.0) < 1e-18


def test_loss_is_unchanged_when_the_samples_of_both_views_are_permuted_together() -> None:
    a, b, p = double(20, 6), double(20, 6, seed=1), torch.randperm(20)
    before = barlow_twins_loss(standardise(a), standardise(b), 0.3)
    torch.testing.assert_close(barlow_twins_loss(standardise(a[p]), standardise(b[p]), 0.3), before, rtol=1e-12, atol=0)
    assert not torch.allclose(barlow_twins_loss(standardise(a[p]), standardise(b), 0.3), before, rtol=1e-3)


def test_loss_is_unchanged_when_the_views_swap_and_when_features_are_shifted_and_scaled() -> None:
    a, b = double(20, 6), double(20, 6, seed=1)
    before = barlow_twins_loss(standardise(a), standardise(b), 0.3)
    torch.testing.assert_close(barlow_twins_loss(standardise(b), standardise(a), 0.3), before, rtol=1e-12, atol=0)
    shifted = a * torch.linspace(0.5, 4, 6, dtype=torch.float64) + 7
    torch.testing.assert_close(barlow_twins_loss(standardise(shifted), standardise(b), 0.3), before, rtol=1e-10, atol=0)


def regulariser_by_the_formula(zm: Tensor, z1: Tensor, z2: Tensor, a: float, p: Tensor) -> float:
    """The README's formula term by term, in numpy."""
    rows = len(z1)
    m, x, y, xp = zm.numpy(), z1.numpy(), z2.numpy(), z2[p].numpy()
    target_1 = a * x.T @ x / rows + (1 - a) * xp.T @ x / rows
    target_2 = a * x.T @ y / rows + (1 - a) * xp.T @ y / rows
    return ((m.T @ x / rows - target_1) ** 2).sum() + ((m.T @ y / rows - target_2) ** 2).sum()


@given(mix=st.floats(0, 1), seed=st.integers(0, 99))
def test_regulariser_equals_the_formula_of_the_authors_readme(mix: float, seed: int) -> None:
    zm, z1, z2 = (standardise(double(12, 5, seed=seed + k)) for k in range(3))
    p = torch.randperm(12, generator=torch.Generator().manual_seed(seed))
    value = mixed_regulariser(zm, z1, z2, scalar(mix), p).item()
    assert value == pytest.approx(regulariser_by_the_formula(zm, z1, z2, mix, p), rel=1e-10, abs=1e-14)


@pytest.mark.parametrize("mix", [0.0, 1.0])
def test_regulariser_vanishes_where_the_mixture_is_one_of_the_views(mix: float) -> None:
    torch.manual_seed(0)
    encode = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 8)).double()
    x1, x2, p = double(32, 6), double(32, 6, seed=1), torch.randperm(32)
    z1, z2, zm = (standardise(encode(x)) for x in (x1, x2, mix * x1 + (1 - mix) * x2[p]))
    assert mixed_regulariser(zm, z1, z2, scalar(mix), p).item() < 1e-10
    halfway = standardise(encode(0.5 * x1 + 0.5 * x2[p]))
    assert mixed_regulariser(halfway, z1, z2, scalar(0.5), p).item() > 1e-2


@given(mix=st.floats(0, 1))
def test_regulariser_vanishes_for_a_linear_encoder_without_standardisation(mix: float) -> None:
    x1, x2, weight, p = double(32, 6), double(32, 6, seed=1), double(6, 8, seed=2), torch.randperm(32)
    zm = (mix * x1 + (1 - mix) * x2[p]) @ weight
    assert mixed_regulariser(zm, x1 @ weight, x2 @ weight, scalar(mix), p).item() < 1e-20


def test_gradients_pass_gradcheck_and_flow_through_the_targets() -> None:
    e1, e2, em = (double(6, 3, seed=k).requires_grad_() for k in range(3))
    p = torch.tensor([3, 0, 1, 5, 2, 4])

    def barlow(a: Tensor, b: Tensor) -> Tensor:
        return barlow_twins_loss(standardise(a), standardise(b), 0.2)

    def mixed(m: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return mixed_regulariser(standardise(m), standardise(a), standardise(b), scalar(0.4), p)

    assert torch.autograd.gradcheck(barlow, (e1, e2))
    # Finite differences move the targets too, so a stop-gradient on them would fail here.
    assert torch.autograd.gradcheck(mixed, (em, e1, e2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("dead", [0.0, 0.1, 1000.3])
def test_a_dead_feature_gives_finite_loss_and_gradients(dead: float, dtype: torch.dtype) -> None:
    x = double(8, 3).to(dtype)
    x[:, 1] = dead
    x.requires_grad_()
    z = standardise(x)
    barlow_twins_loss(z, z, 0.2).backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    assert z[:, 1].abs().max() < 0.1


@pytest.mark.parametrize("rows", [2, 7, 64])
def test_a_batch_of_equal_rows_has_no_correlations(rows: int) -> None:
    x = double(1, 5).float().expand(rows, -1).clone().requires_grad_()
    loss = barlow_twins_loss(standardise(x), standardise(1000 * x), 0.2)
    loss.backward()
    assert loss.item() == pytest.approx(5, rel=0.05)  # every C_ii is 0
    assert x.grad is not None
    assert x.grad.isfinite().all()


def test_nothing_waits_for_the_device() -> None:
    x, p, mix = torch.randn(6, 3, requires_grad=True), torch.tensor([3, 0, 1, 5, 2, 4]), torch.tensor(0.5)
    with HostReads() as reads:
        z1, z2, zm = (standardise(k * x) for k in (1, 2, 3))
        (barlow_twins_loss(z1, z2, 0.2) + mixed_regulariser(zm, z1, z2, mix, p)).backward()
    assert reads.count == 0


def test_autocast_does_not_narrow_the_correlations() -> None:
    x1, x2 = double(16, 5).float(), double(16, 5, seed=1).float()
    expected = cross_correlation(standardise(x1), standardise(x2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(cross_correlation(standardise(x1), standardise(x2)), expected)
    half = cross_correlation(standardise(x1.bfloat16()), standardise(x2.bfloat16()))
    assert half.dtype == torch.float32


def test_one_row_counts_as_equal_rows_as_on_several_ranks_and_none_as_well() -> None:
    one = double(1, 4).requires_grad_()
    assert torch.equal(standardise(one), torch.zeros(1, 4))
    loss = barlow_twins_loss(standardise(one), standardise(double(1, 4, seed=1)), 0.1)
    assert loss == 4
    loss.backward()
    assert one.grad is not None
    assert one.grad.isfinite().all()
    assert barlow_twins_loss(standardise(double(0, 4)), standardise(double(0, 4)), 0.1) == 4
