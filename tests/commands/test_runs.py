"""`lightspan runs`: the table, files for other programs, tags and notes, and a deletion that deletes nothing else."""

import csv
import json
import os
import subprocess
import sys
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from run_folder_fixtures import MakeRun

from lightspan.cli import main

Captured = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)


def started(*words: str, day: int = 1) -> dict[str, Any]:
    argv = ["lightspan", "fit", "language/quickstart", *words]
    return {"recipe": "language/quickstart", "argv": argv, "started": f"2026-01-{day:02}T00:00:00+00:00"}


@pytest.fixture
def four(make_run: MakeRun) -> list[Path]:
    """Three runs that differ in their rate, of which the last failed, and one without a process."""
    runs = [
        make_run(f"runs/r{at}", offset, provenance=started(f"model.lr={lr}", "trainer.max_steps=50", day=at + 1))
        for at, (offset, lr) in enumerate(((0.2, "1e-3"), (0.1, "1e-2"), (0.3, "1e-1"), (0.4, "1")))
    ]
    (runs[2] / "failed.txt").write_text("loss is NaN")
    (runs[3] / "summary.json").unlink()
    (runs[3] / "resolved.yaml").write_text("model: {lr: 1.0}\n")
    for run in runs:
        (run / ".lightspan.lock").write_text("process 1 on node-7\n")
    return runs


def printed(capsys: Captured, *arguments: object) -> str:
    assert main(["runs", *map(str, arguments)]) == 0
    return capsys.readouterr().out


def test_the_table_has_newest_runs_first_and_says_what_differs_and_what_does_not(
    four: list[Path], capsys: Captured
) -> None:
    lines = printed(capsys).splitlines()
    rows = [line.split() for line in lines[1:5]]
    assert lines[0].split() == [
        "run",
        "recipe",
        "differs",
        "in",
        "status",
        "step",
        "val/loss_nats",
        "best",
        "time",
        "reason",
    ]
    assert [row[0] for row in rows] == ["runs/r3", "runs/r2", "runs/r1", "runs/r0"]
    assert [row[2] for row in rows] == ["lr=1", "lr=1e-1", "lr=1e-2", "lr=1e-3"]
    assert [row[3] for row in rows] == ["stale", "failed", "done", "done"]
    assert lines[5:] == ["all with trainer.max_steps=50", "all on node-7"]


def test_settings_go_by_the_end_of_their_keys_that_tells_them_apart(make_run: MakeRun, capsys: Captured) -> None:
    for at, lr in enumerate((1, 2)):
        flags = (f"model.init_args.optimizer.init_args.lr={lr}", f"model.init_args.teacher.init_args.lr={lr}")
        make_run(f"runs/{at}", provenance=started(*flags, day=at + 1))
    assert "optimizer.lr=1 teacher.lr=1" in " ".join(printed(capsys).split())
    assert "init_args" not in printed(capsys)


def test_best_orders_by_the_best_value_and_says_what_it_took_for_best(four: list[Path], capsys: Captured) -> None:
    out = printed(capsys, "--best", "val/loss_nats")
    assert [line.split()[0] for line in out.splitlines()[1:5]] == ["runs/r1", "runs/r0", "runs/r2", "runs/r3"]
    assert "best: the lowest val/loss_nats, judging by its name\n" in out
    out = printed(capsys, "--best", "val/loss_nats", "--mode", "max", "--limit", "1")
    assert out.splitlines()[1].split()[0] == "runs/r3"
    assert "best: the highest val/loss_nats\n" in out
    assert "3 more; --limit 4 shows all" in out


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["--status", "done"], ["r1", "r0"]),
        (["--status", "stale", "--status", "failed"], ["r3", "r2"]),
        (["--where", "model.lr=0.01"], ["r1"]),
        (["--since", "2026-01-03"], ["r3"]),
        (["--recipe", "vision/*"], []),
        (["--sort", "name"], ["r0", "r1", "r2", "r3"]),
        (["--sort", "step", "--reverse", "runs/r0"], ["r0"]),
    ],
)
def test_filters_and_order(four: list[Path], capsys: Captured, arguments: list[str], names: list[str]) -> None:
    if "--since" in arguments:
        arguments = ["--since", "2026-01-03T12:00:00+00:00"]
    found = json.loads(printed(capsys, *arguments, "--json"))
    assert [Path(run["run"]).name for run in found] == names


def test_csv_and_json_hold_the_same_rows_with_full_keys(four: list[Path], capsys: Captured) -> None:
    rows = json.loads(printed(capsys, "--json"))
    table = list(csv.DictReader(StringIO(printed(capsys, "--csv", "-"))))
    assert [row["run"] for row in table] == [row["run"] for row in rows] == [f"runs/r{at}" for at in (3, 2, 1, 0)]
    assert table[3]["changes"] == "model.lr=1e-3 trainer.max_steps=50"
    assert float(table[3]["val/loss_nats lowest"]) == rows[3]["metrics"]["val/loss_nats"]["lowest"]
    printed(capsys, "--csv", "all.csv")
    assert list(csv.DictReader(StringIO(Path("all.csv").read_text()))) == table


def test_runs_that_diverged_are_left_out_of_a_ranking(make_run: MakeRun, capsys: Captured) -> None:
    make_run("runs/good")
    make_run("runs/nan", rows=[{"step": 0, "time_s": 0.0, "val/loss_nats": None}])
    out = printed(capsys, "--best", "val/loss_nats")
    assert "runs/nan" not in out
    assert "1 runs without it are left out" in out
    assert json.loads(printed(capsys, "runs/nan", "--json"))[0]["metrics"]["val/loss_nats"]["last"] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere does not exist; name the folder that contains your runs (default: runs)"),
        (["--best", "val/width"], "its name does not tell whether low or high is good; add --mode min or max"),
        (["--best", "val/error"], "none of these 4 runs has a finite value"),
        (["--mode", "max"], "name that metric"),
        (["--limit", "0"], "--limit 0 must be at least 1"),
        (["--since", "soon"], "--since 'soon' is no time"),
        (["--where", "lr"], "--where 'lr' is not of the form key.path=value"),
        (["tag", "nowhere", "a"], "nowhere is not a run folder"),
        (["tag", "runs/r0", "a b"], "'a b' is no tag"),
        (["tag", "runs/r0", "a", "--remove"], "runs/r0 has no tag 'a'; its tags: none"),
        (["note", "runs/r0", "a", "--remove"], "--remove takes no words"),
        (["clean"], "say it with --yes"),
    ],
)
def test_what_cannot_work_is_refused(
    four: list[Path], capsys: Captured, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.setattr("sys.stdin", StringIO("y\n"))
    assert main(["runs", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert all(run.is_dir() for run in four)


def test_an_empty_folder_has_no_runs(tmp_path: Path, capsys: Captured) -> None:
    (tmp_path / "runs").mkdir()
    assert printed(capsys).strip() == "no runs"
    assert json.loads(printed(capsys, "--json")) == []
    assert printed(capsys, "clean").strip() == "nothing to delete"


def test_tags_and_notes_are_shown_and_found(four: list[Path], capsys: Captured) -> None:
    assert printed(capsys, "tag", "runs/r1", "paper", "best").strip() == "best paper"
    assert printed(capsys, "note", "runs/r1", "use", "this").strip() == "use this"
    out = printed(capsys, "--tag", "paper")
    assert out.splitlines()[1].rstrip().endswith("best paper  use this")
    assert len(json.loads(printed(capsys, "--tag", "paper", "--json"))) == 1
    assert printed(capsys, "tag", "runs/r1", "best", "--remove").strip() == "paper"
    assert printed(capsys, "tag", "runs/r1").strip() == "paper"
    assert printed(capsys, "note", "runs/r1", "--remove").strip() == "no note"


def test_hostile_names_reach_the_terminal_escaped(make_run: MakeRun, capsys: Captured) -> None:
    evil = "\x1b[31m[red]x\x07"
    run = make_run(
        "runs/a", rows=[{"step": 0, "time_s": 0.0, "val/loss": 1.0}], provenance=started(f"model.name={evil}")
    )
    (run / "note.txt").write_text(evil)
    out = printed(capsys)
    assert "\x1b" not in out
    assert "\x07" not in out
    assert out.count("\\x1b[31m[red]x\\x07") == 2


def test_clean_deletes_after_a_yes_what_failed_or_ended_without_a_word(
    four: list[Path], capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Terminal(StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr("sys.stdin", Terminal("n\n"))
    out = printed(capsys, "clean")
    assert out.splitlines()[0].split()[::3] == ["failed", "runs/r2"]
    assert "delete 2 runs, " in out
    assert "nothing was deleted" in out
    monkeypatch.setattr("sys.stdin", Terminal("y\n"))
    assert printed(capsys, "clean").endswith("deleted 2 runs\n")
    assert [run.exists() for run in four] == [True, True, False, False]


def test_clean_keeps_what_is_tagged_what_is_not_lightspans_and_what_holds_another_run(
    make_run: MakeRun, capsys: Captured
) -> None:
    for name in ("tagged", "mine", "outer", "plain"):
        (make_run(f"runs/{name}") / "failed.txt").write_text("error")
    (Path("runs") / "tagged" / "tags.txt").write_text("paper\n")
    (Path("runs") / "mine" / "thesis.tex").touch()
    make_run("runs/outer/export/inner")
    Path("runs/linked").symlink_to(Path("runs/plain").absolute())
    out = printed(capsys, "clean", "--yes", "runs", "runs/linked")
    for kept in (
        "keeps runs/tagged: it is tagged paper",
        "keeps runs/mine: it holds 'thesis.tex', which is not lightspan's",
        "keeps runs/outer: it contains the run export/inner",
        "keeps runs/linked: it is a link",
        "deleted 1 run\n",
    ):
        assert kept in out
    assert sorted(path.name for path in Path("runs").iterdir()) == ["linked", "mine", "outer", "tagged"]
    printed(capsys, "clean", "--yes", "--tag", "paper")
    assert not Path("runs/tagged").exists()


def test_clean_never_follows_a_link_out_of_a_run(make_run: MakeRun, tmp_path: Path, capsys: Captured) -> None:
    run = make_run("runs/a")
    (run / "failed.txt").write_text("error")
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_bytes(b"x" * 5000)
    (run / "checkpoints").symlink_to(outside)
    (run / "pictures").mkdir()
    (run / "pictures" / "a.png").symlink_to(outside / "precious")
    out = printed(capsys, "clean", "--yes")
    assert "deleted 1 run" in out
    assert (outside / "precious").stat().st_size == 5000


LOCKING = """
import sys, time
from pathlib import Path
from lightspan.runs.folder import sole_use
with sole_use(Path(sys.argv[1])):
    print("locked", flush=True)
    time.sleep(60)
"""


def test_clean_keeps_a_run_that_has_started_again_since_it_looked(make_run: MakeRun, capsys: Captured) -> None:
    from lightspan.errors import UserError
    from lightspan.runs.catalogue import read_entry
    from lightspan.runs.cleaning import delete, look

    run = make_run("runs/a")
    (run / "failed.txt").write_text("error")
    (doomed,), _ = look([read_entry(run)])
    command = [sys.executable, "-c", LOCKING, str(run)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=dict(os.environ))
    assert process.stdout is not None
    process.stdout.readline()
    try:
        assert "keeps" not in printed(capsys, "clean", "--yes")  # it is running, which is not failed
        with pytest.raises(UserError, match="it was failed and is running now"):
            delete(doomed)
    finally:
        process.kill()
        process.wait()
    delete(doomed)
    assert not run.exists()
