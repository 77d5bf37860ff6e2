"""Bits per byte, recall among the first k, and accuracy with few labels: the same for any batches and ranks."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import rank_processes
import torch
import torch.distributed as dist
from sklearn.metrics import top_k_accuracy_score
from torch import Tensor
from torchmetrics import Metric

from lightspan.core.distributed import end_process_group
from lightspan.core.errors import UserError
from lightspan.evaluation.probes.few_labels import FewLabelAccuracy
from lightspan.evaluation.scores.bits_per_byte import BitsPerByte
from lightspan.evaluation.scores.recall_at_k import RecallAtK


def nats(generator: torch.Generator) -> tuple[Tensor, ...]:
    """Of texts of 1 to 9 tokens of up to 4 bytes."""
    return torch.rand(40, generator=generator), torch.randint(5, (40,), generator=generator)


def scores(generator: torch.Generator) -> tuple[Tensor, ...]:
    """With ties; some queries look for several documents and some for none."""
    return torch.randn(40, 12, generator=generator).round(decimals=1), torch.rand(40, 12, generator=generator) < 0.1


def classes(generator: torch.Generator) -> tuple[Tensor, ...]:
    label = torch.arange(40) % 3
    return torch.randn(40, 4, generator=generator) + 2 * torch.eye(4)[label], label, torch.arange(40).flip(0)


MADE: dict[str, tuple[Callable[[], Metric], Callable[[torch.Generator], tuple[Tensor, ...]]]] = {
    "bits per byte": (BitsPerByte, nats),
    "recall": (lambda: RecallAtK(3), scores),
    "few labels": (lambda: FewLabelAccuracy(shots=4, draws=2), classes),
}


def given(name: str) -> tuple[Metric, tuple[Tensor, ...]]:
    make, rows = MADE[name]
    return make(), rows(torch.Generator().manual_seed(0))


def expected(name: str) -> float:
    metric, rows = given(name)
    metric.update(*rows)
    return float(metric.compute())


@pytest.mark.parametrize("name", MADE)
def test_batches_of_any_size_in_any_order_give_one_result(name: str) -> None:
    metric, rows = given(name)
    for part in torch.randperm(40, generator=torch.Generator().manual_seed(1)).split(7):
        metric.update(*(column[part] for column in rows))
    assert float(metric.compute()) == pytest.approx(expected(name), rel=1e-12)
    metric.reset()
    assert not metric.state_dict()


def test_bits_per_byte_divides_sums_and_is_no_mean_over_texts() -> None:
    metric = BitsPerByte()
    metric.update(torch.tensor([math.log(2)] * 8), torch.tensor([1] * 8))
    metric.update(torch.tensor(2 * math.log(2), dtype=torch.bfloat16).double(), torch.tensor(12))
    assert float(metric.compute()) == pytest.approx(10 / 20, rel=1e-2)
    assert math.isnan(BitsPerByte().compute())


def test_of_one_document_a_query_recall_is_scikit_learns_accuracy_among_the_first_k() -> None:
    table = torch.randn(50, 6, generator=torch.Generator().manual_seed(2))
    wanted = torch.arange(50) % 6
    metric = RecallAtK(2)
    metric.update(table, torch.eye(6)[wanted])
    assert float(metric.compute()) == pytest.approx(top_k_accuracy_score(wanted, table, k=2))


def test_recall_by_hand_counts_each_wanted_document_and_no_query_that_wants_none() -> None:
    metric = RecallAtK(2)
    match = torch.tensor([[1, 1, 1, 0], [0, 0, 0, 1], [0, 0, 0, 0]])
    metric.update(torch.tensor([[4.0, 3, 2, 1]] * 3, dtype=torch.bfloat16), match)
    assert float(metric.compute()) == pytest.approx((2 / 3 + 0) / 2)
    alike = RecallAtK(1)
    alike.update(torch.ones(4, 4), torch.eye(4))
    assert float(alike.compute()) == 0
    assert math.isnan(RecallAtK().compute())


def test_few_labels_of_classes_far_apart_suffice_and_of_noise_do_not() -> None:
    generator = torch.Generator().manual_seed(0)
    label, noise = torch.arange(200) % 2, torch.randn(200, 3, generator=generator)
    apart, alike = FewLabelAccuracy(shots=2), FewLabelAccuracy(shots=2)
    apart.update(noise + 20 * label[:, None], label, torch.arange(200))
    alike.update(noise, label, torch.arange(200))
    assert float(apart.compute()) == 1
    assert float(alike.compute()) < 0.6


def test_settings_and_rows_that_cannot_work_are_refused() -> None:
    with pytest.raises(UserError, match="k=0 must be at least 1"):
        RecallAtK(0)
    with pytest.raises(UserError, match="shots=0"):
        FewLabelAccuracy(0)
    with pytest.raises(UserError, match="the model has diverged"):
        RecallAtK().update(torch.tensor([[np.nan]]), torch.ones(1, 1))
    few = FewLabelAccuracy(shots=3)
    few.update(torch.zeros(8, 2), torch.tensor([0] * 5 + [1] * 3), torch.arange(8))
    with pytest.raises(UserError, match=r"class 1 has 3 rows.*shots=3"):
        few.compute()


def one_rank(index: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=index, world_size=2)
    own, found = slice(0, 14) if index else slice(14, None), {}
    for name in MADE:
        metric, rows = given(name)
        metric.update(*(column[own] for column in rows))
        found[name] = float(metric.compute())
    torch.save(found, Path(folder, f"{index}.pt"))
    end_process_group()


@pytest.mark.ranks
def test_ranks_count_as_one(tmp_path: Path) -> None:
    rank_processes.start(one_rank, 2, str(tmp_path))
    for index in range(2):
        found = torch.load(tmp_path / f"{index}.pt")
        assert found == pytest.approx({name: expected(name) for name in MADE}, rel=1e-12)


def test_rows_that_do_not_belong_together_are_refused() -> None:
    for scores_BG, match_BG in ((torch.zeros(2, 3), torch.zeros(2, 4)), (torch.zeros(3), torch.zeros(3))):
        with pytest.raises(UserError, match="matches of the same shape"):
            RecallAtK(2).update(scores_BG, match_BG)
    for rows in (
        (torch.zeros(4, 2), torch.zeros(3), torch.arange(4)),
        (torch.zeros(4, 2), torch.zeros(4), torch.arange(3)),
        (torch.zeros(4), torch.zeros(4), torch.arange(4)),
    ):
        with pytest.raises(UserError, match="a label and a number for each row"):
            FewLabelAccuracy().update(*rows)
    with pytest.raises(UserError, match="there is no row to learn from"):
        FewLabelAccuracy().compute()
    with pytest.raises(UserError, match="l2=nan"):
        FewLabelAccuracy(l2=math.nan)
