"""`lightspan plan`: what it says of a recipe is what the recipe's own step, optimiser and callbacks do."""

import argparse
import dataclasses
import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from every_preset import PRESETS
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightspan.callbacks.training.activation_checkpointing import ActivationCheckpointing
from lightspan.cli.commands import plan as command
from lightspan.cli.planning import planned_step
from lightspan.cli.planning.division import Division, division, strategy_of
from lightspan.cli.planning.plan import Plan, measured_peak, shares, verdict
from lightspan.cli.planning.planned_step import available_memory, cgroup_limit, make_plan
from lightspan.cli.planning.step_memory import StepMemory
from lightspan.core.errors import UserError
from lightspan.core.memory import state_bytes
from lightspan.datamodules.shards.stream import Shards
from lightspan.optim.low_rank.gradients import attach
from lightspan.optim.low_rank.optimizer import LowRank
from lightspan.optim.matrices import placement
from lightspan.optim.matrices.owners import bytes_of
from lightspan.optim.muon import FactoredMuon
from lightspan.training.strategies import FSDP2

GIB = 2**30
AMPLE = 64 * GIB  # a plan counts what this process holds already, and late in a long suite that is more than a GiB


class Regression(LightningModule):
    def __init__(self, optimizer: Any = torch.optim.AdamW) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
        self.make_optimizer = optimizer

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        loss = nn.functional.mse_loss(self.net(x), y)
        self.log("train/loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = self.make_optimizer(self.parameters())
        steps = int(self.trainer.estimated_stepping_batches)
        return [optimizer], [torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=steps)]


class Numbers(LightningDataModule):
    def train_dataloader(self) -> DataLoader:
        return DataLoader(TensorDataset(torch.randn(24, 16), torch.randn(24, 4)), batch_size=8)


def trainer(tmp_path: Path, **options: Any) -> Trainer:
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return Trainer(**{"max_epochs": 1, "accelerator": "cpu", "default_root_dir": tmp_path, **quiet, **options})


def planned(
    tmp_path: Path, module: LightningModule, limit: int | None = AMPLE, real: bool = False, **options: Any
) -> Plan:
    return make_plan(trainer(tmp_path, **options), module, Numbers(), limit, real)


def test_the_plan_is_what_training_then_holds(tmp_path: Path) -> None:
    module = Regression()
    plan = planned(tmp_path, module)
    run = trainer(tmp_path)
    run.fit(module, datamodule=Numbers())
    assert plan.step.optimizer_state == state_bytes(run.optimizers[0])
    assert plan.step.weights == sum(p.numel() * p.element_size() for p in module.parameters())
    assert plan.step.activations == 4 * 8 * (32 + 4)
    assert plan.notes == []


@pytest.mark.sample(4)
@pytest.mark.parametrize("kind", [LowRank, *PRESETS], ids=lambda kind: kind.__name__)
def test_every_low_rank_optimizer_is_planned_on_fake_tensors_and_trains_with_its_checks(
    tmp_path: Path, kind: type[LowRank]
) -> None:
    """A real step would need the memory that the plan is asked for."""
    options = {"rank": 2} if "rank" in inspect.signature(kind).parameters else {}
    module = Regression(lambda p: kind(p, lr=0.01, **options))
    plan = planned(tmp_path, module)
    run = trainer(tmp_path)
    run.fit(module, datamodule=Numbers())
    assert plan.step.optimizer_state == state_bytes(run.optimizers[0])
    assert plan.notes == []
    assert run.optimizers[0].check_finite


@pytest.mark.parametrize("kind", [LowRank, FactoredMuon])
def test_a_rank_is_planned_with_the_state_that_it_owns(tmp_path: Path, kind: type[LowRank]) -> None:
    """Of two matrices the larger one; vectors are on every rank."""
    options = {"rank": 2} if kind is LowRank else {}
    module = Regression(lambda p: kind(p, lr=0.01, owners=True, **options))
    one, two = (make_plan(trainer(tmp_path), module, Numbers(), AMPLE, division=Division(ranks=n)) for n in (1, 2))
    run = trainer(tmp_path)
    run.fit(module, datamodule=Numbers())
    optimizer = run.optimizers[0]
    elsewhere = bytes_of(optimizer.state[module.net[2].weight])
    assert one.step.optimizer_state == state_bytes(optimizer)
    assert two.step.optimizer_state == state_bytes(optimizer) - elsewhere
    assert one.step.peak - two.step.peak == elsewhere
    assert [note.endswith("belong to other ranks, and are not counted above") for note in two.notes] == [True]


class Attached(Regression):
    def configure_optimizers(self) -> Any:
        optimizers, schedulers = super().configure_optimizers()
        attach(self, optimizers[0])
        return optimizers, schedulers


@pytest.mark.parametrize("backward", ["hooks", "projected"])
def test_gradients_kept_in_coordinates_are_planned_on_fake_tensors(tmp_path: Path, backward: str) -> None:
    """For several sizes of the batch, each with an optimiser of its own; what it hung on the layers is gone then."""
    module = Attached(lambda p: LowRank(p, rank=2, residual=None, backward=backward))
    plan = planned(tmp_path, module)
    assert plan.notes == []
    assert plan.largest_rows is not None
    assert {type(part) for part in module.net} == {nn.Linear, nn.ReLU}
    run = trainer(tmp_path)
    run.fit(module, datamodule=Numbers())
    assert plan.step.optimizer_state == state_bytes(run.optimizers[0])


class Reading(LowRank):
    """Its step stops on fake tensors."""

    def step(self, closure: Any = None) -> Any:
        assert self.param_groups[0]["params"][0].sum().item() < torch.inf
        return super().step(closure)


@pytest.mark.parametrize("reads", [False, True])
def test_state_that_lives_on_the_host_needs_room_for_two_visits_on_a_device(
    tmp_path: Path, reads: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(placement, "SMALLEST_OFFLOADED", 100)
    monkeypatch.setattr(placement, "LARGEST_TRANSFER", 100)

    def plan(on: bool) -> Plan:
        module = Regression(lambda p: (Reading if reads else LowRank)(p, rank=2, offload=on))
        return planned(tmp_path, module, limit=0)  # with no room there is no largest batch to look for

    whole = plan(False)
    assert plan(True).step == whole.step  # on the host, where it makes no difference
    monkeypatch.setattr(planned_step._Step, "on_device", True)
    assert plan(False).step == whole.step
    found = plan(True)
    away = 2 * 4 * (2 * 32 * 2 + 2 + 1)  # of two matrices with 32 rows: moments and ages at rank 2, and a limiter
    assert found.step.host_state == away
    assert found.step.optimizer_state == whole.step.optimizer_state - away
    assert found.step.peak == whole.step.peak  # each matrix is a transfer
    assert any(
        note.endswith("MiB of optimiser state live on the host, and are not counted above") for note in found.notes
    )
    assert any("a fake one stopped" in note for note in found.notes) == reads
    assert Division(2, optimizer_state=2).of(found.step).host_state == away // 2


def test_planning_changes_no_weight_and_writes_nothing(tmp_path: Path) -> None:
    module = Regression()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    planned(tmp_path, module)
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    assert list(tmp_path.iterdir()) == []


def test_a_callback_that_exchanges_the_optimizer_is_planned_with(tmp_path: Path) -> None:
    class Plain(Callback):
        prepares_optimizers = True

        def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            trainer.strategy.optimizers = [torch.optim.SGD(pl_module.parameters(), momentum=0.9)]

    plan = planned(tmp_path, Regression(), callbacks=[Plain()])
    assert plan.step.optimizer_state == plan.step.gradients


def test_a_callback_that_may_do_anything_is_left_alone_and_named(tmp_path: Path) -> None:
    class Service(Callback):
        def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            raise AssertionError("a plan started the service")

    plan = planned(tmp_path, Regression(), callbacks=[Service()])
    assert [note for note in plan.notes if note.startswith("without what Service.on_fit_start does")]


def test_the_memory_of_a_job_is_the_least_limit_of_its_control_groups(tmp_path: Path) -> None:
    groups, root = tmp_path / "cgroup", tmp_path / "fs"
    job = root / "system.slice" / "slurmstepd.scope" / "job_7" / "step_0"
    job.mkdir(parents=True)
    assert cgroup_limit(groups, root) is None
    groups.write_text("0::/system.slice/slurmstepd.scope/job_7/step_0\n")
    assert cgroup_limit(groups, root) is None
    (job / "memory.max").write_text("max\n")
    (job.parent / "memory.max").write_text("8589934592\n")
    (root / "memory.max").write_text("99999999999\n")
    assert cgroup_limit(groups, root) == 8 * GIB
    # A container sees its own group as the root, and another path than the one that is there.
    groups.write_text("0::/kubepods/pod1\n")
    assert cgroup_limit(groups, root) == 99999999999
    old = root / "memory" / "slurm" / "job_7"
    old.mkdir(parents=True)
    groups.write_text("5:cpu,cpuacct:/slurm/job_7\n4:memory:/slurm/job_7\n")
    (root / "memory" / "memory.limit_in_bytes").write_text("9223372036854771712\n")
    (old / "memory.limit_in_bytes").write_text("4294967296\n")
    assert cgroup_limit(groups, root) == 4 * GIB


def test_an_optimizer_that_reads_numbers_is_planned_by_an_idle_step(tmp_path: Path) -> None:
    module = Regression(torch.optim.Adafactor)
    plan = planned(tmp_path, module)
    run = trainer(tmp_path)
    run.fit(module, datamodule=Numbers())
    assert plan.step.optimizer_state == state_bytes(run.optimizers[0]) > 0
    assert plan.largest_rows is not None
    assert len(plan.notes) == 1
    assert "optimiser state counted by a real step on zero gradients" in plan.notes[0]


def test_a_model_that_reads_numbers_is_planned_by_a_real_step(tmp_path: Path) -> None:
    class Reading(Regression):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            return loss * 2 if loss.item() > 0 else loss

    plan = planned(tmp_path, Reading())
    assert plan.step.activations >= 4 * 8 * (32 + 4)
    assert plan.step.optimizer_state == planned(tmp_path, Regression()).step.optimizer_state
    assert plan.largest_rows is not None
    assert plan.largest_rows > 8
    assert "counted by a real step, since a fake one stopped (it reads a number from a tensor" in plan.notes[0]
    assert plan.notes[1] == "the largest micro-batch is on a line through real steps of 4 and 8 samples"


def test_a_real_step_that_would_not_fit_into_this_machine_is_told_from_smaller_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, ran = planned(tmp_path, Regression(), real=True), list[int]()

    class Counted(Regression):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            ran.append(len(batch[0]))
            return super().training_step(batch, batch_idx)

    monkeypatch.setattr(planned_step, "available_memory", lambda device: (0, "a full machine"))
    plan = planned(tmp_path, Counted(), real=True)
    assert set(ran) == {2, 4}
    assert plan.step == whole.step
    assert plan.notes[1:] == [
        "for 8 samples memory lacks here: all figures are on a line through real steps of 2 and 4 samples"
    ]


def test_a_real_step_on_demand_counts_the_same(tmp_path: Path) -> None:
    real = planned(tmp_path, Regression(), real=True)
    assert real.step == planned(tmp_path, Regression()).step
    assert real.notes[0] == "counted by a real step"


def test_half_precision_weights_take_half(tmp_path: Path) -> None:
    single, half = (planned(tmp_path, Regression(), precision=precision).step for precision in ("32-true", "bf16-true"))
    assert half.weights * 2 == single.weights
    assert half.gradients * 2 == single.gradients


def test_the_largest_batch_uses_the_memory_given(tmp_path: Path) -> None:
    plan = planned(tmp_path, Regression())
    small = planned(tmp_path, Regression(), limit=plan.total + 10 * 2**20)
    assert plan.largest_rows is not None
    assert small.largest_rows is not None
    assert 8 < small.largest_rows < plan.largest_rows
    assert planned(tmp_path, Regression(), limit=1).largest_rows == 0


def test_manual_optimization_is_refused(tmp_path: Path) -> None:
    module = Regression()
    module.automatic_optimization = False
    with pytest.raises(UserError, match=r"Regression uses manual optimisation .* measure it in a short run"):
        planned(tmp_path, module)


def test_a_step_without_a_loss_is_refused(tmp_path: Path) -> None:
    class Skipping(Regression):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
            return None

    with pytest.raises(UserError, match=r"Skipping.training_step returned no loss for the first batch"):
        planned(tmp_path, Skipping())


def plan_of(activations: int, state: int) -> Plan:
    step = StepMemory(8, weights=100, batch=1, activations=activations, gradients=100, optimizer_state=state, peak=500)
    return Plan(step, Division(), process=0, memory=GIB, memory_source="--memory", largest_rows=9, notes=[])


def test_the_verdict_says_what_rules() -> None:
    mib = 2**20
    assert "Activations outweigh optimiser state (9.0 against 2.0 MiB)" in verdict(plan_of(9 * mib, 2 * mib))
    assert "saves at most 2.0 MiB" in verdict(plan_of(9 * mib, 2 * mib))
    assert "Optimiser state outweighs activations (9.0 against 2.0 MiB)" in verdict(plan_of(2 * mib, 9 * mib))


def test_shares_add_up() -> None:
    rows = shares(plan_of(300, 200))
    assert sum(size for _, size, _ in rows) == 100 + 100 + 200 + 300 + 1
    assert sum(share for *_, share in rows) == pytest.approx(1)


def test_memory_of_this_machine_is_a_sane_number() -> None:
    size, source = available_memory(torch.device("cpu"))
    assert 2**28 < size < 2**50
    assert "this" in source


@pytest.mark.parametrize(
    ("summary", "found"),
    [
        ({"peak_rss_mib": 900.0, "peak_device_mib": 70.0}, ("peak_device_mib", 70.0)),
        ({"peak_rss_mib": 900.0}, ("peak_rss_mib", 900.0)),
        ({}, None),
    ],
)
def test_the_measured_peak_is_the_devices_where_there_was_one(tmp_path: Path, summary: Any, found: Any) -> None:
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    assert measured_peak(tmp_path) == found


RECIPE = """
about: {title: t, paper: none, family: language, modality: text, needs: n, expected: e, time: 1 s, evidence: none}
trainer: {max_steps: 4, accelerator: cpu, logger: {}, enable_checkpointing: false}
model:
  class_path: lightspan.methods.language.causal_lm.CausalLM
  init_args:
    backbone:
      class_path: lightspan.backbones.language.llama
      init_args: {width: 32, depth: 1, heads: 2, mlp_width: 64, context: 16}
    optimizer: {class_path: torch.optim.AdamW, init_args: {lr: 1.0e-3}}
data:
  class_path: lightspan.datamodules.text.windows.ByteText
  init_args: {batch_size: 4}
"""


def run_plan(*arguments: object, flags: tuple[str, ...] = ()) -> int:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    args = parser.parse_args([str(argument) for argument in arguments])
    args.flags = list(flags)
    return command.run(args)


class Deep(Regression):
    """Four blocks of 16 -> 64 -> 16, and the loss of what comes out."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(*(nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 16)) for _ in range(4)))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.net(batch[0]).square().mean()


@pytest.mark.parametrize("real", [False, True])
def test_of_blocks_that_compute_twice_what_goes_in_and_out_is_counted_and_no_more(tmp_path: Path, real: bool) -> None:
    whole = planned(tmp_path, Deep(), real=real)
    spared = planned(tmp_path, Deep(), real=real, callbacks=[ActivationCheckpointing()])
    row = 8 * 16 * 4  # bytes of what a block gives for 8 samples
    assert whole.step.activations == 4 * 4 * row + 4 * row  # behind each ReLU, and what each block gives
    assert spared.step.activations == 4 * row + 4  # the loss lives too
    assert spared.notes == whole.notes


@pytest.mark.runs
def test_a_strategy_that_recomputes_is_planned_with(tmp_path: Path) -> None:
    recipe, sizes = tmp_path / "tiny.yaml", []
    recipe.write_text(RECIPE)
    for recomputes in ("false", "true"):
        folder = tmp_path / recomputes
        folder.mkdir()
        strategy = "trainer.strategy.class_path=lightspan.training.strategies.FSDP2"
        flags = (strategy, f"trainer.strategy.init_args.activation_checkpointing={recomputes}")
        flags = (*flags, "data.init_args.context=16", "trainer.accelerator=auto")
        assert run_plan(recipe, "--run", folder, "--memory", 2, flags=flags) == 0
        sizes.append(json.loads((folder / "plan.json").read_text())["step"]["activations"])
    assert 0 < sizes[1] < sizes[0] / 2


def test_the_command_prints_the_plan_and_sets_it_against_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, folder = tmp_path / "tiny.yaml", tmp_path / "run"
    recipe.write_text(RECIPE)
    folder.mkdir()
    (folder / "summary.json").write_text(json.dumps({"peak_rss_mib": 1000.0}))
    assert run_plan(recipe, "--run", folder, "--memory", 2, flags=("data.init_args.context=16",)) == 0
    printed = capsys.readouterr().out
    for text in ("One optimiser step of", "optimiser state", "activations, 4 samples", "2.0 GiB (--memory)"):
        assert text in printed
    assert "The finished run recorded peak_rss_mib 1,000.0; the plan is" in printed
    written = json.loads((folder / "plan.json").read_text())
    assert written["measured_peak_rss_mib"] == 1000.0
    assert written["step"]["optimizer_state"] > 2 * written["step"]["gradients"] > 0
    assert sorted(path.name for path in folder.iterdir()) == ["plan.json", "summary.json"]


def test_a_model_that_no_machine_holds_is_planned_without_its_numbers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, width = tmp_path / "tiny.yaml", "model.init_args.backbone.init_args.width=131072"
    recipe.write_text(RECIPE)
    assert run_plan(recipe, "--run", tmp_path, "--memory", 4000, flags=("data.init_args.context=16", width)) == 0
    found = json.loads((tmp_path / "plan.json").read_text())
    assert found["step"]["weights"] > 4 * 4 * 131072**2
    assert found["step"]["optimizer_state"] > 2 * found["step"]["gradients"]
    assert found["notes"] == []
    assert "plan:   0 s: building tiny\n" in capsys.readouterr().err


def test_a_plan_for_gpus_is_not_compared_with_a_machine_that_has_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    recipe, small = tmp_path / "tiny.yaml", "data.init_args.context=16"
    recipe.write_text(RECIPE)
    assert run_plan(recipe, "--run", tmp_path, flags=(small, "trainer.accelerator=gpu")) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "Memory: this machine has no GPU, so the plan is compared with nothing; add --memory GIB" in printed
    assert "Python, libraries and data" not in printed  # which are not on a GPU
    assert json.loads((tmp_path / "plan.json").read_text())["memory"] is None
    for accelerator, ranks, elsewhere in (("cpu", 2, False), ("auto", 1, False), ("auto", 2, True), ("gpu", 1, True)):
        assert command._elsewhere({"trainer": {"accelerator": accelerator}}, ranks) == elsewhere


def test_a_plan_that_does_not_fit_names_half_precision_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(RECIPE)
    for precision, said in (("32-true", 1), ("bf16-true", 0)):
        flags = ("data.init_args.context=16", f"trainer.precision={precision}")
        assert run_plan(recipe, "--memory", 0.0001, flags=flags) == 0
        assert capsys.readouterr().out.count("trainer.precision=bf16-true") == said


def test_memory_must_be_positive(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--memory 0 must be more than 0 GiB"):
        run_plan(tmp_path / "any.yaml", "--memory", 0)


class Blocks(nn.Module):
    """A root of 10 numbers, two blocks of 20 and one of 4."""

    def __init__(self) -> None:
        super().__init__()
        self.root = nn.Parameter(torch.zeros(10))
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(3, 1)])


def test_full_sharding_divides_what_stands_and_adds_what_is_gathered() -> None:
    """Gathered: the root, the two largest blocks, and twice the gradient of the largest part."""
    shared = division(FSDP2(replicas=2), Blocks(), ranks=8)
    assert (shared.weights, shared.gradients, shared.optimizer_state) == (4, 4, 4)
    assert shared.extra == 4 * (10 + 20 + 20 + 2 * 20)
    step = StepMemory(8, weights=100, batch=1, activations=30, gradients=100, optimizer_state=200, peak=440)
    rank = shared.of(step)
    assert (rank.weights, rank.gradients, rank.optimizer_state, rank.activations) == (25, 25, 50, 30)
    assert rank.peak == 25 + 25 + 50 + 40 + shared.extra


def test_data_parallel_ranks_have_all_of_it_and_buckets_of_gradients() -> None:
    shared = division(strategy_of("ddp"), Blocks(), ranks=8)
    step = StepMemory(8, weights=100, batch=1, activations=30, gradients=100, optimizer_state=200, peak=440)
    assert shared.of(step) == dataclasses.replace(step, peak=440 + shared.extra)
    assert shared.extra == 4 * 54
    views = {"class_path": "lightning.pytorch.strategies.DDPStrategy", "init_args": {"gradient_as_bucket_view": True}}
    assert division(strategy_of(views), Blocks(), ranks=8).extra == 0


@pytest.mark.parametrize(("stage", "divided"), [(1, (1, 1, 4)), (2, (1, 4, 4)), (3, (4, 4, 4))])
def test_zero_divides_more_with_every_stage(stage: int, divided: tuple[int, int, int]) -> None:
    pytest.importorskip("deepspeed")
    zero = strategy_of({"class_path": "lightspan.training.deepspeed.ZeRO", "init_args": {"stage": stage}})
    shared = division(zero, Blocks(), ranks=4)
    assert (shared.weights, shared.gradients, shared.optimizer_state) == divided


def test_one_rank_is_the_whole_step() -> None:
    assert division(FSDP2(), Blocks(), ranks=1) == Division()


def test_what_cannot_be_divided_is_refused() -> None:
    with pytest.raises(UserError, match=r"FSDP2 replicas=3 does not divide 8 ranks"):
        division(FSDP2(replicas=3), Blocks(), ranks=8)
    with pytest.raises(UserError, match=r"trainer.strategy='nonsense' cannot be planned"):
        strategy_of("nonsense")


@pytest.mark.runs
def test_ranks_that_are_not_here_are_planned_here(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each of 4 ranks has a sample of the batch of 4, and a quarter of AdamW's state."""
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(RECIPE)
    size = ("data.init_args.context=16",)
    for ranks in (1, 4):
        folder = tmp_path / str(ranks)
        folder.mkdir()
        flags = (*size, "trainer.strategy.class_path=lightspan.training.strategies.FSDP2", "trainer.accelerator=auto")
        assert run_plan(recipe, "--run", folder, "--memory", 2, "--ranks", ranks, flags=flags) == 0
    assert "one of 4 ranks" in capsys.readouterr().out
    one, quarter = (json.loads((tmp_path / name / "plan.json").read_text())["step"] for name in ("1", "4"))
    assert (one["rows"], quarter["rows"]) == (4, 1)
    assert quarter["optimizer_state"] == pytest.approx(one["optimizer_state"] / 4, abs=4)
    with pytest.raises(UserError, match=r"batch_size=4 .* does not divide into 3 ranks"):
        run_plan(recipe, "--ranks", 3, flags=size)
    with pytest.raises(UserError, match=r"--ranks 0 must be at least 1"):
        run_plan(recipe, "--ranks", 0, flags=size)


class Pictures(LightningModule):
    """Of 3 channels to a number."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(3, 1)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self.net(batch["image"].mean(dim=(2, 3))).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_a_plan_needs_no_shards_and_one_that_is_there_has_to_be_whole(tmp_path: Path) -> None:
    data = Shards([str(tmp_path / "0.tar")], image_size=8, batch_size=12)
    plan = make_plan(trainer(tmp_path), Pictures(), data, AMPLE, division=Division(ranks=3))
    assert plan.step.rows == 4
    assert plan.notes == ["a batch of zeros, black or silent, stands in for the data, which are not here"]
    (tmp_path / "0.tar").write_bytes(b"")
    data = Shards([str(tmp_path / f"{number}.tar") for number in range(2)], image_size=8)
    with pytest.raises(UserError, match=r"0\.tar is not a tar file"):
        make_plan(trainer(tmp_path), Pictures(), data, AMPLE)
