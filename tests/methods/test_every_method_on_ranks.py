"""What holds for every training method on two ranks: they train as one process, whatever divides its weights, and any
low-rank optimiser trains it.
"""

import re
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import method_runs
import pytest
import rank_processes
import torch
import torch.distributed as dist
from every_preset import PRESETS, of_rank
from method_cases import CASES, ROWS
from method_runs import differences, in_float64, in_halves, rows_of

from lightspan.callbacks.resilience.random_state import RandomState
from lightspan.core.errors import UserError
from lightspan.optim.low_rank.optimizer import LowRank
from lightspan.optim.matrices.matrix_optimizer import MatrixOptimizer
from lightspan.training.strategies import FSDP2

OPTIMIZERS: dict[str, type[MatrixOptimizer]] = {kind.__name__: kind for kind in (LowRank, *PRESETS)}
"""Every optimiser of matrices: `LowRank` itself, its presets, and those of whole matrices."""


PARTS = (slice(0, 2), slice(2, ROWS))
"""The rows of both ranks, not equally many: means over a rank's own would weigh them otherwise than one process does.
Each number is even, since some methods take every other row for another purpose.
"""


def run(name: str, rank: int | None, folder: str, **options: Any) -> dict[str, torch.Tensor]:
    """Weights and buffers after training on this rank's part of each batch, or on all of it."""
    batches = in_float64([CASES[name].batch(ROWS, seed) for seed in range(4)])
    if rank is not None:
        batches = [rows_of(given, PARTS[rank]) for given in batches]
        options |= {"devices": 2, "use_distributed_sampler": False}
    model = CASES[name].make().double()
    method_runs.fit(model, batches, Path(folder), callbacks=[RandomState(0)], **options)
    return model.state_dict()


def _every_method(rank: int, folder: str, port: int) -> None:
    rank_processes.join(rank, port)
    wrong = []
    for name, case in CASES.items():
        expected = torch.load(f"{folder}/{name}.pt", weights_only=True)
        for strategy in ("ddp", FSDP2()):
            refusal = case.unsharded if isinstance(strategy, FSDP2) else None
            try:
                differ = differences(run(name, rank, folder, strategy=strategy), expected)
                refused = None
            except UserError as error:
                differ, refused = [], str(error)
            as_said = refused is None if refusal is None else refused is not None and re.search(refusal, refused)
            if not as_said or (refusal is None and bool(differ) != (case.ranks_differ is not None)):
                wrong.append(f"{name} under {strategy}: {refused or differ or 'no difference'}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.ranks
def test_two_ranks_train_every_method_as_one_process_does(tmp_path: Path) -> None:
    for name in CASES:
        torch.save(run(name, None, str(tmp_path)), tmp_path / f"{name}.pt")
    rank_processes.start(_every_method, 2, str(tmp_path), rank_processes.free_port())


SHARES = [(0, 8, 8, 8), (0, 2, 2, 8), (0, 0, 8, 8), (0, 2, 4, 8)]
"""Where the rows of each of three ranks begin and end in four batches: most leave a rank without any."""


def _uneven(rank: int, names: list[str], folder: str, port: int) -> None:
    ranks = len(SHARES[0]) - 1
    rank_processes.join(rank, port, ranks)
    wrong = []
    for name in names:
        batches = [
            rows_of(CASES[name].batch(ROWS, seed), slice(*share[rank : rank + 2])) for seed, share in enumerate(SHARES)
        ]
        model = CASES[name].make()
        options: dict[str, Any] = {"strategy": "ddp", "devices": ranks, "use_distributed_sampler": False}
        method_runs.stays_finite(model, batches, Path(folder), callbacks=[RandomState(0)], **options)
        if differs_between_ranks(model):
            wrong.append(name)
    assert not wrong, f"differ between the ranks: {wrong}"


@pytest.mark.ranks
def test_three_ranks_of_which_some_have_no_row_train_every_method_and_stay_equal(tmp_path: Path) -> None:
    names = [name for name, case in CASES.items() if case.refuses_no_row is None]
    rank_processes.start(_uneven, len(SHARES[0]) - 1, names, str(tmp_path), rank_processes.free_port())


def differs_between_ranks(model: torch.nn.Module) -> bool:
    """Whether this rank's weights are not the first rank's bit for bit."""
    flat = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    first = flat.clone()
    dist.broadcast(first, 0)
    return not torch.equal(flat, first)


def _low_rank(rank: int, pairs: list[tuple[str, str]], folder: str, port: int) -> None:
    """Two steps of each pair: weights move, stay finite, and are the same on both ranks."""
    rank_processes.join(rank, port)
    wrong = []
    for name, optimizer in pairs:
        case = CASES[name]
        model = case.make(partial(OPTIMIZERS[optimizer], lr=1e-2, **of_rank(OPTIMIZERS[optimizer], 1)))
        before = {key: parameter.detach().clone() for key, parameter in model.named_parameters()}
        batches = [in_halves(case.batch(ROWS, seed))[rank] for seed in range(2)]
        options: dict[str, Any] = {"strategy": "ddp", "devices": 2, "use_distributed_sampler": False}
        try:
            method_runs.stays_finite(model, batches, Path(folder), callbacks=[RandomState(0)], **options)
        except UserError as error:
            if case.refuses_low_rank is None or not re.search(case.refuses_low_rank, str(error)):
                wrong.append(f"{name} with {optimizer}: {error}")
            continue
        if case.refuses_low_rank is not None:
            wrong.append(f"{name} with {optimizer} is not refused")
        if all(torch.equal(parameter, before[key]) for key, parameter in model.named_parameters()):
            wrong.append(f"{name} with {optimizer} stays where it was")
        if differs_between_ranks(model):
            wrong.append(f"{name} with {optimizer} differs between the ranks")
    assert not wrong, "\n".join(wrong)


@pytest.mark.ranks
@pytest.mark.parametrize("first", range(0, len(OPTIMIZERS), 3))
def test_low_rank_optimisers_in_turn_train_every_method_on_two_ranks(first: int, tmp_path: Path) -> None:
    """Each method with four optimisers and each optimiser with a third of the methods: all pairs take four minutes."""
    assert {"LowRank", "GaLore", "DCTAdamW", "Trion"} <= OPTIMIZERS.keys()
    turns = islice(cycle(OPTIMIZERS), first, first + len(CASES))
    pairs = [*zip(CASES, turns, strict=True)]
    rank_processes.start(_low_rank, 2, pairs, str(tmp_path), rank_processes.free_port())
