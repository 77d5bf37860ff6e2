"""The discrepancy of two sets: a double loop, a set and itself, sets apart and alike, and too few rows."""

import math

import pytest
import torch
from torch import Tensor

from lightspan.core.errors import UserError
from lightspan.objectives.mmd import WIDTHS, mmd

X = torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = torch.randn(7, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 1


def by_loops(x: Tensor, y: Tensor, unbiased: bool) -> float:
    rows = [*x, *y]
    distances = [float((a - b).square().sum()) for i, a in enumerate(rows) for j, b in enumerate(rows) if i != j]
    unit = sum(distances) / len(distances)

    def kernel(a: Tensor, b: Tensor) -> float:
        return sum(math.exp(-float((a - b).square().sum()) / (w * unit)) for w in WIDTHS) / len(WIDTHS)

    def within(one: Tensor) -> float:
        terms = [kernel(a, b) for i, a in enumerate(one) for j, b in enumerate(one) if not unbiased or i != j]
        return sum(terms) / len(terms)

    return within(x) + within(y) - 2 * sum(kernel(a, b) for a in x for b in y) / (len(x) * len(y))


@pytest.mark.parametrize("unbiased", [True, False])
def test_it_is_what_a_double_loop_gives_and_symmetric(unbiased: bool) -> None:
    found = mmd(X, Y, unbiased=unbiased)
    assert float(found) == pytest.approx(by_loops(X, Y, unbiased), abs=1e-12)
    assert float(found) == pytest.approx(float(mmd(Y, X, unbiased=unbiased)), abs=1e-12)


def test_a_set_and_itself_are_not_apart_and_the_unbiased_one_is_0_on_average() -> None:
    assert float(mmd(X, X, unbiased=False)) == pytest.approx(0, abs=1e-12)
    generator = torch.Generator().manual_seed(0)
    alike = [float(mmd(*torch.randn(2, 20, 3, generator=generator))) for _ in range(200)]
    assert abs(sum(alike) / 200) < 3 * torch.tensor(alike).std() / 200**0.5
    assert min(alike) < 0
    assert float(mmd(X, X + 5)) > 0.5


def test_the_gradient_is_that_of_finite_differences_with_the_unit_held() -> None:
    x = X.clone().requires_grad_()
    mmd(x, Y).backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0
    with torch.no_grad():  # towards the other set it falls
        assert mmd(X - 1e-3 * x.grad, Y) < mmd(X, Y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_few_rows_equal_rows_and_large_ones_have_finite_gradients(dtype: torch.dtype) -> None:
    for x, y in (
        (X[:1], Y),
        (X[:0], Y),
        (X * 0, Y * 0),
        (X * 0, Y),
        (X[:1].expand(4, 3), X[:1].expand(3, 3)),
        (X * 1e4, Y),
    ):
        x = x.to(dtype).clone().requires_grad_()
        found = mmd(x, y.to(dtype))
        found.backward()
        assert found.isfinite()
        assert x.grad is not None
        assert x.grad.isfinite().all()
    assert mmd(X[:1], Y) == 0
    assert mmd(X * 0, Y * 0) == 0


def test_the_unit_has_no_gradient_and_makes_the_scale_of_rows_nothing() -> None:
    x = X.clone().requires_grad_()
    (found,) = torch.autograd.grad(mmd(x, Y), x)
    rows = torch.cat([X, Y])
    unit = torch.cdist(rows, rows).square().sum() / (12 * 11)

    def held(x: Tensor) -> Tensor:
        def kernel(a: Tensor, b: Tensor) -> Tensor:
            squared = (a[:, None] - b[None]).square().sum(dim=2)
            return torch.stack([(-squared / (w * unit)).exp() for w in WIDTHS]).mean(dim=0)

        own = kernel(x, x)
        return (own.sum() - own.trace()) / 20 - 2 * kernel(x, Y).mean()

    (expected,) = torch.autograd.grad(held(x), x)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-9)
    for scale in (1e-4, 1e4):
        assert float(mmd(scale * X, scale * Y)) == pytest.approx(float(mmd(X, Y)), abs=1e-9)


def test_where_both_sets_stand_does_not_matter() -> None:
    """States of a network have a large mean beside which what tells them apart is small."""
    x, y = X.float(), Y.float()
    for far in (1e3, torch.tensor([0.0, -1e4, 3e3])):
        assert float(mmd(x + far, y + far)) == pytest.approx(float(mmd(x, y)), abs=2e-3)


def test_widths_that_cannot_be_are_refused() -> None:
    for widths in ((), (1.0, 0.0)):
        with pytest.raises(UserError, match="must name at least one, all above 0"):
            mmd(X, Y, widths)


@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("seed", range(8))
def test_rows_that_are_all_alike_are_not_apart_and_are_not_moved(seed: int, unbiased: bool) -> None:
    """Features that have collapsed: what rounding leaves of their distances is no direction."""
    row = torch.randn(30 + 17 * seed, generator=torch.Generator().manual_seed(seed))
    x, y = row.expand(2 + 3 * seed, -1).clone().requires_grad_(), row.expand(19, -1)
    found = mmd(x, y, unbiased=unbiased)
    found.backward()
    assert found == 0
    assert x.grad is not None
    assert not x.grad.any()


def test_a_single_row_is_enough_for_the_biased_one() -> None:
    assert float(mmd(X[:1], Y, unbiased=False)) == pytest.approx(by_loops(X[:1], Y, False), abs=1e-12)
    assert mmd(X[:0], Y, unbiased=False) == 0


def test_half_precision_is_widened_also_under_autocast() -> None:
    x, y = X.bfloat16(), Y.bfloat16()
    expected = mmd(x.float(), y.float())
    with torch.autocast("cpu", torch.bfloat16):
        found = mmd(x, y)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)
    assert torch.equal(mmd(x, y), expected)
