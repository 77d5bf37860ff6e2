"""`lightspan doctor`: is this machine ready, and if not, what to do. Uses no network and prints no secrets."""

import argparse
import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lightspan.core.errors import first_lines, install_extra
from lightspan.training.loggers.wandb_key import wandb_key_place

GIB = 2**30
State = Literal["ok", "warn", "bad", "none"]

# Versions that must not be on a training machine, whatever the ranges in the package's metadata say.
KNOWN_BAD = (
    ("lightning", "==2.6.2", "this release steals credentials when imported (GHSA-w37p-236h-pfx3)"),
    ("lightning", "==2.6.3", "this release steals credentials when imported (GHSA-w37p-236h-pfx3)"),
    ("pytorch-lightning", "==2.6.2", "this release steals credentials when imported (GHSA-w37p-236h-pfx3)"),
    ("pytorch-lightning", "==2.6.3", "this release steals credentials when imported (GHSA-w37p-236h-pfx3)"),
    ("torch", "<2.10", "a checkpoint can corrupt memory even with weights_only=True (CVE-2026-24747)"),
)
RUNTIME_EXTRAS = ("deepspeed", "peft", "triton")  # extras that a run can use


@dataclass(frozen=True)
class Finding:
    """One line of the table; `bad`: something required is broken; `none`: something optional is missing."""

    check: str
    state: State
    found: str
    way_out: str = ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--network", action="store_true", help="also run an all-reduce between two small processes over loopback"
    )


def run(args: argparse.Namespace) -> int:
    """Prints the table; 0 if everything required works, 1 if something required is broken."""
    findings = [
        *python_findings(sys.version_info[:2]),
        *package_findings(importlib.metadata.requires("lightspan") or [], installed_version),
        *device_findings(),
        *space_findings(Path.cwd(), Path("/dev/shm")),
        *tool_findings(shutil.which),
        wandb_finding(wandb_key_place()),
    ]
    if args.network:
        findings.append(network_finding())
    _print(findings)
    return exit_status(findings)


def exit_status(findings: Iterable[Finding]) -> int:
    return int(any(finding.state == "bad" for finding in findings))


def installed_version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def python_findings(version: tuple[int, ...]) -> list[Finding]:
    found = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    if version < (3, 11):
        return [Finding("python", "bad", found, "install Python 3.11 or later")]
    return [Finding("python", "ok", found)]


def package_findings(requirements: Iterable[str], version_of: Callable[[str], str | None]) -> list[Finding]:
    """Installed versions against lightspan's own requirements and the versions known to be bad.

    Args:
        requirements: as in the package's metadata: `name>=1; extra == "x"`.
        version_of: the installed version of a package, or None.
    """
    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet

    findings = []
    for text in requirements:
        requirement = Requirement(text)
        marker = requirement.marker
        needed = marker is None or marker.evaluate({"extra": ""})
        if marker is not None and not needed and not any(marker.evaluate({"extra": e}) for e in RUNTIME_EXTRAS):
            continue
        name, version = requirement.name, version_of(requirement.name)
        install = f"pip install '{name}{requirement.specifier}'"
        if name == "lightspan" or (version is None and not needed):
            continue
        if version is None:
            findings.append(Finding(name, "bad", "not installed", install))
        elif not requirement.specifier.contains(version, prereleases=True):
            findings.append(
                Finding(name, "bad" if needed else "warn", f"{version}, not {requirement.specifier}", install)
            )
        else:
            findings.append(Finding(name, "ok", version))
    for name, specifier, reason in KNOWN_BAD:
        version = version_of(name)
        if version is not None and SpecifierSet(specifier).contains(version, prereleases=True):
            way_out = f"uninstall it now, then install {name} in another version"
            findings.append(Finding(name, "bad", f"{version}: {reason}", way_out))
    # Several extras may require the same package.
    return list(dict.fromkeys(findings))


def device_findings() -> list[Finding]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        import torch
    except Exception as error:  # a broken binary raises whatever its loader raises
        return [Finding("devices", "bad", f"torch does not import: {first_lines(error)}", "reinstall torch")]
    threads = torch.get_num_threads()
    findings = [Finding("processor", "ok", f"{cores} usable cores, {threads} threads in torch")]
    if threads > cores:
        findings[0] = Finding("processor", "warn", findings[0].found, f"set OMP_NUM_THREADS={cores}")
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            card = torch.cuda.get_device_properties(index)
            found = f"{card.name}, {card.total_memory / GIB:.0f} GiB, compute {card.major}.{card.minor}"
            findings.append(Finding(f"cuda:{index}", "ok", found))
    elif torch.version.cuda:
        found = f"torch is built for CUDA {torch.version.cuda} but finds no GPU"
        findings.append(Finding("cuda", "warn", found, "check nvidia-smi and, in a container, --gpus all"))
    else:
        findings.append(Finding("cuda", "none", "torch is built without CUDA"))
    if torch.backends.mps.is_available():
        findings.append(Finding("mps", "ok", "Apple GPU"))
    return findings


def space_findings(here: Path, shared_memory: Path) -> list[Finding]:
    free = shutil.disk_usage(here).free
    findings = [Finding("disk", "ok", f"{free / GIB:.1f} GiB free in {here}")]
    if free < 2 * GIB:
        way_out = "free some space, or choose another folder with --run"
        findings = [Finding("disk", "warn", findings[0].found, way_out)]
    if not os.access(here, os.W_OK):
        findings.append(
            Finding("folder", "warn", f"{here} cannot be written", "change to another folder, or name one with --run")
        )
    if shared_memory.is_dir():
        free = shutil.disk_usage(shared_memory).free
        found = f"{free / GIB:.1f} GiB free in {shared_memory}"
        small = free < GIB
        way_out = "data workers may die: docker run --shm-size=8g, or data.init_args.num_workers=0" if small else ""
        findings.append(Finding("shared memory", "warn" if small else "ok", found, way_out))
    return findings


def tool_findings(which: Callable[[str], str | None]) -> list[Finding]:
    """Optional helpers: says what each missing one is for."""
    findings = []
    for name, commands, use in (
        ("C compiler", ("cc", "gcc", "clang"), "triton and torch.compile need one"),
        ("nvcc", ("nvcc",), "only for building CUDA extensions such as DeepSpeed's"),
        ("slurm", ("sbatch",), "only on a SLURM cluster"),
        ("chromium", ("chromium", "chromium-browser", "google-chrome"), "only for the test that opens the report"),
    ):
        path = next(filter(None, map(which, commands)), None)
        findings.append(Finding(name, "ok", path) if path else Finding(name, "none", "not found", use))
    for package, use in (
        ("triton", f"kernels run as plain torch without it: {install_extra('triton')}"),
        ("deepspeed", f"only for the DeepSpeed strategies: {install_extra('deepspeed')}"),
    ):
        if installed_version(package) is None:
            findings.append(Finding(package, "none", "not installed", use))
    return findings


def wandb_finding(place: str | None) -> Finding:
    """Whether a Weights & Biases key is set."""
    if place is None:
        return Finding("wandb key", "none", "not set", "--wandb then logs offline; `wandb login` sets one")
    return Finding("wandb key", "ok", "WANDB_API_KEY is set" if place == "WANDB_API_KEY" else f"in {place}")


def network_finding(timeout_s: float = 60.0) -> Finding:
    """An all-reduce between two processes over loopback, which every distributed run on the CPU needs."""
    code = "import sys; from lightspan.cli.commands.doctor import all_reduce; all_reduce(int(sys.argv[1]), sys.argv[2])"
    way_out = "allow connections over 127.0.0.1 (check firewall and container network)"
    with tempfile.TemporaryDirectory() as folder:
        address = f"file://{folder}/rendezvous"
        ranks = [
            subprocess.Popen([sys.executable, "-c", code, str(rank), address], stderr=subprocess.PIPE, text=True)
            for rank in range(2)
        ]
        try:
            errors = [rank.communicate(timeout=timeout_s)[1] for rank in ranks]
        except subprocess.TimeoutExpired:
            return Finding("all-reduce", "bad", f"no answer in {timeout_s:g} s", way_out)
        finally:
            for rank in ranks:
                rank.kill()
                rank.wait()
    failed = next((error for rank, error in zip(ranks, errors, strict=True) if rank.returncode), None)
    if failed is not None:
        return Finding("all-reduce", "bad", (failed.strip().splitlines() or ["it died"])[-1][:200], way_out)
    return Finding("all-reduce", "ok", "gloo, 2 processes over loopback")


def all_reduce(rank: int, rendezvous: str) -> None:
    """One of the two processes of `network_finding`. Raises: RuntimeError if the sum is wrong."""
    import torch
    import torch.distributed

    # The interface by name, since gloo otherwise resolves this host's name, which is not tested here.
    os.environ["GLOO_SOCKET_IFNAME"] = "lo0" if sys.platform == "darwin" else "lo"
    torch.distributed.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=2)
    value = torch.tensor(float(rank + 1))
    torch.distributed.all_reduce(value)
    torch.distributed.destroy_process_group()
    if value.item() != 3:
        raise RuntimeError(f"1 + 2 over two ranks gave {value.item():g}")


def _print(findings: Iterable[Finding]) -> None:
    from rich.table import Table
    from rich.text import Text

    from lightspan.core.console import SafeConsole

    styles = {"ok": "green", "warn": "yellow", "bad": "bold red", "none": "dim"}
    table = Table(title="lightspan doctor", title_justify="left")
    for heading in ("", "state", "found", "way out"):
        table.add_column(heading, overflow="fold")
    for finding in findings:
        state = "-" if finding.state == "none" else finding.state
        cells = (finding.check, Text(state, style=styles[finding.state]), Text(finding.found), Text(finding.way_out))
        table.add_row(*cells)
    SafeConsole().print(table)
