"""The metric of class statistics is the `Moments` of all rows, in any batches, orders, dtypes and ranks."""

from pathlib import Path

import pytest
import rank_processes
import torch
import torch.distributed as dist
from torch import Tensor

from lightspan.core.distributed import end_process_group
from lightspan.core.errors import UserError
from lightspan.evaluation.gaussians.class_moments import ClassMoments
from lightspan.evaluation.geometry.moments import Moments


def rows() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return 1e3 + torch.randn(23, 4, generator=generator), torch.randint(2, (23,), generator=generator)


def same(one: Moments, other: Moments) -> None:
    assert torch.equal(one.count_C, other.count_C)
    torch.testing.assert_close(one.mean_CD, other.mean_CD, rtol=1e-13, atol=0)
    torch.testing.assert_close(one.within_DD, other.within_DD, rtol=1e-9, atol=1e-9)


def test_batches_in_any_order_and_metrics_that_are_merged_give_the_moments_of_all_rows() -> None:
    (x, label), expected = rows(), Moments.of(*rows(), classes=3)
    order = torch.randperm(23, generator=torch.Generator().manual_seed(1))
    one, first, second = ClassMoments(3, 4), ClassMoments(3, 4), ClassMoments(3, 4)
    for part in order.split(5):
        one.update(x[part], label[part])
    one(x[:0], label[:0])  # forward, with a batch of nothing
    first.update(x[:9], label[:9])
    second.update(x[9:], label[9:])
    first.merge_state(second)
    for metric in (one, first):
        same(metric.moments(), expected)
    one.reset()
    assert one.moments().count == 0


def test_half_rows_are_summed_in_float64_and_the_state_is_saved() -> None:
    x, label = rows()
    metric = ClassMoments(2, 4, persistent=True).bfloat16()
    metric.update(x.bfloat16(), label)
    same(metric.moments(), Moments.of(x.bfloat16().double(), label))
    other = ClassMoments(2, 4, persistent=True)
    other.load_state_dict(metric.state_dict())
    same(other.moments(), metric.moments())
    assert not ClassMoments(2, 4).state_dict()


def one_rank(index: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=index, world_size=2)
    x, label = rows()
    metric = ClassMoments(2, 4)
    metric.update(x[: 5 if index == 0 else 0], label[: 5 if index == 0 else 0])
    if index:
        metric.update(x[5:], label[5:])
    torch.save(vars(metric.moments()), Path(folder, f"{index}.pt"))
    end_process_group()


@pytest.mark.ranks
def test_two_ranks_have_the_moments_of_one(tmp_path: Path) -> None:
    rank_processes.start(one_rank, 2, str(tmp_path))
    for index in range(2):
        same(Moments(**torch.load(tmp_path / f"{index}.pt", weights_only=True)), Moments.of(*rows()))


def test_rows_and_labels_of_another_form_are_refused() -> None:
    metric = ClassMoments(2, 4)
    with pytest.raises(UserError, match="of 2 classes and 4 features got 2 classes of 3 features"):
        metric.update(torch.ones(1, 3), torch.zeros(1).long())
    with pytest.raises(UserError, match="got 6 classes of 4 features"):
        metric.update(torch.ones(1, 4), torch.tensor([5]))
    with pytest.raises(UserError, match="num_classes=0"):
        ClassMoments(0, 4)
