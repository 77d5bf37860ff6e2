"""Replicas choose alike, though last bits of what they choose from may differ: rank 0's number decides."""

import datetime
from pathlib import Path

import pytest
import rank_processes
import torch
import torch.distributed as dist
from torch import nn

from lightspan.experiments.ranks import RankByEnergy

pytestmark = pytest.mark.ranks

BIT = 2.0**-40


def ranks_chosen(rank: int) -> list[int]:
    """Three quarters of the energy lie in the first direction, but for a bit."""
    weight = nn.Parameter(torch.zeros(8, 2, dtype=torch.float64))
    weight.grad = torch.zeros(8, 2, dtype=torch.float64)
    weight.grad[0, 0], weight.grad[1, 1] = 3.0**0.5 * (1 + (2 * rank - 1) * BIT), 1.0
    return RankByEnergy(energy=0.75, least=1).choose([weight])


def one_rank(index: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=60)
    alone = ranks_chosen(index)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", timeout, rank=index, world_size=2)
    together = ranks_chosen(index)
    torch.save({"alone": alone, "together": together}, Path(folder, f"{index}.pt"))
    dist.barrier()
    dist.destroy_process_group()


def test_ranks_choose_what_rank_0_alone_would_have_chosen(tmp_path: Path) -> None:
    rank_processes.start(one_rank, 2, rank_processes.free_port(), str(tmp_path))
    first, second = (torch.load(tmp_path / f"{index}.pt", weights_only=True) for index in range(2))
    assert first["alone"] != second["alone"]  # or nothing was there to agree on
    assert first["together"] == second["together"] == first["alone"]
