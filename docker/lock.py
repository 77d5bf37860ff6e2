"""Writes the pins of the container image. `make lock` runs, in a new environment: docker/lock.py PYPROJECT LOCK.

pip resolves the base dependencies as if nothing were installed, and every version it chose becomes a pin, with the
sha256 of the wheel that pip would take for each of TARGETS, so that the image is built of the same files or not at all.
What belongs to one build of PyTorch (CPU or a CUDA release) is left out: torch pins those parts itself, and the
Dockerfile's arguments pin torch and torchvision.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

BUILD_SPECIFIC = re.compile(r"torch|torchvision|triton|setuptools|nvidia-.*|cuda-.*")
TARGETS = [(python, machine) for python in ("3.11", "3.12", "3.13") for machine in ("x86_64", "aarch64")]
NEWEST_GLIBC = 36  # 2.36, of Debian 12: the oldest base image that docker/README.md names has it

HEADER = """\
# Written by `make lock`; not edited by hand. Every base dependency of lightspan and what it needs in turn, as pip
# resolved them together with torch {torch} and torchvision {torchvision} on Python {python} in a new environment, with
# the sha256 of the wheels for {targets}.
# Left out: torch and torchvision (docker/Dockerfile pins them; their builds differ by device) and the parts of CUDA,
# Triton and setuptools that torch itself installs.
"""


def canonical(name: str) -> str:
    """The name as PEP 503 normalises it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def chosen(*arguments: str) -> list[dict[str, Any]]:
    """What `pip install ARGUMENTS` would install into an empty environment, as pip reports it."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed"]
        subprocess.run([*command, "--report", str(report), *arguments], check=True)
        return json.loads(report.read_text())["install"]


def pins_of(items: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Package -> version."""
    return {canonical(item["metadata"]["name"]): item["metadata"]["version"] for item in items}


def sha256_of(item: dict[str, Any]) -> str:
    """Of the file that pip would take.

    Raises: ValueError for a file of this machine: what it holds says nothing of what others get under its name.
    """
    source = item["download_info"]
    if urlsplit(source["url"]).scheme != "https":
        raise ValueError(
            f"{item['metadata']['name']} comes from {source['url']}; lock without find-links that serve it"
        )
    return source["archive_info"]["hashes"]["sha256"]


def platforms(machine: str) -> list[str]:
    """The tags of wheels that a Linux image can take, newest first."""
    modern = [f"manylinux_2_{minor}_{machine}" for minor in range(NEWEST_GLIBC, 4, -1)]
    return [*modern, *(f"manylinux{name}_{machine}" for name in ("2014", "2010", "1")), f"linux_{machine}"]


def wheels(pins: dict[str, str], python: str, machine: str) -> dict[str, str]:
    """Package -> sha256 of its wheel for one interpreter and kind of processor."""
    with tempfile.TemporaryDirectory() as folder:
        listed = Path(folder) / "pins.txt"
        listed.write_text("".join(f"{name}=={version}\n" for name, version in pins.items()))
        tags = [word for tag in platforms(machine) for word in ("--platform", tag)]
        target = ["--target", folder, "--python-version", python, "--only-binary", ":all:", "--no-deps", *tags]
        return {canonical(item["metadata"]["name"]): sha256_of(item) for item in chosen(*target, "-r", str(listed))}


def text_of(pins: dict[str, str], hashes: dict[str, set[str]]) -> str:
    """The lines of a requirements file, in order of names."""
    lines = []
    for name, version in sorted(pins.items()):
        lines.append(" \\\n".join([f"{name}=={version}", *(f"    --hash=sha256:{x}" for x in sorted(hashes[name]))]))
    return "".join(f"{line}\n" for line in lines)


def main(pyproject: Path, lock: Path) -> None:
    versions = pins_of(chosen(str(pyproject.resolve().parent)))
    # A local part such as +cpu names a build, and the pin in the Dockerfile has to hold for all of them.
    torch, torchvision = (versions[name].partition("+")[0] for name in ("torch", "torchvision"))
    pins = {
        name: version
        for name, version in versions.items()
        if name != "lightspan" and not BUILD_SPECIFIC.fullmatch(name)
    }
    hashes: dict[str, set[str]] = defaultdict(set)
    for python, machine in TARGETS:
        for name, digest in wheels(pins, python, machine).items():
            hashes[name].add(digest)
    pythons, machines = (list(dict.fromkeys(column)) for column in zip(*TARGETS, strict=True))
    header = HEADER.format(
        torch=torch,
        torchvision=torchvision,
        python=f"{sys.version_info.major}.{sys.version_info.minor}",
        targets=f"Python {', '.join(pythons)} on {' and '.join(machines)}",
    )
    lock.write_text(header + text_of(pins, hashes))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
