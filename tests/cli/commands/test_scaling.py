"""Curves over the size of the data: what is refused first, what is never run again, and what is said at the end."""

import json
import math
import os
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_processes import PROJECT
from rank_processes import fit as fit_of_ranks

from lightspan.cli.commands import scaling as command
from lightspan.cli.main import main
from lightspan.cli.runs.fits import Task
from lightspan.cli.studies import queue
from lightspan.cli.studies.scaling.data import Whole
from lightspan.cli.studies.scaling.study import SUBSET, SUBSET_SEED_KEY, read_sweep
from lightspan.cli.studies.scaling.study import read as study_of
from lightspan.core.errors import UserError
from lightspan.core.files.runs import SCALING, SCALING_PICTURE, SWEEP
from lightspan.datamodules.image.sets.small import Digits

TINY = [str(PROJECT / "tiny.yaml"), "--allow-module", "tiny_lab", "data.class_path=tiny_lab.faults.ExactRows"]
CURVE = ["scaling", *TINY, "trainer.limit_val_batches=0", "--metric", "val/accuracy"]
SIZES = ["--sizes", "8", "16", "32", "64"]
SUBSET_SIZE = "trainer.callbacks.training_subset.init_args.size"


@pytest.fixture(autouse=True)
def _project(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(PROJECT))
    monkeypatch.setenv("LIGHTSPAN_RUN", "")
    monkeypatch.chdir(tmp_path)


class Stub:
    """Stands in for processes: a run ends at once with level + 0.1 log10 N and a little by seed, or fails if told."""

    def __init__(self) -> None:
        self.started: list[str] = []
        self.commands: dict[str, str] = {}
        self.fails: Callable[[str], bool] = lambda name: False
        self.level = 0.2

    def __call__(self, tasks: Iterator[Task], workers: int, ended: Any, look: Any) -> None:
        for task in tasks:
            self.started.append(task.name)
            line = self.commands[task.name] = " ".join(task.command)
            size, seed = (int(re.search(rf"{key}=(\d+)", line)[1]) for key in (SUBSET_SIZE, "seed_everything"))  # type: ignore[index]
            task.log.parent.mkdir(parents=True, exist_ok=True)
            task.log.write_text("lightspan: it went wrong\n")
            failed = self.fails(task.name)
            if not failed:
                score = self.level + 0.1 * math.log10(size) + 0.01 * (seed - 1)
                metrics = {"step": 7, "val/accuracy": score, "val/loss": 2 - score}
                (task.log.parent / "metrics.jsonl").write_text(json.dumps(metrics) + "\n")
                (task.log.parent / "summary.json").write_text('{"finished": true}')
                (task.log.parent / "failed.txt").unlink(missing_ok=True)
            ended(task, int(failed))


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Stub:
    made = Stub()
    monkeypatch.setattr(queue, "run_side_by_side", made)
    return made


def outcome(folder: str = "out") -> dict[str, Any]:
    return json.loads(Path(folder, SCALING).read_text())["outcome"]


def test_a_curve_is_fitted_and_said_in_a_table_json_and_a_figure(
    stub: Stub, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*CURVE, *SIZES, "--out", "out"]) == 0
    assert stub.started == [f"size{size}-seed{seed}" for size in (8, 16, 32, 64) for seed in (0, 1, 2)]
    said = capsys.readouterr().out
    assert "per decade: +0.1, 95 % interval 0.1 to 0.1" in said
    assert "ten times the data (640): 0.4806" in said
    assert "by the log-linear, s = a + b log10 N" in said
    assert "equal steps: each size trains for 8 steps of 8 samples" in said
    assert "four sizes cannot separate" in said
    found = outcome()
    assert found["per_decade"]["value"] == pytest.approx(0.1)
    assert found["tenfold"]["value"] == pytest.approx(0.2 + 0.1 * math.log10(640))
    assert (found["best"], found["top"], found["mode"]) == ("log-linear", 1.0, "max")
    assert found["scores"]["16"]["2"] == pytest.approx(0.33041, abs=1e-4)
    assert Path("out", SCALING_PICTURE).read_bytes().startswith(b"\x89PNG")
    line = stub.commands["size16-seed2"]
    for word in (f"class_path={SUBSET}", "init_args.seed=2", "seed_everything=2", "trainer.max_steps=8"):
        assert word in line
    assert "trainer.val_check_interval=8 trainer.check_val_every_n_epoch=null" in line


def test_a_size_or_a_seed_that_is_added_runs_alone(stub: Stub) -> None:
    three = ["--sizes", "8,16,32", "--seeds", "2"]
    assert main([*CURVE, *three, "--out", "out"]) == 0
    stub.started.clear()
    assert main([*CURVE, "--sizes", "64", "16", "8", "--seeds", "2", "--out", "out"]) == 0
    assert stub.started == ["size64-seed0", "size64-seed1"]
    stub.started.clear()
    assert main(["scaling", "out", "--allow-module", "tiny_lab", "--seeds", "3"]) == 0
    assert stub.started == [f"size{size}-seed2" for size in (8, 16, 32, 64)]
    stub.started.clear()
    assert main(["scaling", "out", "--allow-module", "tiny_lab", "--sizes", "48"]) == 0
    assert stub.started == [f"size48-seed{seed}" for seed in (0, 1, 2)]
    assert [*outcome()["scores"]] == ["8", "16", "32", "48", "64"]
    assert main(["scaling", "out", "--allow-module", "tiny_lab", "--metric", "val/loss", "--top", "none"]) == 0
    assert outcome()["per_decade"]["value"] == pytest.approx(-0.1)
    assert len(stub.started) == 3
    assert main(["sweep", "out", "--allow-module", "tiny_lab"]) == 0  # it is the folder of a sweep too


def test_a_run_that_failed_is_named_left_out_and_started_again_when_asked(
    stub: Stub, capsys: pytest.CaptureFixture[str]
) -> None:
    stub.fails = lambda name: name == "size32-seed1"
    assert main([*CURVE, *SIZES, "--out", "out"]) == command.UNFINISHED
    said = capsys.readouterr().out
    assert "the fits leave out seed 1, of which not every size has a score" in said
    assert "--retry-failed" in said
    stub.fails = lambda name: False
    stub.started.clear()
    assert main(["scaling", "out", "--allow-module", "tiny_lab", "--retry-failed"]) == 0
    assert stub.started == ["size32-seed1"]
    assert outcome()["notes"] == [note for note in outcome()["notes"] if "leave out" not in note]


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    ("level", "metric", "top"),
    [(0.2, "val/accuracy", 1.0), (-0.5, "val/accuracy", None), (1.2, "val/accuracy", None), (1.2, "val/loss", None)],
)
def test_only_scores_between_0_and_1_of_which_more_is_better_are_taken_for_shares(
    level: float, metric: str, top: float | None, stub: Stub
) -> None:
    stub.level = level
    assert main([*CURVE[:-1], metric, *SIZES, "--out", "out"]) == 0
    assert outcome()["top"] == top


def test_all_of_the_data_are_proposed_where_ten_times_as_many_are_more(
    stub: Stub, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*CURVE, "--sizes", "8", "16", "32", "--seeds", "1", "--out", "out"]) == 0
    assert "out --allow-module tiny_lab --sizes 64\n" in capsys.readouterr().out
    assert "checkpoint.init_args.every_n_train_steps=2 " in stub.commands["size8-seed0"]  # four of 8 steps


def test_epochs_are_rounded_to_whole_ones(stub: Stub) -> None:
    assert main([*CURVE, *SIZES, "--seeds", "1", "--steps", "epochs", "trainer.max_steps=29", "--out", "out"]) == 0
    assert study_of(Path("out")).length == 4


def test_equal_epochs_count_those_of_the_recipe_on_all_data(stub: Stub, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*CURVE, *SIZES, "--steps", "epochs", "trainer.max_steps=24", "--out", "out"]) == 0
    assert "equal epochs: each size trains for 3 epochs" in capsys.readouterr().out
    assert "trainer.max_steps=-1 trainer.max_epochs=3" in stub.commands["size8-seed0"]
    assert study_of(Path("out")).length == 3


@pytest.mark.sample(2)
@pytest.mark.parametrize(("limit", "length"), [("2", 6), ("0.5", 12), ("1.0", 24), ("100", 24), ("1", 3)])
def test_epochs_that_a_limit_ends_early_count_as_long_as_they_are(
    limit: str, length: int, stub: Stub, capsys: pytest.CaptureFixture[str]
) -> None:
    """Three epochs of 8 steps without it; the runs see all of their samples, so that the limit is not theirs."""
    epochs = ["trainer.max_steps=-1", "trainer.max_epochs=3", f"trainer.limit_train_batches={limit}"]
    assert main([*CURVE, "--sizes", "8", "16", "32", "--seeds", "1", *epochs, "--out", "out"]) == 0
    assert f"each size trains for {length} steps of 8 samples" in capsys.readouterr().out
    line = stub.commands["size8-seed0"]
    assert line.index(f"limit_train_batches={limit}") < line.rindex("trainer.limit_train_batches=1.0")


def test_a_limit_counts_micro_batches(stub: Stub) -> None:
    """Of three, the last makes a step with two accumulated ones before it that is not full."""
    words = ["trainer.max_epochs=3", "trainer.limit_train_batches=3", "trainer.accumulate_grad_batches=2"]
    assert main([*CURVE, "--sizes", "8", "16", "32", "--seeds", "1", *words, "trainer.max_steps=-1", "--out", "o"]) == 0
    assert study_of(Path("o")).length == 6
    assert "trainer.val_check_interval=12" in stub.commands["size8-seed0"]


def test_with_classes_no_size_is_proposed_that_they_may_not_have(
    stub: Stub, capsys: pytest.CaptureFixture[str]
) -> None:
    digits = ["data.class_path=lightspan.datamodules.image.sets.small.Digits", "data.init_args.batch_size=8"]
    words = ["--sizes", "8", "16", "32", "--seeds", "1", "--classes", "3", "--out", "out"]
    assert main([*CURVE, *digits, *words]) == 0
    said = capsys.readouterr().out
    assert "next: lightspan report" in said
    assert "--sizes" not in said


@pytest.mark.sample(10)
@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "--sizes has 0 and a curve needs 3 or more"),
        (["--sizes", "8", "16"], "--sizes has 2 and a curve needs 3 or more"),
        (["--sizes", "8", "16", "16"], "--sizes: 16 is given twice"),
        (["--sizes", "0", "16", "32"], "--sizes: '0' is not a whole number of samples from 1 up"),
        (["--sizes", "8", "16", "-32"], "--sizes: '-32' is not a whole number"),
        (["--sizes", "8", "16", "1e3"], "--sizes: '1e3' is not a whole number"),
        (["--sizes", "8", "16", "65"], "--sizes 65 is more than the 64 training samples"),
        (["--sizes", "4", "16", "32"], "--sizes 4: one step has batch_size=8 samples"),
        ([*SIZES, "--seeds", "0"], "--seeds '0' must be how many"),
        ([*SIZES, "--seeds", "1,1"], "--seeds '1,1' must be how many"),
        ([*SIZES, "--top", "high"], "--top 'high' must be a number"),
        ([*SIZES, "--classes", "3"], "_Rows does not know the classes of its samples"),
        ([*SIZES, "seed_everything=3"], "seed_everything=3 and --seeds both set the seed"),
        ([*SIZES, f"{SUBSET_SIZE}=3"], "follows from --sizes, --seeds and --classes"),
        ([*SIZES, "--steps", "epochs", "trainer.max_steps=3"], "less than half an epoch of its 64 samples"),
        ([*SIZES, "trainer.max_steps=-1", "trainer.max_epochs=2", "trainer.limit_train_batches=0"], "does not say how"),
        ([*SIZES, "trainer.max_steps=-1"], "does not say how long it trains"),
        ([*SIZES, "trainer.callbacks.summary=null"], "from whose file a sweep learns that a run is done"),
        ([*SIZES, "data.class_path=tiny_lab.parts.Rows"], "Rows loads its training data by a DataLoader"),
        (
            [*SIZES, f"trainer.callbacks.own.class_path={SUBSET}", "trainer.callbacks.own.init_args.size=9"],
            "has a TrainingSubset of its own",
        ),
        ([*SIZES, "--metric", "val/odd"], "its name does not tell whether low or high is good"),
    ],
)
def test_what_cannot_be_a_curve_is_told_before_any_run(
    words: list[str], said: str, stub: Stub, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main([*CURVE, *words]) == 2
    assert said in capsys.readouterr().err
    assert stub.started == []
    assert list(tmp_path.iterdir()) == []


def test_another_curve_in_the_same_folder_is_refused(stub: Stub, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*CURVE, *SIZES, "--out", "out"]) == 0
    assert main([*CURVE, *SIZES, "--out", "out", "trainer.max_steps=16"]) == 2
    assert "out contains another curve (then -> now):" in capsys.readouterr().err
    assert main(["scaling", "out", "--allow-module", "tiny_lab", "trainer.max_steps=16"]) == 2
    assert "a changed curve needs another --out" in capsys.readouterr().err
    assert main(["scaling", "out"]) == 2
    assert "runs code of tiny_lab; if you trust it" in capsys.readouterr().err
    Path("out", SCALING).write_text('{"study": {"policy": "none"}}')
    assert main(["scaling", "out", "--allow-module", "tiny_lab"]) == 2
    assert "is not what `lightspan scaling` writes" in capsys.readouterr().err


def test_too_few_samples_for_all_classes_are_told() -> None:
    data = Digits(batch_size=4)
    data.setup()
    whole = Whole(data.train_dataloader())
    assert whole.require(4, 0, None) == "4 samples have 4 of the 10 classes, as shares are kept"
    assert whole.require(40, 0, None) is None
    with pytest.raises(
        UserError, match=r"--sizes 1200 is more than the .* training samples of the 3 classes of seed 0"
    ):
        whole.require(1_200, 0, 3)


def test_the_report_of_a_curve_shows_its_figure(stub: Stub, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*CURVE, *SIZES, "--out", "out"]) == 0
    assert main(["report", "out", "--out", "page.html", "--metric", "val/accuracy"]) == 0
    page = Path("page.html").read_text()
    assert "data:image/png;base64" in page
    assert "at ten times the data" in page


def test_the_example_of_the_document_and_its_continuation(stub: Stub, capsys: pytest.CaptureFixture[str]) -> None:
    text = (Path(__file__).parents[3] / "docs" / "scaling-curves.md").read_text()
    first, more = [
        shlex.split(line)[1:]
        for line in text.splitlines()
        if line.startswith("lightspan scaling") and ("--out curves/linear" in line or "--seeds 5" in line)
    ]
    assert main(first) == 0
    assert "equal steps: each size trains for 345 steps of 128 samples" in capsys.readouterr().out
    assert len(stub.started) == 12
    assert main(more) == 0
    assert len(stub.started) == 5 * 5


@pytest.mark.runs
def test_a_cell_that_stops_on_two_ranks_goes_on_on_one_as_if_it_had_been_there_all_along(tmp_path: Path) -> None:
    part = [f"trainer.callbacks.part.class_path={SUBSET}", "trainer.callbacks.part.init_args.size=24"]
    straight, run = tmp_path / "straight", tmp_path / "run"
    statuses = [
        *fit_of_ranks(straight, *part).statuses,
        *fit_of_ranks(run, *part, "trainer.max_steps=5", ranks=2).statuses,
        *fit_of_ranks(run, *part).statuses,
    ]
    assert statuses == [0, 0, 0, 0]
    assert ledger(run) == ledger(straight)
    for one, other in zip(weights(run), weights(straight), strict=True):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-7)


def ledger(run: Path) -> Any:
    """What the run trained on: the parts of each epoch's order, and the digest of the samples."""
    found = json.loads((run / "ledger.json").read_text())
    assert found["data"]["epoch_samples"] == 24
    return found["data"], found["ranges"]


def weights(run: Path) -> list[torch.Tensor]:
    return [*torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"].values()]


STUDY = {"policy": "equal", "length": 1, "samples": 99, "batch_size": 1}


def foreign(keys: dict[str, Any] | None = None, **changes: Any) -> Path:
    """The folder of a curve that somebody else wrote."""
    keys = {SUBSET_SIZE: {"values": [1, 2]}} if keys is None else keys
    trials = [{"run": f"r{size}", "values": {SUBSET_SIZE: size}, "seed": 0} for size in (1, 2) if SUBSET_SIZE in keys]
    record = {"recipe": "language/quickstart", "arguments": [], "method": "grid", "metric": None, "mode": "min"}
    record |= {"keys": keys, "seeds": [0], "seed_keys": [SUBSET_SEED_KEY], "trials": trials, **changes}
    folder = Path("foreign")
    folder.mkdir(exist_ok=True)
    (folder / SCALING).write_text(json.dumps({"study": STUDY, "outcome": None}))
    (folder / SWEEP).write_text(json.dumps(record))
    return folder


@pytest.mark.parametrize(
    "changes",
    [
        {"keys": {"trainer.max_steps": {"values": [1, 2]}}},
        {"keys": {SUBSET_SIZE: {"values": ["a", "b"]}}, "trials": []},
        {"keys": {SUBSET_SIZE: {"log": [1, 9], "points": 2}}, "trials": []},
        {"seed_keys": []},
    ],
)
def test_a_folder_whose_sweep_is_no_curve_is_refused(changes: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["scaling", str(foreign(**changes))]) == 2
    assert f"{SWEEP} is not a sweep over {SUBSET_SIZE}" in capsys.readouterr().err


@pytest.mark.parametrize("name", [SCALING, SWEEP])
def test_records_that_are_pipes_are_not_waited_for(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    folder = foreign()
    (folder / name).unlink()
    os.mkfifo(folder / name)
    assert main(["scaling", str(folder)]) == 2
    capsys.readouterr()
    with pytest.raises(UserError, match="a named pipe"):
        (study_of if name == SCALING else read_sweep)(folder)


@pytest.mark.parametrize("name", ["r1", "r1/output.txt"])
def test_no_run_of_a_folder_writes_through_a_link_out_of_it(
    name: str, stub: Stub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, theirs = foreign(), tmp_path / "theirs"
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).symlink_to(theirs)
    theirs.mkdir() if name == "r1" else theirs.touch()
    assert main(["scaling", str(folder)]) == 2
    assert f"{name} is a link" in capsys.readouterr().err
    assert not stub.started
