"""The rates that docs/optimisers.md advises are those measured, the defaults beside them are the code's, and the bytes
those of the state.
"""

import inspect
import json
import re
from math import inf
from pathlib import Path

import torch
from every_preset import PRESETS, of_rank

from lightspan.optim import muon, reference
from lightspan.optim.low_rank.optimizer import LowRank
from lightspan.optim.matrices.conventions import shape_factor
from lightspan.optim.matrices.moments import BFloat16Moments, Float32Moments, Int8Moments
from lightspan.optim.matrices.stacks import Layout

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


def test_the_searched_rates_of_factored_muon_are_near_adamws_at_its_length_of_steps():
    """Those of the searches are at Moonlight's length, so many times as high. The page says 0.8 to 2."""
    runs = json.loads((ROOT / "benchmarks" / "results" / "quality.json").read_text())
    best: dict[tuple[str, str], dict] = {}
    for run in runs:
        key = run["task"], run["optimizer"]
        if run["stage"] == "sweep" and (run["online_loss"] or inf) < best.get(key, {"online_loss": inf})["online_loss"]:
            best[key] = run
    quotients = []
    for task, width in (("stdlib", 192), ("austen", 192), ("large", 288), ("vit", 128)):
        layout = Layout(width, width, 1, False, torch.float32, torch.device("cpu"), (0,))
        factor = shape_factor("adamw", layout) / shape_factor("kimi", layout)
        quotients.append(best[task, "factored_muon"]["lr"] / best[task, "adamw"]["lr"] / factor)
    assert 0.8 < min(quotients) < 1 < max(quotients) <= 2
    for kind in (muon.FactoredMuon, reference.FactoredMuon):
        defaults = {name: each.default for name, each in inspect.signature(kind).parameters.items()}
        assert (defaults["convention"], defaults["lr"], defaults["other_lr"]) == ("adamw", 1e-3, None)


def test_factored_muon_steps_everything_at_one_rate_unless_told_otherwise():
    def rates(**settings):
        weights = [torch.nn.Parameter(torch.ones(4, 4)), torch.nn.Parameter(torch.ones(4))]
        return [float(group["lr"]) for group in muon.FactoredMuon(weights, **settings).param_groups]

    assert rates() == [1e-3, 1e-3]
    assert rates(lr=0.5) == [0.5, 0.5]
    assert rates(lr=torch.tensor(0.5)) == [0.5, 0.5]
    assert rates(lr=0.5, other_lr=0.25) == [0.5, 0.25]


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
