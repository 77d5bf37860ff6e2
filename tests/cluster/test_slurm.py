"""The script that `lightspan submit` renders, on a real SLURM of two nodes: run, preempted, requeued, finished."""

import signal
import time
from pathlib import Path

import pytest
import torch
from slurm_cluster import Cluster, catches, command_of
from waiting import wait_until

from lightspan.cli.main import main

pytestmark = pytest.mark.slurm
PROJECT = Path(__file__).parents[1] / "tiny_project"


@pytest.fixture
def script(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    """script(run folder) -> the batch script of a run of 24 steps on two nodes, slow enough to be interrupted."""
    monkeypatch.chdir(PROJECT)

    def render(run: Path) -> str:
        job = ["submit", "tiny.yaml", "--allow-module", "tiny_lab", "--to", "slurm", "--nodes", "2", "--time", "5"]
        length = ["trainer.max_steps=24", "trainer.log_every_n_steps=1", "data.init_args.pause_s=0.2"]
        assert main([*job, *length, "--run", str(run), "--print"]) == 0
        return capsys.readouterr().out

    return render


def weights(run: Path) -> dict[str, torch.Tensor]:
    checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 24
    return checkpoint["state_dict"]


def test_a_preempted_job_requeues_and_ends_with_the_weights_of_an_undisturbed_one(
    cluster: Cluster, script, tmp_path: Path
) -> None:
    straight, disturbed = tmp_path / "straight", tmp_path / "it's $(id) disturbed"
    job = cluster.submit(script(straight))
    look = cluster.wait(job, "COMPLETED")
    assert (look["NumNodes"], look["NumTasks"], look["Restarts"]) == ("2", "2", "0"), cluster.log(job)

    job = cluster.submit(script(disturbed))
    metrics = disturbed / "metrics.jsonl"
    wait_until(lambda: metrics.is_file() and metrics.read_text().count("train/loss") >= 6, "the sixth step")
    cluster.run("scancel", "--signal=USR1", job)
    cluster.wait(job, "PENDING")
    assert cluster.look(job)["Restarts"] == "1", cluster.log(job)
    # SLURM lets a requeued job wait two minutes: a node refuses to start one in the very second in which it ended it.
    time.sleep(3)
    cluster.run("scontrol", "update", f"jobid={job}", "starttime=now")
    cluster.wait(job, "COMPLETED")

    log = cluster.log(job)
    assert "preempted by SIGUSR1 after step" in log  # kept across the restart
    assert "Terminated" not in log  # the ranks left by themselves
    assert f"resumed from {disturbed / 'checkpoints' / 'last.ckpt'}" in log
    expected, got = weights(straight), weights(disturbed)
    assert expected.keys() == got.keys()
    assert all(torch.equal(expected[name], got[name]) for name in expected)


def test_a_warning_during_the_start_requeues_the_job_too(cluster: Cluster, script, tmp_path: Path) -> None:
    run = tmp_path / "early"
    job = cluster.submit(script(run))

    def listening() -> int:
        """Ranks that have a handler for USR1, which they install before they load torch."""
        commands = {process: command_of(process) for process in Path("/proc").glob("[0-9]*")}
        ranks = [process for process, words in commands.items() if words and "python" in words[0] and str(run) in words]
        return sum(catches(process, signal.SIGUSR1) for process in ranks)

    wait_until(lambda: listening() == 2, "two ranks to listen")
    cluster.run("scancel", "--signal=USR1", job)
    cluster.wait(job, "PENDING")
    assert cluster.look(job)["Restarts"] == "1", cluster.log(job)
    assert "preempted by SIGUSR1 before the first step" in cluster.log(job)
    cluster.run("scancel", job)


def test_a_sweep_is_an_array_in_which_a_failed_run_ends_no_other(
    cluster: Cluster, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(PROJECT)
    out = tmp_path / "it's $(id) swept"
    sweep = ["sweep", "tiny.yaml", "--allow-module", "tiny_lab", "model.init_args.width=2,0,3", "--out", str(out)]
    assert main([*sweep, "--to", "slurm", "--time", "5", "--print"]) == 0
    job = cluster.submit(capsys.readouterr().out)

    def ended() -> bool:
        return job not in cluster.run("squeue", "--noheader", "--format=%F").split()

    wait_until(ended, "the end of all tasks")
    assert main([*sweep, "--dry-run"]) == 0
    said = capsys.readouterr().out.splitlines()
    logs = {path.name: path.read_text() for path in cluster.folder.glob(f"slurm-{job}_*.out")}
    assert [line.split()[0] for line in said[:3]] == ["done", "unstarted", "done"], logs
    assert "width=0 must be at least 1" in logs[f"slurm-{job}_1.out"]
