"""`lightspan runs`: the table, files for other programs, tags and notes, and a deletion that deletes nothing else."""

import csv
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from io import BytesIO, StringIO, TextIOWrapper
from pathlib import Path
from typing import Any

import pytest
from run_folder_fixtures import MakeRun

from lightspan.cli.main import main

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


def test_what_all_runs_were_started_with_stands_once_and_a_file_gets_wide_lines(
    make_run: MakeRun, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COLUMNS")
    mine, pictures = ["-c", "mine.yaml"], ["--images", "my_pictures", "--image-size", "32"]
    for seed, words in enumerate(([*mine, *pictures], [*pictures, *mine])):
        make_run(f"runs/with-a-long-name-{seed}", provenance=started(*words, f"seed_everything={seed}", day=seed + 1))
    lines = printed(capsys).splitlines()
    assert [line.split()[:3] for line in lines[1:3]] == [
        [f"runs/with-a-long-name-{seed}", "language/quickstart", f"seed_everything={seed}"] for seed in (1, 0)
    ]
    assert "all with --images my_pictures --image-size 32 -c mine.yaml" in lines


def test_a_run_of_no_steps_has_taken_none_though_it_logged_figures(tmp_path: Path, capsys: Captured) -> None:
    run = tmp_path / "runs" / "start"
    run.mkdir(parents=True)
    (run / "metrics.jsonl").write_text('{"step": 0, "collapse/rankme": 2.0}\n')
    (run / "summary.json").write_text('{"steps": 0, "finished": true}')
    (listed,) = json.loads(printed(capsys, "--json"))
    assert (listed["step"], listed["status"]) == (0, "done")


def test_without_a_validation_the_first_score_of_a_probe_comes_before_the_training_loss(
    tmp_path: Path, capsys: Captured
) -> None:
    run = tmp_path / "runs" / "probed"
    run.mkdir(parents=True)
    rows = [{"step": 0, "train/loss": 2.0}, {"step": 4, "probe/knn_accuracy": 0.25}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert printed(capsys).splitlines()[0].split()[-2:] == ["probe/knn_accuracy", "best"]


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
        (["--best", "lr-AdamW/matrices"], "its name does not tell whether low or high is good; add --mode min or max"),
        (["--best", "val/los_nats"], "no run of 4 logged it; did you mean val/loss_nats? they logged train/"),
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


@pytest.mark.parametrize(("verb", "name"), [("tag", "tags.txt"), ("note", "note.txt")])
@pytest.mark.parametrize("inside", [False, True])
def test_a_label_that_is_a_link_is_neither_read_nor_written(
    make_run: MakeRun, capsys: Captured, verb: str, name: str, inside: bool
) -> None:
    """Also one that stays in the run: what is said about it cannot be one of its other files."""
    run = make_run("runs/a")
    target = run / "inside" if inside else Path("outside")
    target.write_text("SECRET\n")
    (run / name).symlink_to(target.absolute())
    assert "SECRET" not in printed(capsys, "--json")
    assert printed(capsys, verb, run) == f"no {verb}s\n".replace("notes", "note")
    for words in (["mine"], ["--remove"]):
        assert main(["runs", verb, str(run), *words]) == (0 if (verb, words) == ("tag", ["--remove"]) else 2)
    assert f"{name} is a link, but what is said about a run is in files of its own" in capsys.readouterr().err
    assert target.read_text() == "SECRET\n"
    assert (run / name).is_symlink()


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
from lightspan.cli.runs.folder import sole_use
with sole_use(Path(sys.argv[1])):
    print("locked", flush=True)
    time.sleep(60)
"""


def test_clean_keeps_a_run_that_has_started_again_since_it_looked(make_run: MakeRun, capsys: Captured) -> None:
    from lightspan.cli.runs.catalogue import read_entry
    from lightspan.cli.runs.cleaning import delete, look
    from lightspan.core.errors import UserError

    run = make_run("runs/a")
    (run / "failed.txt").write_text("error")
    (deletable,), _ = look([read_entry(run)])
    command = [sys.executable, "-c", LOCKING, str(run)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=dict(os.environ))
    assert process.stdout is not None
    process.stdout.readline()
    try:
        assert "keeps" not in printed(capsys, "clean", "--yes")  # it is running, which is not failed
        with pytest.raises(UserError, match="it was failed and is running now"):
            delete(deletable)
    finally:
        process.kill()
        process.wait()
    delete(deletable)
    assert not run.exists()


def test_clean_neither_writes_through_the_link_that_a_lock_is_nor_waits_for_a_pipe(
    make_run: MakeRun, tmp_path: Path, capsys: Captured
) -> None:
    precious = tmp_path / "precious"
    precious.write_text("x" * 5000)
    for name in ("link", "pipe"):
        (make_run(f"runs/{name}") / "failed.txt").write_text("error")
    (Path("runs/link") / ".lightspan.lock").symlink_to(precious)
    os.mkfifo("runs/pipe/.lightspan.lock")
    assert main(["runs", "clean", "--yes"]) == 1
    said = capsys.readouterr().err
    assert "runs/link/.lightspan.lock is a link, but the lock of a run is a file of its own; remove it" in said
    assert "runs/pipe/.lightspan.lock is a named pipe, not a regular file, but" in said
    assert precious.read_text() == "x" * 5000


@pytest.mark.parametrize(("inside", "named"), [(".", "."), ("checkpoints", ".."), ("checkpoints/deep", "../..")])
def test_a_run_is_deleted_from_inside_too(
    make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured, inside: str, named: str
) -> None:
    run = make_run("runs/a")
    (run / "failed.txt").write_text("error")
    (run / inside).mkdir(parents=True, exist_ok=True)
    monkeypatch.chdir(run / inside)
    assert "deleted 1 run\n" in printed(capsys, "clean", named, "--yes")
    assert [*(tmp_path / "runs").iterdir()] == []


def test_a_run_that_somebody_else_has_deleted_meanwhile_is_no_fault(make_run: MakeRun) -> None:
    from lightspan.cli.runs.catalogue import read_entry
    from lightspan.cli.runs.cleaning import delete, look

    run = make_run("runs/a", summary=None)
    entry = read_entry(run)
    (deletable,), _ = look([entry])
    shutil.rmtree(run)
    delete(deletable)
    assert not run.exists()
    assert [kept.reason for kept in look([entry])[1]] == ["it cannot be read: No such file or directory"]


def test_a_run_of_which_a_part_cannot_be_removed_is_not_called_deleted(
    make_run: MakeRun, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    (make_run("runs/a") / "failed.txt").write_text("error")
    monkeypatch.setattr("lightspan.core.files.atomic.shutil.rmtree", lambda path, ignore_errors: None)
    assert main(["runs", "clean", "--yes"]) == 1
    out, err = capsys.readouterr()
    assert "deleted 0 runs" in out
    assert "a part of " in err
    assert "runs/a could not be removed; it is in " in err


def test_a_line_break_in_a_name_begins_no_line(make_run: MakeRun, capsys: Captured) -> None:
    (make_run("runs/x\nfailed 0 B  runs/y") / "failed.txt").write_text("error")
    for arguments in ((), ("clean", "--yes")):
        assert not any(line.startswith("failed 0 B") for line in printed(capsys, *arguments).splitlines())


def test_names_that_are_no_text_and_letters_that_a_terminal_lacks_are_escaped(
    make_run: MakeRun, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    (make_run("runs/\udcff\x1b[2J") / "note.txt").write_text("é")
    printed(capsys, "--csv", "out.csv")
    assert "runs/\\udcff\x1b[2J" in Path("out.csv").read_text()
    assert "runs/\\udcff\\x1b[2J" in printed(capsys, "--csv", "-")
    assert main(["runs", "note", "runs/\udcff\x1b[2J", "\udcff"]) == 2
    assert "the note is no UTF-8 at character 1" in capsys.readouterr().err
    written = BytesIO()
    monkeypatch.setattr("sys.stdout", TextIOWrapper(written, encoding="ascii"))
    assert main(["runs", "note", "runs/\udcff\x1b[2J"]) == 0
    assert written.getvalue() == b"\\xe9\n"


@pytest.mark.parametrize("seconds", ["NaN", "Infinity", "1" + "0" * 400])
def test_seconds_that_are_no_number_leave_a_gap(make_run: MakeRun, capsys: Captured, seconds: str) -> None:
    run = make_run("runs/a", rows=[])
    (run / "summary.json").write_text(f'{{"steps": 5, "seconds": {seconds}, "finished": true}}')
    (row,) = json.loads(printed(capsys, "--json"))
    assert (row["step"], row["seconds"]) == (5, None)
    printed(capsys)


def test_people_who_tag_at_once_lose_no_tag(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    from lightspan.cli.runs import labels

    run, read = make_run("runs/a"), labels.tags_of
    begin = threading.Barrier(4)

    def slowly(folder: Path) -> tuple[str, ...]:
        found = read(folder)
        time.sleep(0.02)
        return found

    def tag(word: str) -> None:
        begin.wait()
        assert main(["runs", "tag", str(run), word]) == 0

    monkeypatch.setattr(labels, "tags_of", slowly)
    words = ["a", "b", "c", "d"]
    people = [threading.Thread(target=tag, args=(word,)) for word in words]
    for person in people:
        person.start()
    for person in people:
        person.join()
    assert read(run) == tuple(words)


@pytest.mark.parametrize("verb", ["tag", "note"])
def test_a_folder_in_the_place_of_a_label_is_named(make_run: MakeRun, capsys: Captured, verb: str) -> None:
    run = make_run("runs/a")
    (run / {"tag": "tags.txt", "note": "note.txt"}[verb]).mkdir()
    for words in (["word"], *([["--remove"]] if verb == "note" else [])):
        assert main(["runs", verb, "runs/a", *words]) == 2
        assert "there is a folder of this name" in capsys.readouterr().err
