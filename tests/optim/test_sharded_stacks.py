"""Stacks [E out in] that are split along E: each rank steps the matrices that it has, and 1, 2 and 3 ranks step as one
process does. One set of three processes does all that the tests look at.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
import rank_processes
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from lightspan.core.distributed import end_process_group
from lightspan.core.errors import UserError
from lightspan.core.sharded import Ranks, RowShards, from_local, whole
from lightspan.optim.low_rank.optimizer import LowRank
from lightspan.optim.low_rank.presets import APOLLO, LDAdam
from lightspan.optim.matrices.moments import Float32Moments
from lightspan.optim.muon import FactoredMuon
from lightspan.optim.parameter_summary import parameter_summary

pytestmark = pytest.mark.ranks

SHAPES = [(4, 9, 5), (3, 5, 9), (1, 7, 7), (12, 8), (5,)]
"""Of 3 ranks one has none of the first two stacks, whose other parts are uneven, and two have none of the third."""
STEPS, SAVED = 5, 3
RULES: dict[str, Callable[..., LowRank]] = {
    "LowRank": lambda p: LowRank(stacked(p), lr=0.1, rank=2, refresh=2, weight_decay=0.1, max_norm=1.0),
    "APOLLO": lambda p: APOLLO(stacked(p), lr=0.1, rank=2, refresh=2),
    "LDAdam": lambda p: LDAdam(stacked(p), lr=0.1, rank=2, max_norm=1.0),
    "FactoredMuon": lambda p: FactoredMuon(stacked(p), lr=0.1, max_norm=1.0, moments=Float32Moments()),
}


def stacked(params: list) -> list[dict]:
    return [{"params": params, "stacks": True}]


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def split(tensor: Tensor, mesh: DeviceMesh | None, axis: int = 0) -> Tensor:
    """This rank's part along an axis."""
    if mesh is None or mesh.size() == 1:
        return tensor
    ranks = Ranks(mesh, 0)
    part = RowShards(ranks, tensor.shape[axis], moved=False).own(tensor, axis).clone()
    return from_local(part, ranks, axis, tensor.shape)


def parameters(mesh: DeviceMesh | None) -> list[nn.Parameter]:
    return [nn.Parameter(split(draw(*shape, seed=seed), mesh)) for seed, shape in enumerate(SHAPES)]


def take(optimizer: LowRank, weights: list[nn.Parameter], steps: range, mesh: DeviceMesh | None) -> None:
    """One stack has no gradient in every other step."""
    for step in steps:
        for seed, weight in enumerate(weights):
            gradient = draw(*weight.shape, seed=100 * step + seed)
            weight.grad = None if seed == 1 and step % 2 else split(gradient, mesh)
        optimizer.step()


def saved(optimizer: LowRank, weights: list[nn.Parameter]) -> dict[str, Tensor]:
    return {f"{i}.{key}": value for i, w in enumerate(weights) for key, value in optimizer.state[w].items()}


def refusals(mesh: DeviceMesh) -> list[str]:
    """Of a NaN on one rank alone, and of matrices that are split themselves."""
    weights, said = parameters(mesh), []
    optimizer = LowRank(stacked([("experts", weights[0]), ("bias", weights[4])]), rank=2)
    for weight in (weights[0], weights[4]):
        weight.grad = split(draw(*weight.shape, seed=1), mesh)
    if not mesh.get_rank():
        weights[0].grad.to_local()[0, 0, 0] = torch.nan
    with pytest.raises(UserError) as caught:
        optimizer.step()
    said.append(str(caught.value))
    with pytest.raises(UserError) as caught:
        LowRank(stacked([nn.Parameter(split(draw(4, 9, 5, seed=0), mesh, axis=1))]), rank=2)
    return [*said, str(caught.value)]


def one_rank(index: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=index, world_size=3)
    pair, rest = (dist.new_group(members) for members in ([0, 1], [2]))
    own = pair if index < 2 else rest
    meshes = {3: init_device_mesh("cpu", (3,)), 2 if index < 2 else 1: DeviceMesh.from_group(own, "cpu")}
    out: dict = {}
    for count, mesh in meshes.items():
        for name, build in RULES.items():
            weights = parameters(mesh)
            optimizer = build(weights)
            take(optimizer, weights, range(SAVED), mesh)
            if count == 3:
                held = {f"{i}": w for i, w in enumerate(weights)} | saved(optimizer, weights)
                dcp.save(held, checkpoint_id=Path(folder, name))
            take(optimizer, weights, range(SAVED, STEPS), mesh)
            out[count, name] = [whole(w.detach()) for w in weights]
            out[count, name, "steps"] = [int(optimizer.state[w]["step"]) for w in weights]
            out[count, name, "bytes"] = parameter_summary(optimizer, weights[0], optimizer.param_groups[0]).state_bytes
    out["refusals"] = refusals(meshes[3])
    torch.save(out, Path(folder, f"{index}.pt"))
    end_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("stacks")


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict]:
    rank_processes.start(one_rank, 3, str(folder))
    return [torch.load(folder / f"{index}.pt", weights_only=True) for index in range(3)]


def straight(name: str) -> tuple[LowRank, list[nn.Parameter]]:
    weights = parameters(None)
    optimizer = RULES[name](weights)
    take(optimizer, weights, range(STEPS), None)
    return optimizer, weights


@pytest.mark.parametrize("name", RULES)
def test_ranks_step_as_one_process_does(ranks, name):
    optimizer, weights = straight(name)
    assert all(optimizer.projected(weight, optimizer.param_groups[0]) for weight in weights[:4])
    for index, count in ((0, 3), (1, 3), (2, 3), (0, 2), (1, 2), (2, 1)):
        out = ranks[index]
        torch.testing.assert_close(out[count, name], [w.detach() for w in weights], rtol=1e-9, atol=1e-12)
        assert out[count, name, "steps"] == [int(optimizer.state[w]["step"]) for w in weights]


@pytest.mark.parametrize("name", RULES)
def test_ranks_keep_the_state_of_their_own_matrices(ranks, name):
    three, two, one = ([out[count, name, "bytes"] for out in ranks if (count, name) in out] for count in (3, 2, 1))
    assert [4 * (size - 4) for size in three] == [2 * (one[0] - 4), 2 * (one[0] - 4), 0]  # beside the number of steps
    assert two == three[:2]


@pytest.mark.parametrize("name", RULES)
def test_a_checkpoint_of_three_ranks_goes_on_in_one_process(ranks, name, folder):
    weights = parameters(None)
    optimizer = RULES[name](weights)
    take(optimizer, weights, range(1), None)  # which makes the state that is loaded
    held = {f"{i}": w.detach() for i, w in enumerate(weights)} | saved(optimizer, weights)
    dcp.load(held, checkpoint_id=folder / name)
    state = optimizer.state_dict()
    for key, value in held.items():
        if "." in key:
            number, part = key.split(".")
            state["state"][int(number)][part] = value
    optimizer.load_state_dict(state)
    take(optimizer, weights, range(SAVED, STEPS), None)
    torch.testing.assert_close(weights, straight(name)[1], rtol=1e-9, atol=1e-12)


def test_a_gradient_that_is_not_finite_on_one_rank_stops_all_and_split_matrices_are_refused(ranks):
    for out in ranks:
        not_finite, split_matrices = out["refusals"]
        assert "the gradient of experts is not finite" in not_finite
        assert "except stacks [experts out in], which need gradients of whole matrices" in split_matrices
