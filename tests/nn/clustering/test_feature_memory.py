"""Features by image number, of all micro-batches of a step, and the clusters of those that are known."""

import pytest
import torch

from lightspan.core.errors import UserError
from lightspan.nn.clustering.feature_memory import FeatureMemory
from lightspan.nn.clustering.spherical_kmeans import drawn_rows, spherical_kmeans


def filled(count: int = 12) -> FeatureMemory:
    memory, row = FeatureMemory(20, 3), torch.randn(count, 3, generator=torch.Generator().manual_seed(0))
    memory.see(row[:5], torch.arange(5), 0)
    memory.see(row[5:], torch.arange(5, count), 0)
    memory.follow()
    return memory


def test_rows_of_all_micro_batches_take_their_places_after_the_step_and_a_skipped_step_leaves_none() -> None:
    memory = FeatureMemory(6, 2)
    memory.see(torch.full((2, 2), torch.nan), torch.tensor([0, 1]), 0)  # its step was not taken
    memory.see(torch.ones(1, 2), torch.tensor([4]), 1)
    assert not memory.rows_MF.any()
    memory.see(2 * torch.ones(1, 2), torch.tensor([2]), 1)
    memory.follow()
    assert memory.rows_MF[:, 0].tolist() == [0, 0, 2, 0, 1, 0]
    assert memory.known().tolist() == [2, 4]


def test_clusters_are_the_best_of_several_starts_over_known_rows() -> None:
    memory = filled()
    index_N, cluster_N = memory.clusters(3, [0, 1, 2, 3], 10)
    assert index_N.tolist() == [*range(12)]
    rows = memory.rows_MF[:12]
    runs = [spherical_kmeans(rows, drawn_rows(rows, torch.arange(12), 3, seed), 10) for seed in range(4)]
    best = max(runs, key=lambda run: float(run.objective))
    assert torch.equal(cluster_N, best.nearest_M)
    assert best.objective > min(run.objective for run in runs)  # so that the choice shows


def test_more_clusters_than_known_images_and_no_place_at_all_are_refused() -> None:
    with pytest.raises(UserError, match="k-means of 13 clusters needs as many rows, and there are 12"):
        filled().clusters(13, [0], 1)
    with pytest.raises(UserError, match="images=0 must be at least 1"):
        FeatureMemory(0, 3)
