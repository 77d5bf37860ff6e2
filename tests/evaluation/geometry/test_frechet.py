import numpy as np
import pytest
import scipy.linalg
import torch

from lightspan.core.errors import UserError
from lightspan.evaluation.geometry.frechet import frechet_distance, gaussian_distance, principal_directions


def rows(count: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(5, 5, generator=generator, dtype=torch.float64)
    return torch.randn(count, 5, generator=generator, dtype=torch.float64) @ mix + seed


def test_it_is_the_formula_with_scipys_matrix_root() -> None:
    a, b = rows(40, 1), rows(30, 2)
    c_a, c_b = np.cov(a.T), np.cov(b.T)
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum().item()
    expected += np.trace(c_a + c_b - 2 * scipy.linalg.sqrtm(c_a @ c_b).real)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-8)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-8)


def test_equal_sets_are_at_distance_zero_and_a_shift_at_its_square() -> None:
    a = rows(40, 1)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-10)
    assert frechet_distance(a, a + torch.tensor([3.0, 4, 0, 0, 0])) == pytest.approx(25)
    assert frechet_distance(a[:, :1], 2 * a[:, :1] - a[:, :1].mean()) == pytest.approx(a[:, 0].var().item())


def test_a_rotation_of_both_changes_nothing() -> None:
    a, b = rows(40, 1), rows(30, 2)
    turn = torch.linalg.qr(rows(5, 3)).Q
    assert frechet_distance(a @ turn, b @ turn) == pytest.approx(frechet_distance(a, b))


def test_principal_directions_are_orthonormal_and_hold_the_most_variance() -> None:
    a = rows(40, 1)
    mean, directions = principal_directions(a, 2)
    torch.testing.assert_close(directions.T @ directions, torch.eye(2, dtype=torch.float64))
    kept = ((a - mean) @ directions).var(dim=0)
    expected = torch.linalg.eigvalsh(a.T.cov()).flip(0)[:2]
    torch.testing.assert_close(kept, expected, rtol=1e-10, atol=0)


def test_the_distance_scales_with_the_square_until_it_cannot_be_held() -> None:
    a, b = rows(40, 1).double(), rows(30, 2).double()
    for power in (-400, 400):  # where squares of squares vanish or overflow
        expected = frechet_distance(a, b) * 2.0**power * 2.0**power
        assert frechet_distance(a * 2.0**power, b * 2.0**power) == pytest.approx(expected, rel=1e-8, abs=0)
    with pytest.raises(UserError, match="so large that their squared distance overflows"):
        frechet_distance(a * 1e200, b * 1e200)


def test_what_has_no_distance_is_refused() -> None:
    with pytest.raises(UserError, match=r"sets of \[1, 5\] and \[30, 5\] need at least 2 rows"):
        frechet_distance(rows(40, 1)[:1], rows(30, 2))
    with pytest.raises(UserError, match=r"6 principal directions are outside \[1, 5\]"):
        principal_directions(rows(40, 1), 6)


def test_covariances_that_overflow_are_refused_and_not_decomposed() -> None:
    ones, huge = torch.eye(2), 1e200 * torch.eye(2, dtype=torch.float64)
    for a, b in ((huge, huge), (huge * 1e200, ones.double()), (ones.double(), huge * 1e200)):
        with pytest.raises(UserError, match="overflow"):
            gaussian_distance(torch.zeros(2), a, torch.zeros(2), b)
