"""torchrun starts all ranks anew after one was killed, and they continue from the last checkpoint."""

import json
import os
import subprocess
import sys

import pytest
import rank_processes
import torch
from rank_processes import PROJECT, TINY, callback
from waiting import HANG_S

pytestmark = pytest.mark.runs


def test_a_killed_worker_costs_a_restart_and_no_bit_of_the_result(tmp_path):
    run, straight = tmp_path / "killed", tmp_path / "straight"
    checkpoints = "trainer.callbacks.checkpoint.init_args.every_n_train_steps=4"
    marker = tmp_path / "was-killed"
    kill = callback("kill", "tiny_lab.faults.SignalAt", step=6, name="SIGKILL", rank=1, marker=marker)
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1", "-m", "--"]
    flags = ["--run", str(run), "trainer.devices=2", "trainer.strategy=ddp", checkpoints, *kill]
    command = [sys.executable, "-m", *launcher, "lightspan", "fit", *TINY, *flags]
    environment = {**os.environ, "PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=HANG_S)
    assert done.returncode == 0, done.stderr[-3000:]
    assert marker.exists()
    provenance = json.loads((run / "provenance.json").read_text())
    assert provenance["checkpoint"]  # the second start resumed, the first had nothing to resume
    assert [start["checkpoint"] for start in provenance["earlier"]] == [None]

    undisturbed = rank_processes.fit(straight, checkpoints, ranks=2)
    assert undisturbed.statuses == [0, 0], undisturbed.said
    a, b = (torch.load(f / "checkpoints/last.ckpt", weights_only=True)["state_dict"] for f in (run, straight))
    assert all(torch.equal(a[name], b[name]) for name in b)
