"""The rates that docs/optimisers.md advises are those measured, the defaults beside them are the code's, and the bytes
those of the state.
"""

import inspect
import json
import re
from math import inf, sqrt
from pathlib import Path

import torch
from every_preset import PRESETS, of_rank

from lightspan.optim import muon, reference
from lightspan.optim.low_rank.optimizer import LowRank
from lightspan.optim.matrices.moments import BFloat16Moments, Float32Moments, Int8Moments

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
    rows = [(re.findall(r"`(\w+)`", cells)[0], *numbers) for cells, *numbers in table("| preset | lr | times")]
    runs = json.loads((ROOT / "benchmarks" / "results" / "quality.json").read_text())
    measured = {
        (run["optimizer"], run["lr"], run["other_lr"], run["momentum"])
        for run in runs
        if (run["task"], run["stage"]) == ("stdlib", "final")
    }
    assert {name for name, *_ in rows} == set(NAMES)
    assert {
        (NAMES[name], float(lr), float(other), float(momentum)) for name, lr, _, other, momentum, _ in rows
    } <= measured
    adamw = {name: float(lr) for name, lr, *_ in rows}["AdamW"]
    for name, lr, times, *_, default in rows:
        assert float(lr) / adamw == float(times)
        kind = {"LowRank": LowRank, "AdamW": torch.optim.AdamW, **{each.__name__: each for each in PRESETS}}[name]
        assert inspect.signature(kind).parameters["lr"].default == float(default)


def test_the_default_rates_of_factored_muon_are_the_safest_of_the_searches():
    runs = json.loads((ROOT / "benchmarks" / "results" / "quality.json").read_text())
    searches: dict[str, list[dict]] = {}
    for run in runs:
        if (run["optimizer"], run["stage"]) == ("factored_muon", "sweep"):
            searches.setdefault(run["task"], []).append(run)
    best = {task: min(tried, key=lambda run: run["online_loss"]) for task, tried in searches.items()}
    worst = {
        rate: max(
            min((run["online_loss"] for run in tried if run["lr"] == rate), default=inf) - best[task]["online_loss"]
            for task, tried in searches.items()
        )
        for rate in {run["lr"] for tried in searches.values() for run in tried}
    }
    defaults = {name: each.default for name, each in inspect.signature(muon.FactoredMuon).parameters.items()}
    assert defaults["lr"] == min(worst, key=worst.__getitem__)
    assert worst[defaults["lr"]] <= 0.006
    others = [run["other_lr"] for run in best.values()]
    halfway = sqrt(min(others) * max(others))
    assert defaults["other_lr"] == float(f"{halfway:.0e}")
    slow = inspect.signature(reference.FactoredMuon).parameters
    assert {name: slow[name].default for name in ("lr", "other_lr")} == {n: defaults[n] for n in ("lr", "other_lr")}


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
    assert shown == {kind.__name__: taken(kind, **of_rank(kind, 128)) for kind in [LowRank, *PRESETS]}
