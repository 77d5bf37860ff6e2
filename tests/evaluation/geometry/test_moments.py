"""Streaming moments are those of numpy, however the rows were cut, and over ranks."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import rank_processes
import torch
import torch.distributed as dist
from torch import Tensor

from lightspan.core.distributed import end_process_group
from lightspan.core.errors import UserError
from lightspan.evaluation.geometry.moments import Moments

ROWS, WIDTH, CLASSES = 23, 4, 3


def rows(offset: float = 1e6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = offset + torch.randn(ROWS, WIDTH, dtype=torch.float64, generator=generator)
    return x, torch.randint(CLASSES, (ROWS,), generator=generator)


def in_batches(cuts: list[int]) -> Moments:
    x, label = rows()
    edges = [0, *cuts, ROWS]
    parts = [Moments.of(x[a:b], label[a:b]) for a, b in pairwise(edges)]
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


@pytest.mark.parametrize("cuts", [[], [1], [5, 5, 20], list(range(1, ROWS))], ids=str)
def test_batches_of_any_size_give_the_moments_that_numpy_gives(cuts: list[int]) -> None:
    x, label = (column.numpy() for column in rows())
    moments = in_batches(cuts)
    within = sum((x[label == c] - x[label == c].mean(0)).T @ (x[label == c] - x[label == c].mean(0)) for c in range(3))
    assert moments.count_C.tolist() == np.bincount(label).tolist()
    np.testing.assert_allclose(moments.mean_CD, [x[label == c].mean(0) for c in range(3)], rtol=1e-14)
    np.testing.assert_allclose(moments.within_DD, within, rtol=1e-9, atol=1e-9)
    total = moments.total()
    assert total.count == ROWS
    np.testing.assert_allclose(total.mean_CD[0], x.mean(0), rtol=1e-14)
    np.testing.assert_allclose(total.covariance(), np.cov(x.T), rtol=1e-8, atol=1e-9)


def test_two_sets_of_features_side_by_side_give_their_cross_moments() -> None:
    x, _ = rows()
    xx, xy, yy = Moments.of(x).between(1)
    apart = x - x.mean(0)
    for block, wanted in ((xx, (0, 1, 0, 1)), (xy, (0, 1, 1, WIDTH)), (yy, (1, WIDTH, 1, WIDTH))):
        a, b, c, d = wanted
        torch.testing.assert_close(block, apart[:, a:b].T @ apart[:, c:d], rtol=1e-8, atol=1e-8)


def test_constant_features_have_no_scatter_at_all() -> None:
    x = torch.full((9, 2), 0.1)
    moments = Moments.of(x[:4]) + Moments.of(x[4:], torch.tensor([1, 1, 0, 4, 0]))
    assert moments.total().within_DD.abs().max() == 0
    assert moments.count_C.tolist() == [6, 2, 0, 0, 1]
    assert moments.mean_CD[2].tolist() == [0, 0]


def test_no_rows_change_nothing() -> None:
    x, label = rows()
    empty, full = Moments.of(x[:0]), Moments.of(x, label)
    for sums in (empty + full, full + empty):
        torch.testing.assert_close(sums.within_DD, full.within_DD, rtol=0, atol=0)
        torch.testing.assert_close(sums.mean_CD, full.mean_CD, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("x", "label", "message"),
    [
        (torch.ones(3), None, r"rows \[B, D\], but got \[3\]"),
        (torch.ones(3, 2), torch.zeros(2, dtype=torch.int64), "one whole number from 0 as the label of each of 3"),
        (torch.ones(1, 2), torch.tensor([-1]), "one whole number from 0"),
        (torch.ones(1, 2), torch.tensor([0.5]), "one whole number from 0"),
        (torch.tensor([[torch.nan]]), None, "NaN or infinite"),
    ],
)
def test_what_has_no_moments_is_refused(x: Tensor, label: Tensor | None, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Moments.of(x, label)


def test_one_row_has_no_covariance() -> None:
    with pytest.raises(UserError, match="more than 1 rows, but there are 1"):
        Moments.of(torch.ones(1, 2)).covariance()


def one_rank(index: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=index, world_size=2)
    x, label = rows(3.0)
    mine = slice(0, 5) if index == 0 else slice(5, ROWS)  # rank 0 may never see the last class
    uneven = Moments.of(x[mine], label[mine].clamp_max(index + 1)).over_ranks()
    lonely = Moments.of(x[: 0 if index else ROWS]).over_ranks()
    constant = Moments.of(torch.full((3 + index, 2), 0.1)).over_ranks()
    out = {"count": uneven.count_C, "mean": uneven.mean_CD, "within": uneven.within_DD}
    torch.save({**out, "lonely": lonely.within_DD, "constant": constant.within_DD}, Path(folder, f"{index}.pt"))
    end_process_group()


def test_two_ranks_have_the_moments_of_one(tmp_path: Path) -> None:
    rank_processes.start(one_rank, 2, str(tmp_path))
    x, label = rows(3.0)
    label = torch.cat([label[:5].clamp_max(1), label[5:]])
    alone = Moments.of(x, label)
    for index in range(2):
        out = torch.load(tmp_path / f"{index}.pt", weights_only=True)
        assert torch.equal(out["count"], alone.count_C)
        torch.testing.assert_close(out["mean"], alone.mean_CD, rtol=1e-12, atol=0)
        torch.testing.assert_close(out["within"], alone.within_DD, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(out["lonely"], Moments.of(x).within_DD, rtol=1e-12, atol=1e-12)
        assert out["constant"].abs().max() == 0
