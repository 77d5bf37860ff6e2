"""Two data-parallel ranks that reduce coordinates train as one process with the whole batch, and send r / n of it.

All two-rank runs are made by one pair of processes; the tests compare what it has left with runs in this process.
"""

import gc
import os
from functools import partial
from pathlib import Path

import pytest
import rank_processes
import torch
import torch.distributed as dist
from lightning import Callback, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from lightspan.callbacks.training.subspace_projection import SubspaceProjection
from lightspan.core.distributed import end_process_group
from lightspan.core.errors import UserError
from lightspan.optim.low_rank.bases import DCTBasis, PowerBasis
from lightspan.optim.low_rank.gradients import attach
from lightspan.optim.low_rank.optimizer import LowRank
from lightspan.optim.matrices.shapes import canonical
from lightspan.training.method import Method

RANKS, STEPS, MICRO, REFRESH, RANK = 2, 20, 2, 4, 3
RUNS = {
    f"{backward} {str(dtype).removeprefix('torch.')}": (backward, basis, dtype)
    for backward, basis in (("hooks", DCTBasis), ("projected", PowerBasis))
    for dtype in (torch.float64, torch.float32)
}
FITS = ("method", "callback", "all projected")


class Net(nn.Module):
    """Tall, wide and square matrices, a convolution, vectors, and a matrix that some batches do not use."""

    def __init__(self, vectors=True):
        super().__init__()
        self.conv = nn.Conv2d(2, 6, 3, padding=1, bias=vectors)
        self.up, self.down = nn.Linear(24, 16, bias=vectors), nn.Linear(16, 40, bias=False)
        self.norm = nn.LayerNorm(40) if vectors else nn.Tanh()
        self.expert = nn.Linear(16, 16, bias=False)

    def forward(self, x, expert):
        x = torch.tanh(self.up(torch.tanh(self.conv(x)).flatten(1)))
        return self.norm(self.down(self.expert(x) if expert else x)).square().mean(dim=1)


def uses_expert(step, rank):
    """Both ranks, one of them, or none."""
    return step % 4 == 0 or (step % 4 == 2 and rank == 1)


def parts(step, rank, dtype):
    """The micro-batches of one rank."""
    generator = torch.Generator().manual_seed(100 * step + rank)
    return torch.randn(MICRO, 3, 2, 2, 2, generator=generator, dtype=torch.float64).to(dtype)


def make(backward, basis, dtype, seed=0):
    torch.manual_seed(seed)
    model = Net().to(dtype)
    optimizer = LowRank(
        model.named_parameters(), lr=0.01, rank=RANK, basis=basis(), residual=None, refresh=REFRESH, max_norm=0.05,
        weight_decay=0.1, backward=backward,
    )  # fmt: skip
    attach(model, optimizer)
    return model, optimizer


def weights(model):
    return {name: p.detach() for name, p in model.named_parameters()}


def projected(model):
    return [p for p in model.parameters() if p.ndim > 1]


class Traffic:
    """Counts the bytes that all-reduces send, ours and DDP's."""

    def __init__(self):
        self.ours, self.ddp, self.all_reduce = 0, 0, dist.all_reduce
        dist.all_reduce = self.counted

    def counted(self, tensor, *args, **kwargs):
        self.ours += tensor.nbytes
        return self.all_reduce(tensor, *args, **kwargs)

    def watch(self, ddp):
        ddp.register_comm_hook(None, self.mean_of_bucket)

    def mean_of_bucket(self, _, bucket):
        self.ddp += bucket.buffer().nbytes
        work = self.all_reduce(bucket.buffer().div_(RANKS), async_op=True)
        return work.get_future().then(lambda future: future.value()[0])

    def take(self):
        taken = torch.tensor([self.ours, self.ddp])
        self.ours = self.ddp = 0
        return taken


def train_ranks(rank, traffic, backward, basis, dtype):
    """This rank's share, starting from weights that only rank 0 has right."""
    model, optimizer = make(backward, basis, dtype, seed=rank)
    ddp = DistributedDataParallel(model)
    traffic.watch(ddp)
    sent = []
    for step in range(STEPS):
        optimizer.zero_grad()
        traffic.take()
        for i, x in enumerate(parts(step, rank, dtype)):
            ddp.require_backward_grad_sync = i == MICRO - 1  # what no_sync() sets
            (ddp(x, uses_expert(step, rank)).mean() / MICRO).backward()
        optimizer.step()
        sent.append(traffic.take())
    return {"weights": weights(model), "sent": torch.stack(sent)}


def train_one(backward, basis, dtype):
    """One process with the batch of all ranks."""
    model, optimizer = make(backward, basis, dtype)
    for step in range(STEPS):
        optimizer.zero_grad()
        losses = [model(x, uses_expert(step, rank)) for rank in range(RANKS) for x in parts(step, rank, dtype)]
        torch.cat(losses).mean().backward()
        optimizer.step()
    return weights(model)


def not_finite(rank):
    """Rank 1 alone meets a NaN. What every rank says, and whether its weights stand as they were."""
    model, optimizer = make("projected", PowerBasis, torch.float32)
    ddp = DistributedDataParallel(model)
    for step in range(2):
        optimizer.zero_grad()
        x = parts(step, rank, torch.float32)[0]
        before = {name: value.clone() for name, value in weights(model).items()}
        ddp(x * float("nan") if step == rank == 1 else x, True).mean().backward()
        try:
            optimizer.step()
        except UserError as error:
            same = all(torch.equal(before[name], value) for name, value in weights(model).items())
            return {"step": step, "said": str(error), "same": same}
    return {"step": -1, "said": "", "same": False}


def detached(traffic):
    """Bytes that a DDP sends which was built after `detach`."""
    model = Net()
    attach(model, LowRank(model.named_parameters(), rank=RANK, residual=None, backward="hooks")).detach()
    ddp = DistributedDataParallel(model)
    traffic.watch(ddp)
    traffic.take()
    ddp(parts(0, 0, torch.float32)[0], True).mean().backward()
    return traffic.take()


class Fit(Method):
    """`Net` under Lightning; batches are (micro-batch, whether to use the expert)."""

    def __init__(self, optimizer, vectors):
        super().__init__(optimizer)
        torch.manual_seed(0)
        self.net = Net(vectors).double()

    def training_step(self, batch, batch_idx):
        return self.net(batch[0][0], bool(batch[1])).mean()


class PlainFit(Fit):
    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.05, weight_decay=0.1)


class CountTraffic(Callback):
    def __init__(self, traffic):
        self.traffic, self.sent, self.ddps = traffic, [], 0

    def on_train_start(self, trainer, pl_module):
        self.ddps = sum(isinstance(thing, DistributedDataParallel) for thing in gc.get_objects())
        if self.traffic is not None and isinstance(trainer.strategy.model, DistributedDataParallel):
            self.traffic.watch(trainer.strategy.model)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if self.traffic is not None and batch_idx % MICRO == 0:
            self.traffic.take()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if self.traffic is not None and batch_idx % MICRO == MICRO - 1:
            self.sent.append(self.traffic.take())


def fit(kind, ranks, traffic, folder):
    """Seven steps by the Trainer, which accumulates and clips; rank by rank, or everything in one process."""
    options = {"rank": RANK, "residual": None, "refresh": REFRESH, "backward": "hooks"}
    low_rank = partial(LowRank, lr=0.05, weight_decay=0.1, **options)
    module = PlainFit(None, True) if kind == "callback" else Fit(low_rank, kind == "method")
    samples = [
        (x, uses_expert(step, rank)) for step in range(7) for rank in ranks for x in parts(step, rank, torch.float64)
    ]
    counter = CountTraffic(traffic)
    trainer = Trainer(
        accelerator="cpu", devices=RANKS // len(ranks), strategy="ddp" if len(ranks) < RANKS else "auto", logger=False,
        max_epochs=1, accumulate_grad_batches=MICRO * len(ranks), gradient_clip_val=0.05, default_root_dir=folder,
        callbacks=[counter, *([SubspaceProjection(**options)] if kind == "callback" else [])],
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        use_distributed_sampler=False,
    )  # fmt: skip
    gc.collect()
    trainer.fit(module, torch.utils.data.DataLoader(samples, batch_size=1))
    sent = torch.stack(counter.sent) if counter.sent else None
    return {"weights": weights(module), "sent": sent, "ddps": counter.ddps}


class Sharded(Fit):
    def configure_model(self):
        """ModelParallelStrategy wants it; the refusal comes before anything is sharded."""


def under_fsdp2(folder):
    low_rank = partial(LowRank, rank=RANK, residual=None, backward="hooks")
    trainer = Trainer(
        accelerator="cpu", devices=RANKS, strategy=ModelParallelStrategy(), logger=False, max_steps=1,
        default_root_dir=folder, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    try:
        trainer.fit(Sharded(low_rank, True), torch.utils.data.DataLoader(torch.zeros(2)))
    except UserError as error:
        return str(error)
    return ""


def one_rank(index, folder):
    torch.set_num_threads(1)
    os.environ.update(LOCAL_RANK=str(index), NODE_RANK="0")
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=index, world_size=RANKS)
    traffic = Traffic()
    out = {name: train_ranks(index, traffic, *options) for name, options in RUNS.items()}
    out["not finite"] = not_finite(index)
    out |= {kind: fit(kind, [index], traffic, folder) for kind in FITS}
    out["detached"] = detached(traffic)
    out["under FSDP2"] = under_fsdp2(folder)
    torch.save(out, Path(folder, f"{index}.pt"))
    end_process_group()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two_ranks")
    rank_processes.start(one_rank, RANKS, str(folder))
    return [torch.load(folder / f"{index}.pt", weights_only=True) for index in range(RANKS)]


def assert_close(got, expected, tolerance):
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            got[name], value, rtol=tolerance, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.ranks
@pytest.mark.parametrize("run", RUNS)
def test_two_ranks_train_as_one_process_with_the_whole_batch(two_ranks, run):
    """Through refreshes, accumulation, clipping, and steps in which one rank or none reaches the expert.

    Float64 shows that it is the same arithmetic. In float32 twenty steps of Adam enlarge what the order of sums rounds:
    1.3e-5 was seen.
    """
    expected = train_one(*RUNS[run])
    assert_close(two_ranks[0][run]["weights"], expected, 1e-10 if run.endswith("64") else 1e-4)


@pytest.mark.ranks
@pytest.mark.parametrize("run", [*RUNS, *FITS])
def test_weights_are_bit_equal_on_all_ranks(two_ranks, run):
    first, second = (rank[run]["weights"] for rank in two_ranks)
    assert all(torch.equal(first[name], second[name]) for name in first)


def expected_bytes(model, itemsize, reached):
    """What the ranks have to send for the projected matrices in each step.

    Args:
        reached: by step, whether the expert is.
    """
    matrices = [canonical(p).shape for p in projected(model)]
    steps_taken = [0] * len(matrices)
    expected = []
    for expert in reached:
        sent = len(matrices)  # a byte each: whether any rank has reached it
        for i, (m, n) in enumerate(matrices):
            if (m, n) == (16, 16) and not expert:
                continue
            phase = int(i / len(matrices) * REFRESH)
            due = steps_taken[i] == 0 or (steps_taken[i] - phase) % REFRESH == 0
            sent += itemsize * m * (n if due else RANK)
            steps_taken[i] += 1
        expected.append(sent)
    return torch.tensor(expected)


@pytest.mark.ranks
@pytest.mark.parametrize("run", RUNS)
def test_coordinates_travel_instead_of_gradients(two_ranks, run):
    """r / n of the bytes of a matrix, but for the steps that choose its frame; vectors are all that is left to DDP."""
    model, itemsize = Net(), RUNS[run][2].itemsize
    ours, ddp = two_ranks[0][run]["sent"].unbind(dim=1)
    reached = [uses_expert(step, 0) or uses_expert(step, 1) for step in range(STEPS)]
    assert torch.equal(ours, expected_bytes(model, itemsize, reached))
    assert (ddp == itemsize * sum(p.numel() for p in model.parameters() if p.ndim < 2)).all()


@pytest.mark.ranks
@pytest.mark.parametrize("kind", FITS)
def test_the_trainer_trains_two_ranks_as_one_process(two_ranks, tmp_path, kind):
    assert_close(two_ranks[0][kind]["weights"], fit(kind, range(RANKS), None, tmp_path)["weights"], 1e-10)


@pytest.mark.ranks
@pytest.mark.parametrize("kind", FITS)
def test_under_the_trainer_ddp_keeps_only_what_is_not_projected(two_ranks, kind):
    model = Net(vectors=kind != "all projected")
    ours, ddp = two_ranks[0][kind]["sent"].unbind(dim=1)
    reached = [uses_expert(step, 0) or uses_expert(step, 1) for step in range(len(ours))]
    assert torch.equal(ours, expected_bytes(model, 8, reached))
    assert (ddp == 8 * sum(p.numel() for p in model.parameters() if p.ndim < 2)).all()
    # The one that Lightning had built first would still reduce whole gradients if anything kept it alive.
    assert two_ranks[0][kind]["ddps"] == (kind != "all projected")


@pytest.mark.ranks
def test_a_gradient_that_is_not_finite_on_one_rank_stops_all_of_them(two_ranks):
    for rank in two_ranks:
        out = rank["not finite"]
        assert out["step"] == 1
        assert "is not finite" in out["said"]
        assert out["same"]


@pytest.mark.ranks
def test_a_ddp_that_is_built_after_detaching_reduces_everything(two_ranks):
    for rank in two_ranks:
        assert rank["detached"].tolist() == [0, 4 * sum(p.numel() for p in Net().parameters())]


@pytest.mark.ranks
def test_another_strategy_than_ddp_is_refused(two_ranks):
    for rank in two_ranks:
        assert (
            "backward='hooks' trains in one process or under DDP, not under ModelParallelStrategy"
            in (rank["under FSDP2"])
        )


@pytest.fixture
def lone_rank(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    end_process_group()


def test_a_model_that_ddp_holds_already_is_refused(lone_rank):
    ddp = DistributedDataParallel(nn.Linear(8, 8))
    optimizer = LowRank(ddp.named_parameters(), rank=2, residual=None, backward="hooks")
    with pytest.raises(UserError, match="attach first, then build DDP around it"):
        attach(ddp, optimizer)


def test_a_sharded_model_is_refused(lone_rank):
    model = fully_shard(nn.Linear(8, 8, bias=False), mesh=init_device_mesh("cpu", (1,)))
    optimizer = LowRank(model.named_parameters(), rank=2, residual=None, backward="hooks")
    with pytest.raises(UserError, match="this model is sharded; set backward='whole', or train with DDP"):
        attach(model, optimizer)
