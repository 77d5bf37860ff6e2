"""Recall of places: values by hand, ties, and queries whose place is not in the database."""

import math

import pytest
import torch

from lightspan.core.errors import UserError
from lightspan.evaluation.scores.place_recall import nearest_first, place_recall


def test_a_query_counts_once_if_any_of_the_first_k_matches() -> None:
    gallery = torch.eye(4)
    query = torch.tensor([[0.9, 0.3, 0.2, 0.1], [0.1, 0.2, 0.3, 0.9], [0.5, 0.6, 0.4, 0.1]])
    match = torch.tensor([[0, 1, 1, 0], [0, 0, 0, 1], [0, 0, 0, 0]]).bool()
    order = nearest_first(query, gallery, match, 3)
    assert order.tolist() == [[0, 1, 2], [3, 2, 1], [1, 0, 2]]
    assert place_recall(order, match, 1) == 0.5  # the third query has no place to find
    assert place_recall(order, match, 2) == place_recall(order, match, 9) == 1
    assert math.isnan(place_recall(order[2:], match[2:], 1))


def test_equal_features_find_nothing_by_the_order_of_rows() -> None:
    same, match = torch.ones(5, 3), torch.eye(5).bool()
    order = nearest_first(same, same * 2, match, 5)
    assert [place_recall(order, match, k) for k in (1, 4, 5)] == [0, 0, 1]


def test_the_scale_of_rows_does_not_matter_and_nan_is_refused() -> None:
    query, gallery = torch.randn(4, 6), torch.randn(7, 6)
    match = torch.zeros(4, 7, dtype=torch.bool)
    order = nearest_first(query, gallery, match, 7)
    assert torch.equal(order, (torch.nn.functional.normalize(gallery) @ query.T).T.argsort(1, descending=True))
    assert torch.equal(nearest_first(1e-30 * query, 1e25 * gallery, match, 7), order)
    with pytest.raises(UserError, match="NaN"):
        nearest_first(query * torch.nan, gallery, match, 7)
