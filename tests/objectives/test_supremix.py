"""SupReMix against loops over anchors, pairs and mixtures, its limits, and what it must not depend on."""

import math
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightspan.core.errors import UserError
from lightspan.objectives.info_nce import nt_xent
from lightspan.objectives.supcon import supcon
from lightspan.objectives.supremix import mixed_pairs, supremix

PLAIN = {"window": 0.0, "distance_weight": 0.0}


def rows(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def targets(count: int, levels: int = 8, seed: int = 0) -> Tensor:
    return torch.randint(levels, (count,), generator=torch.Generator().manual_seed(seed)).double()


def by_loops(z: Tensor, y: list[float], share: list[float] | None, window: float, weight: float, t: float) -> float:
    """One anchor and one term at a time, with the vectors of all mixtures."""
    v = z.numpy() / np.linalg.norm(z.numpy(), axis=1, keepdims=True)
    count, anchors = len(v), []
    for i in range(count):
        terms = [(v[a], abs(y[i] - y[a]), y[a] == y[i]) for a in range(count) if a != i]
        if share is not None:
            for k in range(count):
                if y[k] != y[i]:
                    of_mixture = share[i] * y[i] + (1 - share[i]) * y[k]
                    terms.append((share[i] * v[i] + (1 - share[i]) * v[k], abs(y[i] - of_mixture), False))
        for j, k in product(range(count), repeat=2):
            if y[j] < y[i] < y[k] and y[i] - y[j] < window and y[k] - y[i] < window:
                a = (y[k] - y[i]) / (y[k] - y[j])
                terms.append((a * v[j] + (1 - a) * v[k], 0.0, True))
        denominator = sum((1 + weight * distance) * math.exp(v[i] @ other / t) for other, distance, _ in terms)
        positives = [v[i] @ other / t - math.log(denominator) for other, _, positive in terms if positive]
        if positives:
            anchors.append(-sum(positives) / len(positives))
    return sum(anchors) / max(len(anchors), 1)


@settings(max_examples=15)
@given(
    count=st.integers(1, 9),
    levels=st.integers(1, 9),
    window=st.sampled_from([0.0, 2.0, 5.0]),
    weight=st.sampled_from([0.0, 1.0, 0.3]),
    negatives=st.booleans(),
    seed=st.integers(0, 99),
)
def test_the_loss_is_that_of_loops_over_anchors_and_terms(
    count: int, levels: int, window: float, weight: float, negatives: bool, seed: int
) -> None:
    z, y = rows(count, seed), targets(count, levels, seed)
    share = torch.linspace(0.1, 0.6, count, dtype=torch.float64) if negatives else None
    expected = by_loops(z, y.tolist(), None if share is None else share.tolist(), window, weight, 0.3)
    assert supremix(z, y, share, window, weight, 0.3).item() == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_without_mixtures_and_weights_it_is_supcon_and_with_distinct_targets_nt_xent() -> None:
    z, y = rows(10), targets(10, 3)
    torch.testing.assert_close(supremix(z, y, temperature=0.3, **PLAIN), supcon(z, y.long(), 0.3))
    distinct = torch.arange(5).repeat(2)
    torch.testing.assert_close(supremix(z, distinct, temperature=0.3, **PLAIN), nt_xent(z[:5], z[5:], 0.3))


@settings(max_examples=15)
@given(count=st.integers(3, 12), window=st.sampled_from([1.5, 3.0, 20.0]), seed=st.integers(0, 99))
def test_every_mixed_pair_gives_the_target_of_its_anchor(count: int, window: float, seed: int) -> None:
    y = targets(count, 9, seed)
    j, k, a, stands_for = mixed_pairs(y, y, window)
    there = stands_for > 0
    of_anchor = y[:, None].expand_as(a)[there]
    torch.testing.assert_close((a * y[j] + (1 - a) * y[k])[there], of_anchor)
    assert ((a > 0) & (a < 1))[there].all()
    assert (stands_for[there] == 1).all()
    expected = {
        (i, one, other)
        for i, one, other in product(range(count), repeat=3)
        if y[one] < y[i] < y[other] and y[i] - y[one] < window and y[other] - y[i] < window
    }
    found = [(i, j[i, s].item(), k[i, s].item()) for i, s in there.nonzero().tolist()]
    assert len(found) == len(expected)
    assert set(found) == expected


def test_sampled_pairs_are_all_of_them_if_there_is_room_and_stand_for_the_others_if_not() -> None:
    z, y, share = rows(12), targets(12, 6), torch.full((12,), 0.2)
    whole = supremix(z, y, share)
    torch.testing.assert_close(supremix(z, y, share, most_pairs=100, start_B=torch.rand(12)), whole)
    pairs = mixed_pairs(y, y, 5.0)[3].sum(dim=1)
    sampled = mixed_pairs(y, y, 5.0, most_pairs=4, start_B=torch.rand(12))[3]
    assert pairs.max() > 8
    torch.testing.assert_close(sampled.sum(dim=1), pairs)  # none is left out of the counts
    assert supremix(z, y, share, most_pairs=4).item() == pytest.approx(whole.item(), rel=0.2)


def test_every_pair_is_drawn_as_often() -> None:
    y, starts = targets(12, 6), torch.linspace(0, 1, 1001)[:-1]
    j, k, _, stands_for = mixed_pairs(y[:1].repeat(1000), y, 5.0, 5, starts)
    drawn = torch.bincount((12 * j + k)[stands_for > 0], minlength=144)
    drawn = drawn[drawn > 0]
    assert len(drawn) == mixed_pairs(y[:1], y, 5.0)[3].sum() > 5
    assert drawn.max() - drawn.min() <= 5


def test_adding_a_number_to_all_targets_or_permuting_rows_changes_nothing() -> None:
    z, y, share = rows(10), targets(10), torch.linspace(0, 0.5, 10)
    loss, order = supremix(z, y, share), torch.randperm(10)
    torch.testing.assert_close(supremix(z, y + 64, share), loss)
    torch.testing.assert_close(supremix(z[order], y[order], share[order]), loss)
    assert supremix(z, 2 * y, share) != loss


def test_distance_weighs_on_negatives_alone() -> None:
    z, same = rows(6), torch.full((6,), 3.0)
    assert supremix(z, same, distance_weight=9.0) == supremix(z, same, distance_weight=0.0)
    assert supremix(z, targets(6, 2), distance_weight=9.0) > supremix(z, targets(6, 2), distance_weight=0.0)


def test_mixtures_carry_no_gradient() -> None:
    """The gradient is that of the loss with the rows of all mixtures copied before."""
    z, y = rows(5).requires_grad_(), torch.tensor([0.0, 1.0, 2.0, 2.0, 4.0], dtype=torch.float64)
    supremix(z, y, torch.full((5,), 0.3, dtype=torch.float64), temperature=0.5).backward()
    v = torch.nn.functional.normalize(z.detach(), dim=1).requires_grad_()
    c, terms = v.detach(), []
    for i in range(5):
        seen = [((v[i] @ v[a]) / 0.5, abs(y[i] - y[a]), y[a] == y[i]) for a in range(5) if a != i]
        seen += [
            (v[i] @ (0.3 * c[i] + 0.7 * c[k]) / 0.5, 0.7 * abs(y[i] - y[k]), False) for k in range(5) if y[k] != y[i]
        ]
        for j, k in product(range(5), repeat=2):
            if y[j] < y[i] < y[k]:
                a = (y[k] - y[i]) / (y[k] - y[j])
                seen.append((v[i] @ (a * c[j] + (1 - a) * c[k]) / 0.5, 0 * y[i], True))
        denominator = torch.stack([s + torch.log1p(d) for s, d, _ in seen]).logsumexp(0)
        positive = [s - denominator for s, _, p in seen if p]
        if positive:
            terms.append(-torch.stack(positive).mean())
    (expected,) = torch.autograd.grad(torch.stack(terms).mean(), v)
    (expected,) = torch.autograd.grad(torch.nn.functional.normalize(z, dim=1), z, expected)
    torch.testing.assert_close(z.grad, expected, rtol=1e-8, atol=1e-12)


def test_gradcheck() -> None:
    y = targets(5, 5)
    assert torch.autograd.gradcheck(lambda z: supremix(z, y, None, 0.0, 1.0, 0.5), rows(5).requires_grad_())


def test_settings_out_of_range_are_refused() -> None:
    for given_, message in (
        ({"window": -1.0}, "window=-1.0 must"),
        ({"most_pairs": 0}, "most_pairs=0 must"),
        ({"temperature": 0.0}, "temperature=0.0 must be above 0"),
    ):
        with pytest.raises(UserError, match=message):
            supremix(rows(4), targets(4), **given_)  # type: ignore[arg-type]
