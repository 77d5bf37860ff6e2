"""Assignments against all permutations, places of groups by hand, and scores that tell nothing."""

from itertools import permutations

import pytest
import torch
from torch import Tensor

from lightspan.evaluation.alignment.matching import assigned, cosines, matching_accuracy, numbered_rows, ranks


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("size", [1, 2, 5, 7])
def test_an_assignment_is_the_best_of_all_permutations(size: int) -> None:
    scores, rows = drawn(size, size, seed=size), torch.arange(size)
    best = max(permutations(range(size)), key=lambda columns: float(scores[rows, list(columns)].sum()))
    assert assigned(scores).tolist() == list(best)


def test_any_column_of_a_group_is_right() -> None:
    scores = torch.tensor([[0.0, 2.0, 0.0], [2.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    assert matching_accuracy(scores, torch.arange(3)) == pytest.approx(1 / 3)
    assert matching_accuracy(scores, torch.tensor([5, 5, 9])) == 1
    assert matching_accuracy(scores[:0, :0], torch.arange(0)) == 0


def test_places_count_groups_by_their_best_row() -> None:
    scores = torch.tensor([[0.9, 0.8, 0.7, 0.1], [0.9, 0.8, 0.7, 0.1]])
    group = torch.tensor([1, 1, 2, 3])
    assert ranks(scores, torch.tensor([2, 3]), group).tolist() == [2, 3]
    assert ranks(scores, torch.tensor([1, 7]), group).tolist() == [1, 4]  # nobody is of group 7


def test_scores_without_a_difference_find_nothing() -> None:
    scores, group = torch.ones(9, 9), torch.arange(9)
    assert ranks(scores, group, group).tolist() == [9] * 9
    assert matching_accuracy(scores, group) == pytest.approx(1 / 9)


def test_cosines_of_equal_rows_are_equal_and_those_of_zeros_0() -> None:
    x = drawn(4, 6)
    rows = torch.cat([x, 3 * x, 1e-200 * x, 0 * x])
    found = cosines(rows, rows)
    assert torch.equal(found[:4, :4], found[4:8, 8:12])
    assert torch.equal(found.diagonal()[:12], torch.ones(12, dtype=torch.float64))
    assert not found[12:].any()


def test_equal_rows_are_one_group() -> None:
    assert numbered_rows(torch.tensor([[1.0, 2.0], [0.0, 5.0], [1.0, 2.0]])).tolist() == [1, 0, 1]
    assert numbered_rows(torch.zeros(3, 0)).tolist() == [0, 0, 0]
