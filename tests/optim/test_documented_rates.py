"""The rates that docs/optimisers.md advises are those measured, the defaults beside them are the code's, and the bytes
those of the state.
"""

import inspect
import json
import re
from pathlib import Path

import torch
from every_preset import PRESETS

from lightspan.optim import presets
from lightspan.optim.low_rank import LowRank
from lightspan.optim.moments import BFloat16Moments, Float32Moments, Int8Moments

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
    "Muon": "muon_by_heads",
    "NorMuon": "nor_muon",
    "FactoredMuon": "factored_muon",
    "AdamW": "adamw",
}


def table(start):
    """Rows of numbers, (first cell, numbers ...), of the page's table that starts so."""
    text = (ROOT / "docs" / "optimisers.md").read_text()
    lines = text[text.index(start) :].split("\n\n")[0]
    rows = re.findall(r"^\| (.*?)((?: \| [\d.]+)+) \|$", lines, re.MULTILINE)
    return [(cell, *numbers.split(" | ")[1:]) for cell, numbers in rows]


def test_the_advised_rates_are_the_measured_ones():
    rows = [(re.findall(r"`(\w+)`", cells)[0], *numbers) for cells, *numbers in table("| preset | lr | other_lr")]
    runs = json.loads((ROOT / "benchmarks" / "results" / "quality.json").read_text())
    measured = {
        (run["optimizer"], run["lr"], run["other_lr"], run["momentum"])
        for run in runs
        if (run["task"], run["stage"]) == ("stdlib", "final")
    }
    assert {name for name, *_ in rows} == set(NAMES)
    assert {(NAMES[name], *map(float, numbers)) for name, *numbers, _ in rows} <= measured
    for name, *_, default in rows:
        kind = {"LowRank": LowRank, "AdamW": torch.optim.AdamW}.get(name) or getattr(presets, name)
        assert inspect.signature(kind).parameters["lr"].default == float(default)


def test_the_table_of_bytes_has_every_preset_and_what_its_state_takes():
    rows = table("| optimiser | `Float32Moments`")
    weight = torch.nn.Parameter(torch.empty(4096, 1024, device="meta"))

    def taken(kind, project=True, **options):
        group = {"params": [weight], "project": project}
        made = [kind([group], moments=m, **options) for m in (Float32Moments(), BFloat16Moments(), Int8Moments())]
        states = [optimizer.initial_state(weight, optimizer.param_groups[0]) for optimizer in made]
        return tuple(f"{sum(value.nbytes for value in state.values()) / weight.numel():.2f}" for state in states)

    assert rows[0] == ("AdamW of `LowRank`", *taken(LowRank, project=False))
    shown = {name: tuple(numbers) for names, *numbers in rows[1:] for name in re.findall(r"`(\w+)`", names)}
    assert shown == {
        kind.__name__: taken(kind, rank=1 if kind is presets.APOLLOMini else 128) for kind in [LowRank, *PRESETS]
    }
