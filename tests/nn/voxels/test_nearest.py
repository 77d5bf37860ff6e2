"""The nearest of other points, in each cloud by itself, against scipy's tree."""

import numpy as np
import torch
from scipy.spatial import cKDTree

from lightspan.nn.voxels.nearest import interpolated, largest_near, nearest_rows

ASKING, KNOWN = (7, 0, 5, 2), (20, 3, 6, 1)


def packed(counts: tuple[int, ...], seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    xyz = torch.rand(sum(counts), 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return xyz, torch.tensor([0, *np.cumsum(counts).tolist()])


def test_they_are_those_of_a_tree_and_of_the_same_cloud() -> None:
    (asking, to), (known, offsets) = packed(ASKING, 0), packed(KNOWN, 1)
    near, there = nearest_rows(asking, to, known, offsets, 4)
    for cloud, (count, rows) in enumerate(zip(ASKING, KNOWN, strict=True)):
        own, others = asking[to[cloud] : to[cloud + 1]], known[offsets[cloud] : offsets[cloud + 1]]
        if not count:
            continue
        kept = min(rows, 4)
        found = cKDTree(others.numpy()).query(own.numpy(), k=[*range(1, kept + 1)])[1] + int(offsets[cloud])
        mine = slice(int(to[cloud]), int(to[cloud + 1]))
        assert near[mine, :kept].tolist() == found.tolist()
        assert there[mine].tolist() == [[True] * kept + [False] * (4 - kept)] * count


def test_values_between_points_are_means_by_inverse_distance() -> None:
    (asking, to), (known, offsets) = packed(ASKING, 0), packed(KNOWN, 1)
    x = torch.randn(len(known), 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    near, there = nearest_rows(asking, to, known, offsets, 3)
    given = interpolated(x, known, asking, near, there)
    for row, (rows, real) in enumerate(zip(near.tolist(), there.tolist(), strict=True)):
        kept = [at for at, is_there in zip(rows, real, strict=True) if is_there]
        weights = 1 / (known[kept] - asking[row]).norm(dim=1)
        torch.testing.assert_close(
            given[row], (weights[:, None] * x[kept]).sum(0) / weights.sum(), rtol=1e-6, atol=1e-6
        )
    at_known = interpolated(x, known, known, *nearest_rows(known, offsets, known, offsets, 3))
    torch.testing.assert_close(at_known, x, rtol=1e-5, atol=1e-6)


def test_the_largest_of_the_nearest() -> None:
    x = torch.tensor([[1.0, 5.0], [3.0, 2.0], [2.0, 9.0]])
    assert largest_near(x, torch.tensor([[0, 1, 0], [2, 2, 2]])).tolist() == [[3, 5], [2, 9]]
