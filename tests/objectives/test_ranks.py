"""Objectives over two ranks of different batch size: loss and gradient of one process, in few collectives."""

from collections.abc import Callable
from pathlib import Path

import pytest
import rank_processes
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from lightspan.distributed import leave
from lightspan.objectives.barlow import barlow_twins_loss, mixed_regulariser, standardise
from lightspan.objectives.class_text import current_class_text_loss

pytestmark = pytest.mark.ranks

ROWS, RANKS = 7, 2
PARTS = (slice(0, 5), slice(5, ROWS))  # of the ranks
LABEL, CURRENT = torch.tensor([1, 3, 3, 1, 3, 4, 1]), torch.tensor([False, True, False, True, True, True])
PERMUTED = torch.tensor([3, 0, 1, 4, 2, 6, 5])  # within each part


def class_text(x: Tensor, weight: Tensor, part: slice) -> Tensor:
    text = F.normalize(torch.eye(6, 4, dtype=torch.float64) @ weight + 0.1, dim=1)
    return current_class_text_loss(F.normalize(x @ weight, dim=1), text, LABEL[part], CURRENT, 20.0)


def barlow(x: Tensor, weight: Tensor, part: slice) -> Tensor:
    z1, z2 = standardise(x @ weight), standardise(x.tanh() @ weight)
    return barlow_twins_loss(z1, z2, 0.1)


def mixed(x: Tensor, weight: Tensor, part: slice) -> Tensor:
    z1, z2, zm = (standardise(view @ weight) for view in (x, x.tanh(), x.sin()))
    return mixed_regulariser(zm, z1, z2, torch.tensor(0.3).double(), PERMUTED[part] - part.start)


LOSSES: dict[str, tuple[Callable[[Tensor, Tensor, slice], Tensor], int]] = {
    "class_text": (class_text, 2),
    "barlow": (barlow, 2 + 2 + 1),
    "mixed": (mixed, 2 + 2 + 2 + 1),
}
"""Each with the collectives of its forward pass."""


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
    for name, (loss_of, _) in LOSSES.items():
        x, weight = inputs()
        calls[0] = 0
        loss = loss_of(x[PARTS[index]], weight, PARTS[index])
        forward = calls[0]
        loss.backward()
        reduce(weight.grad)
        out[name] = {"loss": loss.detach(), "grad": weight.grad / RANKS, "collectives": torch.tensor(forward)}
    lonely = standardise(torch.ones(1 - index, 3))  # one row on one of the ranks
    out["lonely"] = {"largest": lonely.abs().sum()}
    torch.save(out, Path(folder, f"{index}.pt"))
    leave()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Tensor]]]:
    folder = tmp_path_factory.mktemp("objectives")
    rank_processes.start(one_rank, RANKS, str(folder))
    return [torch.load(folder / f"{index}.pt", weights_only=True) for index in range(RANKS)]


@pytest.mark.parametrize("name", LOSSES)
def test_ranks_of_unequal_batches_give_the_loss_and_the_gradient_of_one(
    name: str, two_ranks: list[dict[str, dict[str, Tensor]]]
) -> None:
    loss_of, collectives = LOSSES[name]
    x, weight = inputs()
    loss = loss_of(x, weight, slice(0, ROWS))
    loss.backward()
    for out in two_ranks:
        torch.testing.assert_close(out[name]["loss"], loss.detach(), rtol=1e-12, atol=0)
        torch.testing.assert_close(out[name]["grad"], weight.grad, rtol=1e-10, atol=1e-13)
        assert out[name]["collectives"] == collectives


def test_one_row_on_all_ranks_is_standardised_to_zero(two_ranks: list[dict[str, dict[str, Tensor]]]) -> None:
    assert all(out["lonely"]["largest"] == 0 for out in two_ranks)
