from pathlib import Path

import pytest
import rank_processes
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lightspan.core.distributed import all_reduce_sum, end_process_group, rank, world_size
from lightspan.objectives.barlow import barlow_twins_loss, mixed_regulariser, standardise

pytestmark = pytest.mark.ranks

RANKS, ROWS = 2, 12


def encoder() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 4)).double()


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Two views, the mixing scalar, and a permutation that stays inside each rank's half."""
    generator = torch.Generator().manual_seed(1)
    x1, x2 = torch.randn(2, ROWS, 5, dtype=torch.float64, generator=generator)
    half = ROWS // RANKS
    permutation = torch.cat([torch.randperm(half, generator=generator) + half * r for r in range(RANKS)])
    return x1, x2, torch.tensor(0.3, dtype=torch.float64), permutation


def mixed_barlow(model: nn.Module, x1: torch.Tensor, x2: torch.Tensor, mix: torch.Tensor, p: torch.Tensor):
    # One forward for all three: DDP wants one forward a step. Each part is standardised by itself.
    parts = model(torch.cat([x1, x2, mix * x1 + (1 - mix) * x2[p]])).split(len(x1))
    z1, z2, zm = (standardise(part) for part in parts)
    return barlow_twins_loss(z1, z2, 0.01) + 0.04 * mixed_regulariser(zm, z1, z2, mix, p)


def gradients(model: nn.Module) -> torch.Tensor:
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


def one_rank(index: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=index, world_size=RANKS)
    assert (rank(), world_size()) == (index, RANKS)

    # L = (sum of all x)^2 on every rank: dL/dx = 2 * sum, times the ranks whose losses are summed.
    x = torch.tensor([1.0 + index], requires_grad=True)
    total = all_reduce_sum(x)
    total.square().sum().backward()

    half = ROWS // RANKS
    mine = slice(index * half, (index + 1) * half)
    x1, x2, mix, permutation = inputs()
    model = DistributedDataParallel(encoder())
    loss = mixed_barlow(model, x1[mine], x2[mine], mix, permutation[mine] - index * half)
    loss.backward()
    out = {"total": total.detach(), "x_grad": x.grad, "loss": loss.detach(), "grad": gradients(model)}
    torch.save(out, Path(folder, f"{index}.pt"))
    del model, loss
    end_process_group()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, torch.Tensor]]:
    folder = tmp_path_factory.mktemp("two_ranks")
    rank_processes.start(one_rank, RANKS, str(folder))
    return [torch.load(folder / f"{index}.pt", weights_only=True) for index in range(RANKS)]


def test_without_a_process_group_the_sum_is_the_input_itself() -> None:
    x = torch.ones(3, requires_grad=True)
    assert all_reduce_sum(x) is x
    assert (rank(), world_size()) == (0, 1)


def test_sum_and_its_gradient_run_over_all_ranks(two_ranks: list[dict[str, torch.Tensor]]) -> None:
    for out in two_ranks:
        assert out["total"].item() == 3.0
        assert out["x_grad"].item() == RANKS * 2 * 3.0


def test_two_ranks_under_ddp_give_the_loss_and_the_gradient_of_one(two_ranks: list[dict[str, torch.Tensor]]) -> None:
    model = encoder()
    loss = mixed_barlow(model, *inputs())
    loss.backward()
    for out in two_ranks:
        torch.testing.assert_close(out["loss"], loss.detach(), rtol=1e-12, atol=0)
        torch.testing.assert_close(out["grad"], gradients(model), rtol=1e-10, atol=1e-13)
