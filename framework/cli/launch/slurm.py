"""A batch script for SLURM: srun starts one task for each rank, and Lightning reads the rest from the environment."""

import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from lightspan import __version__
from lightspan.cli.launch import torchrun
from lightspan.cli.launch.job import Job
from lightspan.core.errors import UserError

RUNTIMES = ("apptainer", "pyxis")
_PLAIN = re.compile(r"[A-Za-z0-9][\w.,-]*")  # names of a cluster's administrators, also several
_RULE = re.compile(r"(?:#SBATCH\s+)?-{0,2}(?P<rule>(?P<name>[A-Za-z][A-Za-z0-9-]*)(?P<value>[= ].*)?)")
_LONG = {
    "A": "account", "J": "job-name", "N": "nodes", "a": "array", "c": "cpus-per-task", "n": "ntasks", "p": "partition",
    "q": "qos", "t": "time",
}  # fmt: skip

# A program inherits ignored signals from the process that executes it: a warning that reaches a rank before
# lightspan's own handler is installed does not kill it.
_SHIELDED = ("bash", "-c", 'trap "" USR1 && exec "$@"', "rank")


@dataclass(frozen=True)
class Site:
    """What a cluster asks of every job, whatever it runs.

    Attributes:
        account, partition, qos: names, of the partition also several with commas; None leaves it to the cluster.
        rules: further options of sbatch, as `constraint=a100`, `--constraint=a100` or `#SBATCH --constraint=a100`.
        setup: lines of shell before the ranks start, such as `module load cuda`; the job ends if one of them fails.
    """

    account: str | None = None
    partition: str | None = None
    qos: str | None = None
    rules: Sequence[str] = ()
    setup: Sequence[str] = ()


def batch_script(job: Job, site: Site = Site(), runtime: str = "apptainer") -> str:
    """The script for `sbatch`; everything from outside is quoted or restricted to plain characters, except for the
    lines of `site.setup`, which are shell.

    Args:
        job: what to run.
        site: what the cluster asks for.
        runtime: what runs the job's image, if it has one: `apptainer`, or `pyxis` (SLURM's plugin for enroot).
    Raises: UserError for a name, rule, line or path that the launcher could misread.
    """
    rules = "\n".join(f"#SBATCH --{rule}" for rule in _rules(job, site))
    command, meeting = shlex.join(_step(job, runtime)), _meeting(job) if job.lose else ""
    # Modules and environments read variables that may not be set.
    strict = ["set -eo pipefail", *map(_line, site.setup), "set -u"] if site.setup else ["set -euo pipefail"]
    begin = "\n".join(strict)
    return f"""#!/bin/bash
# Rendered by lightspan {__version__}. Submit it with sbatch; submitted again, it continues from its last checkpoint.
{rules}
{begin}
cd -- {shlex.quote(job.workdir)}
mkdir -p -- {shlex.quote(job.run)}
{meeting}status=0
{command} || status=$?
{_requeue(job)}exit "${{status}}"
"""


def _rules(job: Job, site: Site) -> list[str]:
    tasks = 1 if job.lose else job.ranks_per_node
    rules = [f"job-name={job.name}", f"nodes={job.nodes}", f"ntasks-per-node={tasks}"]
    if job.array is not None:
        limit = "" if job.array.at_once is None else f"%{job.array.at_once}"
        rules.append(f"array=0-{job.array.tasks - 1}{limit}")
    if job.gpus:
        rules.append(f"gpus-per-node={job.ranks_per_node}")
    if (cores := _cores(job)) > 1:
        rules.append(f"cpus-per-task={cores}")
    if job.memory_mib is not None:
        rules.append(f"mem={job.memory_mib}M")
    if job.time is not None:
        rules.append(f"time={job.time}")
    for option in ("account", "partition", "qos"):
        if (name := getattr(site, option)) is not None:
            if not _PLAIN.fullmatch(name):
                raise UserError(f"--{option} {name!r}: a name may have letters, digits, '_', '-' and '.'")
            rules.append(f"{option}={name}")
    rules += ["requeue", "open-mode=append"]
    if job.lose:
        rules.append("no-kill")  # a node that fails does not end the job
    if job.preemption is not None:
        # Without B: the signal goes to the ranks and not to this shell, which would not forward it.
        rules.append(f"signal=USR1@{job.preemption.grace_s}")
    return [*rules, *_further(site.rules, {rule.partition("=")[0] for rule in rules})]


def _further(given: Sequence[str], taken: set[str]) -> list[str]:
    """The cluster's own rules in one form. Raises: UserError for what is no option of sbatch, or is in the script."""
    found = []
    for text in given:
        match = _RULE.fullmatch(_printable(text, "--sbatch").strip())
        if match is None:
            raise UserError(f"--sbatch {text!r} is not an option of sbatch; write one such as --sbatch constraint=a100")
        name, short = match["name"], len(match["name"]) == 1
        if (known := _LONG.get(name, name)) in taken:
            raise UserError(
                f"--sbatch {text!r}: the script has a rule --{known} already; submit --help lists its option"
            )
        if short and known == name:
            raise UserError(f"--sbatch {text!r}: write the option's long name, as `sbatch --help` gives it")
        found.append(f"{known}{(match['value'] or '').replace(' ', '=', 1)}" if short else match["rule"])
    return found


def _line(text: str) -> str:
    if not text.strip():
        raise UserError("--setup is empty; give it a line of shell, such as 'module load cuda'")
    return _printable(text, "--setup")


def _printable(text: str, option: str) -> str:
    if not text.isprintable():
        raise UserError(
            f"{option} {text!r} has a line break or another control character; repeat {option} for more lines"
        )
    return text


def _meeting(job: Job) -> str:
    """Tells the torchruns of all nodes where they meet: on the node that the script runs on."""
    values = " ".join(f"{name}={value}" for name, value in torchrun.environment(job).items())
    # No pipe into `head`: scontrol, still writing when it closes, would end the job by SIGPIPE under pipefail.
    return f"""hosts=$(scontrol show hostnames "${{SLURM_JOB_NODELIST}}")
export PET_RDZV_ENDPOINT="${{hosts%%$'\\n'*}}:$((20000 + SLURM_JOB_ID % 10000))"
export PET_RDZV_ID="${{SLURM_JOB_ID}}" {values}
""".replace(" \n", "\n")


def _cores(job: Job) -> int:
    """Of one task: a rank, or the torchrun of a node with its ranks."""
    return job.cores * job.ranks_per_node if job.lose else job.cores


def _step(job: Job, runtime: str) -> list[str]:
    if job.lose:
        # The others go on for as long as they need when a node is gone.
        step = ["srun", "--no-kill", "--wait=0", "--kill-on-bad-exit=0"]
    else:
        # --wait: ends ranks that a dead one leaves hanging. --kill-on-bad-exit would do so at once, and treat a rank
        # that stops a moment after the others as failed.
        step = ["srun", f"--wait={job.preemption.grace_s if job.preemption else 60}"]
    if (cores := _cores(job)) > 1:
        step.append(f"--cpus-per-task={cores}")  # since SLURM 22.05 srun does not take it from the job
    arguments = [*job.arguments, *_flags(job)]
    if job.image is None:
        # -P: nothing is imported from the folder of the job, which may be a stranger's.
        python = [sys.executable, "-P"]
        program = _agent(job, python, arguments) if job.lose else [*python, "-m", "lightspan", *arguments]
        return [*step, *_SHIELDED, *program]
    folders = list(dict.fromkeys((job.workdir, job.run, *job.inputs)))
    for folder in folders:
        if re.search(r"[:,\n]", folder):
            raise UserError(f"{folder!r} cannot be mounted: its name has ':', ',' or a line break; use another folder")
    inside = _agent(job, ["python", "-P"], arguments) if job.lose else ["lightspan", *arguments]
    if runtime == "pyxis":
        mounts = ",".join(f"{folder}:{folder}" for folder in folders)
        flags = [f"--container-image={job.image}", f"--container-mounts={mounts}", "--no-container-entrypoint"]
        return [*step, *flags, f"--container-workdir={job.workdir}", *_SHIELDED, *inside]
    return [*step, *_SHIELDED, "apptainer", "exec", *_apptainer(job, folders), job.image, *inside]


def _agent(job: Job, python: list[str], arguments: Sequence[str]) -> list[str]:
    """The torchrun of a node. It is told of SLURM's warning as it understands it, and ends with the status that the
    script looks for. Where nodes meet is known on the cluster alone: the torchruns read it from the environment.
    """
    stopped = [f"--stopped={job.stopped}", "--"]
    meeting = [torchrun.nodes(job), "--rdzv-backend=c10d", *torchrun.ranks(job)]
    launcher = [*python, "-m", "torch.distributed.run", *meeting, *torchrun.program(arguments)]
    return [*python, "-m", "lightspan.cli.launch.warned", *stopped, *launcher]


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
