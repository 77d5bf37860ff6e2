"""Mutual matches: against loops, of a picture with itself, both ways round, where gradients go, and degenerate maps."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lightspan.nn import mutual_matches as module
from lightspan.nn.mutual_matches import match_scores, mutual_matches


def unit(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype), dim=-1)


@pytest.mark.parametrize("at_once", [1, 1 << 26])
def test_matches_are_those_of_two_loops(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "AT_ONCE", at_once)
    a, b = unit(3, 64, 5), unit(3, 49, 5, seed=1)
    mean, count = match_scores(a, b)
    for pair in range(3):
        cosines = []
        for i, position in enumerate(a[pair]):
            best = max(range(49), key=lambda j, position=position, pair=pair: float(position @ b[pair, j]))
            back = max(range(64), key=lambda k, best=best, pair=pair: float(a[pair, k] @ b[pair, best]))
            if back == i:
                cosines.append(float(position @ b[pair, best]))
        assert int(count[pair]) == len(cosines) > 0
        assert float(mean[pair]) == pytest.approx(sum(cosines) / len(cosines), abs=1e-12)


def test_all_positions_of_a_picture_match_themselves_and_the_number_is_the_same_both_ways() -> None:
    a, b = unit(2, 30, 6), unit(2, 30, 6, seed=1)
    mean, count = match_scores(a, a)
    assert count.tolist() == [30, 30]
    torch.testing.assert_close(mean, torch.ones(2, dtype=torch.float64))
    assert torch.equal(mutual_matches(a, a).other_RP, torch.arange(30).expand(2, -1))
    there, back = match_scores(a, b), match_scores(b, a)
    assert torch.equal(there[1], back[1])
    torch.testing.assert_close(there[0], back[0])


def test_matches_do_not_depend_on_the_order_of_positions() -> None:
    a, b = unit(1, 20, 6), unit(1, 20, 6, seed=1)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(match_scores(a[:, order], b), match_scores(a, b))


def test_gradients_go_to_the_matched_positions_alone() -> None:
    a, b = unit(1, 9, 4).requires_grad_(), unit(1, 9, 4, seed=1).requires_grad_()
    mean, count = match_scores(a, b)
    mean.sum().backward()
    other, mutual = (each[0] for each in mutual_matches(a, b))
    assert 0 < int(count) < 9
    assert a.grad is not None
    assert b.grad is not None
    assert torch.equal(a.grad[0].abs().sum(1) > 0, mutual)
    assert set(torch.nonzero(b.grad[0].abs().sum(1))[:, 0].tolist()) == set(other[mutual].tolist())
    torch.testing.assert_close(a.grad[0, mutual], b.detach()[0, other[mutual]] / count)


def test_equal_positions_no_pairs_and_nan() -> None:
    assert match_scores(torch.ones(1, 7, 1), torch.ones(1, 7, 1))[1].tolist() == [1]
    assert match_scores(torch.zeros(1, 7, 3), torch.zeros(1, 7, 3))[0].tolist() == [0]
    mean, count = match_scores(unit(0, 7, 3), unit(0, 5, 3))
    assert mean.shape == count.shape == (0,)
    assert match_scores(unit(1, 7, 3) * torch.nan, unit(1, 7, 3))[0].shape == (1,)
    low = unit(1, 30, 8, dtype=torch.float32).bfloat16()
    assert match_scores(low, low)[0].isfinite().all()
