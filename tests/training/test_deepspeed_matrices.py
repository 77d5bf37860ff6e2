"""Optimisers of matrices under ZeRO 1 and 2: two ranks take the steps of one process, bit for bit, and share the rest.

One set of processes does all that the tests look at; another one is killed before, while its owners send.
"""

import os
import signal
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import rank_processes
import torch
import torch.distributed as dist
from lightning import Callback, LightningDataModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DeepSpeedStrategy
from tiny_project.tiny_lab import zero
from torch import nn

from lightspan.callbacks.training.subspace_projection import SubspaceProjection
from lightspan.cli.planning.division import division
from lightspan.cli.planning.planned_step import make_plan
from lightspan.core.distributed import end_process_group
from lightspan.core.errors import UserError
from lightspan.core.memory import state_bytes
from lightspan.optim.low_rank.optimizer import LowRank
from lightspan.optim.matrices import placement
from lightspan.optim.matrices.owned_gradients import OwnedGradients
from lightspan.optim.matrices.owners import Sending
from lightspan.optim.muon import FactoredMuon, Muon
from lightspan.optim.schedules import WarmupCosine
from lightspan.training.method import Method
from lightspan.training.wiring.optimizers import share_steps

pytestmark = pytest.mark.ranks

needs_deepspeed = pytest.mark.skipif(not zero.READY, reason=zero.NOT_READY)
RANKS, STEPS, SAVED, STAGES = 2, 4, 2, (1, 2)
ADAMW = partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1)
ON = {"enabled": True}
CASES = {  # optimiser, callbacks, settings of ZeRO
    "FactoredMuon": (partial(FactoredMuon, lr=0.02), [], {}),
    "LowRank": (partial(LowRank, lr=0.01, rank=2, refresh=2), [], {"offload_optimizer": True}),
    "SubspaceProjection": (ADAMW, [partial(SubspaceProjection, rank=2, offload=True)], {}),
}
"""Each optimiser as a recipe of one process names it."""
OWNED = {  # the same, with what ZeRO sees to
    "FactoredMuon": (partial(FactoredMuon, lr=0.02, owners=True), []),
    "LowRank": (partial(LowRank, lr=0.01, rank=2, refresh=2, owners=True, offload=True), []),
    "SubspaceProjection": (ADAMW, [partial(SubspaceProjection, rank=2, offload=True, owners=True)]),
}
EVERYWHERE = partial(
    mock.patch.multiple, placement, has_host=lambda device: True, SMALLEST_OFFLOADED=0, LARGEST_TRANSFER=1 << 12
)
"""State leaves the processor for the host, which are one here."""


class Net(Method):
    """Each epoch is one step of a micro-batch on each of `ranks`; the table is so large that one rank owns it."""

    def __init__(self, optimizer, ranks):
        super().__init__(optimizer, partial(WarmupCosine, warmup=0.3))
        torch.manual_seed(0)
        self.table = nn.Embedding(256, 16)
        self.net = nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.LayerNorm(24), nn.Linear(24, 6, bias=False))
        self.ranks = ranks

    def train_dataloader(self):
        step = self.trainer.current_epoch
        draws = [torch.Generator().manual_seed(100 * step + rank) for rank in self.ranks]
        return torch.utils.data.DataLoader([torch.randint(256, (32,), generator=g) for g in draws], 1)

    def training_step(self, batch, batch_idx):
        x_BD = self.table(batch[0])
        return (self.net(x_BD) - x_BD[:, :6].sin()).square().mean()


class Look(Callback):
    """What a rank has: gradients as a step begins, state and weights at the end."""

    def on_fit_start(self, trainer, pl_module):
        self.gradients = []
        names = {p: name for name, p in pl_module.named_parameters()}

        def look(optimizer, args, kwargs):
            self.gradients.append([names[p] for p in names if p.grad is not None])

        trainer.optimizers[0].register_step_pre_hook(look)

    def on_train_end(self, trainer, pl_module):
        names, optimizer = {p: name for name, p in pl_module.named_parameters()}, trainer.optimizers[0]
        self.weights = {name: p.detach().clone() for p, name in names.items()}
        self.state = [names[p] for p in names if optimizer.state.get(p)]
        self.bytes, self.hosted = state_bytes(optimizer), isinstance(optimizer.placement, placement.HostState)
        self.norm = optimizer.gradient_norm


def trainer_of(folder, strategy, devices, accumulate, *callbacks, **settings):
    return Trainer(
        accelerator="cpu", devices=devices, strategy=strategy, logger=False, gradient_clip_val=0.05,
        accumulate_grad_batches=accumulate, default_root_dir=folder, reload_dataloaders_every_n_epochs=1,
        use_distributed_sampler=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in callbacks), callbacks=list(callbacks),
        **{"max_epochs": STEPS, **settings},
    )  # fmt: skip


def fit(folder, case, ranks, strategy="auto", resume=None, saves=False, **settings):
    optimizer, callbacks = case
    look, several = Look(), len(ranks) < RANKS
    when = {"save_top_k": -1, "every_n_epochs": SAVED, "save_on_train_epoch_end": True}
    keeps = ModelCheckpoint(folder, filename="{epoch}", **when)
    made = [*(make() for make in callbacks), look, *([keeps] if saves else [])]
    trainer = trainer_of(folder, strategy, RANKS if several else 1, 1 if several else len(ranks), *made, **settings)
    with EVERYWHERE():
        trainer.fit(Net(optimizer, ranks), ckpt_path=resume, weights_only=True)
    return {key: getattr(look, key) for key in ("weights", "gradients", "state", "bytes", "hosted", "norm")}


def said(function, *arguments):
    try:
        function(*arguments)
    except UserError as error:
        return str(error)
    return ""


def began(index, folder):
    os.environ.update(LOCAL_RANK=str(index), NODE_RANK="0", **zero.environment())
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=index, world_size=RANKS)


def killed_rank(index, folder):
    """Dies in the third step of the run, when its first weight is on its way."""
    began(index, f"{folder}/killed")
    send, sent = Sending._send, []

    def sends(self, parameter):
        send(self, parameter)
        sent.append(parameter)
        if index == 1 and len(sent) == 3 * SAVED + 1:
            os.kill(os.getpid(), signal.SIGKILL)

    with mock.patch.object(Sending, "_send", sends):
        fit(f"{folder}/killed", CASES["FactoredMuon"][:2], [index], zero.OnCPU(2), saves=True)


def one_rank(index, folder, half):
    began(index, folder)
    out = {}
    for stage in STAGES:
        for name, (*case, settings) in CASES.items():
            here = f"{folder}/{stage}-{name}"
            out[f"{name} {stage}"] = fit(here, case, [index], zero.OnCPU(stage, **settings), saves=name == "LowRank")
    case = CASES["FactoredMuon"][:2]
    last = f"{folder}/killed/epoch={SAVED - 1}.ckpt"
    out["resumed"] = fit(f"{folder}/resumed", case, [index], zero.OnCPU(2), resume=last)
    out["one process before"] = fit(f"{folder}/before", case, [index], zero.OnCPU(1), resume=half)
    out["brain float"] = fit(f"{folder}/bf16", case, [index], zero.OnCPU(2), precision="bf16-mixed", max_epochs=1)
    out["float16"] = said(
        partial(fit, f"{folder}/16", case, [index], zero.OnCPU(1), precision="16-mixed", max_epochs=1)
    )
    out["stage 3"] = said(fit, f"{folder}/3", case, [index], zero.OnCPU(3))
    out["micro-batches"] = micro_batches(index)
    torch.save(out, Path(folder, f"{index}.pt"))
    end_process_group()


def micro_batches(index):
    """Two backward passes before a step: where gradients are in between, and what owners have at the end."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4), nn.Linear(4, 4))
    optimizer = Muon(net.named_parameters(), owners=True)
    gradients, found = OwnedGradients(net.parameters(), optimizer, room=40), []
    for batch in range(2):
        x_BD = torch.randn(3, 6, generator=torch.Generator().manual_seed(10 * batch + index))
        net[: 3 - batch](x_BD).square().sum().backward()  # the last layer has no gradient in one of them
        gradients.finish(last=batch == 1)
        found.append({name: p.grad for name, p in net.named_parameters() if p.grad is not None and p.ndim > 1})
    owners = optimizer.divided(RANKS)
    mine = sorted(name for name, p in net.named_parameters() if owners.of.get(p) == index)
    vector = net[0].bias.grad
    optimizer.zero_grad()
    for _ in range(2):
        net(torch.ones(3, 6)).sum().backward()
    twice = said(gradients.finish, True)
    gradients.detach()
    seen = {"between": sorted(found[0]), "at the end": found[1], "vector": vector}
    return {"mine": mine, "twice": twice, **seen}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    found = {name: fit(f"{folder}/{name}", case, range(RANKS), saves=True) for name, case in OWNED.items()}
    return folder, found


@pytest.fixture(scope="module")
def ranks(alone, tmp_path_factory):
    folder = tmp_path_factory.mktemp("zero")
    (folder / "killed").mkdir()
    with pytest.raises(torch.multiprocessing.ProcessExitedException, match="SIGKILL"):
        rank_processes.start(killed_rank, RANKS, str(folder))
    half = alone[0] / "FactoredMuon" / f"epoch={SAVED - 1}.ckpt"
    rank_processes.start(one_rank, RANKS, str(folder), str(half))
    return folder, [torch.load(folder / f"{index}.pt", weights_only=True) for index in range(RANKS)]


def equal(ours, theirs):
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


@needs_deepspeed
@pytest.mark.parametrize("stage", STAGES)
def test_two_ranks_step_as_one_process_bit_for_bit(ranks, alone, stage):
    for name, expected in alone[1].items():
        for rank in ranks[1]:
            assert equal(rank[f"{name} {stage}"]["weights"], expected["weights"]), name
            assert torch.equal(rank[f"{name} {stage}"]["norm"], expected["norm"])
            assert expected["norm"] > 0.05  # clipped


@needs_deepspeed
@pytest.mark.parametrize("stage", STAGES)
def test_each_rank_has_the_state_of_its_own_parameters_alone_and_in_stage_2_their_gradients(ranks, alone, stage):
    for name in CASES:
        one, two = (rank[f"{name} {stage}"] for rank in ranks[1])
        whole = alone[1][name]
        both = set(one["state"]) & set(two["state"])
        assert set(one["state"]) | set(two["state"]) == set(whole["state"])
        assert both == {n for n in whole["state"] if n.endswith(("bias", "2.weight"))}  # vectors
        assert one["hosted"] == two["hosted"] == whole["hosted"] == (name != "FactoredMuon")
        for rank in (one, two):
            expected = sorted(rank["state"] if stage == 2 else whole["state"])
            assert [sorted(given) for given in rank["gradients"]] == [expected] * STEPS


@needs_deepspeed
def test_gradients_of_several_passes_are_summed_at_their_owners(ranks):
    """Nothing stays between two passes; then each owner has the mean over ranks of its own parameters' sums."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4), nn.Linear(4, 4))
    for batch in range(2):
        for index in range(RANKS):
            x_BD = torch.randn(3, 6, generator=torch.Generator().manual_seed(10 * batch + index))
            (net[: 3 - batch](x_BD).square().sum() / RANKS).backward()
    one, two = (rank["micro-batches"] for rank in ranks[1])
    assert one["between"] == two["between"] == []
    assert "0.weight got its gradient in several parts" in one["twice"]
    assert one["twice"] == two["twice"]
    assert sorted(one["mine"] + two["mine"]) == ["0.weight", "2.weight", "3.weight"]
    for rank in (one, two):
        assert sorted(rank["at the end"]) == rank["mine"]
        for name, gradient in rank["at the end"].items():
            expected = net.get_parameter(name).grad
            torch.testing.assert_close(gradient, torch.zeros(4, 4) if expected is None else expected)
        torch.testing.assert_close(rank["vector"], net[0].bias.grad)


@needs_deepspeed
def test_a_run_that_is_killed_while_owners_send_goes_on_with_the_bits_of_one_process(ranks, alone):
    assert {path.name for path in (ranks[0] / "killed").glob("*.ckpt")} == {f"epoch={SAVED - 1}.ckpt"}
    for rank in ranks[1]:
        assert equal(rank["resumed"]["weights"], alone[1]["FactoredMuon"]["weights"])


@needs_deepspeed
def test_checkpoints_are_those_of_one_process_and_continue_on_another_number_of_ranks(ranks, alone, tmp_path):
    for rank in ranks[1]:
        assert equal(rank["one process before"]["weights"], alone[1]["FactoredMuon"]["weights"])
    for stage in STAGES:
        half = ranks[0] / f"{stage}-LowRank" / f"epoch={SAVED - 1}.ckpt"
        assert half.is_file()
        after = fit(str(tmp_path / str(stage)), OWNED["LowRank"], range(RANKS), resume=half)
        assert equal(after["weights"], alone[1]["LowRank"]["weights"])


@needs_deepspeed
def test_in_bfloat16_weights_and_state_stay_in_their_own_precision(ranks):
    for rank in ranks[1]:
        weights = rank["brain float"]["weights"]
        assert all(weight.dtype == torch.float32 and weight.isfinite().all() for weight in weights.values())
        assert equal(weights, ranks[1][0]["brain float"]["weights"])


@needs_deepspeed
def test_what_cannot_be_divided_by_matrices_is_refused_before_the_first_step(ranks):
    for rank in ranks[1]:
        assert rank["stage 3"].startswith("FactoredMuon works on matrices, but ZeRO's stage 3")
        assert "scale/fsdp2" in rank["stage 3"]
        assert rank["float16"].startswith("trainer.precision=16-mixed")


def test_other_optimisers_of_matrices_and_other_places_of_state_are_refused():
    pytest.importorskip("deepspeed")
    weights = [nn.Parameter(torch.ones(4, 3))]
    nvme = zero.OnCPU(1, offload_optimizer=True, offload_optimizer_device="nvme")
    with pytest.raises(UserError, match=r"Muon works on matrices.*flat ranges"):
        share_steps(zero.OnCPU(1), [torch.optim.Muon(weights)])
    with pytest.raises(UserError, match="offload_optimizer_device=nvme"):
        share_steps(nvme, [Muon(weights)])
    with pytest.raises(UserError, match="backward='hooks'"):
        share_steps(zero.OnCPU(1), [LowRank(weights, rank=2, residual=None, backward="hooks")])
    with pytest.raises(UserError, match=r"class_path=lightspan.training.deepspeed.ZeRO"):
        share_steps(DeepSpeedStrategy(stage=1), [Muon(weights)])
    share_steps(zero.OnCPU(3), [torch.optim.AdamW(weights)])


@pytest.mark.parametrize(
    ("settings", "name"),
    [({"gradient_clipping": 1.0}, "trainer.gradient_clip_val"), ({"bf16": ON}, "trainer.precision")],
)
def test_settings_that_an_engine_which_divides_nothing_would_honour_otherwise_are_refused(settings, name):
    pytest.importorskip("deepspeed")
    strategy = zero.OnCPU(1, config={"zero_optimization": {"stage": 1}, **settings})
    module = Net(ADAMW, range(1))
    module.trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    strategy.connect(module)
    with pytest.raises(UserError, match=name):
        strategy._undivided()


class Rows(LightningDataModule):
    def train_dataloader(self):
        return torch.utils.data.DataLoader([torch.arange(32)] * RANKS, 1)


@needs_deepspeed
@pytest.mark.parametrize("stage", STAGES)
def test_a_plan_is_that_of_the_rank_that_has_most(ranks, alone, tmp_path, stage):
    for name in ("FactoredMuon", "LowRank"):
        net = Net(CASES[name][0], range(1))
        shared = division(zero.OnCPU(stage), net, RANKS)
        plan = make_plan(trainer_of(tmp_path, "auto", 1, 1), net, Rows(), 1 << 36, division=shared)
        measured = max(rank[f"{name} {stage}"]["bytes"] for rank in ranks[1])
        assert plan.step.optimizer_state == pytest.approx(measured, rel=0.1)
        assert measured < alone[1][name]["bytes"]
        assert (plan.division.gradients, plan.division.optimizer_state) == (stage, 1)
