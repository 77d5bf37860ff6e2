"""Agreement of clusters and classes by hand, and clusters of points that are plainly apart."""

import pytest
import torch

from lightspan.core.errors import UserError
from lightspan.evaluation.geometry.clustering import (
    agreement,
    kmeans,
    matched_accuracy,
    renumbered,
    spectral,
    spectral_of_neighbours,
)


def apart(each: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    label = torch.arange(3).repeat_interleave(each)
    return torch.randn(3 * each, 2, generator=generator) / 10 + 5 * torch.eye(3, 2)[label], label


def test_the_best_matching_counts_and_spare_clusters_are_wrong() -> None:
    label = torch.tensor([0, 0, 0, 1, 1, 2])
    assert matched_accuracy(torch.tensor([7, 7, 7, 0, 0, 3]), label) == 1
    assert matched_accuracy(torch.tensor([4, 4, 5, 5, 5, 5]), label) == pytest.approx(4 / 6)
    assert matched_accuracy(torch.arange(6), label) == pytest.approx(3 / 6)  # every row a cluster
    assert matched_accuracy(torch.zeros(6).long(), label) == pytest.approx(3 / 6)  # one cluster


def test_scores_do_not_depend_on_the_names_of_clusters() -> None:
    label, cluster = torch.tensor([0, 0, 1, 1, 2, 2]), torch.tensor([0, 1, 1, 1, 2, 0])
    scores = agreement(cluster, label)
    assert agreement(torch.tensor([9, 4, 6])[cluster], label) == pytest.approx(scores)
    assert agreement(label, label) == pytest.approx({"accuracy": 1, "nmi": 1, "ari": 1})


def test_clusters_that_are_apart_are_found() -> None:
    x, label = apart()
    same = (label[:, None] == label).float() + 0.01
    for found in (kmeans(x, 3), spectral_of_neighbours(x, 3, neighbours=8), spectral(same, 3)):
        assert matched_accuracy(found, label) == 1


def test_as_many_clusters_as_rows_and_one() -> None:
    x, _ = apart(1)
    assert spectral(torch.eye(3), 3).tolist() == [0, 1, 2]
    assert sorted(kmeans(x, 3).tolist()) == [0, 1, 2]
    assert kmeans(x, 1).tolist() == spectral_of_neighbours(x, 1).tolist() == [0, 0, 0]


def test_what_has_no_clusters_is_refused() -> None:
    x, label = apart()
    with pytest.raises(UserError, match=r"clusters=37 is outside \[1, 36\]"):
        kmeans(x, 37)
    with pytest.raises(UserError, match="NaN or infinite"):
        spectral(torch.full((3, 3), torch.nan), 2)
    with pytest.raises(UserError, match="clusters of no rows"):
        agreement(label[:0], label[:0])


def test_clusters_take_the_numbers_that_overlap_most_with_those_before() -> None:
    before = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2])
    now = torch.tensor([2, 2, 2, 0, 0, 1, 1, 1])
    assert renumbered(now, before).tolist() == [0, 0, 0, 1, 1, 2, 2, 2]
    assert torch.equal(renumbered(before, before), before)
    one = torch.zeros(8, dtype=torch.int64)
    more = renumbered(now, one)  # the first cluster is split in three
    assert sorted(set(more.tolist())) == [0, 1, 2]
    assert torch.equal(more == more[0], now == now[0])
    assert len(renumbered(one[:0], one[:0])) == 0
