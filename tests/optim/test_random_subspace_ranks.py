"""RandomSubspace on two ranks: sharded (FSDP2) and replicated (DDP) models train as one process does.

One pair of processes does all that the tests look at.
"""

import copy
from functools import partial
from pathlib import Path

import pytest
import rank_processes
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from lightspan.core.distributed import end_process_group
from lightspan.optim.random_subspace import RandomSubspace
from lightspan.subspaces.projections import Dense, Fastfood, Sparse
from lightspan.training.strategies import shard_blocks

pytestmark = pytest.mark.ranks

STEPS, SAVED, BATCH = 12, 7, 16
OPTIMISERS = {
    "Fastfood": partial(RandomSubspace, inner=partial(torch.optim.Adam, lr=0.05), dim=20),
    "Dense, decay": partial(
        RandomSubspace, inner=partial(torch.optim.AdamW, lr=0.05, weight_decay=0.1), dim=20, projection=Dense
    ),
    "Sparse, scales": partial(
        RandomSubspace, inner=partial(torch.optim.SGD, lr=0.002, momentum=0.9), dim=20, projection=Sparse,
        layer_scales=True, per_tensor=True,
    ),
}  # fmt: skip


class Block(nn.Module):
    """A wide matrix, split along its columns, and one with an odd number of rows."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(12, 7), nn.Tanh(), nn.Linear(7, 12))

    def forward(self, x_BD: torch.Tensor) -> torch.Tensor:
        return x_BD + self.layers(x_BD)


class Net(nn.Module):
    """A head with one row, of which the second rank has none."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(5, 12)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(12, 1)

    def forward(self, x_BI: torch.Tensor) -> torch.Tensor:
        x_BD = self.stem(x_BI)
        for block in self.blocks:
            x_BD = block(x_BD)
        return self.head(x_BD)[:, 0]


def net() -> Net:
    torch.manual_seed(0)
    return Net().double()


def train(model: nn.Module, optimizer: RandomSubspace, steps: range, rank: int = 0, ranks: int = 1) -> list[float]:
    """This rank's share of the loss of each whole batch."""
    losses = []
    for step in steps:
        x_BI = torch.randn(BATCH, 5, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        x_BI = x_BI.chunk(ranks)[rank]
        loss = (model(x_BI) - x_BI.sin().sum(1)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item() / ranks)
    return losses


def moved(optimizer: RandomSubspace, reached: list[int]) -> bool:
    """Whether a step changes a weight or what `inner` keeps, where the loss of this rank reached those parameters."""
    parameters = optimizer.slice.parameters
    for number in reached:
        parameters[number].grad = torch.ones_like(parameters[number])
    before = copy.deepcopy([*parameters, optimizer.state_dict()["state"][0]])
    optimizer.step()
    optimizer.zero_grad()
    after = [*parameters, optimizer.state_dict()["state"][0]]
    return any(not _equal(a, b) for a, b in zip(before, after, strict=True))


def _equal(a: torch.Tensor | dict, b: torch.Tensor | dict) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    return torch.equal(a, b)


def one_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    out: dict = {}
    for name, build in OPTIMISERS.items():
        model = net()
        shard_blocks(model, mesh)
        optimizer = build(model.named_parameters())
        losses = train(model, optimizer, range(SAVED), rank, 2)
        weights, state = get_state_dict(model, optimizer)
        dcp.save({"model": weights, "optimizer": state}, checkpoint_id=Path(folder, name))
        losses += train(model, optimizer, range(SAVED, STEPS), rank, 2)
        whole = [p.full_tensor().detach() for p in model.parameters()]
        kept = sum(part.numel() for part in optimizer.slice.start)
        out[name, "FSDP2"] = {"losses": losses, "weights": whole, "kept": kept}
        replica = net()
        wrapped = DistributedDataParallel(replica)
        losses = train(wrapped, build(replica.named_parameters()), range(STEPS), rank, 2)
        alone = net()
        optimizer = build(alone.named_parameters())
        optimizer.averages = True
        shares = train(alone, optimizer, range(STEPS), rank, 2)
        out[name, "coordinates"] = {"losses": shares, "weights": [p.detach().clone() for p in alone.parameters()]}
        out[name, "DDP"] = {"losses": losses, "weights": [p.detach() for p in replica.parameters()]}
        out[name, "moved"] = {"no rank": moved(optimizer, []), "one rank": moved(optimizer, [0] if rank == 0 else [])}
    projection, half = Fastfood(101, 9, 7), 51
    g_D = torch.arange(101, dtype=torch.float64).sin()
    pulled_d = projection.pull(g_D[:half] if rank == 0 else g_D[half:], half * rank)
    dist.all_reduce(pulled_d)
    out["slices"] = pulled_d
    torch.save(out, Path(folder, f"{rank}.pt"))
    end_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def runs(folder: Path) -> list[dict]:
    rank_processes.start(one_rank, 2, str(folder))
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("how", ["FSDP2", "DDP", "coordinates"])
@pytest.mark.parametrize("name", OPTIMISERS)
def test_two_ranks_train_as_one_process(runs, name, how) -> None:
    model = net()
    losses = train(model, OPTIMISERS[name](model.named_parameters()), range(STEPS))
    assert losses[-1] < losses[0]
    both = [sum(pair) for pair in zip(*(out[name, how]["losses"] for out in runs), strict=True)]
    torch.testing.assert_close(both, losses, rtol=1e-9, atol=0)
    for out in runs:
        for found, wanted in zip(out[name, how]["weights"], model.parameters(), strict=True):
            torch.testing.assert_close(found, wanted.detach(), rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", OPTIMISERS)
def test_where_no_rank_has_a_gradient_there_is_no_step(runs, name) -> None:
    """As when a step is skipped: neither momentum nor weight decay acts. A gradient of one rank moves both."""
    for out in runs:
        assert out[name, "moved"] == {"no rank": False, "one rank": True}


def test_a_rank_of_a_sharded_model_keeps_its_part_of_the_start_alone(runs) -> None:
    total = sum(p.numel() for p in net().parameters())
    kept = [out["Fastfood", "FSDP2"]["kept"] for out in runs]
    assert sum(kept) == total
    assert max(kept) < 0.6 * total


@pytest.mark.parametrize("name", OPTIMISERS)
def test_a_checkpoint_of_two_ranks_goes_on_in_one_process(runs, folder, name) -> None:
    straight, resumed = net(), net()
    train(straight, OPTIMISERS[name](straight.named_parameters()), range(STEPS))
    optimizer = OPTIMISERS[name](resumed.named_parameters())
    weights, state = get_state_dict(resumed, optimizer)
    dcp.load({"model": weights, "optimizer": state}, checkpoint_id=folder / name)
    set_state_dict(resumed, optimizer, model_state_dict=weights, optim_state_dict=state)
    train(resumed, optimizer, range(SAVED, STEPS))
    for found, wanted in zip(resumed.parameters(), straight.parameters(), strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-10)


def test_pulls_of_two_ranks_sum_to_that_of_one(runs) -> None:
    wanted = Fastfood(101, 9, 7).pull(torch.arange(101, dtype=torch.float64).sin())
    for out in runs:
        torch.testing.assert_close(out["slices"], wanted, rtol=1e-12, atol=1e-13)
