"""Records what an evidence run measured, also what fell short, as evidence/results/<system>.json."""

import datetime
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from lightspan.core.files.atomic import write_atomic

PACKAGES = ("lightspan", "torch", "lightning", "numpy", "timm", "transformers", "scikit-learn")
OWN_OUTPUT = ("evidence/results", "docs/evidence.md", "docs/evidence", "docs/methods.md")  # a run changes these itself

Figure = float | Mapping[int, float]


class Recorder:
    """The `evidence` fixture: one for each evidence file.

    Args:
        system: the file's name without `test_` and `.py`, e.g. 42_mixed_barlow_twins.
        title: what was measured, one line.
        path: the JSON file, written after each test and replaced as a whole.
    """

    def __init__(self, system: str, title: str, path: Path) -> None:
        self.path, self.started = path, time.perf_counter()
        self.ended: set[str] = set()  # tests of the file that ran to their end
        self.record: dict[str, Any] = {
            "system": system,
            "title": title,
            "command": f"make evidence SYSTEM={system.split('_')[0]}",
            **surroundings(path.parent),
            "seconds": 0.0,
            "complete": False,
            "notes": [],
            "claims": [],
            "figures": [],
        }

    def figure(self, name: str, value: float, seed: int | None = None, unit: str = "") -> None:
        """Records one measured number that no margin is set for."""
        self.record["figures"].append({"name": name, "value": _finite(value), "seed": seed, "unit": unit})

    def claim(
        self,
        name: str,
        value: Figure,
        *,
        at_least: float | None = None,
        at_most: float | None = None,
        unit: str = "",
    ) -> bool:
        """Records a claim with its margin and says whether it held. The test fails at its end if one did not.

        Args:
            value: a number, or {seed: number}, whose mean and median must both keep the margin: one run that
                diverged, or one lucky seed, moves a mean alone. A number that is not finite fails every margin.
            at_least, at_most: the margin; exactly one of them.
        """
        if (at_least is None) == (at_most is None):
            raise ValueError(f"claim {name!r} needs exactly one of at_least= and at_most=")
        per_seed = dict(value) if isinstance(value, Mapping) else None
        if per_seed == {}:
            raise ValueError(f"claim {name!r} has no figures")
        mean = sum(per_seed.values()) / len(per_seed) if per_seed else float(value)  # type: ignore[arg-type]
        middle = statistics.median(per_seed.values()) if per_seed and math.isfinite(mean) else None
        held = all(
            math.isfinite(one) and (one >= at_least if at_least is not None else one <= at_most)
            for one in ((mean,) if middle is None else (mean, middle))
        )
        self.record["claims"].append(
            {
                "name": name,
                "value": _finite(mean),
                "median": middle if middle is None else float(middle),
                "per_seed": {str(seed): _finite(v) for seed, v in per_seed.items()} if per_seed else None,
                "unit": unit,
                "margin": {"at_least": at_least} if at_least is not None else {"at_most": at_most},
                "held": bool(held),
            }
        )
        return bool(held)

    def note(self, text: str, found: Mapping[Any, Any] | None = None) -> None:
        """Records a sentence a reader of the figures needs: how a rate was chosen, what a run leaves out.

        Args:
            found: settings to list behind it, such as the rate of each arm.
        """
        self.record["notes"].append(text if found is None else f"{text}: {listed(found)}.")

    def write(self, complete: bool) -> None:
        """Replaces the JSON file. `complete` is false unless all tests of the file have run to their end."""
        self.record["complete"] = complete
        self.record["threads"] = threads()
        self.record["seconds"] = round(time.perf_counter() - self.started, 1)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(self.path, json.dumps(self.record, indent=1, allow_nan=False) + "\n")


def listed(value: Any) -> str:
    """Settings as a reader wants them: `LoRA: 0.01, FLoRA: (0.03, 16)`."""
    if isinstance(value, Mapping):
        parts = []
        for key, one in value.items():
            name = " ".join(map(listed, key)) if isinstance(key, tuple) else listed(key)
            parts.append(f"{name} ({listed(one)})" if isinstance(one, Mapping) else f"{name}: {listed(one)}")
        return ", ".join(parts)
    if isinstance(value, tuple | list):
        return f"({', '.join(map(listed, value))})"
    return "none" if value is None else value if isinstance(value, str) else f"{value:g}"


def unmet(claims: list[dict[str, Any]]) -> str:
    """One line for each claim that did not hold; empty when all did."""
    lines = []
    for claim in claims:
        if not claim["held"]:
            ((bound, margin),) = claim["margin"].items()
            seeds = f", per seed {claim['per_seed']}" if claim["per_seed"] else ""
            median = "" if claim["median"] is None else f" (median {claim['median']})"
            lines.append(f"{claim['name']}: {claim['value']}{median} {claim['unit']}, wanted {bound} {margin}{seeds}")
    return "\n".join(lines)


def surroundings(folder: Path) -> dict[str, Any]:
    """What a figure depends on besides the code: versions, commit, machine, date (UTC)."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    changed = _git(folder, "status", "--porcelain", "--", ":/", *(f":(top,exclude){path}" for path in OWN_OUTPUT))
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": _git(folder, "rev-parse", "--verify", "--quiet", "HEAD"),
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


def _git(folder: Path, *args: str) -> str | None:
    existing = next(p for p in (folder, *folder.parents) if p.is_dir())
    try:
        done = subprocess.run(["git", *args], cwd=existing, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
