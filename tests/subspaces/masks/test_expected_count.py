"""The shift that limits an expected count."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightspan.subspaces.masks.expected_count import shift_to_count


def shift(x: Tensor, count: float) -> float:
    def sums(b: float) -> tuple[float, float]:
        p = torch.sigmoid(x - b)
        return p.sum().item(), (p * (1 - p)).sum().item()

    return shift_to_count(sums, count, len(x), x.max().item())


@settings(derandomize=True, max_examples=100, deadline=None)
@given(
    x=st.lists(st.floats(-30, 30), min_size=1, max_size=20),
    share=st.floats(0.01, 1.0),
)
def test_the_expected_count_is_brought_to_the_limit_and_never_raised(x: list[float], share: float) -> None:
    logits = torch.tensor(x, dtype=torch.float64)
    count, before = share * len(x), torch.sigmoid(logits).sum().item()
    after = torch.sigmoid(logits - shift(logits, count)).sum().item()
    assert after == pytest.approx(min(before, count) if share < 1 else before, rel=1e-5)


def test_of_all_probabilities_with_this_sum_the_nearest_are_found() -> None:
    """Against a search along random directions that keep the sum: KL(new || old) is at its minimum."""
    torch.manual_seed(0)
    x = torch.randn(30, dtype=torch.float64)
    old = torch.sigmoid(x)
    new = torch.sigmoid(x - shift(x, 6.0))

    def divergence(p: Tensor) -> float:
        return (p * (p / old).log() + (1 - p) * ((1 - p) / (1 - old)).log()).sum().item()

    for _ in range(200):
        way = torch.randn(30, dtype=torch.float64)
        moved = new + 1e-3 * (way - way.mean())
        assert divergence(moved) > divergence(new)


def test_equal_logits_and_extreme_counts() -> None:
    assert shift(torch.zeros(8), 8) == 0
    assert torch.sigmoid(torch.tensor(-shift(torch.zeros(1000), 1))).item() == pytest.approx(1e-3, rel=1e-5)
    assert math.isfinite(shift(torch.full((10,), 90.0), 1e-3))
