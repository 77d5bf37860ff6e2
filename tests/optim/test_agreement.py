"""Replicas choose alike, though last bits of what they choose from may differ: rank 0's number decides."""

import datetime
from pathlib import Path

import pytest
import rank_processes
import torch
import torch.distributed as dist
from torch import nn

from lightspan.optim.low_rank import LowRank
from lightspan.optim.ranks import RankByEnergy
from lightspan.optim.triggers import WhenCapturedFalls

pytestmark = pytest.mark.ranks

BIT = 2.0**-40


def ranks_chosen(rank: int) -> list[int]:
    """Three quarters of the energy lie in the first direction, but for a bit."""
    weight = nn.Parameter(torch.zeros(8, 2, dtype=torch.float64))
    weight.grad = torch.zeros(8, 2, dtype=torch.float64)
    weight.grad[0, 0], weight.grad[1, 1] = 3.0**0.5 * (1 + (2 * rank - 1) * BIT), 1.0
    return RankByEnergy(energy=0.75, least=1).choose([weight])


def frame_ages(rank: int) -> list[int]:
    """Half of the energy leaves the frame after the first step: a little more on rank 0, less on rank 1."""
    weight = nn.Parameter(torch.zeros(8, 4, dtype=torch.float64))
    optimizer = LowRank([weight], lr=0.0, rank=1, refresh=WhenCapturedFalls(below=0.5, check=1))
    ages = []
    for step in range(60):
        weight.grad = torch.zeros(8, 4, dtype=torch.float64)
        weight.grad[0, 0] = 1.0
        weight.grad[1, 1] = 0.0 if step == 0 else 1 + (1 - 2 * rank) * 1e-2
        optimizer.step()
        ages.append(int(optimizer.state[weight]["frame_age"]))
    return ages


def one_rank(index: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=60)
    alone = {"ranks": ranks_chosen(index), "ages": frame_ages(index)}
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", timeout, rank=index, world_size=2)
    together = {"ranks": ranks_chosen(index), "ages": frame_ages(index)}
    torch.save({"alone": alone, "together": together}, Path(folder, f"{index}.pt"))
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, list[int]]]]:
    folder = tmp_path_factory.mktemp("agreement")
    rank_processes.start(one_rank, 2, rank_processes.free_port(), str(folder))
    return [torch.load(folder / f"{index}.pt", weights_only=True) for index in range(2)]


@pytest.mark.parametrize("choice", ["ranks", "ages"])
def test_ranks_choose_what_rank_0_alone_would_have_chosen(found, choice):
    first, second = found
    assert first["alone"][choice] != second["alone"][choice]  # or nothing was there to agree on
    assert first["together"][choice] == second["together"][choice] == first["alone"][choice]
