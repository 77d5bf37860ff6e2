"""Chamfer distance: against scipy, by hand, its gradient, and what it must not depend on."""

import numpy as np
import pytest
import torch
from scipy.spatial import cKDTree
from torch.autograd import gradcheck

from lightspan.core.errors import UserError
from lightspan.objectives.chamfer import chamfer_loss, chamfer_squared


def sets(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(4, count, 3, generator=generator, dtype=torch.float64).to(dtype) for count in (6, 9))  # type: ignore[return-value]


def test_it_is_the_mean_of_squared_distances_to_the_nearest_both_ways() -> None:
    a, b = sets()
    expected = [
        np.square(cKDTree(y).query(x)[0]).mean() + np.square(cKDTree(x).query(y)[0]).mean()
        for x, y in zip(a.numpy(), b.numpy(), strict=True)
    ]
    np.testing.assert_allclose(chamfer_squared(a, b).numpy(), expected)
    line = torch.tensor([[[0.0, 0, 0], [3, 0, 0]]])
    assert chamfer_squared(line, torch.tensor([[[1.0, 0, 0]]])).tolist() == [(1 + 4) / 2 + 1]


def test_its_gradient_is_right_and_it_is_symmetric_and_blind_to_order_and_place() -> None:
    a, b = sets()
    assert gradcheck(chamfer_squared, (a.requires_grad_(), b.requires_grad_()))
    a, b = sets()
    found = chamfer_squared(a, b)
    for other in (chamfer_squared(b, a), chamfer_squared(a.flip(1), b), chamfer_squared(a + 7, b + 7)):
        torch.testing.assert_close(other, found)
    assert not chamfer_squared(a, a.flip(1)).any()


def test_unknown_pairs_add_nothing_and_half_types_are_computed_in_float32() -> None:
    a, b = sets(torch.bfloat16)
    known = torch.tensor([True, False, True, False])
    a[1] = torch.nan
    loss = chamfer_loss(a.requires_grad_(), b, known)
    torch.testing.assert_close(loss, chamfer_squared(a, b)[known].mean())
    assert loss.dtype == torch.float32
    loss.backward()
    assert a.grad is not None
    assert a.grad[known].isfinite().all()
    assert chamfer_loss(a[:0], b[:0], known[:0]) == 0
    with pytest.raises(UserError, match="no distance"):
        chamfer_squared(a[:, :0], b)
