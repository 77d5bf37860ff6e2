"""ZeRO 1 to 3 on two CPU ranks against one process: the same losses, and a resumed run goes on as the straight one.

`make deepspeed` installs DeepSpeed and builds its CPU communication, which takes a minute and no test waits for.
"""

import contextlib
import os
import pickle
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import rank_processes
import torch
import torch.distributed as dist
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DeepSpeedStrategy
from tiny_project.tiny_lab import zero
from torch import nn

from lightspan.cli.config.resolve import resolve
from lightspan.core.distributed import end_process_group
from lightspan.core.errors import UserError
from lightspan.optim.schedules import WarmupCosine
from lightspan.training.checkpoints.manifest import fault, manifest
from lightspan.training.method import Method

pytestmark = pytest.mark.ranks

needs_deepspeed = pytest.mark.skipif(not zero.READY, reason=zero.NOT_READY)
RANKS, STEPS, HALF, MICRO, STAGES = 2, 6, 3, 2, (1, 2, 3)


class Net(Method):
    """Each epoch is one optimiser step of MICRO micro-batches on each of `ranks`."""

    def __init__(self, optimizer=lambda groups: torch.optim.AdamW(groups, lr=0.01, weight_decay=0.1), ranks=()):
        super().__init__(optimizer, partial(WarmupCosine, warmup=0.3))
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(8, 24), nn.Tanh(), nn.LayerNorm(24), nn.Linear(24, 6, bias=False))
        self.ranks, self.losses = ranks, []

    def train_dataloader(self):
        step = self.trainer.current_epoch
        draws = [torch.Generator().manual_seed(100 * step + rank) for rank in self.ranks]
        return torch.utils.data.DataLoader([torch.randn(5, 8, generator=g) for g in draws for _ in range(MICRO)], 1)

    def training_step(self, batch, batch_idx):
        loss = (self.net(batch[0]) - batch[0, :, :6]).square().mean()
        self.losses.append(loss.detach())
        return loss


class Plain(LightningModule):
    """A module that knows nothing of lightspan."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(8, 8, bias=False)

    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.randn(4, 8), 2)

    def training_step(self, batch, batch_idx):
        return self.net(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.Muon(self.parameters())


class KeepWeights(Callback):
    def on_train_end(self, trainer, pl_module):
        whole = contextlib.nullcontext()
        if isinstance(trainer.strategy, DeepSpeedStrategy):
            import deepspeed

            whole = deepspeed.zero.GatheredParameters(list(pl_module.parameters()))
        with whole:
            self.weights = {name: p.detach().clone() for name, p in pl_module.named_parameters()}


def make_trainer(folder, strategy, devices, *callbacks):
    return Trainer(
        accelerator="cpu", devices=devices, strategy=strategy, max_epochs=STEPS, logger=False,
        accumulate_grad_batches=MICRO * RANKS // devices, gradient_clip_val=0.3, default_root_dir=folder,
        reload_dataloaders_every_n_epochs=1, use_distributed_sampler=False, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=bool(callbacks), callbacks=list(callbacks),
    )  # fmt: skip


def fit(folder, strategy, ranks, resume=None):
    """Losses by step and micro-batch, and the weights at the end."""
    module, keep = Net(ranks=ranks), KeepWeights()
    saves = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1, enable_version_counter=False)
    trainer = make_trainer(folder, strategy, RANKS // len(ranks), saves, keep)
    trainer.fit(module, ckpt_path=resume, weights_only=True)
    losses = torch.stack(module.losses).view(-1, len(ranks) * MICRO)
    return {"losses": losses, "weights": keep.weights, "steps": trainer.global_step}


def refusal(folder, stage, module, resume=None):
    try:
        make_trainer(folder, zero.OnCPU(stage), RANKS).fit(module, ckpt_path=resume, weights_only=True)
    except UserError as error:
        return str(error)
    return ""


def one_shard(checkpoint):
    return next(checkpoint.glob("checkpoint/*zero_pp_rank_1_*_optim_states.pt"))


def one_rank(index, folder):
    torch.set_num_threads(1)
    os.environ.update(LOCAL_RANK=str(index), NODE_RANK="0", **zero.environment())
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=index, world_size=RANKS)
    out = {}
    for stage in STAGES:
        here = f"{folder}/{stage}"
        out[f"straight {stage}"] = fit(here, zero.OnCPU(stage), [index])
        out[f"resumed {stage}"] = fit(f"{here}-resumed", zero.OnCPU(stage), [index], f"{here}/epoch={HALF - 1}.ckpt")
        out[f"Muon {stage}"] = refusal(folder, stage, Plain())
        if index == 0:
            with (one_shard(Path(here, "epoch=0.ckpt"))).open("r+b") as file:
                file.truncate(1000)
        out[f"torn {stage}"] = refusal(folder, stage, Net(ranks=[index]), f"{here}/epoch=0.ckpt")
    torch.save(out, Path(folder, f"{index}.pt"))
    end_process_group()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("zero")
    rank_processes.start(one_rank, RANKS, str(folder))
    return folder, [torch.load(folder / f"{index}.pt", weights_only=True) for index in range(RANKS)]


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    return fit(str(tmp_path_factory.mktemp("one")), "auto", range(RANKS))


@needs_deepspeed
@pytest.mark.parametrize("stage", STAGES)
def test_two_ranks_train_as_one_process(two_ranks, one_process, stage):
    runs = [rank[f"straight {stage}"] for rank in two_ranks[1]]
    losses = torch.cat([run["losses"] for run in runs], dim=1)
    assert runs[0]["steps"] == one_process["steps"] == STEPS
    torch.testing.assert_close(losses, one_process["losses"], rtol=1e-5, atol=0)
    for run in runs:
        torch.testing.assert_close(run["weights"], one_process["weights"], rtol=1e-4, atol=1e-5)


@needs_deepspeed
@pytest.mark.parametrize("stage", STAGES)
def test_a_resumed_run_goes_on_as_the_straight_one(two_ranks, stage):
    for rank in two_ranks[1]:
        straight, resumed = rank[f"straight {stage}"], rank[f"resumed {stage}"]
        assert torch.equal(resumed["losses"], straight["losses"][HALF:])
        assert all(torch.equal(resumed["weights"][name], value) for name, value in straight["weights"].items())


@needs_deepspeed
@pytest.mark.parametrize("stage", STAGES)
def test_checkpoints_are_whole_folders_and_a_torn_one_is_refused(two_ranks, stage):
    folder, ranks = two_ranks[0] / str(stage), two_ranks[1]
    assert {path.name for path in folder.iterdir()} == {f"epoch={step}.ckpt" for step in range(STEPS)}
    assert all(fault(folder / f"epoch={step}.ckpt") is None for step in range(1, STEPS))
    assert manifest(folder / "epoch=1.ckpt")["step"] == 2
    assert all(one_shard(folder / "epoch=0.ckpt").name in rank[f"torn {stage}"] for rank in ranks)


@needs_deepspeed
@pytest.mark.parametrize("stage", STAGES)
def test_matrix_optimisers_of_others_are_refused_before_the_first_step(two_ranks, stage):
    for rank in two_ranks[1]:
        said = rank[f"Muon {stage}"]
        assert said.startswith("Muon works on matrices, but ZeRO can divide its step only by flat ranges")
        assert "scale/fsdp2" in said


@needs_deepspeed
def test_a_checkpoint_that_would_run_code_is_refused(tmp_path):
    from lightspan.training.deepspeed import _load

    class Evil:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    file = tmp_path / "mp_rank_00_model_states.pt"
    torch.save({"module": Evil()}, file, pickle_module=pickle)
    with pytest.raises(UserError, match=r"mp_rank_00_model_states.pt contains more than tensors.*no code in it"):
        _load(tmp_path, str(file))
    assert not (tmp_path / "ran").exists()
    file.write_bytes(file.read_bytes()[:-30])
    with pytest.raises(UserError, match=r"mp_rank_00_model_states.pt is damaged"):
        _load(tmp_path, str(file))


@needs_deepspeed
def test_nothing_is_unpickled_freely_also_past_the_checkpoint_engine(tmp_path, monkeypatch):
    """DeepSpeed reads the files of a universal checkpoint, which settings ask for, by itself."""
    from lightspan.training import deepspeed

    class Evil:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    file = tmp_path / "universal.pt"
    torch.save(Evil(), file, pickle_module=pickle)
    strategy = deepspeed.ZeRO.__new__(deepspeed.ZeRO)
    monkeypatch.delenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", raising=False)
    engine = SimpleNamespace(checkpoint_engine=SimpleNamespace())
    monkeypatch.setattr(deepspeed.ZeRO, "deepspeed_engine", engine, raising=False)
    monkeypatch.setattr(deepspeed.ZeRO, "broadcast", lambda self, value: value)
    monkeypatch.setattr(deepspeed.ZeRO, "_on_first_rank", lambda *_: None)
    monkeypatch.setattr(
        deepspeed.DeepSpeedStrategy, "load_checkpoint", lambda *_, **__: torch.load(file, weights_only=False)
    )
    with pytest.raises(UserError, match="no code in it was run"):
        strategy.load_checkpoint(tmp_path)
    assert not (tmp_path / "ran").exists()
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ


@pytest.mark.parametrize("stage", STAGES)
def test_overlays_choose_the_stage_and_leave_the_rest_of_the_recipe(stage):
    name = "language/quickstart_adamw"
    plain, scaled = resolve(name, [], [], []).config, resolve(name, [f"scale/deepspeed_zero{stage}"], [], []).config
    strategy = scaled["trainer"].pop("strategy")
    assert strategy == {"class_path": "lightspan.training.deepspeed.ZeRO", "init_args": {"stage": stage}}
    assert {key: value for key, value in scaled.items() if key != "trainer"} == {
        key: value for key, value in plain.items() if key != "trainer"
    }
