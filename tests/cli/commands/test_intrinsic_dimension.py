"""The search is proved on curves that are known, its bookkeeping on runs that are stubbed, the whole on a tiny one."""

import json
import math
from pathlib import Path

import pytest
import rank_processes
from rank_processes import PROJECT

from lightspan.cli.config.resolve import resolve
from lightspan.cli.main import main
from lightspan.cli.studies import queue
from lightspan.cli.studies.dimension.curve import target
from lightspan.cli.studies.dimension.fits import layer
from lightspan.cli.studies.dimension.search import TUNING_SEED, Fit, SearchSettings, search
from lightspan.core.errors import UserError

REFERENCES = {"untrained": {"0": 0.1, "1": 0.1, "2": 0.1}}
TINY = [str(PROJECT / "tiny.yaml"), "--allow-module", "tiny_lab"]
FLAGS = ["--metric", "val/loss", "--mode", "min", "--seeds", "1"]


def settings(**changes) -> SearchSettings:
    values = {
        "grid": [0, 10, 20, 40], "threshold": 0.9, "metric": "val/accuracy", "mode": "max", "seeds": 3, "lrs": [None],
        "lr_key": "model.lr", "projection": "P", "layer_scales": False, "stop_early": False, "workers": 1,
        "out": Path("nowhere"),
    }  # fmt: skip
    return SearchSettings(**{**values, **changes})


class Runs:
    """Stands in for training: a metric as a function of (dim, lr, seed), and a record of what was asked for."""

    def __init__(self, metric) -> None:
        self.metric, self.fits = metric, []

    def __call__(self, fits):
        self.fits += fits
        return {fit: self.metric(fit.dim, fit.lr, fit.seed) for fit in fits}


def rising(dim, lr, seed):
    """0.8 in all weights; 0.5 and 0.73 on the mean of d = 10 and 20, seeds 0.1 apart."""
    return {None: 0.8, 10: 0.5, 20: 0.73, 40: 0.79}[dim] + 0.1 * (seed - 1)


def test_the_dimension_is_the_first_grid_point_whose_mean_is_on_the_line():
    curve = search(settings(), REFERENCES, Runs(rising))
    assert curve.line == pytest.approx(0.9 * 0.8)
    assert curve.reached == 20
    assert curve.by_seed() == {0: None, 1: 20, 2: 20}
    assert list(curve.points) == [0, 10, 20, 40]
    assert curve.points[0].values == {0: 0.1, 1: 0.1, 2: 0.1}


def test_a_search_that_stops_early_trains_nothing_beyond_the_line():
    runs = Runs(rising)
    assert search(settings(stop_early=True), REFERENCES, runs).reached == 20
    assert {fit.dim for fit in runs.fits} == {None, 10, 20}


def test_a_line_that_is_never_reached_has_no_dimension():
    curve = search(settings(grid=[10]), REFERENCES, Runs(rising))
    assert curve.reached is None
    assert curve.record()["dimension"] is None


def test_each_dimension_has_its_own_rate_from_a_seed_that_is_not_reported():
    runs = Runs(lambda dim, lr, seed: 1.0 if lr == (1e-3 if dim is None else 1e-1) else 0.2)
    curve = search(settings(lrs=[1e-3, 1e-1]), REFERENCES, runs)
    assert (curve.baseline.lr, curve.points[10].lr) == (1e-3, 1e-1)
    assert curve.points[10].tuning == {1e-3: 0.2, 1e-1: 1.0}
    compared = {(fit.dim, fit.lr) for fit in runs.fits if fit.seed == TUNING_SEED}
    assert compared == {(dim, lr) for dim in (None, 10, 20, 40) for lr in (1e-3, 1e-1)}
    assert {fit.lr for fit in runs.fits if fit.seed >= 0 and fit.dim == 10} == {1e-1}


def test_the_line_of_a_loss_is_a_share_of_the_way_from_the_untrained_network():
    assert target(0.9, "min", baseline=1.0, untrained=3.0) == pytest.approx(1.2)
    losses = {None: 1.0, 10: 1.3, 20: 1.19, 40: 1.1}
    curve = search(settings(mode="min"), {"untrained": {"0": 3.0}}, Runs(lambda dim, lr, seed: losses[dim]))
    assert curve.reached == 20


def test_failed_runs_stay_out_of_means_and_of_the_choice_of_rates():
    runs = Runs(lambda dim, lr, seed: math.nan if (dim == 10 and lr == 1.0) or seed == 2 else 0.5 * (lr or 1))
    curve = search(settings(lrs=[0.5, 1.0]), REFERENCES, runs)
    assert curve.points[10].lr == 0.5
    assert curve.points[10].values == {0: 0.25, 1: 0.25}
    assert curve.record()["points"][1]["tuning"] == {"0.5": 0.25, "1": None}


def test_a_baseline_that_never_finishes_is_told():
    with pytest.raises(UserError, match="no run of the baseline finished with a value of val/accuracy"):
        search(settings(), REFERENCES, Runs(lambda *_: math.nan))


@pytest.fixture
def _project(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(PROJECT))
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("_project")
def test_runs_differ_in_seed_subspace_and_rate_alone():
    found = resolve(TINY[0], allow_modules=["tiny_lab"])
    lr_key = "model.init_args.optimizer.init_args.lr"
    made = {
        fit: layer(found, settings(lr_key=lr_key), fit)
        for fit in (Fit(None, 0.1, 0), Fit(5, 0.1, 0), Fit(5, 0.2, 0), Fit(5, 0.1, 1), Fit(9, 0.1, 0))
    }
    seeds = [one["seed_everything"] for one in made.values()]
    assert seeds[1] == seeds[2]  # rates are compared on the same draws
    assert len(set(seeds)) == 4
    direct, five, other_rate, *_ = made.values()
    assert "intrinsic_dimension" not in direct["trainer"]["callbacks"]
    subspace = five["trainer"]["callbacks"]["intrinsic_dimension"]["init_args"]
    assert (subspace["dim"], subspace["seed"], subspace["projection"]) == (5, seeds[1], {"class_path": "P"})
    assert other_rate["model"]["init_args"]["optimizer"]["init_args"]["lr"] == 0.2
    assert five["trainer"]["callbacks"]["checkpoint"] is None


@pytest.fixture
def stubbed(monkeypatch, tmp_path):
    """Runs that finish at once with loss 1 / d (1 / 15 for all weights); what was started is recorded."""
    started: list[str] = []

    def run_side_by_side(tasks, workers, ended, look):
        for task in tasks:
            folder = task.log.parent
            started.append(folder.name)
            folder.mkdir(parents=True)
            dim = 15 if folder.name.startswith("direct") else int(folder.name[1:].split("-")[0])
            (folder / "metrics.jsonl").write_text(json.dumps({"step": 3, "time_s": 1.0, "val/loss": 1 / dim}) + "\n")
            (folder / "summary.json").write_text(json.dumps({"finished": True}))
            task.log.write_text(" ".join(task.command))
            ended(task, 0)

    monkeypatch.setattr(queue, "run_side_by_side", run_side_by_side)
    return started


def intrinsic_dimension(*arguments: str) -> int:
    return main(["intrinsic-dimension", *TINY, *FLAGS, "--out", "out", *arguments])


@pytest.mark.usefixtures("_project")
def test_finished_runs_are_kept_torn_ones_done_again_and_other_settings_refused(stubbed, tmp_path, capsys):
    arguments = ["--grid", "0,3,12", "trainer.limit_val_batches=1"]
    assert intrinsic_dimension(*arguments) in (0, 1)
    assert stubbed == ["direct-seed0", "d3-seed0", "d12-seed0"]
    (tmp_path / "out/runs/d12-seed0/summary.json").write_text('{"finished": fal')
    assert intrinsic_dimension(*arguments[:1], "0,3,6,12", *arguments[2:]) in (0, 1)
    assert stubbed[3:] == ["d6-seed0", "d12-seed0"]
    result = json.loads((tmp_path / "out/result.json").read_text())
    assert [point["dim"] for point in result["points"]] == [0, 3, 6, 12]
    assert result["baseline"]["per_seed"] == {"0": 1 / 15}
    assert result["parameters"] == 15
    assert (tmp_path / "out/curve.png").read_bytes().startswith(b"\x89PNG")
    said = capsys.readouterr().out
    assert said.count("measuring what needs no training") == 1  # kept, like the runs
    assert "tiny on Rows: val/loss in random subspaces of 15 weights" in said
    assert intrinsic_dimension(*arguments, "trainer.max_steps=20") == 2
    said = capsys.readouterr().err
    assert "contains a search with other settings (then -> now, in direct-seed0)" in said
    assert "trainer.max_steps: 8 -> 20" in said


@pytest.mark.usefixtures("_project")
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--grid", "10,5"], "--grid '10,5' must be whole numbers from 0 up in ascending order"),
        (["--grid", "a"], "--grid 'a' must be whole numbers"),
        (["--grid", "5", "--threshold", "1.5"], "--threshold 1.5 must be above 0 and at most 1"),
        (["--grid", "5", "--workers", "0"], "--workers 0 must be at least 1"),
        (["--grid", "5", "--lrs", "0.1,-1"], "--lrs '0.1,-1' must be different numbers above 0"),
        (["--grid", "5", "--lrs", "0.1", "--lr-key", "a.b"], "no such key; name it with --lr-key, for example model."),
        (
            ["--grid", "5", "--metric", "val/f1"],
            "'val/f1' is not logged by the validation of tiny; it logs val/loss",
        ),
        (["--grid", "5,16"], "--grid ends at 16, but tiny trains 15 weights"),
        (["--grid", "5", "--projection", "lightspan.nope.X"], "intrinsic_dimension.init_args.projection"),
    ],
)
def test_what_cannot_be_searched_is_told_before_any_run(stubbed, capsys, arguments, said):
    assert intrinsic_dimension("trainer.limit_val_batches=1", *arguments) == 2
    assert said in capsys.readouterr().err
    assert not [name for name in stubbed if name.startswith("d5")]


@pytest.mark.runs
@pytest.mark.usefixtures("_project")
def test_a_folder_with_a_link_out_of_it_is_refused_before_anything_in_it_is_removed(stubbed, tmp_path, capsys):
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "runs").symlink_to(theirs)
    assert intrinsic_dimension("--grid", "0,1", "--out", str(tmp_path / "out")) == 2
    assert "runs is a link" in capsys.readouterr().err
    assert not [*theirs.iterdir()]


@pytest.mark.usefixtures("_project")
def test_a_real_search_of_a_tiny_recipe(monkeypatch, tmp_path, capsys):
    """15 weights whose loss 40 steps of Adam bring down, in as many dimensions too."""

    def run_side_by_side(tasks, workers, ended, look):
        for task in tasks:
            done = rank_processes.launch(list(task.command[3:]), 1, task.log.parent)
            task.log.write_text(done.said)
            ended(task, done.statuses[0])

    monkeypatch.setattr(queue, "run_side_by_side", run_side_by_side)
    flags = ["trainer.limit_val_batches=1", "trainer.val_check_interval=4", "trainer.max_steps=40"]
    assert intrinsic_dimension("--grid", "0,15", "--threshold", "0.5", "--lrs", "0.1", *flags) == 0, capsys.readouterr()
    result = json.loads((tmp_path / "out/result.json").read_text())
    losses = {point["dim"]: point["mean"] for point in result["points"]}
    assert result["dimension"] == 15
    assert result["baseline"]["mean"] < losses[15] < losses[0]
    assert (tmp_path / "out/runs/d15-lr0.1-seed0/subspace.safetensors").is_file()
    assert "reached at d = 15" in capsys.readouterr().out
