"""Rows of an evaluation are scored as one, in the order of their numbers, on any number of ranks."""

from pathlib import Path

import pytest
import rank_processes
import torch
import torch.distributed as dist
from torch import Tensor

from lightspan.core.distributed import end_process_group
from lightspan.evaluation.probes.evaluated_rows import EvaluatedRows


def measure(row_ND: Tensor, label_N: Tensor) -> dict[str, float]:
    """Depends on the order."""
    weights = torch.arange(1.0, len(row_ND) + 1)
    return {"sum": float(weights @ row_ND.sum(dim=1)), "labels": float(weights @ label_N.float()), "more": 0.0}


def scored(order: Tensor) -> dict[str, float]:
    rows = EvaluatedRows()
    for index_B in order.split(2):
        rows.add(torch.stack([index_B * 2.0, index_B + 0.0], dim=1), index_B % 3, index_B)
    return {name: float(figure) for name, figure in rows.score(("sum", "labels"), measure).items()}


WHOLE = {"sum": sum(3.0 * i * (i + 1) for i in range(7)), "labels": sum((i % 3) * (i + 1.0) for i in range(7))}


def test_figures_do_not_depend_on_the_order_of_batches_and_rows_are_used_once() -> None:
    assert scored(torch.arange(7)) == scored(torch.tensor([6, 0, 3, 1, 5, 2, 4])) == WHOLE
    rows = EvaluatedRows()
    assert rows.score(("sum",), measure) == {}
    rows.add(torch.ones(1, 2), torch.zeros(1), torch.zeros(1))
    rows.clear()
    assert rows.score(("sum",), measure) == {}


def _on_rank(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    assert scored(torch.tensor([0, 2, 4, 6] if rank == 0 else [1, 3, 5])) == WHOLE
    end_process_group()


@pytest.mark.ranks
def test_two_ranks_have_the_figures_of_one(tmp_path: Path) -> None:
    rank_processes.start(_on_rank, 2, str(tmp_path))
