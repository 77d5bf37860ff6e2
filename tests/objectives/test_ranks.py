"""Objectives over two ranks of different batch size: loss and gradient of one process, in few collectives."""

from pathlib import Path

import pytest
import rank_processes
import torch
import torch.distributed as dist
from objective_cases import CASES
from torch import Tensor

from lightspan.core.distributed import end_process_group
from lightspan.objectives.barlow import standardise

pytestmark = pytest.mark.ranks

ROWS, RANKS = 16, 2
PARTS = (slice(0, 5), slice(5, ROWS))  # of the ranks
LABEL_B = torch.tensor([1, 3, 3, 1, 3, 4, 1, 4, 3, 1, 1, 4, 3, 3, 1, 3])
MIXED_B = torch.tensor([3, 0, 1, 4, 2, 6, 5, 8, 7, 15, 9, 10, 12, 11, 14, 13])  # within each part


def inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(n, 4, dtype=torch.float64, generator=generator) for n in (ROWS, 4))
    return x, weight.requires_grad_()


def one_rank(index: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=index, world_size=RANKS)
    out, reduce, calls = {}, dist.all_reduce, [0]

    def counted(*args: object, **options: object) -> object:
        calls[0] += 1
        return reduce(*args, **options)

    dist.all_reduce = counted
    for name, case in CASES.items():
        x, weight = inputs()
        part = PARTS[index]
        own = x[part]
        calls[0] = 0
        loss = case.loss(own, weight, LABEL_B[part], MIXED_B[part] - part.start)
        forward = calls[0]
        (loss / RANKS).backward()  # the mean over ranks is DDP's
        total = loss.detach() / RANKS
        reduce(weight.grad)
        reduce(total)
        out[name] = {"loss": total, "grad": weight.grad, "collectives": torch.tensor(forward)}
    lonely = standardise(torch.ones(1 - index, 3))  # one row on one of the ranks
    out["lonely"] = {"largest": lonely.abs().sum()}
    torch.save(out, Path(folder, f"{index}.pt"))
    end_process_group()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Tensor]]]:
    folder = tmp_path_factory.mktemp("objectives")
    rank_processes.start(one_rank, RANKS, str(folder))
    return [torch.load(folder / f"{index}.pt", weights_only=True) for index in range(RANKS)]


@pytest.mark.parametrize("name", CASES)
def test_ranks_of_unequal_batches_give_the_loss_and_the_gradient_of_one(
    name: str, two_ranks: list[dict[str, dict[str, Tensor]]]
) -> None:
    x, weight = inputs()
    loss = CASES[name].loss(x, weight, LABEL_B, MIXED_B)
    loss.backward()
    for out in two_ranks:
        torch.testing.assert_close(out[name]["loss"], loss.detach(), rtol=1e-12, atol=0)
        torch.testing.assert_close(out[name]["grad"], weight.grad, rtol=1e-10, atol=1e-13)
        assert out[name]["collectives"] == CASES[name].collectives


def test_one_row_on_all_ranks_is_standardised_to_zero(two_ranks: list[dict[str, dict[str, Tensor]]]) -> None:
    assert all(out["lonely"]["largest"] == 0 for out in two_ranks)
