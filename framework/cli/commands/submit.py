"""`lightspan submit RECIPE --to slurm|kubernetes|local`: the same recipe, started by another program."""

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path, PurePosixPath
from typing import Any

from lightspan.cli.commands.arguments import (
    REPLACING,
    add_data_arguments,
    add_recipe_arguments,
    configuration_words,
    count,
    folder,
    option_value,
    resolved_from,
)
from lightspan.cli.config.flags import allow_options
from lightspan.cli.config.provenance import redacted
from lightspan.cli.config.resolve import Resolved
from lightspan.cli.config.tree import dump
from lightspan.cli.launch import kubernetes, slurm, torchrun
from lightspan.cli.launch.job import Array, Job, cores_of, grace_period_of, job_name, mebibytes, seconds
from lightspan.cli.launch.warned import passing_warnings_on
from lightspan.cli.runs import elastic
from lightspan.cli.runs.folder import run_folder
from lightspan.cli.runs.rank_counts import refuse_fixed_ranks, usable_counts
from lightspan.core.errors import UserError, print_notes, printable

_IMAGE = re.compile(r"[\w./:@+~-]+")
_LABEL = re.compile(
    r"((?:[a-z0-9](?:[a-z0-9.-]*[a-z0-9])?/)?[A-Za-z0-9](?:[\w.-]{0,61}[A-Za-z0-9])?)=([A-Za-z0-9](?:[\w.-]{0,61}[A-Za-z0-9])?)",
    re.ASCII,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_recipe_arguments(parser)
    add_data_arguments(parser)
    parser.add_argument(
        "--run",
        type=folder,
        metavar="DIR",
        help="run folder (default: runs/RECIPE/TIME, in /runs on Kubernetes)",
    )
    add_target_arguments(parser, tuple(_TARGETS), required=True)
    parser.add_argument(
        "--lose",
        type=count,
        metavar="N",
        help="continue without N lost nodes, or ranks with --to local, from the last checkpoint with the same batches",
    )


def add_target_arguments(parser: argparse.ArgumentParser, targets: Sequence[str], required: bool = False) -> None:
    """--to and what a job can say about itself, which `lightspan sweep` has too."""
    parser.add_argument("--to", required=required, choices=targets, help="what starts it")
    parser.add_argument("--print", action="store_true", help="print the job and submit nothing")
    parser.add_argument("--nodes", type=count, metavar="N", help="machines (default: the recipe's trainer.num_nodes)")
    parser.add_argument(
        "--gpus-per-node",
        type=count,
        metavar="G",
        help="GPUs, and so ranks, of each machine (default: the recipe's trainer.devices)",
    )
    parser.add_argument("--time", metavar="LIMIT", help="time limit: minutes, H:M:S or D-H:M:S")
    parser.add_argument("--image", metavar="IMAGE", help="container image (Kubernetes needs one)")
    parser.add_argument(
        "--wandb", action="store_true", help="also log to Weights & Biases; offline without WANDB_API_KEY"
    )
    parser.add_argument("--mem", metavar="SIZE", help="main memory of each node, such as 64G (default: the cluster's)")
    parser.add_argument(
        "--cpus-per-task",
        type=count,
        metavar="N",
        help="processor cores of each rank (default: one, and one for each of its data workers)",
    )
    parser.add_argument("--account", metavar="NAME", help="SLURM: who is charged")
    parser.add_argument("--partition", metavar="NAME", help="SLURM: where to queue")
    parser.add_argument("--qos", metavar="NAME", help="SLURM: quality of service")
    parser.add_argument(
        "--sbatch",
        action="append",
        metavar="RULE",
        help="SLURM: any other option of sbatch, such as constraint=a100 or '#SBATCH --exclusive'; repeat it",
    )
    parser.add_argument(
        "--setup",
        action="append",
        metavar="LINE",
        help="SLURM: a line of shell before the ranks start, such as 'module load cuda'; repeat it",
    )
    parser.add_argument(
        "--container",
        choices=slurm.RUNTIMES,
        help="SLURM: container runtime for --image (default: apptainer; pyxis uses enroot)",
    )
    parser.add_argument(
        "--kind", choices=kubernetes.KINDS, help="Kubernetes: manifest (default: job for one node, jobset for several)"
    )
    parser.add_argument(
        "--node-selector",
        action="append",
        metavar="LABEL=VALUE",
        help="Kubernetes: only nodes with this label, such as nvidia.com/gpu.product=A100; repeat it",
    )
    parser.add_argument(
        "--claim", metavar="NAME", help="Kubernetes: PersistentVolumeClaim for /runs (default: lightspan-runs)"
    )


def run(args: argparse.Namespace) -> int:
    """Checks the recipe, then prints or submits its job. Raises: UserError for bad input or a missing tool."""
    resolved = prepared(args)
    print_notes(resolved.notes)
    return hand_over(args, Workload(resolved, args.run, lose=args.lose or 0))


@dataclass(frozen=True)
class Workload:
    """What a job runs: one fit, or the trials of a sweep.

    Attributes:
        resolved: the recipe.
        folder: where, as the user said.
        words: what a sweep needs on its command line beyond the recipe.
        lose: nodes, or on this machine ranks, that a fit may lose.
    """

    resolved: Resolved
    folder: Path | None
    words: tuple[str, ...] = ()
    array: Array | None = None
    lose: int = 0

    def command(self, recipe: Sequence[str], folder: str) -> list[str]:
        """What follows `lightspan`, without --allow-module."""
        if self.array is None:
            return ["fit", *recipe, "--run", folder, *(["--elastic"] if self.lose else [])]
        return ["sweep", *recipe, *self.words, "--out", folder, "--task", "array"]


def prepared(args: argparse.Namespace) -> Resolved:
    """The recipe on the devices that the options ask for, whose flags are left in `args.flags`. Raises: UserError for
    options that do not go together.
    """
    _refuse_strangers(args)
    return _on_the_asked_devices(args)


def hand_over(args: argparse.Namespace, workload: Workload) -> int:
    """Prints the job or submits it."""
    return _TARGETS[args.to](args, workload)


def _to_slurm(args: argparse.Namespace, workload: Workload) -> int:
    job = _job_of_files(args, workload)
    site = slurm.Site(args.account, args.partition, args.qos, args.sbatch or (), args.setup or ())
    return _hand_over(args, slurm.batch_script(job, site, args.container or "apptainer"), ["sbatch"])


def _to_kubernetes(args: argparse.Namespace, workload: Workload) -> int:
    if args.image is None:
        raise UserError("--to kubernetes needs --image IMAGE, which the nodes can pull; docker/README.md builds one")
    claim = args.claim or "lightspan-runs"
    if not re.fullmatch(r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?", claim):
        raise UserError(f"--claim {claim!r} cannot be a Kubernetes name: lower-case letters, digits, '-' and '.'")
    resolved = workload.resolved
    folder = _folder_in_the_volume(workload.folder, resolved.name)
    recipe = kubernetes.recipe_path(job_name(resolved.name))
    job = _job(args, workload, folder, [recipe])
    if job.array is not None and (job.nodes > 1 or args.kind not in (None, "job")):
        raise UserError(
            "a sweep on Kubernetes is one indexed Job, whose runs have one node each; use --to slurm for more"
        )
    documents = kubernetes.manifests(job, dump(resolved.document()), claim, args.kind)
    return _hand_over(args, kubernetes.to_yaml(documents), ["kubectl", "apply", "-f", "-"])


def _to_this_machine(args: argparse.Namespace, workload: Workload) -> int:
    job = _job_of_files(args, workload)
    if job.nodes > 1:
        raise UserError(f"--to local starts ranks on this machine only, not on {job.nodes}; use --to slurm")
    command = elastic.local_command(job) if job.lose else torchrun.local_command(job)
    variables = {} if job.lose else torchrun.environment(job)
    if args.print:
        settings = [f"{name}={value}" for name, value in variables.items()]
        print(printable(shlex.join(["env", *settings, *command] if settings else command)))
        return 0
    if find_spec("torch") is None:
        raise UserError("torchrun is not installed: pip install torch, or look at the command with --print")
    return passing_warnings_on(command, os.environ | variables, job.stopped)


_TARGETS: dict[str, Callable[[argparse.Namespace, Workload], int]] = {
    "slurm": _to_slurm,
    "kubernetes": _to_kubernetes,
    "local": _to_this_machine,
}
_ONLY_FOR = {
    "account": ("slurm",),
    "partition": ("slurm",),
    "qos": ("slurm",),
    "sbatch": ("slurm",),
    "setup": ("slurm",),
    "node_selector": ("kubernetes",),
    "mem": ("slurm", "kubernetes"),
    "cpus_per_task": ("slurm", "kubernetes"),
    "container": ("slurm",),
    "kind": ("kubernetes",),
    "claim": ("kubernetes",),
    "time": ("slurm", "kubernetes"),
    "image": ("slurm", "kubernetes"),
    # Files of this machine or of storage that it shares; pods have neither.
    **{option.removeprefix("--"): ("slurm", "local") for option in REPLACING},
}


def _refuse_strangers(args: argparse.Namespace) -> None:
    for option, targets in _ONLY_FOR.items():
        if getattr(args, option) is not None and args.to not in targets:
            name = option.replace("_", "-")
            raise UserError(f"--{name} does not work with --to {args.to}, only with {' and '.join(targets)}")
    if args.container is not None and args.image is None:
        raise UserError(f"--container {args.container} needs --image IMAGE")
    if args.image is not None and not _IMAGE.fullmatch(args.image):
        raise UserError(
            f"--image {args.image!r} is not a container image: give a name such as registry/name:tag, or a "
            "path without spaces"
        )
    if args.time is not None:
        seconds(args.time)
    given = [flag.partition("=")[::2] for flag in args.flags]
    given += [(f"--{option}", text) for option in ("sbatch", "setup") for text in getattr(args, option) or ()]
    for name, value in given:
        if redacted([value]) != [value]:
            raise UserError(
                f"{name}: its value looks like a secret, which would be written into the job; keep it in an "
                "environment variable such as WANDB_API_KEY"
            )


def _on_the_asked_devices(args: argparse.Namespace) -> Resolved:
    """The configuration on as many devices as the options say; the flags it used are left in `args.flags`."""
    if args.nodes is not None:
        args.flags.append(f"trainer.num_nodes={args.nodes}")
    if args.gpus_per_node is not None:
        args.flags.append(f"trainer.devices={args.gpus_per_node}")
    resolved = resolved_from(args)
    accelerator = resolved.config["trainer"].get("accelerator", "auto")
    if args.gpus_per_node is not None and accelerator == "cpu":
        raise UserError(
            f"--gpus-per-node {args.gpus_per_node}: {resolved.name} runs on the CPU "
            f"({resolved.sources['trainer.accelerator']}); use trainer.devices=N, or add trainer.accelerator=gpu"
        )
    if args.gpus_per_node is not None and accelerator == "auto":
        # Requested explicitly, so a node without them is an error and not a slow run.
        args.flags.append("trainer.accelerator=gpu")
        resolved = resolved_from(args)
    return resolved


def _job_of_files(args: argparse.Namespace, workload: Workload) -> Job:
    """The job if recipe and run folder are on this machine, or on storage that the others share with it."""
    folder = run_folder(workload.folder, workload.resolved.name, make=not args.print)
    return _job(args, workload, str(folder), [args.recipe, *configuration_words(args)])


def _job(args: argparse.Namespace, workload: Workload, folder: str, recipe: list[str]) -> Job:
    resolved, places = workload.resolved, [option_value(args, option) for option in REPLACING]
    trainer = resolved.config["trainer"]
    arguments = [*workload.command(recipe, folder), *allow_options(args.allow_modules)]
    nodes = _number(trainer.get("num_nodes", 1), "trainer.num_nodes", "--nodes")
    ranks = _number(trainer.get("devices", "auto"), "trainer.devices", "--gpus-per-node")
    return Job(
        name=job_name(resolved.name, PurePosixPath(folder).name),
        arguments=(*arguments, "--wandb") if args.wandb else tuple(arguments),
        run=folder,
        workdir=str(Path.cwd()),
        nodes=nodes,
        ranks_per_node=ranks,
        gpus=trainer.get("accelerator") in ("gpu", "cuda"),
        cores=args.cpus_per_task or cores_of(resolved.config),
        preemption=grace_period_of(resolved.config),
        time=args.time,
        image=args.image,
        wandb=args.wandb,
        inputs=tuple(str(place.absolute()) for place in places if place is not None),
        array=workload.array,
        memory_mib=None if args.mem is None else mebibytes(args.mem),
        node_labels=tuple(map(_label, args.node_selector or ())),
        lose=workload.lose,
        counts=_counts(workload, args.to, nodes, ranks) if workload.lose else (),
    )


def _counts(workload: Workload, target: str, nodes: int, ranks: int) -> tuple[int, ...]:
    """The numbers of ranks on which a run may go on that loses some; says where ranks that are left will wait.

    Raises: UserError for as many losses as there are nodes or ranks, and for nodes without an even share of the batch.
    """
    resolved, lose = workload.resolved, workload.lose
    refuse_fixed_ranks(resolved)
    if isinstance(devices := resolved.config["trainer"].get("devices"), list):
        raise UserError(
            f"--lose {lose}: trainer.devices={devices} names devices, and some of them may be lost; give their number, "
            "and name them in CUDA_VISIBLE_DEVICES"
        )
    counts = usable_counts(resolved, nodes * ranks)
    whole, each, name = (ranks, 1, "rank(s)") if target == "local" else (nodes, ranks, f"node(s) of {ranks} rank(s)")
    if lose >= whole:
        raise UserError(f"--lose {lose} leaves none of {whole} {name}; give a smaller number, or more of them")
    uneven = [left for left in range(whole, whole - lose - 1, -1) if left * each not in counts]
    if whole in uneven or (uneven and target != "local"):
        raise UserError(
            f"--lose {lose}: the batch cannot be shared evenly by {', '.join(map(str, uneven))} {name}; set "
            "data.init_args.batch_size to a multiple of each number of ranks, times trainer.accumulate_grad_batches"
        )
    for left in uneven:
        most = max(count for count in counts if count <= left)
        print_notes([f"the batch cannot be shared evenly by {left} ranks: when so many are left, {most} continue"])
    return tuple(counts)


def _label(text: str) -> tuple[str, str]:
    """A label of a node and its value. Raises: UserError."""
    match = _LABEL.fullmatch(text)
    if match is None:
        raise UserError(f"--node-selector {text!r} is not LABEL=VALUE, such as nvidia.com/gpu.product=A100")
    return match[1], match[2]


def _number(value: Any, key: str, option: str) -> int:
    if isinstance(value, list):
        value = len(value)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"{key}={value!r} cannot be resolved before the job has a machine; give {option} a number")
    return value


def _folder_in_the_volume(given: Path | None, name: str) -> str:
    """The run folder inside the pods."""
    if given is None:
        new = run_folder(None, name, make=False)  # only the name is needed
        return f"{kubernetes.RUNS}/{new.parent.name}/{new.name}"
    folder = PurePosixPath(kubernetes.RUNS) / given
    if folder.parts[:2] != ("/", "runs") or len(folder.parts) < 3 or ".." in folder.parts:
        raise UserError(
            f"--run {given}: on Kubernetes a run must be in {kubernetes.RUNS}, which is on the claimed volume"
        )
    return str(folder)


def _hand_over(args: argparse.Namespace, text: str, command: list[str]) -> int:
    if args.print:
        sys.stdout.write(text)
        return 0
    if shutil.which(command[0]) is None:
        raise UserError(f"{command[0]} is not installed here; run this where it is, or look at the job with --print")
    return subprocess.run(command, input=text, text=True).returncode
