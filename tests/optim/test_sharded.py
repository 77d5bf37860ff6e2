"""Sharded parameters: 1, 2, 4 and 2 x 2 ranks train as one process does, keep their share of the state, and reload it.

One set of four processes does all that the tests look at: as one mesh of four, as two pairs, and each by itself.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import rank_processes
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from optim.plain_bases import RandomBasis
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from lightspan.core.distributed import end_process_group
from lightspan.core.errors import UserError
from lightspan.optim.low_rank.bases import DCTBasis, SVDBasis
from lightspan.optim.low_rank.inner import SGD, NewtonSchulz
from lightspan.optim.low_rank.optimizer import LowRank
from lightspan.optim.low_rank.presets import APOLLO, APOLLOMini, DCTAdamW, LDAdam
from lightspan.optim.low_rank.residuals import Apollo, ErrorFeedback
from lightspan.optim.matrices.moments import Int8Moments
from lightspan.optim.muon import NorMuon
from lightspan.training.strategies import shard_blocks

pytestmark = pytest.mark.ranks

STEPS, BATCH, IMAGE, OUTPUTS = 24, 32, (3, 6, 6), 6
RANK, REFRESH, CLIP = 3, 6, 0.5
SAVED, SHORT = 16, 8


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        # Wide, split along its columns by 2 and by 4 ranks; wide, split so by 2 alone; square and odd.
        self.layers = nn.Sequential(nn.Linear(52, 14), nn.Tanh(), nn.Linear(14, 13), nn.Tanh(), nn.Linear(13, 13))

    def forward(self, x_BD: torch.Tensor) -> torch.Tensor:
        return self.layers(x_BD)


class Net(nn.Module):
    """Of 4 ranks one has none of the last square matrix, the norm and the head."""

    def __init__(self) -> None:
        super().__init__()
        self.convolutions = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Tanh(), nn.Conv2d(8, 10, 3), nn.Tanh(), nn.Flatten())
        self.tall = nn.Linear(40, 52)
        self.blocks = nn.ModuleList([Block()])
        self.narrow = nn.Linear(13, 9)
        self.square = nn.Linear(9, 9)
        self.norm = nn.LayerNorm(9)
        self.head = nn.Linear(9, OUTPUTS)

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        x_BD = self.tall(self.convolutions(x_BCHW)).tanh()
        for block in self.blocks:
            x_BD = block(x_BD)
        return self.head(self.norm(self.square(self.narrow(x_BD).tanh())))


OPTIMISERS = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2),
    "LowRank": lambda p: LowRank(p, lr=1e-2, rank=RANK, refresh=REFRESH, weight_decay=0.1, max_norm=CLIP),
    # Errors in float32: the last bit of a sum decides whether a code of 8 bits is rounded up, and one code moves later
    # losses by more than 1e-5, also in one process. Below, int8 is compared in float64.
    "DCTAdamW": lambda p: DCTAdamW(p, lr=1e-2, rank=RANK, weight_decay=0.1, max_norm=CLIP, error_feedback="float32"),
}
OTHERS = {
    "DCTAdamW int8": lambda p: DCTAdamW(p, lr=3e-3, rank=RANK, weight_decay=0.1, max_norm=CLIP),
    "LDAdam": lambda p: LDAdam(p, lr=1e-3, rank=RANK, max_norm=CLIP),
    "APOLLO": lambda p: APOLLO(p, lr=1e-3, rank=RANK, refresh=2, max_norm=CLIP),
    "APOLLOMini": lambda p: APOLLOMini(p, lr=1e-4, refresh=2, max_norm=CLIP),
    "SVD": lambda p: LowRank(p, lr=1e-3, rank=RANK, refresh=2, basis=SVDBasis(), residual=None, check_finite=False),
    "random": lambda p: LowRank(p, lr=1e-3, rank=RANK, refresh=2, basis=RandomBasis(), inner=SGD(), residual=Apollo()),
    "orthogonalised": lambda p: LowRank(
        p, lr=1e-3, rank=RANK, refresh=1, basis=DCTBasis(norm=1), inner=NewtonSchulz(), residual=ErrorFeedback(kept=0.9)
    ),
    "NorMuon": lambda p: NorMuon(p, lr=1e-3, max_norm=CLIP),
}
"""Every rule that looks across rows in one way of its own; a few steps of each."""
OTHER_STEPS = 5


def data(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A fixed linear map of noise: gradients have more directions than any rank here, so that none is chosen by
    rounding errors alone.
    """
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(BATCH, *IMAGE, dtype=torch.float32, generator=generator)
    map_DO = torch.randn(images[0].numel(), OUTPUTS, dtype=torch.float32, generator=generator.manual_seed(99)) / 6
    target = images.flatten(1) @ map_DO
    return images.to(torch.get_default_dtype()), target.to(torch.get_default_dtype())


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range, mesh=None) -> list[float]:
    """Losses of whole batches, of which each rank of the mesh takes its share."""
    index, ranks = (0, 1) if mesh is None else (share(mesh), mesh.size())
    losses: list[torch.Tensor] = []
    for step in steps:
        images, target = (part.chunk(ranks)[index] for part in data(step))
        loss = nn.functional.mse_loss(model(images), target)
        loss.backward()
        if isinstance(optimizer, torch.optim.AdamW):
            nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach().double() / ranks)
    total = torch.stack(losses) if losses else torch.zeros(0)
    for axis in range(0 if mesh is None else mesh.ndim):
        dist.all_reduce(total, group=mesh.get_group(axis))
    return total.tolist()


def share(mesh) -> int:
    """This rank's place among all ranks of a mesh."""
    place = 0
    for axis in range(mesh.ndim):
        place = place * mesh.size(axis) + mesh.get_local_rank(axis)
    return place


@contextlib.contextmanager
def in_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    yield
    torch.set_default_dtype(before)


def net() -> Net:
    dtype = torch.get_default_dtype()
    with in_dtype(torch.float32):
        torch.manual_seed(0)
        return Net().to(dtype)


def sharded_net(mesh) -> Net:
    model = net()
    shard_blocks(model, mesh)
    return model


def held_bytes(optimizer: torch.optim.Optimizer) -> int:
    tensors = [value for state in optimizer.state.values() for value in state.values()]
    return sum((t.to_local() if isinstance(t, DTensor) else t).nbytes for t in tensors)


def not_finite(mesh) -> str:
    """One NaN on rank 2 alone; every rank has to see it."""
    model = sharded_net(mesh)
    optimizer = LowRank(model.named_parameters(), rank=RANK)
    nn.functional.mse_loss(model(data(0)[0]), data(0)[1]).backward()
    if share(mesh) == 2:
        model.tall.weight.grad.to_local()[0, 0] = torch.nan
    before = [p.to_local().clone() for p in model.parameters()]
    with pytest.raises(UserError) as caught:
        optimizer.step()
    assert all(torch.equal(a, p.to_local()) for a, p in zip(before, model.parameters(), strict=True))
    return str(caught.value)


def loaded(model: nn.Module, build, folder: Path) -> torch.optim.Optimizer:
    """A new optimiser with what a checkpoint holds of it; the model's weights are loaded too."""
    optimizer = build(model.named_parameters())
    weights, state = get_state_dict(model, optimizer)
    dcp.load({"model": weights, "optimizer": state}, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
    return optimizer


def low_precision(mesh) -> list[bool]:
    """Whether replicas stay equal with bfloat16 weights and 8-bit moments, which round at random."""
    with in_dtype(torch.bfloat16):
        model = sharded_net(mesh)
        optimizer = LowRank(model.named_parameters(), lr=1e-2, rank=RANK, moments=Int8Moments(), max_norm=CLIP)
        train(model, optimizer, range(4), mesh)
    equal = []
    for parameter in model.parameters():
        part = parameter.to_local().float().contiguous()
        pair = [torch.empty_like(part) for _ in range(2)]
        dist.all_gather(pair, part, group=mesh.get_group("replica"))
        equal.append(torch.equal(*pair))
    return equal


def one_rank(index: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=index, world_size=4)
    hybrid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replica", "shard"))
    alone = init_device_mesh("cpu", (4, 1), mesh_dim_names=("run", "shard"))["shard"]
    meshes = {1: alone, 2: hybrid["shard"], 4: init_device_mesh("cpu", (4,)), "2 x 2": hybrid}
    out: dict = {"losses": {}, "bytes": {}, "resumed": {}}
    for name, build in OPTIMISERS.items():
        for ranks, mesh in meshes.items():
            steps = STEPS if ranks in (2, 4) else SHORT
            model = sharded_net(mesh)
            optimizer = build(model.named_parameters())
            out["losses"][name, ranks] = train(model, optimizer, range(min(steps, SAVED)), mesh)
            out["bytes"][name, ranks] = held_bytes(optimizer)
            if ranks == 2 and hybrid.get_local_rank("replica") == 0:
                weights, state = get_state_dict(model, optimizer)
                saved = {"model": weights, "optimizer": state}
                dcp.save(saved, checkpoint_id=Path(folder, name), process_group=mesh.get_group())
            out["losses"][name, ranks] += train(model, optimizer, range(SAVED, steps), mesh)
        dist.barrier()
        model = sharded_net(meshes[4])
        optimizer = loaded(model, build, Path(folder, name))
        out["resumed"][name] = train(model, optimizer, range(SAVED, STEPS), meshes[4])
    with in_dtype(torch.float64):
        for name, build in OTHERS.items():
            model = sharded_net(meshes[4])
            out["losses"][name, 4] = train(model, build(model.named_parameters()), range(OTHER_STEPS), meshes[4])
    out["not finite"] = not_finite(meshes[4])
    out["replicas equal"] = low_precision(hybrid)
    torch.save(out, Path(folder, f"{index}.pt"))
    end_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sharded")


@pytest.fixture(scope="module")
def runs(folder: Path) -> list[dict]:
    rank_processes.start(one_rank, 4, str(folder))
    return [torch.load(folder / f"{index}.pt", weights_only=True) for index in range(4)]


@pytest.fixture(scope="module")
def straight() -> dict[str, list[float]]:
    """Losses of one process without shards."""
    found = {}
    for name, build in OPTIMISERS.items():
        model = net()
        found[name] = train(model, build(model.named_parameters()), range(STEPS))
    with in_dtype(torch.float64):
        for name, build in OTHERS.items():
            model = net()
            found[name] = train(model, build(model.named_parameters()), range(OTHER_STEPS))
    return found


@pytest.mark.parametrize("ranks", [1, 2, 4, "2 x 2"])
@pytest.mark.parametrize("name", OPTIMISERS)
def test_ranks_give_the_losses_of_one_process(runs, straight, name, ranks):
    first, last = straight[name][:5], straight[name][-5:]  # each loss is that of another batch
    assert sum(last) < 0.97 * sum(first)
    for out in runs:
        losses = out["losses"][name, ranks]
        assert len(losses) == (STEPS if ranks in (2, 4) else SHORT) > REFRESH
        torch.testing.assert_close(losses, straight[name][: len(losses)], rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", OTHERS)
def test_every_rule_that_looks_across_rows_sees_those_of_other_ranks(runs, straight, name):
    for out in runs:
        torch.testing.assert_close(out["losses"][name, 4], straight[name], rtol=1e-9, atol=0)


@pytest.mark.parametrize("name", OPTIMISERS)
def test_ranks_share_the_state(runs, name):
    """Frames are on every rank, and the first ranks have more than a share of what does not divide."""
    whole = runs[0]["bytes"][name, 1]
    for ranks, share_at_most in ((2, 0.65), ("2 x 2", 0.65), (4, 0.45)):
        assert max(out["bytes"][name, ranks] for out in runs) < share_at_most * whole


@pytest.mark.parametrize("name", OPTIMISERS)
def test_a_checkpoint_of_two_ranks_can_be_resumed_on_four_and_on_one(runs, straight, name, folder):
    rest = straight[name][SAVED:]
    for out in runs:
        torch.testing.assert_close(out["resumed"][name], rest, rtol=1e-5, atol=0)
    model = net()
    optimizer = loaded(model, OPTIMISERS[name], folder / name)
    torch.testing.assert_close(train(model, optimizer, range(SAVED, STEPS)), rest, rtol=1e-5, atol=0)


def test_replicas_round_alike(runs):
    assert all(out["replicas equal"] and all(out["replicas equal"]) for out in runs)


def test_a_gradient_that_is_not_finite_on_one_rank_stops_all_of_them(runs):
    for out in runs:
        assert "tall.weight is not finite" in out["not finite"]
