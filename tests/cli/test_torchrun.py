"""torchrun starts all ranks anew after one was killed, and they continue from the last checkpoint; after the loss of a
node on the others.
"""

import json
import os
import socket
import subprocess
import sys

import pytest
import rank_processes
import torch
from rank_processes import PROJECT, TINY, callback, free_port
from waiting import HANG_S, wait_until

from lightspan.cli.launch.torchrun import OWN_STORE_VARIABLE
from lightspan.cli.runs.differences import first_other_batch, trace_of
from lightspan.core.files.runs import TRACE

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


def test_when_a_node_is_lost_the_other_goes_on_with_the_samples_of_one_process(tmp_path):
    """Two nodes of one rank each on this machine; the one that is lost is not the one where they meet."""
    run, straight = tmp_path / "losing", tmp_path / "straight"
    port = free_port()
    patience = "last_call_timeout=30,keep_alive_interval=1,keep_alive_max_attempt=3"
    meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{port}", "--rdzv-id", "7"]
    launcher = ["torch.distributed.run", "--nnodes", "1:2", *meeting, "--rdzv-conf", patience, "--max-restarts", "3"]
    often = "trainer.callbacks.checkpoint.init_args.every_n_train_steps=4"
    flags = ["--run", str(run), "--elastic", "trainer.strategy=ddp", often, *traced(run)]
    flags += callback("lose", "tiny_lab.faults.LoseNode", step=6)
    command = [sys.executable, "-m", *launcher, "-m", "--", "lightspan", "fit", *TINY, *flags]
    environment = {**os.environ, "PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    environment[OWN_STORE_VARIABLE] = "1"
    logs = [tmp_path / f"node-{number}.log" for number in range(2)]
    nodes = []
    try:
        for number, log in enumerate(logs):
            with log.open("wb") as file:
                nodes.append(subprocess.Popen(command, env=environment, stdout=file, stderr=file))
            if number == 0:
                wait_until(lambda: listens(port), "the first node to be met")
        nodes[0].wait(HANG_S)
    finally:
        for node in nodes:
            node.kill()
            node.wait()
    statuses = [node.returncode for node in nodes]
    assert sorted(statuses) == [-9, 0], [log.read_text()[-3000:] for log in logs]

    undisturbed = rank_processes.fit(straight, often, *traced(straight))
    assert undisturbed.statuses == [0], undisturbed.said
    assert first_other_batch(straight, run, 1e-4) is None  # in float32
    seen = [sample for batch in range(8) for sample in trace_of(run)[batch].samples]
    assert len(seen) == len(set(seen)) == 64


def traced(run):
    return callback("trace", "lightspan.callbacks.resilience.proof.Trace", folder=run / TRACE)


def listens(port):
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
