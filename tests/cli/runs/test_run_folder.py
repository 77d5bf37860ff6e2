"""The run folder: one run has it, two runs never share one, and nothing in it is lost or grows without need."""

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from lightspan.cli.commands.arguments import folder
from lightspan.cli.config import provenance
from lightspan.cli.launch import parent
from lightspan.cli.main import main
from lightspan.cli.runs import folder as run_folder
from lightspan.cli.runs.folder import checkpoint_to_resume, is_first_rank, set_metrics_aside, sole_use
from lightspan.core.errors import UserError

RANKS = ("RANK", "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_STEP_ID")


@pytest.fixture(autouse=True)
def _alone(monkeypatch, tmp_path):
    for name in RANKS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LIGHTSPAN_RUN", "")  # restored afterwards
    monkeypatch.chdir(tmp_path)


def test_runs_that_begin_in_the_same_second_have_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder, "datetime", SimpleNamespace(now=lambda: SimpleNamespace(strftime=lambda _: "now")))
    folders = [run_folder.run_folder(None, "language/quickstart") for _ in range(3)]
    assert folders == [tmp_path / "runs" / "language-quickstart" / name for name in ("now", "now-2", "now-3")]
    assert all(folder.is_dir() for folder in folders)
    assert run_folder.run_folder(None, "language/quickstart", make=False).name == "now-4"
    assert not folders[0].with_name("now-4").exists()


@pytest.mark.parametrize(
    ("place", "first"),
    [
        ({}, True),
        ({"RANK": "0", "LOCAL_RANK": "0"}, True),
        ({"RANK": "8", "LOCAL_RANK": "0"}, False),
        ({"LOCAL_RANK": "1", "NODE_RANK": "0"}, False),
        ({"LOCAL_RANK": "0", "NODE_RANK": "1"}, False),
        ({"SLURM_PROCID": "0"}, True),
        ({"SLURM_PROCID": "3"}, False),
        # Lightning's own launcher inside an allocation: all its ranks see the process number of the shell.
        ({"SLURM_PROCID": "0", "LOCAL_RANK": "1"}, False),
        # srun with a LOCAL_RANK of one's own: 0 on every node.
        ({"SLURM_PROCID": "4", "LOCAL_RANK": "0"}, False),
    ],
)
def test_one_rank_is_the_first(monkeypatch, place, first):
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    assert is_first_rank() is first


@pytest.mark.parametrize(("place", "told"), [({}, False), ({"LOCAL_RANK": "1"}, True)])
def test_a_rank_that_a_launcher_started_is_told_when_that_ends_and_a_run_of_a_shell_is_not(monkeypatch, place, told):
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    child = os.fork()
    if child == 0:
        os._exit(int(parent.end_with_launcher()))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == int(told)


def another_process_may_use(folder: Path) -> bool:
    child = os.fork()
    if child == 0:
        try:
            with sole_use(folder, wait_s=0):
                os._exit(0)
        except UserError as error:
            os._exit(3 if f"{folder} is in use by process {os.getppid()} on " in str(error) else 4)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, 3)
    return status == 0


def test_a_second_run_is_refused_until_the_first_has_left(tmp_path):
    with sole_use(tmp_path):
        assert not another_process_may_use(tmp_path)
    assert another_process_may_use(tmp_path)


@pytest.mark.parametrize("wrote", [False, True])
def test_a_start_that_is_refused_leaves_no_folder_and_one_that_wrote_leaves_it(tmp_path, wrote):
    folder = tmp_path / "run"
    folder.mkdir()
    with contextlib.suppress(UserError), sole_use(folder):
        if wrote:
            (folder / "metrics.jsonl").write_text("x")
        raise UserError("refused")
    assert folder.exists() is wrote


def test_what_a_killed_write_left_is_removed(tmp_path):
    (tmp_path / ".lightspan-0a1b-resolved.yaml.tmp").write_text("half")
    with sole_use(tmp_path):
        assert [path.name for path in tmp_path.iterdir()] == [".lightspan.lock"]


def test_figures_of_a_start_without_a_checkpoint_are_kept(tmp_path, capsys):
    for number in (1, 2):
        (tmp_path / "metrics.jsonl").write_text(f"{number}\n")
        set_metrics_aside(tmp_path)
        assert f"kept in {tmp_path / f'metrics-{number}.jsonl'}" in capsys.readouterr().err
    assert [(tmp_path / f"metrics-{number}.jsonl").read_text() for number in (1, 2)] == ["1\n", "2\n"]
    (tmp_path / "metrics.jsonl").write_text("3\n")
    with pytest.raises(UserError, match="already contains a run"):
        checkpoint_to_resume("never", tmp_path, given=True)


@pytest.mark.parametrize("run", ["", "  "])
def test_an_empty_run_folder_is_refused(run):
    with pytest.raises(argparse.ArgumentTypeError, match="the name of the folder is empty"):
        folder(run)


@pytest.mark.parametrize("run", ["x" * 300, "/proc/x"])
def test_a_folder_that_cannot_be_made_is_refused_in_words(run):
    with pytest.raises(UserError, match=r"--run: /proc/x cannot be made: |a name in this path is too long .*--run"):
        run_folder.run_folder(Path(run), "any")


def test_a_run_folder_with_a_link_out_of_it_is_refused_and_nothing_is_written_through_it(tmp_path):
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "checkpoints" / "last.ckpt").symlink_to("step=1.ckpt")
    (run / "checkpoints" / "step=1.ckpt").touch()
    assert run_folder.run_folder(run, "any") == run
    (run / "csv").mkdir()
    for name in ("csv/metrics.csv", "pictures"):
        (run / name).symlink_to(tmp_path)
        with pytest.raises(UserError, match=f"{name} is a link that leads out of its run folder"):
            run_folder.run_folder(run, "any")
        (run / name).unlink()


def test_a_run_folder_with_a_pipe_is_refused_since_a_run_would_wait_for_it(tmp_path):
    os.mkfifo(tmp_path / "metrics.jsonl")
    with pytest.raises(UserError, match=r"metrics.jsonl is a named pipe"):
        run_folder.run_folder(tmp_path, "any")


def test_checkpoints_that_are_a_link_out_of_a_run_are_neither_read_nor_put_back(tmp_path):
    aside = tmp_path / "theirs" / ".lightspan-ab12-thesis.old"
    aside.parent.mkdir()
    aside.touch()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").symlink_to(aside.parent)
    with pytest.raises(UserError, match="checkpoints is a link"):
        run_folder.newest_checkpoint(tmp_path / "run")
    assert aside.exists()


def test_the_record_keeps_of_earlier_starts_what_was_different(tmp_path, monkeypatch):
    starts = [{"seed": 1, "packages": ["a"] * 99}, {"seed": 2, "packages": ["a"] * 99, "checkpoint": "last"}]
    starts.append(starts[1] | {"seed": 3})
    resolved = SimpleNamespace(document=dict)
    for start in starts:
        monkeypatch.setattr(run_folder.provenance, "provenance", lambda *_, start=start: dict(start))
        run_folder.write_run_files(resolved, tmp_path, [], [])
    record = json.loads((tmp_path / "provenance.json").read_text())
    assert record.pop("earlier") == [{"seed": 1, "checkpoint": None}, {"seed": 2}]
    assert record == starts[2]


def test_a_record_of_very_many_starts_keeps_the_newest_and_stays_a_file_of_settings(tmp_path, monkeypatch):
    large = {"seed": 0, "note": "n" * 10**5, "earlier": [{"seed": number} for number in range(1, 1000)]}
    (tmp_path / "provenance.json").write_text(json.dumps(large))
    monkeypatch.setattr(run_folder.provenance, "provenance", lambda *_: {"seed": -1})
    run_folder.write_run_files(SimpleNamespace(document=dict), tmp_path, [], [])
    earlier = run_folder.settings_object(tmp_path / "provenance.json")["earlier"]
    assert [start["seed"] for start in earlier[-2:]] == [999, 0]
    assert len(earlier) < 100


def test_a_run_folder_is_told_from_a_checkpoint_before_anything_is_built(tmp_path, capsys):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "resolved.yaml").write_text("{}")
    way_on = f"is a run folder, not a checkpoint: name one of its own, such as {tmp_path / 'a/checkpoints/last.ckpt'}"
    assert main(["fit", "compression/vit", "--run", str(tmp_path / "b"), "--resume", str(tmp_path / "a")]) == 2
    assert f"--resume {tmp_path / 'a'} {way_on}" in capsys.readouterr().err
    assert main(["validate", "compression/vit", "--ckpt", str(tmp_path / "a")]) == 2
    assert f"--ckpt {tmp_path / 'a'}: this run has no checkpoint" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_the_commit_is_told_without_running_what_a_repository_names(tmp_path):
    """git runs monitors, filters and hooks of the settings in `.git`, which come with a stranger's folder."""

    def git(*words: str) -> None:
        subprocess.run(["git", "-C", str(tmp_path), *words], check=True, capture_output=True)

    def touched(file: Path) -> None:
        os.utime(file, (1, 1))  # so that git looks at the content

    git("init")
    file, ran, hook = (tmp_path / name for name in ("file", "ran", ".git/hooks/post-index-change"))
    file.write_text("x")
    git("add", "file")
    git("-c", "user.name=a", "-c", "user.email=a@b", "commit", "-m", "x")
    head = provenance.commit(tmp_path)
    assert head is not None
    assert len(head) == 40
    evil = tmp_path / ".git" / "evil"
    for script in (evil, hook):
        script.parent.mkdir(exist_ok=True)
        script.write_text(f"#!/bin/sh\ntouch '{ran}'\ncat\n")
        script.chmod(0o755)
    (tmp_path / ".git" / "info").mkdir(exist_ok=True)
    (tmp_path / ".git" / "info" / "attributes").write_text("* filter=evil\n")
    git("config", "filter.evil.clean", str(evil))
    git("config", "core.fsmonitor", str(evil))
    touched(file)
    assert provenance.commit(tmp_path) == head
    assert not ran.exists()
    file.write_text("y")
    assert provenance.commit(tmp_path) == f"{head}+changes"
    assert not ran.exists()
    git("status")
    assert ran.exists()
    assert provenance.commit(tmp_path / ".git" / "info") is None


def test_processes_of_the_command_import_nothing_from_the_current_folder(tmp_path, monkeypatch, capsys):
    """It may be a stranger's, with a `torch.py` in it; `python -m` and `python -c` look there first."""
    (tmp_path / "stranger.py").write_text("raise SystemExit('ran')")
    monkeypatch.setattr(sys, "argv", ["lightspan", "--version"])
    monkeypatch.setenv("PYTHONSAFEPATH", "")
    monkeypatch.delenv("PYTHONSAFEPATH")
    look = [sys.executable, "-c", "import stranger"]
    assert b"ran" in subprocess.run(look, capture_output=True).stderr
    assert main(["--version"]) == 0
    assert "PYTHONSAFEPATH" not in os.environ  # of a program that calls it
    assert main() == 0
    assert b"No module named 'stranger'" in subprocess.run(look, capture_output=True).stderr
