"""The command line of torchrun, which starts and restarts the ranks of one machine."""

import sys
from collections.abc import Sequence

from lightspan.cli.launch.job import RESTARTS, Job

SHUTDOWN_VARIABLE = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"
"""Seconds between the signal that torchrun passes on to its ranks and SIGKILL; 30 if it is unset, as in older torch."""

OWN_STORE_VARIABLE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
"""1 has the ranks of each start meet at a store of their own. In that of torchrun, a node that comes later, or back,
waits in vain for an address that was told in the first start alone (torch 2.13).
"""


def local_command(job: Job) -> list[str]:
    """Starts the ranks of a job on this machine, with this Python. Argument list, unquoted."""
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", *ranks(job), *program(job.arguments)]


def nodes(job: Job) -> str:
    """How many nodes torchrun starts on: with `lose` also on fewer, and on all of them again when they come back."""
    return f"--nnodes={job.nodes - job.lose}:{job.nodes}" if job.lose else f"--nnodes={job.nodes}"


def ranks(job: Job) -> list[str]:
    """How many ranks torchrun starts here, and how often it restarts them after one died."""
    return [f"--nproc-per-node={job.ranks_per_node}", f"--max-restarts={RESTARTS}"]


def program(arguments: Sequence[str]) -> list[str]:
    """What each rank runs. The dashes keep torchrun from taking `--run` for its own `--run-path`."""
    return ["-m", "--", "lightspan", *arguments]


def environment(job: Job) -> dict[str, str]:
    """Variables torchrun reads."""
    patience = {SHUTDOWN_VARIABLE: str(job.preemption.grace_s)} if job.preemption else {}
    return patience | ({OWN_STORE_VARIABLE: "1"} if job.lose else {})
