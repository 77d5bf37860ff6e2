"""A batch script for SLURM: srun starts one task for each rank, and Lightning reads the rest from the environment."""

import re
import shlex
import sys
from collections.abc import Sequence

from lightspan import __version__
from lightspan.errors import UserError
from lightspan.launch.job import Job

RUNTIMES = ("apptainer", "pyxis")
_PLAIN = re.compile(r"[A-Za-z0-9][\w.,-]*")  # partitions, also several

# A program inherits ignored signals from the process that executes it: a warning that reaches a rank before
# lightspan's own handler is installed does not kill it.
_SHIELDED = ("bash", "-c", 'trap "" USR1 && exec "$@"', "rank")


def batch_script(job: Job, partition: str | None = None, runtime: str = "apptainer") -> str:
    """The script for `sbatch`; everything from outside is quoted or restricted to plain characters.

    Args:
        job: what to run.
        partition: name of a partition, or several with commas.
        runtime: what runs the job's image, if it has one: `apptainer`, or `pyxis` (SLURM's plugin for enroot).
    Raises: UserError for a partition or path that the launcher could misread.
    """
    rules = "\n".join(f"#SBATCH --{rule}" for rule in _rules(job, partition))
    command = shlex.join(_step(job, runtime))
    return f"""#!/bin/bash
# Rendered by lightspan {__version__}. Submit it with sbatch; submitted again, it continues from its last checkpoint.
{rules}
set -euo pipefail
cd -- {shlex.quote(job.workdir)}
mkdir -p -- {shlex.quote(job.run)}
status=0
{command} || status=$?
{_requeue(job)}exit "${{status}}"
"""


def _rules(job: Job, partition: str | None) -> list[str]:
    rules = [f"job-name={job.name}", f"nodes={job.nodes}", f"ntasks-per-node={job.ranks_per_node}"]
    if job.array is not None:
        limit = "" if job.array.at_once is None else f"%{job.array.at_once}"
        rules.append(f"array=0-{job.array.tasks - 1}{limit}")
    if job.gpus:
        rules.append(f"gpus-per-node={job.ranks_per_node}")
    if job.cores > 1:
        rules.append(f"cpus-per-task={job.cores}")
    if job.time is not None:
        rules.append(f"time={job.time}")
    if partition is not None:
        if not _PLAIN.fullmatch(partition):
            raise UserError(f"--partition {partition!r}: a name may have letters, digits, '_', '-' and '.'; see sinfo")
        rules.append(f"partition={partition}")
    rules += ["requeue", "open-mode=append"]
    if job.preemption is not None:
        # Without B: the signal goes to the ranks and not to this shell, which would not forward it.
        rules.append(f"signal=USR1@{job.preemption.grace_s}")
    return rules


def _step(job: Job, runtime: str) -> list[str]:
    # --wait: ends ranks that a dead one leaves hanging. --kill-on-bad-exit would do so at once, and treat a rank
    # that stops a moment after the others as failed.
    step = ["srun", f"--wait={job.preemption.grace_s if job.preemption else 60}"]
    if job.cores > 1:
        step.append(f"--cpus-per-task={job.cores}")  # since SLURM 22.05 srun does not take it from the job
    arguments = [*job.arguments, *_flags(job)]
    if job.image is None:
        return [*step, *_SHIELDED, sys.executable, "-m", "lightspan", *arguments]
    folders = list(dict.fromkeys((job.workdir, job.run, *job.inputs)))
    for folder in folders:
        if re.search(r"[:,\n]", folder):
            raise UserError(f"{folder!r} cannot be mounted: its name has ':', ',' or a line break; use another folder")
    inside = ["lightspan", *arguments]
    if runtime == "pyxis":
        mounts = ",".join(f"{folder}:{folder}" for folder in folders)
        flags = [f"--container-image={job.image}", f"--container-mounts={mounts}", "--no-container-entrypoint"]
        return [*step, *flags, f"--container-workdir={job.workdir}", *_SHIELDED, *inside]
    return [*step, *_SHIELDED, "apptainer", "exec", *_apptainer(job, folders), job.image, *inside]


def _apptainer(job: Job, folders: Sequence[str]) -> list[str]:
    binds = [f"--bind={folder}" for folder in folders]
    return [*(["--nv"] if job.gpus else []), *binds, f"--pwd={job.workdir}"]


def _requeue(job: Job) -> str:
    """A cancelled job never gets here: SLURM ends this shell together with the ranks."""
    if job.preemption is None:
        return ""
    return f"""if [[ "${{status}}" -eq {job.preemption.exit_code} ]]; then
    scontrol requeue "${{SLURM_JOB_ID}}"
fi
"""


def _flags(job: Job) -> list[str]:
    """Flags a run needs in this script, which requests the requeue itself, after all ranks have stopped.

    A rank that requested it would be ended by SLURM at once, with open loggers; and in a container it could not.
    """
    if job.preemption is None:
        return []
    flag = f"trainer.callbacks.{job.preemption.callback}.init_args.requeue_on=[]"
    return [flag] if job.array is None else ["--also", flag]
