"""Sweeps end to end: points checked first, runs that fail, are killed or preempted, and what is said at the end."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import forked_fits
import kubernetes_validate
import pytest
import yaml
from rank_processes import PROJECT, TINY
from waiting import wait_until

from lightspan.cli.commands import sweep as command
from lightspan.cli.config.resolve import resolve
from lightspan.cli.config.tree import dump
from lightspan.cli.main import main
from lightspan.cli.runs.fits import Task
from lightspan.cli.runs.folder import TASK_VARIABLE
from lightspan.cli.runs.status import Status, status_of
from lightspan.cli.studies import queue
from lightspan.cli.studies.sweeps import outcome
from lightspan.cli.studies.sweeps.files import read

LR = "model.init_args.optimizer.init_args.lr"
ALLOWED = ["--allow-module", "tiny_lab"]
SWEEP = ["sweep", str(PROJECT / "tiny.yaml"), *ALLOWED]
EXACT = ["sweep", *TINY, "trainer.log_every_n_steps=1"]  # its runs continue with the next row


@pytest.fixture(autouse=True)
def _project(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(PROJECT))
    monkeypatch.setenv("LIGHTSPAN_RUN", "")  # restored afterwards: a run sets it for its other ranks
    monkeypatch.chdir(tmp_path)


class Stub:
    """Stands in for processes: a run ends at once with the loss that `loss_of` gives its command line, or fails with
    the exit status that it gives instead.
    """

    def __init__(self) -> None:
        self.started: list[str] = []
        self.loss_of: Callable[[str], float | int] = lambda line: float(re.search(rf"{re.escape(LR)}=(\S+)", line)[1])  # type: ignore[index]

    def __call__(self, tasks: Iterator[Task], workers: int, ended: Any, look: Any) -> None:
        for task in tasks:
            self.started.append(task.name)
            folder, found = task.log.parent, self.loss_of(" ".join(task.command))
            folder.mkdir(parents=True, exist_ok=True)
            task.log.write_text("lightspan: it went wrong\n")
            if isinstance(found, float):
                (folder / "metrics.jsonl").write_text(json.dumps({"step": 7, "val/loss": found}) + "\n")
                (folder / "summary.json").write_text('{"finished": true}')
                (folder / "failed.txt").unlink(missing_ok=True)
            look([task])
            ended(task, 0 if isinstance(found, float) else found)


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Stub:
    made = Stub()
    monkeypatch.setattr(queue, "run_side_by_side", made)
    return made


def test_a_sweep_runs_every_point_and_seed_and_ranks_them(stub: Stub, capsys: pytest.CaptureFixture[str]) -> None:
    words = [f"{LR}=log(1e-3,1e-1,3)", "--seeds", "4,5", "--metric", "val/loss", "trainer.max_steps=3", "--out", "out"]
    assert main([*SWEEP, *words]) == 0
    assert stub.started == [
        f"{n:03d}-lr{lr}-seed{s}" for n, (lr, s) in enumerate([(a, b) for a in (0.001, 0.01, 0.1) for b in (4, 5)])
    ]
    said = capsys.readouterr().out
    assert "done  000-lr0.001-seed4  val/loss 0.001 (0 s)" in said
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in said.splitlines() if line.startswith("│")]
    assert rows == [["1", "0.001", "0.001", "0", "2"], ["2", "0.01", "0.01", "0", "2"], ["3", "0.1", "0.1", "0", "2"]]
    out = Path("out").absolute()
    assert said.splitlines()[-5:] == [
        f"best: {LR}=0.001",
        f"done: {out}",
        f"next: lightspan report {out}",
        f"      lightspan runs {out}",
        f"      lightspan fit {SWEEP[1]} trainer.max_steps=3 --allow-module tiny_lab {LR}=0.001",
    ]
    assert read(out).words(read(out).trials[5])[-2:] == [f"{LR}=0.1", "seed_everything=5"]


def test_fit_with_seeds_is_a_sweep_without_keys(stub: Stub, capsys: pytest.CaptureFixture[str]) -> None:
    stub.loss_of = lambda line: float(line.split("seed_everything=")[1].split()[0])
    assert main(["fit", *SWEEP[1:], "--seeds", "1,2,3", "--run", "out", "trainer.max_steps=3"]) == 0
    said = capsys.readouterr().out
    assert stub.started == ["000-seed1", "001-seed2", "002-seed3"]
    assert "done  001-seed2  val/loss 2 (0 s)" in said
    assert re.search(r"┃ metric\s*┃\s*mean ┃\s*spread ┃\s*n ┃\s*seed 1 ┃\s*seed 2 ┃\s*seed 3 ┃", said)
    assert re.search(r"│ val/loss\s*│\s*2 │\s*1 │\s*3 │\s*1 │\s*2 │\s*3 │", said)
    assert read(Path("out")).seeds == (1, 2, 3)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([f"{LR}=0.1,0.2", "model.init_args.widht=2,3"], f"{LR}=0.1, model.init_args.widht=2: 1 problem"),
        ([f"{LR}=0.1,-0.2"], f"{LR}=-0.2: 1 problem"),
        ([f"{LR}=0.1,fast"], f"{LR}=fast: 1 problem"),
        ([f"{LR}=0.1"], "nothing varies: give a key several values"),
        ([f"{LR}=0.1,"], "is empty; write null for nothing"),
        ([f"{LR}=log(1e-3,1)"], "has no number of points, which a grid needs: write log(0.001,1,5)"),
        ([f"{LR}=1,2", "seed_everything=1,2"], "seed_everything=1,2: write --seeds"),
        ([f"{LR}=1,2", "seed_everything=1", "--seeds", "1,2"], "seed_everything=1 and --seeds both set the seed"),
        ([f"{LR}=1,2", "--seed-key", "a.b"], "--seed-key a.b takes each of --seeds, which are not given"),
        ([f"{LR}=1,2", "--seeds", "1", "--seed-key", "data.init_args.sed"], "data.init_args.sed"),
        ([f"{LR}=1,2", "--seeds", "1", "--seed-key", LR], f"{LR}=1,2 and --seed-key {LR} both set it"),
        ([f"{LR}=1,2", "--seeds", "000000000000999999999999"], "must be different whole numbers"),
        ([f"{LR}=1{'0' * 400},2"], "must fit in 64 bits"),
        ([f"{LR}=1,2", "--seeds", "1,1"], "--seeds '1,1' must be different whole numbers from 0 up, such as 0,1,2"),
        ([f"{LR}=1,2", "--seeds", "1,-2"], "--seeds '1,-2' must be different whole numbers"),
        ([f"{LR}=1,2", "--trials", "2"], "--method grid tries all points"),
        ([f"{LR}=1,2", "--method", "random"], "--method random needs --trials N"),
        ([f"{LR}=1,2", "--method", "random", "--trials", "3"], "these keys have only 2 different points"),
        (["--seeds", "1,2", "--method", "random", "--trials", "3"], "no key has several"),
        ([f"{LR}=1,2", "--metric", "val/odd"], "--metric val/odd: its name does not tell whether low or high is good"),
        ([f"{LR}=1,2", "--workers", "0"], "'0' is not a whole number from 1 up"),
        ([f"{LR}=1,2", "--task", "0"], "--task needs the folder that all tasks share; give --out DIR"),
        ([f"{LR}=1,2", "trainer.callbacks.summary=null"], "from whose file a sweep learns that a run is done"),
    ],
)
def test_what_cannot_be_run_is_told_before_any_run_and_names_the_point(
    words: list[str], said: str, stub: Stub, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main([*SWEEP, *words]) == 2
    assert said in capsys.readouterr().err
    assert stub.started == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("key", ["model.init_args.api_key", "data.init_args.root"])
@pytest.mark.parametrize("second", ["ghp_BbcdEfghIjklMnopQrstUvwxYz0123456789", ""])
def test_a_secret_among_the_values_is_refused_and_not_repeated(
    key: str, second: str, stub: Stub, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main([*SWEEP, f"{key}=ghp_AbcdEfghIjklMnopQrstUvwxYz0123456789,{second}"]) == 2
    said = capsys.readouterr().err
    assert "Efgh" not in said
    assert key in said
    assert list(tmp_path.iterdir()) == []


def test_a_metric_whose_name_says_nothing_needs_a_mode_and_others_do_not(stub: Stub) -> None:
    for number, (metric, mode) in enumerate({"val/loss": "min", "val/accuracy": "max"}.items()):
        assert main([*SWEEP, f"{LR}=1,2", "--metric", metric, "--out", f"out{number}"]) == 0
        assert read(Path(f"out{number}")).mode == mode


def test_a_dry_run_checks_and_lists_and_writes_nothing(
    stub: Stub, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main([*SWEEP, f"{LR}=0.1,0.2", "--dry-run", "--out", "out"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"unstarted  000-lr0.1  {LR}=0.1",
        f"unstarted  001-lr0.2  {LR}=0.2",
        "2 runs: 2 unstarted. Nothing was written.",
    ]
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_fails_is_named_ends_no_other_and_is_retried_on_demand(
    stub: Stub, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*SWEEP, f"{LR}=0.1,0.2,0.3", "--metric", "val/loss", "--out", "out"]
    stub.loss_of = lambda line: 2 if f"{LR}=0.2" in line else 1.0
    assert main(words) == command.UNFINISHED
    assert len(stub.started) == 3
    out, said = Path("out").absolute(), capsys.readouterr().out
    failed = out / "001-lr0.2"
    assert f"failed  001-lr0.2; {failed / 'output.txt'} ends with:\nlightspan: it went wrong" in said
    assert f"failed: {failed}, see output.txt there" in said
    assert f"not finished: {out}\nnext: lightspan sweep {out} --allow-module tiny_lab --retry-failed\n" in said
    assert (failed / "failed.txt").read_text().endswith("ended with status 2: lightspan: it went wrong\n")

    assert main(words) == command.UNFINISHED  # again: neither the done ones nor the failed one
    assert len(stub.started) == 3
    stub.loss_of = lambda line: 0.5
    assert main(["sweep", "out", *ALLOWED, "--retry-failed"]) == 0
    assert stub.started[3:] == ["001-lr0.2"]
    assert f"best: {LR}=0.2" in capsys.readouterr().out


def test_another_sweep_in_the_folder_is_refused_and_so_is_a_folder_with_something_else(
    stub: Stub, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main([*SWEEP, f"{LR}=0.1,0.2", "--out", "out"]) == 0
    assert main([*SWEEP, f"{LR}=0.1,0.3", "trainer.max_steps=3", "--out", "out"]) == 2
    said = capsys.readouterr().err
    assert f"{LR}: [0.1,0.2] -> [0.1,0.3]" in said
    assert "arguments: ['--allow-module', 'tiny_lab'] -> ['trainer.max_steps=3', '--allow-module', 'tiny_lab']" in said
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    assert main([*SWEEP, f"{LR}=0.1,0.3", "--out", "mine"]) == 2
    assert "contains thesis.txt and no sweep; give another folder" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_a_recipe_that_has_changed_since_the_first_run_is_refused_while_runs_are_due(
    stub: Stub, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    recipe = (PROJECT / "tiny.yaml").read_text()
    (tmp_path / "own.yaml").write_text(recipe)
    line = ["sweep", "own.yaml", *ALLOWED, f"{LR}=0.1,0.2", "--metric", "val/loss", "--out", "out"]
    stub.loss_of = lambda line: 0.5 if f"{LR}=0.1" in line else 1
    assert main(line) == 1
    trained = resolve("own.yaml", [], [f"{LR}=0.1"], ["tiny_lab"])
    (tmp_path / "out" / "000-lr0.1" / "resolved.yaml").write_text(dump(trained.document()))
    (tmp_path / "own.yaml").write_text(recipe.replace("width: 3", "width: 4"))
    for again in (line, ["sweep", "out", *ALLOWED]):
        assert main([*again, "--retry-failed"]) == 2
        said = capsys.readouterr().err
        assert "own.yaml has changed since " in said
        assert "model.init_args.width: 3 -> 4" in said
    (tmp_path / "own.yaml").write_text(recipe)
    stub.loss_of = lambda line: 0.4
    assert main([*line, "--retry-failed"]) == 0
    (tmp_path / "own.yaml").unlink()
    assert main(["sweep", "out", *ALLOWED]) == 0  # nothing is due: the ranking needs no recipe


def test_a_folder_is_continued_as_its_file_says(stub: Stub, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SWEEP, f"{LR}=0.1,0.2", "--out", "out"]) == 0
    for words, said in (
        ([f"{LR}=0.3,0.4"], "a changed sweep needs another --out"),
        (["--seeds", "1"], "--seeds belongs to a new sweep"),
        (["--out", "other"], "--out belongs to a new sweep"),
    ):
        assert main(["sweep", "out", *ALLOWED, *words]) == 2
        assert said in capsys.readouterr().err
    file = Path("out/sweep.json")
    text = file.read_text()
    document = json.loads(text)
    document["arguments"].append("trainer.default_root_dir=/home")
    file.write_text(json.dumps(document))
    assert main(["sweep", "out", *ALLOWED]) == 2  # nor where they write
    assert "write outside their folders: 'trainer.default_root_dir=\"/home\"'" in capsys.readouterr().err
    file.write_text(text)
    assert main(["sweep", "out"]) == 2  # a file of others must not decide whose code runs
    assert "runs code of tiny_lab; if you trust it, add --allow-module tiny_lab" in capsys.readouterr().err
    assert main(["sweep", "out", *ALLOWED, "--metric", "val/loss"]) == 0
    assert f"best: {LR}=0.1" in capsys.readouterr().out
    assert len(stub.started) == 2


def test_random_points_are_the_same_again_and_more_of_them_continue(stub: Stub) -> None:
    words = [*SWEEP, f"{LR}=log(1e-3,1)", "--method", "random", "--metric", "val/loss", "--out", "out"]
    assert main([*words, "--trials", "2"]) == 0
    first = read(Path("out")).trials
    assert main([*words, "--trials", "4"]) == 0
    assert read(Path("out")).trials[:2] == first
    assert stub.started == [trial.run for trial in read(Path("out")).trials]


def test_tpe_follows_the_metric_and_goes_on_as_if_it_had_not_been_stopped(stub: Stub) -> None:
    pytest.importorskip("optuna")
    words = [*SWEEP, f"{LR}=log(1e-3,1)", "--method", "tpe", "--trials", "13", "--metric", "val/loss", "--out"]
    assert main([*words, "whole"]) == 0
    whole, loss_of = list(stub.started), stub.loss_of

    def stops(line: str) -> float | int:
        if len(stub.started) == len(whole) + 12:
            raise KeyboardInterrupt
        return loss_of(line)

    stub.loss_of = stops
    assert main([*words, "halves"]) == 130
    stub.loss_of = loss_of
    assert len(read(Path("halves")).trials) == 12  # the twelfth was written before it started
    assert main(["sweep", "halves", *ALLOWED]) == 0
    assert read(Path("halves")) == read(Path("whole"))
    assert stub.started[len(whole) + 12 :] == whole[11:]


def test_a_metric_that_no_run_logs_is_told_with_those_that_it_logs(
    stub: Stub, capsys: pytest.CaptureFixture[str]
) -> None:
    said = "--metric val/los: 000-lr0.1 never logged it; did you mean val/loss? it logged val/loss"
    assert main([*SWEEP, f"{LR}=0.1,0.2", "--metric", "val/los", "--mode", "min", "--out", "out"]) == 0
    assert said in capsys.readouterr().err
    pytest.importorskip("optuna")
    words = [f"{LR}=log(0.1,1)", "--method", "tpe", "--trials", "3", "--metric", "val/los", "--mode", "min"]
    assert main([*SWEEP, *words, "--out", "followed"]) == 2
    assert "never logged it; did you mean val/loss?" in capsys.readouterr().err
    assert len(stub.started) == 3  # tpe has nothing to follow after its first run


def test_a_metric_spelt_as_in_the_summary_is_told_after_the_first_run_as_it_is_logged(
    stub: Stub, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*SWEEP, f"{LR}=0.1,0.2", "--metric", "val_loss", "--out", "out"]) == 0
    first = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("done  000"))
    assert "--metric val_loss: 000-lr0.1 never logged it; did you mean val/loss? it logged val/loss" in first


def test_without_optuna_tpe_is_refused_at_once(
    stub: Stub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    words = [f"{LR}=log(1e-3,1)", "--method", "tpe", "--trials", "3", "--metric", "val/loss"]
    assert main([*SWEEP, *words]) == 2
    assert "pip install '.[sweep]' in a checkout of lightspan, or use --method random" in capsys.readouterr().err


# --- real runs


def rows_of(run: Path) -> list[dict[str, Any]]:
    """Its metrics of every step, without those of the machine."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    own = ("time_s", "throughput/", "memory/")
    found = [{name: value for name, value in row.items() if not name.startswith(own)} for row in rows]
    assert len([row for row in found if "train/loss" in row]) == 12
    return found


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep that nothing disturbed."""
    folder = tmp_path_factory.mktemp("straight")
    done = forked_fits.lightspan([*EXACT, f"{LR}=0.01,0.1", "--out", "out"], folder / "said", folder)
    assert done.statuses == [0], done.said
    return folder / "out"


@pytest.mark.runs
@pytest.mark.parametrize("name", ["SIGKILL", "SIGTERM", "SIGINT"])
def test_a_sweep_that_is_killed_leaves_no_process_and_goes_on_to_the_same_figures(
    name: str, straight: Path, tmp_path: Path
) -> None:
    at = "trainer.callbacks.stop"
    fault = [f"{at}.class_path=tiny_lab.faults.SignalParentAt", f"{at}.init_args.step=5", f"{at}.init_args.name={name}"]
    words = [*EXACT, *fault, f"{at}.init_args.marker={tmp_path / 'marker'}", f"{LR}=0.01,0.1", "--out", "out"]
    done = forked_fits.lightspan(words, tmp_path / "said", tmp_path)
    assert done.statuses == [{"SIGKILL": -9, "SIGTERM": 143, "SIGINT": 130}[name]], done.said
    out = tmp_path / "out"
    first, second = [out / trial.run for trial in read(out).trials]
    wait_until(lambda: status_of(first) is not Status.RUNNING, "the end of the run")
    assert (status_of(first), status_of(second)) == (Status.PREEMPTED, Status.UNSTARTED)
    assert not [line for line in processes() if str(out) in line]

    done = forked_fits.lightspan(["sweep", "out", *ALLOWED], tmp_path / "said", tmp_path)
    assert done.statuses == [0], done.said
    assert "resumed from" in (first / "output.txt").read_text()
    for trial in read(out).trials:
        assert rows_of(out / trial.run) == rows_of(straight / trial.run)


@pytest.mark.runs
def test_fit_with_seeds_passes_a_warning_on(tmp_path: Path) -> None:
    at = "trainer.callbacks.stop"
    fault = [
        f"{at}.class_path=tiny_lab.faults.SignalParentAt",
        f"{at}.init_args.step=5",
        f"{at}.init_args.name=SIGTERM",
    ]
    words = ["fit", *TINY, *fault, f"{at}.init_args.marker={tmp_path / 'marker'}", "--seeds", "1,2", "--run", "out"]
    done = forked_fits.lightspan(words, tmp_path / "said", tmp_path)
    assert done.statuses == [143], done.said
    assert [status_of(tmp_path / "out" / f"00{n}-seed{n + 1}") for n in range(2)] == [
        Status.PREEMPTED,
        Status.UNSTARTED,
    ]


def processes() -> list[str]:
    """The command lines of this machine, as far as they can be read."""
    found = []
    for place in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found.append(place.read_text(errors="replace"))
        except OSError:
            continue
    return found


@pytest.mark.runs
def test_a_real_run_that_fails_ends_no_other(tmp_path: Path) -> None:
    words = [*EXACT, "model.init_args.width=0,2", "--workers", "2", "--out", "out"]
    done = forked_fits.lightspan(words, tmp_path / "said", tmp_path)
    assert done.statuses == [command.UNFINISHED], done.said
    bad, good = [tmp_path / "out" / trial.run for trial in read(tmp_path / "out").trials]
    assert (status_of(bad), status_of(good)) == (Status.FAILED, Status.DONE)
    assert "width=0 must be at least 1" in done.said


@pytest.mark.runs
def test_a_task_of_an_array_becomes_the_fit_of_its_trial(tmp_path: Path, straight: Path) -> None:
    """Twice: without a file of the sweep, and with it."""
    words = [*EXACT, f"{LR}=0.01,0.1", "--out", "out", "--task", "array", "--also", "data.init_args.num_workers=0"]
    environment = os.environ | {"PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1", "SLURM_ARRAY_TASK_ID": "1"}
    done = subprocess.run([sys.executable, "-m", "lightspan", *words], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first, second = [tmp_path / "out" / trial.run for trial in read(tmp_path / "out").trials]
    assert (status_of(first), status_of(second)) == (Status.UNSTARTED, Status.DONE)
    assert rows_of(second) == rows_of(straight / second.name)
    done = subprocess.run([sys.executable, "-m", "lightspan", *words], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"done before: {second}\n")


def test_a_task_whose_run_is_a_link_out_of_the_sweep_is_refused(
    stub: Stub, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main([*EXACT, f"{LR}=0.01,0.1", "--out", "out"]) == 0
    run = Path("out", read(Path("out")).trials[0].run)
    shutil.rmtree(run)
    (tmp_path / "theirs").mkdir()
    run.symlink_to(tmp_path / "theirs")
    monkeypatch.setattr(os, "execv", lambda *command: pytest.fail(f"started {command}"))
    assert main(["sweep", "out", "--task", "0", "--allow-module", "tiny_lab"]) == 2
    assert f"{run.name} is a link" in capsys.readouterr().err


# --- arrays of jobs


@pytest.fixture
def render(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    def printed(*arguments: str) -> str:
        assert main([*SWEEP, *arguments, "--print"]) == 0, capsys.readouterr().err
        return capsys.readouterr().out

    return printed


def test_a_slurm_array_has_one_task_for_each_run(render: Callable[..., str], tmp_path: Path) -> None:
    script = render(
        f"{LR}=log(1e-3,1e-1,3)",
        "--seeds",
        "0,1",
        "--workers",
        "4",
        "--to",
        "slurm",
        "--out",
        "it's out",
        "--time",
        "30",
    )
    assert "#SBATCH --array=0-5%4\n" in script
    assert "#SBATCH --requeue" in script
    (line,) = [line for line in script.splitlines() if line.startswith("srun")]
    words = line.split(" lightspan ")[1]
    assert words.startswith(f"sweep {SWEEP[1]} '{LR}=log(0.001,0.1,3)' --seeds 0,1 --method grid --out ")
    assert (
        " --task array --allow-module tiny_lab --also 'trainer.callbacks.preemption.init_args.requeue_on=[]'" in words
    )
    assert list(tmp_path.iterdir()) == []


def test_the_tasks_of_an_array_derive_the_sweep_that_was_checked(
    render: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    job = [f"{LR}=log(1e-3,1e-1)", "model.init_args.width=2,3"]
    job += ["--method", "random", "--trials", "5", "--draw-seed", "3", "--metric", "val/loss", "trainer.devices=2"]
    script = render(*job, "--to", "slurm", "--out", "out")
    (line,) = [line for line in script.splitlines() if line.startswith("srun")]
    words = shlex.split(line.removesuffix(" || status=$?"))
    begun: list[list[str]] = []

    def execv(program: str, command: tuple[str, ...]) -> int:
        begun.append(list(command))
        return 0

    monkeypatch.setattr(os, "execv", execv)
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "4")
    assert main(words[words.index("lightspan") + 1 :]) == 0
    written = read(Path("out"))
    assert main([*SWEEP, *job, "--out", "out", "--dry-run"]) == 0  # the same sweep, or it would be refused
    assert begun[0][3:] == [
        *("fit", *written.words(written.trials[4]), "trainer.callbacks.preemption.init_args.requeue_on=[]"),
        *("--run", str(Path("out").absolute() / written.trials[4].run)),
    ]


@pytest.mark.parametrize(
    ("words", "also", "said"),
    [
        (["model.init_args.width=2,3"], "model.init_args.widht=1", "before its first step: UserError: .*widht"),
        pytest.param(
            ["model.init_args.width=2,0"],
            "trainer.max_steps=1",
            "before its first step: UserError: .*width=0 must be",
            marks=pytest.mark.runs,
        ),
    ],
    ids=["configuration", "building"],
)
def test_a_task_that_fails_before_its_first_step_is_failed_with_its_reason(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    words: list[str], also: str, said: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(os, "execv", lambda program, command: main(list(command[3:])))
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "1")
    monkeypatch.setenv(TASK_VARIABLE, "")
    assert main([*EXACT, *words, "--out", "out", "--task", "array", "--also", also]) == 2
    first, second = [tmp_path / "out" / trial.run for trial in read(tmp_path / "out").trials]
    assert (status_of(first), status_of(second)) == (Status.UNSTARTED, Status.FAILED)
    assert re.search(said, (second / "failed.txt").read_text())
    capsys.readouterr()
    assert main(["runs", "out", "--json"]) == 0
    (record,) = json.loads(capsys.readouterr().out)
    assert (record["run"], record["status"]) == (f"out/{second.name}", "failed")
    assert re.search(said, record["reason"])
    assert not outcome.conclude(read(tmp_path / "out"), tmp_path / "out")
    assert re.search(rf"failed: .*{second.name}\n    .*{said}", capsys.readouterr().out)


def test_a_mistake_in_an_ordinary_fit_leaves_no_folder(tmp_path: Path) -> None:
    assert main(["fit", *EXACT[1:], "model.init_args.widht=1", "--run", str(tmp_path / "run")]) == 2
    assert not (tmp_path / "run").exists()


def test_kubernetes_gets_an_indexed_job_whose_runs_fail_alone(render: Callable[..., str]) -> None:
    job = [
        f"{LR}=0.1,0.2",
        "--seeds",
        "0,1",
        "--to",
        "kubernetes",
        "--image",
        "hub/lightspan:1",
        "--out",
        "rates",
        "--time",
        "60",
    ]
    documents = list(yaml.safe_load_all(render(*job)))
    for document in documents:
        kubernetes_validate.validate(document, kubernetes_validate.latest_version(), strict=True)
    spec = documents[1]["spec"]
    assert (spec["completionMode"], spec["completions"], spec["parallelism"]) == ("Indexed", 4, 4)
    assert spec["backoffLimitPerIndex"] == 3
    assert "backoffLimit" not in spec
    assert "activeDeadlineSeconds" not in spec  # the time is that of each run
    assert spec["template"]["spec"]["activeDeadlineSeconds"] == 3600
    assert {rule["action"] for rule in spec["podFailurePolicy"]["rules"]} == {"Ignore", "FailIndex"}
    command_line = spec["template"]["spec"]["containers"][0]["command"]
    assert command_line == [
        *("lightspan", "sweep", "/etc/lightspan/tiny.yaml", f"{LR}=0.1,0.2", "--seeds", "0,1", "--method", "grid"),
        *("--out", "/runs/rates", "--task", "array", "--allow-module", "tiny_lab"),
    ]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["--to", "slurm", "--method", "tpe", "--trials", "4", "--metric", "val/loss"],
            "--method tpe chooses each point by",
        ),
        (["--to", "kubernetes", "--image", "i", "--nodes", "2"], "a sweep on Kubernetes is one indexed Job"),
        (["--to", "kubernetes"], "--to kubernetes needs --image"),
        (["--to", "slurm", "--claim", "x"], "--claim does not work with --to slurm"),
    ],
)
def test_what_no_array_can_do_is_refused(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    if "tpe" in words:
        pytest.importorskip("optuna")
    assert main([*SWEEP, f"{LR}=0.1,0.2", *words, "--print"]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("task", "said"),
    [
        ("2", "--task 2: this sweep has 2 runs, numbered from 0"),
        ("-1", "--task '-1' must be a whole number"),
        ("array", "none of SLURM_ARRAY_TASK_ID"),
    ],
)
def test_a_task_that_is_none_is_refused(
    task: str, said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SLURM_ARRAY_TASK_ID", raising=False)
    monkeypatch.delenv("JOB_COMPLETION_INDEX", raising=False)
    assert main([*SWEEP, f"{LR}=0.1,0.2", "--out", "out", "--task", task]) == 2
    assert said in capsys.readouterr().err


# --- the document


def documented(*words: str) -> list[str]:
    """The command line of docs/sweeps.md that contains these words."""
    text = (Path(__file__).parents[3] / "docs" / "sweeps.md").read_text().replace("\\\n", " ")
    (line,) = [
        line for line in text.splitlines() if line.startswith("lightspan ") and all(word in line for word in words)
    ]
    return shlex.split(line)[1:]


@pytest.mark.runs
def test_the_example_of_the_document(tmp_path: Path) -> None:
    done = forked_fits.lightspan(documented("sweep", "--out sweeps/rates"), tmp_path / "said", tmp_path)
    assert done.statuses == [0], done.said
    lines = done.said.splitlines()
    assert lines[0] == f"supervised/linear: 4 runs -> {tmp_path / 'sweeps' / 'rates'}"
    assert (
        len(
            [
                line
                for line in lines
                if re.fullmatch(r"done  00\d-lr0\.0?1-seed[01]  val/accuracy 0\.\d+ \(\d+ s\)", line)
            ]
        )
        == 4
    )
    assert re.fullmatch(rf"best: {re.escape(LR)}=0\.0?1", lines[-5])


def test_the_arrays_of_the_document_are_rendered(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([word.replace("/shared", str(tmp_path)) for word in documented("slurm")]) == 0
    assert "#SBATCH --array=0-8%4" in capsys.readouterr().out
    assert main(documented("kubernetes")) == 0
    assert "completions: 3" in capsys.readouterr().out
