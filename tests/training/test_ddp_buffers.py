"""Buffers under the strategy DDP: what all ranks compute alike is sent once, what differs is rank 0's as in torch."""

import copy
import os
from functools import partial
from pathlib import Path
from typing import Any

import method_runs
import pytest
import rank_processes
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightspan.backbones.vision import SmallConvNet
from lightspan.core.distributed import register_replicated, replicated_buffers
from lightspan.methods.clustering.deepcluster import DeepCluster
from lightspan.methods.clustering.swav import SwAV
from lightspan.methods.contrastive.moco import MoCo
from lightspan.nn.heads.projector import Projector
from lightspan.training.method import Method
from lightspan.training.strategies import DDP

STEPS, QUEUE = 3, 1000
SGD = {"optimizer": partial(torch.optim.SGD, lr=0.05)}


def parts() -> tuple[nn.Module, Projector]:
    return SmallConvNet(width=4, stages=2), Projector(8, [16], 6)


# Each with buffers that are random at the start and that a rank must not keep for itself.
METHODS = {
    "MoCo": lambda: MoCo(*parts(), queue=QUEUE, **SGD),
    "SwAV": lambda: SwAV(*parts(), prototypes=5, queue=QUEUE, **SGD),
    "DeepCluster": lambda: DeepCluster(*parts(), images=QUEUE, prototypes=(5, 4), **SGD),
}


def statistics(model: nn.Module) -> dict[str, Tensor]:
    """Of the BatchNorms."""
    known = ("running_mean", "running_var", "num_batches_tracked")
    return {name: buffer.clone() for name, buffer in model.named_buffers() if name.rpartition(".")[2] in known}


def one_rank(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "NODE_RANK": "0"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    seen, send = {}, dist._broadcast_coalesced
    sent = [0]

    def counted(group: Any, tensors: list[Tensor], *rest: Any) -> None:
        sent[-1] += sum(tensor.nbytes for tensor in tensors)
        send(group, tensors, *rest)

    dist._broadcast_coalesced = counted
    for name, make in METHODS.items():
        torch.manual_seed(rank)  # as in a program that seeds each rank differently
        model: Method = make()
        entered, left, step = [], [], model.training_step

        def watched(*given: Any, model: Method = model, step: Any = step, entered: Any = entered, left: Any = left):
            entered.append(statistics(model))
            loss = step(*given)
            left.append(statistics(model))
            sent.append(0)
            return loss

        model.training_step = watched  # type: ignore[method-assign]
        sent[:] = [0]
        batches = [method_runs.batch(4, seed=2 * at + rank, locals_=0) for at in range(STEPS)]
        method_runs.fit(model, batches, Path(folder), strategy=DDP(), devices=2, use_distributed_sampler=False)
        seen[name] = {
            "sent": sent[:STEPS],
            "entered": entered,
            "left": left,
            "state": {key: value for key, value in model.state_dict().items() if key not in statistics(model)},
        }
    torch.save(seen, Path(folder, f"{rank}.pt"))


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("buffers")
    rank_processes.start(one_rank, 2, rank_processes.free_port(), str(folder))
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.ranks
@pytest.mark.parametrize("method", METHODS)
def test_a_step_sends_the_running_statistics_and_neither_queue_nor_memory(ranks: Any, method: str) -> None:
    running = sum(tensor.nbytes for tensor in ranks[0][method]["entered"][0].values())
    first, *later = ranks[0][method]["sent"]
    assert first > QUEUE * 6 * 4  # all of the module once, when it is wrapped
    assert later == [running] * (STEPS - 1)


@pytest.mark.ranks
@pytest.mark.parametrize("method", METHODS)
def test_weights_queues_and_memories_are_equal_on_all_ranks_from_any_seeds(ranks: Any, method: str) -> None:
    mine, other = (of[method]["state"] for of in ranks)
    assert any(name.endswith(("rows_LD", "memory_GMD")) for name in mine)
    for name, tensor in mine.items():
        assert torch.equal(tensor, other[name]), name


@pytest.mark.ranks
@pytest.mark.parametrize("method", METHODS)
def test_every_step_begins_with_rank_0s_running_statistics(ranks: Any, method: str) -> None:
    mine, other = (of[method] for of in ranks)
    differ = False
    for step in range(STEPS):
        for name, tensor in mine["entered"][step].items():
            assert torch.equal(tensor, other["entered"][step][name]), (step, name)
            differ |= not torch.equal(mine["left"][step][name], other["left"][step][name])
    assert differ  # else it would say nothing: each rank has seen its own images


def test_a_copy_of_a_module_keeps_the_mark() -> None:
    net = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 2))
    register_replicated(net[1], "table", torch.zeros(3))
    register_replicated(net, "other", torch.zeros(3), persistent=False)
    assert replicated_buffers(copy.deepcopy(net)) == {"1.table", "other"}
    assert "other" not in net.state_dict()
