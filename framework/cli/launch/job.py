"""A run that another program will start: how many ranks, on what, for how long, and how long it may take to stop."""

import math
import re
import signal
from dataclasses import dataclass
from typing import Any

from lightspan.core.errors import UserError

EXIT_MARGIN_S = 30
"""Seconds beyond the budget of a checkpoint: to finish one step before it and end the ranks after it."""
RESTARTS = 3
"""How often a launcher restarts a run that failed. A preempted run does not count, if the launcher can tell."""

_PREEMPTION = "lightspan.callbacks.resilience.preemption.Preemption"
_BUDGET_S, _EXIT_CODE = 60.0, 143  # the callback's defaults, which cannot be read without torch; a test compares them
_SIZE = re.compile(r"(?P<number>\d{1,9})(?P<unit>[MGTmgt])(?:i?[Bb])?")
_TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<parts>\d+(?::\d+){0,2})")


@dataclass(frozen=True)
class Array:
    """Equal jobs that differ in their number alone, from 0 to `tasks` - 1; each runs one trial of a sweep.

    Attributes:
        at_once: how many may run at the same time; None for any number.
    """

    tasks: int
    at_once: int | None = None


@dataclass(frozen=True)
class Job:
    """One run of `lightspan fit`, or with an array those of a sweep.

    Attributes:
        name: lower-case letters, digits and dashes, at most 40 characters.
        arguments: what follows `lightspan`, unquoted: `fit RECIPE --run DIR ...`, or `sweep RECIPE --out DIR ...`.
        run: the absolute folder of the run or the sweep.
        workdir: the absolute folder that paths among the arguments are relative to.
        nodes, ranks_per_node: >= 1.
        gpus: whether each rank has its own GPU.
        cores: processor cores a rank keeps busy, its data workers included.
        preemption: how the run stops when it is asked to; None if nothing in it obeys a signal.
        time: time limit in SLURM's notation, or None for the cluster's own.
        image: container image, or None.
        wandb: whether the run logs to Weights & Biases.
        inputs: absolute folders that it reads, besides those of its own; a container has to see them.
        array: the jobs that there are of it; None for one.
        memory_mib: main memory of each node; None leaves it to the cluster.
        node_labels: (label, value) that a node of a Kubernetes cluster must have.
        lose: nodes that may be lost, or on this machine ranks, after which the run continues on the others; its
            arguments then say that it is elastic.
        counts: with `lose` on this machine, the numbers of ranks that the run may have, from the largest down.
    """

    name: str
    arguments: tuple[str, ...]
    run: str
    workdir: str
    nodes: int
    ranks_per_node: int
    gpus: bool
    cores: int
    preemption: "GracePeriod | None"
    time: str | None = None
    image: str | None = None
    wandb: bool = False
    inputs: tuple[str, ...] = ()
    array: Array | None = None
    memory_mib: int | None = None
    node_labels: tuple[tuple[str, str], ...] = ()
    lose: int = 0
    counts: tuple[int, ...] = ()

    @property
    def stopped(self) -> int:
        """Exit status of a run that stopped because it was asked to."""
        return 128 + signal.SIGTERM if self.preemption is None else self.preemption.exit_code


@dataclass(frozen=True)
class GracePeriod:
    """What the run's `Preemption` callback promises.

    Attributes:
        callback: its name in the recipe.
        budget_s: whole seconds from the signal to a complete checkpoint.
        exit_code: status of a run that stopped because it was asked to.
    """

    callback: str
    budget_s: int
    exit_code: int

    @property
    def grace_s(self) -> int:
        """Seconds that a launcher must allow between its signal and the end."""
        return self.budget_s + EXIT_MARGIN_S


def grace_period_of(config: dict[str, Any]) -> GracePeriod | None:
    """How a resolved configuration stops, or None if it has no `Preemption` callback. Raises: UserError."""
    for name, spec in (config.get("trainer", {}).get("callbacks") or {}).items():
        if spec.get("class_path") == _PREEMPTION:
            settings = spec.get("init_args") or {}
            budget_s, exit_code = settings.get("budget_s", _BUDGET_S), settings.get("exit_code", _EXIT_CODE)
            if not isinstance(budget_s, int | float) or not 0 < budget_s < math.inf or not isinstance(exit_code, int):
                raise UserError(
                    f"budget_s={budget_s!r} of the Preemption must be finite seconds above 0, and "
                    f"exit_code={exit_code!r} a whole number"
                )
            return GracePeriod(name, math.ceil(budget_s), exit_code)
    return None


def cores_of(config: dict[str, Any]) -> int:
    """One core for a rank and one for each of its data workers."""
    workers = (config.get("data", {}).get("init_args") or {}).get("num_workers", 0)
    return 1 + (workers if isinstance(workers, int) else 0)


def job_name(*parts: str) -> str:
    """Lower-case letters, digits and dashes out of any text: a name for SLURM and a DNS label for Kubernetes.

    At most 40 characters, since Kubernetes makes host names of up to 63 from it; longer texts keep their end.
    """
    text = re.sub(r"[^a-z0-9]+", "-", "-".join(parts).lower()).strip("-")
    name = text if len(text) <= 40 else text[-40:].lstrip("-")
    # A DNS label that names a service begins with a letter.
    return name if name[:1].isalpha() else f"run-{name[-36:].lstrip('-')}".rstrip("-")


def mebibytes(size: str) -> int:
    """A size in SLURM's notation, such as 64G or 500M, as MiB. Raises: UserError."""
    match = _SIZE.fullmatch(size)
    if match is None or int(match["number"]) == 0:
        raise UserError(f"--mem {size!r} is not a size above 0; write a whole number with M, G or T, for example 64G")
    return int(match["number"]) * {"M": 1, "G": 2**10, "T": 2**20}[match["unit"].upper()]


def seconds(time: str) -> int:
    """A time limit in SLURM's notation as seconds: M, M:S, H:M:S, D-H, D-H:M or D-H:M:S. Raises: UserError."""
    match = _TIME.fullmatch(time)
    if match is None:
        raise UserError(f"--time {time!r} is not a time; write minutes, H:M:S or D-H:M:S, for example 12:00:00")
    parts = [int(part) for part in match["parts"].split(":")]
    if match["days"] is not None:
        hours, minutes, rest = [*parts, 0, 0][:3]
        total = ((int(match["days"]) * 24 + hours) * 60 + minutes) * 60 + rest
    elif len(parts) == 3:
        total = (parts[0] * 60 + parts[1]) * 60 + parts[2]
    else:
        total = parts[0] * 60 + (parts[1] if len(parts) == 2 else 0)
    if total == 0:
        raise UserError(f"--time {time!r} is zero; give at least 1 minute, or leave --time out")
    return total
