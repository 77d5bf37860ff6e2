"""Supervised contrast against the sums of its paper in numpy, and what it leaves out."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightspan.core.errors import UserError
from lightspan.objectives.info_nce import class_pair_loss
from lightspan.objectives.supcon import supcon


def rows(count: int, width: int = 5, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, width, dtype=torch.float64, generator=generator)


def by_sums(z: Tensor, label: list[int], temperature: float) -> float:
    """Equation 2, one anchor and one positive at a time."""
    unit = z.numpy() / np.linalg.norm(z.numpy(), axis=1, keepdims=True)
    anchors = []
    for i in range(len(z)):
        others = [a for a in range(len(z)) if a != i]
        positives = [p for p in others if label[p] == label[i]]
        denominator = sum(np.exp(unit[i] @ unit[a] / temperature) for a in others)
        terms = [np.log(np.exp(unit[i] @ unit[p] / temperature) / denominator) for p in positives]
        if positives:
            anchors.append(-sum(terms) / len(positives))
    return sum(anchors) / max(len(anchors), 1)


@settings(max_examples=40)
@given(count=st.integers(1, 12), classes=st.integers(1, 5), seed=st.integers(0, 99))
def test_loss_is_the_mean_over_anchors_of_the_mean_over_their_positives(count: int, classes: int, seed: int) -> None:
    label = torch.randint(classes, (count,), generator=torch.Generator().manual_seed(seed))
    loss = supcon(rows(count, seed=seed), label, 0.1)
    assert loss.item() == pytest.approx(by_sums(rows(count, seed=seed), label.tolist(), 0.1), rel=1e-9, abs=1e-12)


def test_three_rows_by_hand() -> None:
    """Both rows of a class have the cosine 0 with one another and 0 or 1 with the third, which is no anchor."""
    z, label = torch.eye(2, dtype=torch.float64)[[0, 1, 1]], torch.tensor([4, 4, 7])
    first, second = math.log(2), math.log(1 + math.exp(2))
    assert supcon(z, label, 0.5).item() == pytest.approx((first + second) / 2, rel=1e-12)


def test_an_anchor_is_not_its_own_positive_as_it_is_in_the_loss_of_class_pairs() -> None:
    z, label = rows(4), torch.arange(4)
    assert supcon(z, label).item() == 0
    assert class_pair_loss(z, label, label).item() > 0


def test_frequent_classes_weigh_by_their_anchors_not_by_their_pairs() -> None:
    z = rows(6)
    label = torch.tensor([0, 0, 0, 0, 1, 1])
    z[:4], z[4:] = z[0], z[4]  # every anchor of a class has the same loss
    s = float(torch.nn.functional.cosine_similarity(z[0], z[4], dim=0))
    e = [math.exp(1 / 0.5), math.exp(s / 0.5)]
    large, small = math.log(3 * e[0] + 2 * e[1]) - 2, math.log(e[0] + 4 * e[1]) - 2
    assert supcon(z, label, 0.5).item() == pytest.approx((4 * large + 2 * small) / 6, rel=1e-12)


def test_gradient_is_that_of_differences() -> None:
    label = torch.tensor([0, 1, 0, 2, 1])
    assert torch.autograd.gradcheck(lambda z: supcon(z, label, 0.3), rows(5).requires_grad_())


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.inf, math.nan])
def test_a_temperature_that_is_none_is_refused(temperature: float) -> None:
    with pytest.raises(UserError, match=r"temperature=\S+ must be above 0 and finite"):
        supcon(rows(2), torch.zeros(2, dtype=torch.int64), temperature)
