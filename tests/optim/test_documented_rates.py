"""The rates that docs/optimisers.md advises are those measured, and the defaults beside them are the code's."""

import inspect
import json
import re
from pathlib import Path

import torch

from lightspan.optim import presets
from lightspan.optim.low_rank import LowRank

ROOT = Path(__file__).parents[2]
NAMES = {
    "GaLore": "galore",
    "FiraAdam": "fira",
    "APOLLO": "apollo",
    "APOLLOMini": "apollo_mini",
    "LDAdam": "ldadam",
    "DCTAdamW": "dct_adamw",
    "Trion": "trion",
    "LowRank": "low_rank",
    "AdamW": "adamw",
}


def test_the_advised_rates_are_the_measured_ones():
    text = (ROOT / "docs" / "optimisers.md").read_text()
    rows = re.findall(r"^\| (?:torch's )?`(\w+)`[^|]*\| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", text, re.MULTILINE)
    runs = json.loads((ROOT / "benchmarks" / "results" / "quality.json").read_text())
    measured = {
        (run["optimizer"], run["lr"], run["other_lr"])
        for run in runs
        if (run["task"], run["stage"]) == ("stdlib", "final")
    }
    assert {name for name, *_ in rows} == set(NAMES)
    assert {(NAMES[name], float(lr), float(other)) for name, lr, other, _ in rows} <= measured
    for name, _, _, default in rows:
        kind = {"LowRank": LowRank, "AdamW": torch.optim.AdamW}.get(name) or getattr(presets, name)
        assert inspect.signature(kind).parameters["lr"].default == float(default)
