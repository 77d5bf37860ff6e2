"""The sentinel warns of runs that are made to collapse, is silent on healthy ones, and changes nothing."""

import contextlib
import io
import json
import math
import os
import random
import re
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rank_processes
import torch
import torch.distributed as dist
from collapsing_runs import Pairs, Siamese
from lightning import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint

from lightspan.callbacks.resilience.checkpoint import Checkpoint
from lightspan.callbacks.watching import collapse_sentinel
from lightspan.callbacks.watching.collapse_sentinel import CollapseSentinel
from lightspan.callbacks.watching.collapse_signs import SIGNS, Judge
from lightspan.callbacks.watching.held_samples import images_of, single_views
from lightspan.callbacks.watching.run_summary import RunSummary
from lightspan.cli.report.page import render
from lightspan.cli.report.runs import load_run
from lightspan.cli.report.sections import sections
from lightspan.core.distributed import end_process_group
from lightspan.core.errors import UserError
from lightspan.evaluation.geometry.collapse import lidar, rankme
from lightspan.training.loggers.jsonl import JsonlLogger
from lightspan.training.strategies import FSDP2


def fit(make_trainer, module, sentinel=None, views="noisy", seed=0, **options) -> tuple[Trainer, list[str]]:
    """The trainer, and what the sentinel said."""
    callbacks = [*([sentinel] if sentinel else []), *options.pop("callbacks", [])]
    data = options.pop("data", None) or Pairs(views, seed)
    trainer = make_trainer(**{"max_steps": 100, **options}, callbacks=callbacks)
    seed_everything(3, verbose=False)
    with contextlib.redirect_stderr(io.StringIO()) as said:
        trainer.fit(module, datamodule=data)
    return trainer, [line for line in said.getvalue().splitlines() if "CollapseSentinel" in line]


def sentinel(**settings: Any) -> CollapseSentinel:
    return CollapseSentinel(**{"every_n_steps": 10, "samples": 128, **settings})


# Runs that are made to collapse, and healthy ones.


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    ("objective", "rate", "by_step", "finding"),
    [
        ("cosine", 3e-3, 60, "embeddings of all samples become one point"),  # neither stop-gradient nor variance
        ("cosine", 1e-2, 50, "embeddings of all samples become one point"),
        ("contrast", 1.0, 20, "the learning rate is likely too high"),
    ],
)
def test_a_collapse_is_warned_of_in_time_with_its_likely_cause(make_trainer, objective, rate, by_step, finding) -> None:
    _, said = fit(make_trainer, Siamese(objective, rate), sentinel(), max_steps=by_step)
    assert finding in said[0]


@pytest.mark.parametrize(
    ("views", "finding"),
    [
        ("constant", "of 128 training samples only 1 differ after augmentation"),
        ("equal", "the views of each sample are all equal"),
    ],
)
def test_views_that_teach_nothing_are_told_before_the_first_step(make_trainer, views, finding) -> None:
    _, said = fit(make_trainer, Siamese("contrast"), sentinel(), views, max_steps=1)
    assert len(said) == 1
    assert said[0].startswith(f"warning: CollapseSentinel, step 0: {finding}")


@pytest.mark.sample(3)
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("objective", ["predicted", "contrast", "variance"])
def test_a_healthy_run_is_left_in_peace(make_trainer, objective, seed) -> None:
    watch = sentinel()
    _, said = fit(make_trainer, Siamese(objective, seed=seed), watch, seed=seed, max_steps=80)
    assert said == []
    assert watch.sound_step == 80


# What it measures, and that it changes nothing.


def measured(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's log that have figures of collapse."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "collapse/rankme" in row]


def test_figures_are_those_of_the_embeddings_of_the_first_samples(make_trainer, tmp_path) -> None:
    module, seen = Siamese("contrast"), {}
    seen["x"] = torch.stack(
        [module.eval().embeddings({"image": view}) for view in next(iter(Pairs().train_dataloader()))["views"]], dim=1
    )
    fit(make_trainer, module, sentinel(samples=64, every_n_steps=1000), max_steps=1, logger=JsonlLogger(str(tmp_path)))
    logged = measured(tmp_path)[0]
    assert logged["collapse/rankme"] == pytest.approx(rankme(seen["x"][:, 0]), rel=1e-4)
    assert logged["collapse/lidar"] == pytest.approx(lidar(seen["x"]), rel=1e-3)


@pytest.mark.parametrize(
    ("length", "steps"),
    [({"max_steps": 7}, [0, 6]), ({"max_epochs": 1, "max_steps": -1}, [0, 3]), ({"max_steps": 20}, [0, 9, 19])],
    ids=["inside an epoch", "after an epoch", "when one is due"],
)
def test_the_last_figures_are_of_the_end_and_are_judged(make_trainer, tmp_path, length, steps) -> None:
    watch, logger = sentinel(patience=1, action="stop"), JsonlLogger(str(tmp_path))
    trainer, _ = fit(make_trainer, Siamese("contrast"), watch, logger=logger, **length)
    rows = measured(tmp_path)
    assert [row["step"] for row in rows] == steps
    module, batch = trainer.lightning_module.eval(), next(iter(Pairs().train_dataloader()))
    last = trainer.callback_metrics["collapse/length"].item()
    assert last == rows[-1]["collapse/length"] != rows[0]["collapse/length"]
    assert watch.sound_step == watch.measured == trainer.global_step
    assert module.embeddings({"image": batch["views"][0]}).norm(dim=1).mean().item() == pytest.approx(last, rel=0.2)


def test_a_run_is_measured_ten_times_and_a_long_one_every_fifty_steps(make_trainer, tmp_path, monkeypatch) -> None:
    def steps(name: str, length: int) -> list[int]:
        logger = JsonlLogger(str(tmp_path / name))
        fit(make_trainer, Siamese("contrast"), sentinel(every_n_steps=None, samples=8), logger=logger, max_steps=length)
        return [row["step"] for row in measured(tmp_path / name)]

    assert steps("short", 5) == [0, 0, 1, 2, 3, 4]
    assert steps("medium", 23) == [0, *range(1, 23, 2), 22]
    monkeypatch.setattr(collapse_sentinel, "steps_of_run", lambda trainer: math.inf)
    assert steps("endless", 101) == [0, 49, 99, 100]


@pytest.mark.parametrize("steps", [7, 20])
def test_a_run_killed_behind_its_last_checkpoint_still_measures_its_end(make_trainer, tmp_path, steps) -> None:
    def start(ckpt_path: Path | None = None) -> list[dict[str, Any]]:
        callbacks = [sentinel(), Checkpoint(dirpath=str(tmp_path / "checkpoints"), every_n_train_steps=1)]
        options = {"logger": JsonlLogger(str(tmp_path)), "enable_checkpointing": True, "max_steps": steps}
        trainer = make_trainer(**options, callbacks=callbacks)
        seed_everything(3, verbose=False)
        trainer.fit(Siamese("contrast"), datamodule=Pairs(), ckpt_path=ckpt_path, weights_only=True)
        return [{**row, "time_s": 0} for row in measured(tmp_path)]

    straight = start()
    assert start(tmp_path / "checkpoints" / "last.ckpt") == straight  # written before the end of the epoch


def test_training_is_bit_identical_with_and_without_it(make_trainer) -> None:
    runs = []
    for watch in (
        None,
        sentinel(every_n_steps=1),
        sentinel(every_n_steps=1000),
        sentinel(every_n_steps=1, action="roll_back"),
    ):
        module = Siamese("contrast")
        trainer, _ = fit(make_trainer, module, watch, max_epochs=2, max_steps=-1)
        moments = [value for state in trainer.optimizers[0].state.values() for value in state.values()]
        draws = torch.tensor([random.random(), np.random.rand(), torch.rand(()).item()])
        position = torch.tensor(trainer.train_dataloader.consumed)
        runs.append([*module.state_dict().values(), *moments, draws, position])
    assert len(runs[0]) > 30
    for one in runs[1:]:
        assert all(torch.equal(without, with_it) for without, with_it in zip(runs[0], one, strict=True))


def test_a_module_with_features_alone_and_batches_without_views(make_trainer) -> None:
    class Plain(Siamese):
        embeddings = property()  # none

        def training_step(self, batch, batch_idx):
            return self.features(batch).square().mean()

    class Rows(Pairs):
        def train_dataloader(self):
            return torch.utils.data.DataLoader([{"image": x} for x in self.points.x], self.batch_size, shuffle=True)

    module = Plain("cosine")
    with torch.no_grad():
        module.encoder[-2].bias.add_(100)  # what all features have in common says nothing
    trainer = make_trainer(max_steps=2, callbacks=[sentinel(every_n_steps=1)])
    trainer.fit(module, datamodule=Rows())
    names = {name for name in trainer.callback_metrics if name.startswith("collapse/")}
    assert "collapse/rankme" in names
    assert not names & {"collapse/lidar", "collapse/alignment", "collapse/prototypes_in_use"}
    assert trainer.callback_metrics["collapse/rankme"] > 2
    assert trainer.callback_metrics["collapse/spread"] > 0.2


def test_views_by_name_are_views_and_other_entries_of_that_name_are_none() -> None:
    a, b, small = torch.ones(2, 4), torch.zeros(2, 4), torch.ones(2, 2)
    for views, expected in (({"x": a, "y": b, "z": small}, [a, b]), ([a, b, small], [a, b])):
        batch = {"views": views, "index": torch.arange(2)}
        assert [one["image"] is view for one, view in zip(single_views(batch), expected, strict=True)] == [True, True]
    for views in ((), {}, None, torch.ones(2, 2, 4), [1, 2]):
        batch = {"views": views, "image": a}
        (one,) = single_views(batch)
        assert one is batch
        assert images_of(batch)[0].ndim > 1


def test_prototypes_are_judged_by_assignments(make_trainer) -> None:
    class OnePrototype(Siamese):
        """Ever more samples go to the first of eight prototypes."""

        def assignments(self, batch):
            scores = 4 * self.features(batch)[:, :8]
            return torch.nn.functional.pad(scores, (0, 0)).add(self.global_step * torch.eye(8)[0]).softmax(dim=1)

    _, said = fit(make_trainer, OnePrototype("contrast"), sentinel(), max_steps=60)
    assert any("all samples go to 1." in one for one in said)


def test_figures_go_to_the_log_and_into_the_report(make_trainer, tmp_path: Path) -> None:
    fit(make_trainer, Siamese("contrast"), sentinel(), max_steps=20, logger=JsonlLogger(str(tmp_path)))
    run = load_run(tmp_path, "run")
    assert [point.step for point in run.points("collapse/rankme")] == [0, 9, 19]
    (section,) = [section for section in sections([run]) if section.key == "collapse"]
    assert {"collapse/rankme", "collapse/lidar", "collapse/signs"} <= {chart.title for chart in section.charts}


def test_a_warning_is_in_metrics_summary_and_report_once_whatever_the_starts(make_trainer, tmp_path: Path) -> None:
    def start(steps: int, ckpt_path: Path | None = None) -> list[str]:
        callbacks = [sentinel(), RunSummary(str(tmp_path / "summary.json"), print_table=False)]
        trainer = make_trainer(max_steps=steps, logger=JsonlLogger(str(tmp_path)), callbacks=callbacks)
        seed_everything(3, verbose=False)
        with contextlib.redirect_stderr(io.StringIO()) as said:
            trainer.fit(Siamese("cosine", 1e-2), datamodule=Pairs(), ckpt_path=ckpt_path, weights_only=True)
        trainer.save_checkpoint(tmp_path / f"{steps}.ckpt")
        return [line for line in said.getvalue().splitlines() if "CollapseSentinel" in line]

    said = start(40)
    assert said
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    warned = [(row["step"], row["warning"]) for row in rows if "warning" in row]
    assert [f"warning: {text}" for _, text in warned] == said
    step, text = warned[0]
    assert f"CollapseSentinel, step {step + 1}: embeddings of all samples become one point (spread 0." in text
    said += start(50, tmp_path / "40.ckpt")
    assert [f"warning: {text}" for text in json.loads((tmp_path / "summary.json").read_text())["warnings"]] == said
    page = render([load_run(tmp_path, "run")], "title")
    assert all(page.count(escape(line.removeprefix("warning: "))) == 1 for line in said)


# What it does.


def test_it_stops_the_run_and_names_the_checkpoint_from_before_the_fall(make_trainer, tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=10, save_top_k=-1)
    watch = sentinel(action="stop")
    with pytest.raises(UserError, match="embeddings of all samples become one point") as raised:
        fit(make_trainer, Siamese("cosine", 1e-2), watch, callbacks=[keep], enable_checkpointing=True)
    assert 10 <= watch.sound_step < 50
    assert f"step={watch.sound_step}.ckpt is from before the fall" in str(raised.value)
    assert (tmp_path / f"step={watch.sound_step}.ckpt").exists()


def test_a_roll_back_restores_every_bit_of_the_last_sound_measurement_and_slows_down(make_trainer) -> None:
    states: dict[int, Any] = {}

    class Watch(CollapseSentinel):
        def _measure(self, trainer, module, log) -> None:
            before, fell = self.roll_backs, {n: v.clone() for n, v in module.state_dict().items()}
            super()._measure(trainer, module, log)
            after = {n: v.clone() for n, v in module.state_dict().items()}
            if self.roll_backs > before:
                sound = states[self.sound_step]
                assert all(torch.equal(after[name], sound[name]) for name in after)
                assert any(not torch.equal(after[name], fell[name]) for name in after)
                rates.append(trainer.optimizers[0].param_groups[0]["lr"])
            states[trainer.global_step] = after

    rates: list[float] = []
    watch = Watch(every_n_steps=10, samples=128, action="roll_back", rate=0.1)
    with pytest.raises(UserError, match="become one point"):
        fit(make_trainer, Siamese("cosine", 1e-2), watch, max_steps=2000)
    assert rates == pytest.approx([1e-3, 1e-4])  # most_roll_backs is 2


def test_a_slower_run_that_was_rolled_back_lives_on(make_trainer) -> None:
    class TooFast(Siamese):
        """Nothing but the rate is wrong."""

        def configure_optimizers(self):
            optimizer = torch.optim.Adam(self.parameters(), lr=1.0)
            return [optimizer], [{"scheduler": torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)}]

    watch = sentinel(action="roll_back", rate=1e-3)
    trainer, said = fit(make_trainer, TooFast("contrast"), watch)
    assert watch.roll_backs == 1
    assert "Roll back 1 of 2: went back to step 0's weights" in said[0]
    assert watch.sound_step == 100
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(1e-3)


def test_a_resumed_run_goes_on_judging_where_it_was(make_trainer, tmp_path: Path) -> None:
    straight, first, second = sentinel(), sentinel(), sentinel()
    _, said = fit(make_trainer, Siamese("cosine", 1e-2), straight, max_steps=60)
    trainer, early = fit(make_trainer, Siamese("cosine", 1e-2), first, max_steps=20)
    trainer.save_checkpoint(tmp_path / "20.ckpt")
    trainer = make_trainer(max_steps=60, callbacks=[second])
    with contextlib.redirect_stderr(io.StringIO()) as late:
        trainer.fit(Siamese("cosine", 1e-2), datamodule=Pairs(), ckpt_path=tmp_path / "20.ckpt", weights_only=True)
    assert second.judge.state_dict() == straight.judge.state_dict()
    assert said == early + [line for line in late.getvalue().splitlines() if "CollapseSentinel" in line]


# Rules by hand.

SOUND = {"rankme": 10.0, "spread": 0.5, "duplicates": 0.0, "length": 1.0, "width": 1.0, "equal_samples": 0.0}


@pytest.mark.parametrize(
    ("changes", "sign"),
    [
        ({"spread": 0.2}, "one point"),
        ({"duplicates": 0.9}, "equal embeddings"),
        ({"rankme": 3.3}, "few directions"),
        ({"length": 101.0}, "blown up"),
        ({"spread": math.nan}, "not finite"),
    ],
)
def test_each_sign_needs_patience_is_told_once_and_again_after_a_recovery(changes, sign) -> None:
    judge = Judge(patience=2)
    assert judge.look(SOUND) == []
    for expected in (0, 1, 0, 0):
        assert len(judge.look(SOUND | changes)) == expected
    assert judge.shown[sign] == 4
    assert judge.collapsed == 1
    assert not judge.sound
    assert judge.look(SOUND) == []
    assert judge.sound
    assert [len(judge.look(SOUND | changes)) for _ in range(2)] == [0, 1]


def test_a_sign_of_a_short_run_waits_and_is_told_at_the_end() -> None:
    judge = Judge(patience=2)
    judge.look(SOUND)
    assert [len(judge.look(SOUND | {"spread": 0.1}, least=least)) for least in (4, 4, 4, 0, 0)] == [0, 0, 0, 1, 0]
    assert judge.collapsed == 1
    restored = Judge(patience=2)
    restored.load_state_dict(judge.state_dict())
    assert restored.look(SOUND | {"spread": 0.1}) == []


def test_close_embeddings_of_an_untrained_network_are_no_sign() -> None:
    judge = Judge(patience=1)
    for spread in (0.02, 0.03, 0.1, 0.08, 0.4):
        assert judge.look(SOUND | {"spread": spread}) == []


def test_the_same_embedding_for_most_samples_is_a_sign_from_the_start_unless_the_samples_are_equal() -> None:
    for equal_samples, signs in ((0.0, [0, 1]), (0.6, [0, 0])):
        judge, equal = Judge(patience=2), SOUND | {"duplicates": 0.9, "equal_samples": equal_samples}
        found = [judge.look(equal) for _ in range(2)]
        assert [len(one) for one in found] == signs
    assert judge.look(SOUND | {"duplicates": 1.0}) == []


def test_numbers_that_were_never_finite_are_not_laid_to_the_rate() -> None:
    judge, broken = Judge(patience=1), SOUND | {"rankme": math.nan, "length": math.inf}
    (said,) = judge.look(broken)
    assert "in the data and in the weights" in said
    assert judge.look(SOUND) == []


def test_embeddings_that_grow_to_variance_one_have_not_blown_up() -> None:
    judge = Judge(patience=1)
    for length in (1e-4, 1.0, 8.0, 90.0):
        assert judge.look(SOUND | {"length": length, "width": 64.0}) == []
    (said,) = judge.look(SOUND | {"length": 900.0, "width": 64.0})
    assert "the learning rate is likely too high" in said


def test_many_random_directions_may_be_lost_but_not_all() -> None:
    judge = Judge(patience=1)
    for rank, signs in ((25.7, 0), (6.6, 0), (4.9, 1)):
        assert len(judge.look(SOUND | {"rankme": rank})) == signs


def test_advice_names_what_the_method_has() -> None:
    for apart in ("lam is above 0", "momentum is near 1"):
        judge = Judge(patience=1)
        judge.look(SOUND, apart)
        assert f"tells samples apart: that {apart}" in judge.look(SOUND | {"spread": 0.1}, apart)[0]


def test_prototypes_that_no_longer_tell_samples_apart_are_a_sign() -> None:
    judge = Judge(patience=1)
    assert judge.look(SOUND | {"prototypes_in_use": 0.0, "prototypes_a_sample": 0.0}) == []  # of no sample
    uniform, told = {"prototypes_in_use": 8.0, "prototypes_a_sample": 8.0}, {"prototypes_a_sample": 2.0}
    assert judge.look(SOUND | uniform) == []  # as they begin
    assert judge.look(SOUND | uniform | told) == []
    assert "sharpen" in judge.look(SOUND | uniform)[0]


def test_every_sign_can_be_put_into_words() -> None:
    every = {**SOUND, "prototypes_in_use": 4.0, "prototypes_a_sample": 1.0, "told_apart": 1.0}
    words = {**every, **{f"{when}_{name}": value for name, value in every.items() for when in ("first", "best")}}
    for sign in SIGNS.values():
        assert not re.search(r"[{}]", (sign.finding + sign.advice).format(apart="its negatives are many", **words))


# What cannot work is named before the first step.


def test_settings_out_of_range_are_named() -> None:
    for wrong, message in (
        ({"every_n_steps": 0}, "every_n_steps=0 must be at least 1"),
        ({"samples": 1}, "samples=1 must be at least 2"),
        ({"patience": 0}, "patience=0 must be at least 1"),
        ({"most_roll_backs": 0}, "most_roll_backs=0 must be at least 1"),
        ({"action": "pray"}, "action='pray' must be 'warn', 'stop' or 'roll_back'"),
        ({"rate": 0.0}, "rate=0.0 must be above 0"),
    ):
        with pytest.raises(UserError, match=f"CollapseSentinel {message}"):
            CollapseSentinel(**wrong)


def test_modules_without_embeddings_and_runs_without_a_datamodule_are_named(make_trainer) -> None:
    class Nothing(Siamese):
        embeddings = features = None

    with pytest.raises(UserError, match=r"Nothing has neither embeddings\(batch\) nor features\(batch\)"):
        fit(make_trainer, Nothing("cosine"), sentinel())
    with pytest.raises(UserError, match=r"reads train_dataloader\(\) of the datamodule, but this run has none"):
        make_trainer(max_steps=1, callbacks=[sentinel()]).fit(Siamese("cosine"), Pairs().train_dataloader())


def test_one_sample_cannot_be_compared(make_trainer) -> None:
    class One(Pairs):
        def train_dataloader(self):
            return [{"views": [torch.ones(1, 16)] * 2}]

    with pytest.raises(UserError, match="got 1 of training; give it at least 2"):
        make_trainer(max_steps=1, callbacks=[sentinel()]).fit(Siamese("cosine"), datamodule=One())


# Ranks.


def one_rank(rank: int, folder: str) -> None:
    os.environ |= {"TORCHELASTIC_RUN_ID": "x", "MASTER_ADDR": "localhost", "MASTER_PORT": "1", "GROUP_RANK": "0"}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    for name in ("ddp", "fsdp2"):
        watch, module = sentinel(action="roll_back"), Siamese("cosine", 1e-2)
        logged: list[dict[str, float]] = []
        measure = watch._figures

        def figures(trainer, module, measure=measure, logged=logged):
            logged.append(measure(trainer, module))
            return logged[-1]

        watch._figures = figures  # type: ignore[method-assign]
        trainer = Trainer(
            accelerator="cpu",
            devices=2,
            strategy=FSDP2() if name == "fsdp2" else "ddp",
            max_steps=40,
            logger=False,
            callbacks=[watch],
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            use_distributed_sampler=False,
        )
        trainer.fit(module, datamodule=Pairs())
        torch.save((logged, watch.judge.state_dict(), watch.roll_backs), Path(folder, f"{name} {rank}.pt"))
    end_process_group()


@pytest.mark.ranks
def test_all_ranks_measure_what_one_process_does_and_agree_on_what_to_do(make_trainer, tmp_path: Path) -> None:
    rank_processes.start(one_rank, 2, str(tmp_path))
    alone = sentinel()
    fit(make_trainer, Siamese("cosine", 1e-2), alone, max_steps=1)
    for name in ("ddp", "fsdp2"):
        (logged, judged, back), other = (torch.load(tmp_path / f"{name} {rank}.pt") for rank in range(2))
        assert (logged, judged, back) == other
        assert logged[0] == pytest.approx(alone.judge.first, rel=1e-3)
        assert back == 1
