"""What a figure depends on besides the code that measures it."""

import datetime
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("lightspan", "torch", "lightning", "numpy", "timm", "transformers", "scikit-learn")
OWN_OUTPUT = ("evidence/results", "docs/evidence.md", "docs/evidence", "docs/methods.md")  # a run changes these itself


def surroundings() -> dict[str, Any]:
    """What a figure depends on besides the code: versions, commit, machine, date (UTC)."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    changed = _git("status", "--porcelain", "--", ":/", *(f":(top,exclude){path}" for path in OWN_OUTPUT))
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": _git("rev-parse", "--verify", "--quiet", "HEAD"),
        "uncommitted_changes": None if changed is None else bool(changed),
        "python": platform.python_version(),
        "versions": versions,
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": threads(),
    }


def threads() -> int | None:
    """Threads that torch computes with; None in a run without torch."""
    torch = sys.modules.get("torch")
    return torch.get_num_threads() if torch else None


def _git(*args: str) -> str | None:
    """What git says of the code that measures, wherever the records go."""
    try:
        done = subprocess.run(["git", *args], cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
