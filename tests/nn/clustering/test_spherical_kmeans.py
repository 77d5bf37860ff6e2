"""Spherical k-means: its objective never falls, fixed points, empty clusters, and ranks."""

from itertools import pairwise
from pathlib import Path

import pytest
import rank_processes
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from lightspan.core.distributed import end_process_group
from lightspan.core.errors import UserError
from lightspan.nn.clustering.spherical_kmeans import drawn_rows, spherical_kmeans


def rows(count: int = 60) -> Tensor:
    return torch.randn(count, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_the_objective_never_falls_and_is_the_sum_of_cosines() -> None:
    start = rows()[:7]
    seen = [spherical_kmeans(rows(), start, steps).objective for steps in range(12)]
    assert all(after >= before - 1e-12 for before, after in pairwise(seen))
    assert seen[-1] > seen[0] + 1
    found = spherical_kmeans(rows(), start, 12)
    own = F.normalize(rows(), dim=1) @ found.centroid_KD.T
    torch.testing.assert_close(found.objective, own.max(dim=1).values.sum())
    assert torch.equal(found.nearest_M, own.argmax(dim=1))
    torch.testing.assert_close(found.centroid_KD.norm(dim=1), torch.ones(7).double())


def test_at_its_end_each_centroid_is_the_direction_of_its_rows() -> None:
    found, unit = spherical_kmeans(rows(), rows()[:5], 50), F.normalize(rows(), dim=1)
    for cluster, centroid in enumerate(found.centroid_KD):
        torch.testing.assert_close(F.normalize(unit[found.nearest_M == cluster].sum(dim=0), dim=0), centroid)


def test_empty_clusters_opposite_rows_and_zeros_are_finite() -> None:
    axes = torch.eye(2)
    far = spherical_kmeans(axes[:1].repeat(4, 1), torch.cat([axes, -axes[1:]]), 3)
    assert torch.equal(far.centroid_KD, torch.cat([axes, -axes[1:]]))  # two have no rows, and stay
    opposite = spherical_kmeans(torch.tensor([[0.0, 1.0], [0.0, -1.0]]), axes[:1], 3)
    assert torch.equal(opposite.centroid_KD, axes[:1])  # its rows sum to zero
    assert spherical_kmeans(torch.zeros(3, 2), axes, 2).nearest_M.tolist() == [0, 0, 0]
    assert spherical_kmeans(torch.zeros(0, 2), axes, 2).objective == 0
    assert spherical_kmeans(axes.bfloat16(), axes.bfloat16(), 2).objective == 2


def test_the_start_is_different_rows_whatever_their_order() -> None:
    order = torch.randperm(60, generator=torch.Generator().manual_seed(1))
    start = drawn_rows(rows(), torch.arange(60), 9, seed=3)
    assert torch.equal(start, drawn_rows(rows()[order], order, 9, seed=3))
    assert not torch.equal(start, drawn_rows(rows(), torch.arange(60), 9, seed=4))
    assert len(start.unique(dim=0)) == 9
    with pytest.raises(UserError, match="k-means of 61 clusters needs as many rows, and there are 60"):
        drawn_rows(rows(), torch.arange(60), 61, seed=0)


def one_rank(index: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=index, world_size=2)
    part = (slice(0, 25), slice(25, 60))[index]
    sent, send = [], dist.all_reduce
    dist.all_reduce = lambda tensor, *rest, **more: (sent.append(tensor.numel()), send(tensor, *rest, **more))
    start = drawn_rows(rows()[part], torch.arange(60)[part], 7, seed=0)
    dist.all_reduce = send
    assert max(sent) == 60  # the order of all rows; of their numbers only those of the 7 that are drawn
    torch.save(spherical_kmeans(rows()[part], start)._asdict() | {"start": start}, Path(folder, f"{index}.pt"))
    end_process_group()


@pytest.mark.ranks
def test_ranks_find_what_one_process_finds(tmp_path: Path) -> None:
    rank_processes.start(one_rank, 2, str(tmp_path))
    parts = [torch.load(tmp_path / f"{index}.pt", weights_only=True) for index in range(2)]
    start = drawn_rows(rows(), torch.arange(60), 7, seed=0)
    whole = spherical_kmeans(rows(), start)
    assert torch.equal(torch.cat([part["nearest_M"] for part in parts]), whole.nearest_M)
    for part in parts:
        assert torch.equal(part["start"], start)
        torch.testing.assert_close(part["centroid_KD"], whole.centroid_KD)
        torch.testing.assert_close(part["objective"], whole.objective)
