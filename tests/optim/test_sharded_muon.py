"""Whole-matrix rules on rows that are spread over ranks: 1 to 4 ranks and a hybrid mesh step as one process does, and
what travels is what makes fewer bytes.

One set of four processes does all that the tests look at.
"""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import rank_processes
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from lightspan.core.distributed import end_process_group
from lightspan.core.sharded import Ranks, RowShards, from_local, whole
from lightspan.optim.low_rank.optimizer import LowRank
from lightspan.optim.low_rank.presets import Trion
from lightspan.optim.matrices.moments import Float32Moments, Int8Moments
from lightspan.optim.matrices.newton_schulz import COEFFICIENTS, bytes_of_grams, bytes_of_rows, orthogonalised
from lightspan.optim.muon import Dion2, FactoredMuon, Muon, NorMuon

pytestmark = pytest.mark.ranks

SHAPES = [(52, 10), (10, 52), (7, 7), (7, 7), (7, 7), (7, 7), (7, 7), (2, 3), (6, 3, 2, 2), (5,)]
"""Tall, wide, square and more of them than ranks, with fewer rows than ranks, a convolution, a vector."""
STEPS, SAVED = 2, 1
SPLITS: list[tuple[int | str, int]] = [(1, 0), (2, 1), (3, 0), (3, 1), (4, 0), ("2 x 2", 1)]
"""Ranks, and the axis of the parameter that is split among them."""
RULES: dict[str, Callable[..., LowRank]] = {
    "Muon": lambda p: Muon(p, lr=0.1, weight_decay=0.1, max_norm=1.0),
    "NorMuon": lambda p: NorMuon(p, lr=0.1, weight_decay=0.1, convention="kimi"),
    "FactoredMuon": lambda p: FactoredMuon(p, lr=0.1, weight_decay=0.1, moments=Float32Moments()),
    "Muon by heads": lambda p: Muon(by_heads(p), lr=0.1, weight_decay=0.1, by_heads=True),
    "Dion2": lambda p: Dion2(p, lr=0.1, weight_decay=0.1, fraction=0.5),
    "Trion": lambda p: Trion(p, lr=0.1, weight_decay=0.1, rank=3),
}


def by_heads(weights: list[nn.Parameter]) -> list[dict[str, Any]]:
    """Tall, wide and square weights with heads of equal and other sizes, which no split of rows follows."""
    heads = {"0": [4] * 10 + [12], "1": [2, 2, 2, 4], "2": [3, 3, 1]}
    return [{"params": [(str(i), weight) for i, weight in enumerate(weights)], "heads": heads}]


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def split(tensor: Tensor, mesh: DeviceMesh | None, axis: int) -> Tensor:
    """This rank's part along `axis`, or that of vectors; split among the ranks of the last axis of the mesh."""
    if mesh is None:
        return tensor
    ranks, axis = Ranks(mesh, mesh.ndim - 1), min(axis, tensor.ndim - 1)
    part = RowShards(ranks, tensor.shape[axis], moved=False).own(tensor, axis).clone()
    return from_local(part, ranks, axis, tensor.shape)


def parameters(mesh: DeviceMesh | None, axis: int, dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
    made = [draw(*shape, seed=seed).to(dtype) for seed, shape in enumerate(SHAPES)]
    return [nn.Parameter(split(each, mesh, axis)) for each in made]


def take(optimizer: LowRank, weights: list[nn.Parameter], steps: range, mesh: DeviceMesh | None, axis: int) -> None:
    """One matrix has no gradient in every other step."""
    for step in steps:
        for seed, weight in enumerate(weights):
            gradient = draw(*weight.shape, seed=100 * step + seed).to(weight.dtype)
            weight.grad = None if seed == 4 and step % 2 else split(gradient, mesh, axis)
        optimizer.step()


def trained(rule: str, mesh: DeviceMesh | None, axis: int) -> list[Tensor]:
    weights = parameters(mesh, axis)
    take(RULES[rule](weights), weights, range(STEPS), mesh, axis)
    return [whole(weight.detach()).clone() for weight in weights]


class Traffic:
    """Numbers that this rank hands to the collectives of a mesh, times the ranks: what `bytes_of_*` count."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, ranks: Ranks) -> None:
        self.sent, all_reduce, exchange = 0, dist.all_reduce, dist.all_to_all_single

        def reduced(tensor: Tensor, **options: Any) -> None:
            self.sent += 2 * tensor.numel() * (ranks.count - 1)
            all_reduce(tensor, **options)

        def exchanged(out: Tensor, flat: Tensor, received: list[int], sent: list[int], **options: Any) -> None:
            self.sent += (sum(sent) - sent[ranks.index]) * ranks.count
            exchange(out, flat, received, sent, **options)

        monkeypatch.setattr(dist, "all_reduce", reduced)
        monkeypatch.setattr(dist, "all_to_all_single", exchanged)


CASES = [(1, 40, 5), (1, 8, 8), (4, 40, 5), (4, 8, 8), (9, 24, 8), (2, 12, 8), (3, 4, 4)]
"""(matrices, rows, columns); rows divide among four ranks, so that what the first rank sends can be stated."""


def traffic(mesh: DeviceMesh) -> dict[tuple[int, int, int], tuple[int, int, int, float]]:
    """By case, on this rank: (sent, what Grams would need, what rows would need, error)."""
    ranks, found = Ranks(mesh, 0), {}
    for batch, rows, columns in CASES:
        shards = RowShards(ranks, rows, moved=False)
        x_BMN = draw(batch, rows, columns, seed=batch)
        one = orthogonalised(x_BMN, None, COEFFICIENTS["jordan"])
        with pytest.MonkeyPatch.context() as patch:
            counted = Traffic(patch, ranks)
            got = orthogonalised(shards.own(x_BMN, axis=1), shards, COEFFICIENTS["jordan"])
        error = float((got - shards.own(one, axis=1)).abs().max())
        grams = bytes_of_grams(batch, columns, 1 if rows >= 2 * columns else 5, shards)
        found[batch, rows, columns] = counted.sent, grams, bytes_of_rows(batch, columns, shards), error
    return found


def low_precision(mesh: DeviceMesh) -> bool:
    """Whether replicas of a hybrid mesh stay equal with bfloat16 weights and 8-bit momentum, which round at
    random, and bfloat16 products."""
    weights = parameters(mesh, 0, torch.bfloat16)
    take(NorMuon(weights, moments=Int8Moments(), precision="bfloat16"), weights, range(STEPS), mesh, 0)
    equal = True
    for weight in weights:
        part = weight.to_local().float().contiguous()
        pair = [torch.empty_like(part) for _ in range(2)]
        dist.all_gather(pair, part, group=mesh.get_group(0))
        equal = equal and torch.equal(*pair) and bool(part.isfinite().all())
    return equal


def one_rank(index: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=index, world_size=4)
    meshes = {count: DeviceMesh("cpu", list(range(count))) for count in (1, 2, 3, 4)}
    meshes["2 x 2"] = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replica", "shard"))
    out: dict[str, Any] = {"weights": {}, "resumed": {}}
    for (ranks, axis), rule in itertools.product(SPLITS, RULES):
        if meshes[ranks].get_coordinate() is not None:
            out["weights"][rule, ranks, axis] = trained(rule, meshes[ranks], axis)
    for rule in RULES:
        if index < 2:
            weights = parameters(meshes[2], 0)
            optimizer = RULES[rule](weights)
            take(optimizer, weights, range(SAVED), meshes[2], 0)
            save(weights, optimizer, Path(folder, rule), meshes[2])
        dist.barrier()
        if index < 3:
            weights = parameters(meshes[3], 1)
            optimizer = loaded(RULES[rule], weights, Path(folder, rule), meshes[3])
            take(optimizer, weights, range(SAVED, STEPS), meshes[3], 1)
            out["resumed"][rule] = [whole(weight.detach()).clone() for weight in weights]
    out["traffic"] = traffic(meshes[4])
    out["replicas equal"] = low_precision(meshes["2 x 2"])
    torch.save(out, Path(folder, f"{index}.pt"))
    end_process_group()


def flat(optimizer: LowRank) -> dict[str, Any]:
    """State of an optimiser by parameter and name, in tensors that a checkpoint loads into."""
    state = optimizer.state_dict()["state"]
    return {f"{number}.{key}": value for number, held in state.items() for key, value in held.items()}


def save(weights: list[nn.Parameter], optimizer: LowRank, folder: Path, mesh: DeviceMesh) -> None:
    made = {str(i): weight.detach() for i, weight in enumerate(weights)}
    dcp.save({"weights": made, "state": flat(optimizer)}, checkpoint_id=folder, process_group=mesh.get_group())


def loaded(make: Callable[..., LowRank], weights: list[nn.Parameter], folder: Path, mesh: DeviceMesh) -> LowRank:
    """An optimiser with what a checkpoint of other ranks holds: its state after a step of zeros is what is filled."""
    optimizer = make(weights)
    for weight in weights:
        weight.grad = torch.zeros_like(weight)
    optimizer.step()
    held = {"weights": {str(i): weight.detach() for i, weight in enumerate(weights)}, "state": flat(optimizer)}
    dcp.load(held, checkpoint_id=folder, process_group=mesh.get_group())
    state: dict[int, dict[str, Any]] = {}
    for name, value in held["state"].items():
        number, key = name.split(".")
        state.setdefault(int(number), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return optimizer


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    folder = tmp_path_factory.mktemp("sharded_muon")
    rank_processes.start(one_rank, 4, str(folder))
    return [torch.load(folder / f"{index}.pt", weights_only=True) for index in range(4)]


@pytest.fixture(scope="module")
def straight() -> dict[str, list[Tensor]]:
    return {rule: trained(rule, None, 0) for rule in RULES}


@pytest.mark.parametrize(("ranks", "axis"), SPLITS)
@pytest.mark.parametrize("rule", RULES)
def test_ranks_step_as_one_process(runs, straight, rule, ranks, axis) -> None:
    took_part = [out["weights"][rule, ranks, axis] for out in runs if (rule, ranks, axis) in out["weights"]]
    assert len(took_part) == (4 if ranks == "2 x 2" else ranks)
    for weights in took_part:
        for ours, theirs in zip(weights, straight[rule], strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-11, rtol=0)


@pytest.mark.parametrize("rule", RULES)
def test_a_checkpoint_of_two_ranks_continues_on_three(runs, straight, rule) -> None:
    for out in runs[:3]:
        for ours, theirs in zip(out["resumed"][rule], straight[rule], strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-11, rtol=0)


def test_what_travels_makes_fewer_bytes_than_the_other_way_and_than_gathering(runs) -> None:
    ways = set()
    for case in CASES:
        batch, rows, columns = case
        sent, grams, whole_rows, _ = runs[0]["traffic"][case]
        assert sent == min(grams, whole_rows)
        assert sent <= batch * rows * columns * 3  # each rank sending its rows to all others
        assert all(out["traffic"][case][3] < 1e-11 for out in runs)
        ways.add(grams <= whole_rows)
    assert ways == {True, False}


def test_replicas_round_alike(runs) -> None:
    assert all(out["replicas equal"] for out in runs)
