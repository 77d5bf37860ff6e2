"""SIGReg: its integral against scipy and lightly, and what it holds a Gaussian for."""

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from torch import Tensor

from lightspan.core.errors import UserError
from lightspan.objectives.sigreg import epps_pulley, random_directions, sigreg


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_the_statistic_is_the_integral_of_the_distance_of_characteristic_functions() -> None:
    x = normal(7, 1).numpy()[:, 0]

    def integrand(t: float) -> float:
        return abs(np.exp(1j * t * x).mean() - np.exp(-(t**2) / 2)) ** 2 * np.exp(-(t**2) / 2)

    expected = 7 * quad(integrand, -3, 3)[0]
    statistic = epps_pulley(torch.from_numpy(x)[None, :, None], reach=3.0, points=400)
    assert statistic.shape == (1, 1)
    assert statistic.item() == pytest.approx(expected, rel=1e-5)
    assert epps_pulley(torch.from_numpy(x)[None, :, None]).item() == pytest.approx(expected, rel=2e-3)


def test_one_row_at_zero_by_hand() -> None:
    """phi = 1: two trapezoids of (1 - g)^2 g over [-1, 1], once with weight 1/2 at the end."""
    g = np.exp(-0.5)
    assert epps_pulley(torch.zeros(1, 1, 1), reach=1.0, points=2).item() == pytest.approx((1 - g) ** 2 * g, rel=1e-6)


def test_lightly_has_the_same_statistic_for_the_same_directions(monkeypatch: pytest.MonkeyPatch) -> None:
    peers = pytest.importorskip("lightly.loss", reason="the extra `peers` is not installed")
    z = normal(2, 8, 5).float()
    theirs = peers.SIGReg(num_vectors=6)
    monkeypatch.setattr(theirs, "_generate_unit_vectors", lambda *_: random_directions(5, 6, 0, 2))
    torch.testing.assert_close(sigreg(z, 0, 2, directions=6), theirs(z), rtol=1e-5, atol=1e-6)


def test_directions_are_unit_vectors_and_a_function_of_seed_and_step() -> None:
    torch.manual_seed(0)
    first, state = random_directions(5, 40, 1, 7), torch.get_rng_state()
    torch.testing.assert_close(first.norm(dim=0), torch.ones(40))
    torch.manual_seed(9)
    assert torch.equal(random_directions(5, 40, 1, 7), first)
    for seed, step in ((1, 8), (2, 7), (0, 7)):
        assert not torch.equal(random_directions(5, 40, seed, step), first)
    torch.manual_seed(0)
    assert torch.equal(torch.get_rng_state(), state)  # nothing of the global generator is used


def test_a_gaussian_scores_below_what_is_wider_narrower_shifted_correlated_or_collapsed() -> None:
    z = normal(1, 500, 4)
    gaussian = sigreg(z, 0, 0, 64)
    others = (2 * z, 0.5 * z, z + 1, z[..., :1].expand_as(z), torch.zeros_like(z), z.sign())
    assert all(sigreg(other, 0, 0, 64) > 2 * gaussian for other in others)


def test_it_does_not_depend_on_the_order_of_rows_or_sets_and_is_their_mean() -> None:
    z = normal(2, 9, 4)
    loss = sigreg(z, 0, 0, 16)
    torch.testing.assert_close(sigreg(z.flip(0), 0, 0, 16), loss)
    torch.testing.assert_close(sigreg(z.flip(1), 0, 0, 16), loss)
    torch.testing.assert_close((sigreg(z[:1], 0, 0, 16) + sigreg(z[1:], 0, 0, 16)) / 2, loss)


def test_gradient_is_that_of_differences() -> None:
    assert torch.autograd.gradcheck(lambda z: sigreg(z, 0, 1, 3), normal(2, 4, 3).requires_grad_())


@pytest.mark.parametrize("bad", [{"directions": 0}, {"reach": 0.0}, {"reach": float("nan")}, {"points": 1}])
def test_numbers_out_of_range_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(UserError, match=r"(directions|reach|points)=\S+ must"):
        sigreg(normal(1, 4, 3), 0, 0, **bad)
