"""Puts the figures of the last `make quickstart` into README.md and its curves into docs/quickstart.png.

python tools/readme_figures.py        (`make readme` runs the quickstart first)
"""

import json
import os
import shutil
from pathlib import Path

from lightspan.core.files.atomic import write_atomic

ROOT = Path(__file__).resolve().parents[1]
QUICKSTART = ROOT / "build" / "quickstart"
BEGIN, END = "<!-- quickstart:begin -->\n", "<!-- quickstart:end -->\n"
ARMS = {"adamw": "AdamW", "lowrank": "low rank", "factored_muon": "FactoredMuon"}
ROWS = {
    "validation loss, nats per byte": ("val_loss_nats", "{:.3f}"),
    "optimiser state, MiB": ("optimizer_state_mib", "{:.2f}"),
    "median step, ms": ("step_ms_median", "{:.0f}"),
}


def table(summary: dict[str, dict[str, float]]) -> str:
    """A Markdown table of the runs, and a line on where they were measured."""
    provenance = json.loads((QUICKSTART / next(iter(ARMS)) / "provenance.json").read_text(encoding="utf-8"))
    lines = [f"| one run, seed 0 | {' | '.join(ARMS.values())} |", "|---" * (1 + len(ARMS)) + "|"]
    for label, (key, form) in ROWS.items():
        lines.append(f"| {label} | {' | '.join(form.format(summary[run][key]) for run in ARMS)} |")
    torch_version = provenance.get("packages", {}).get("torch", "")
    where = f"{len(os.sched_getaffinity(0))} CPU cores with torch {torch_version}"  # `make readme` has just run it here
    return "\n".join(lines) + f"\n\nMeasured on {where}; `make readme` measures it again.\n"


def main() -> None:
    summary = json.loads((QUICKSTART / "summary.json").read_text(encoding="utf-8"))
    readme = ROOT / "README.md"
    before, rest = readme.read_text(encoding="utf-8").split(BEGIN)
    _, after = rest.split(END)
    write_atomic(readme, before + BEGIN + table(summary) + END + after)
    shutil.copyfile(QUICKSTART / "curves.png", ROOT / "docs" / "quickstart.png")


if __name__ == "__main__":
    main()
