"""Writes the pins of the container image. `make lock` runs, in a new environment: docker/lock.py PYPROJECT LOCK.

pip resolves the base dependencies as if nothing were installed, and every version it chose becomes a pin. What belongs
to one build of PyTorch (CPU or a CUDA release) is left out: torch pins those parts itself, and the Dockerfile's
arguments pin torch and torchvision.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

BUILD_SPECIFIC = re.compile(r"torch|torchvision|triton|setuptools|nvidia-.*|cuda-.*")

HEADER = """\
# Written by `make lock`; do not edit by hand. Every base dependency of lightspan and what it needs in turn, as pip
# resolved them together with torch {torch} and torchvision {torchvision} on Python {python} in a new environment.
# Left out: torch and torchvision (docker/Dockerfile pins them; their builds differ by device) and the parts of CUDA,
# Triton and setuptools that torch itself installs.
"""


def canonical(name: str) -> str:
    """The name as PEP 503 normalises it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def resolve(project: Path) -> dict[str, str]:
    """Package -> version that pip would install for `project` into an empty environment."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed", "--report"]
        subprocess.run([*command, str(report), str(project)], check=True)
        chosen = (item["metadata"] for item in json.loads(report.read_text())["install"])
        return {canonical(item["name"]): item["version"] for item in chosen}


def main(pyproject: Path, lock: Path) -> None:
    versions = resolve(pyproject.resolve().parent)
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    # A local part such as +cpu names a build, and the pin in the Dockerfile must fit all of them.
    torch, torchvision = (versions[name].partition("+")[0] for name in ("torch", "torchvision"))
    pins = [
        f"{name}=={version}\n"
        for name, version in sorted(versions.items())
        if name != "lightspan" and not BUILD_SPECIFIC.fullmatch(name)
    ]
    lock.write_text(HEADER.format(torch=torch, torchvision=torchvision, python=python) + "".join(pins))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
