"""Optimisers take torch.optim.AdamW's arguments by its names, with its defaults or for a reason that stands here."""

import inspect
from typing import Any

import every_preset
import pytest
import torch
from torch.optim import Optimizer

from lightspan.optim.low_rank import presets
from lightspan.optim.low_rank.optimizer import LowRank

SHARED = ("lr", "betas", "eps", "weight_decay")
OF_TORCH = {name: inspect.signature(torch.optim.AdamW).parameters[name].default for name in SHARED}
REASONS = {
    ("LowRank", "weight_decay"): "decay belongs to a run: the papers of all presets train without it by default",
    ("GaLore", "lr"): "arXiv 2403.03507, section 5.1",
    ("FiraAdam", "lr"): "arXiv 2410.01623, section 5",
    ("APOLLO", "lr"): "arXiv 2412.05270, section 5",
    ("APOLLOMini", "lr"): "arXiv 2412.05270, section 5",
    ("LDAdam", "betas"): "arXiv 2410.16103, section 5",
    ("Trion", "lr"): "of Newton-Schulz, which needs another than AdamW",
    ("Trion", "betas"): "published code, for what is not projected",
    ("Trion", "eps"): "published code, for what is not projected",
    ("Muon", "lr"): "https://kellerjordan.github.io/posts/muon, for its factor by shape",
    ("Muon", "betas"): "published code, for what is not projected",
    ("Muon", "eps"): "published code, for what is not projected",
    ("NorMuon", "lr"): "published code",
    ("NorMuon", "betas"): "published code, for what is not projected",
    ("NorMuon", "eps"): "published code, for what is not projected",
    ("FactoredMuon", "betas"): "as Muon",
    ("FactoredMuon", "eps"): "as Muon",
    ("Dion2", "lr"): "published code, for its factor by shape",
    ("Dion2", "betas"): "published code, for what is not projected",
    ("Dion2", "eps"): "as Muon",
    ("LARS", "lr"): "it has none: a share of each matrix' length, which grows with the batch",
}
OF_COORDINATES = {"RandomSubspace", "RiemannianSGD"}
"""Optimisers with another one inside, of coordinates or of the rest, which brings its own settings."""


def optimisers() -> dict[str, type[Optimizer]]:
    return {name: kind for name, kind in every_preset.optimizers().items() if name not in OF_COORDINATES}


def default(kind: type[Optimizer], name: str) -> Any:
    """That of the first constructor in the order of resolution that names the parameter."""
    for base in kind.__mro__:
        own = inspect.signature(base.__init__).parameters if "__init__" in vars(base) else {}
        if name in own:
            return own[name].default
        assert any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in own.values()) or not own, name
    return inspect.Parameter.empty


def shared(kind: type[Optimizer]) -> list[str]:
    """Those of `SHARED` that an optimiser has: one without second moments has no betas and no eps."""
    own = set().union(*(inspect.signature(base.__init__).parameters for base in kind.__mro__))
    return [setting for setting in SHARED if setting in own]


def test_all_presets_are_found() -> None:
    assert optimisers().keys() >= {"LowRank", "Trion"}
    assert set(optimisers().values()) >= {
        kind for kind in vars(presets).values() if inspect.isclass(kind) and issubclass(kind, LowRank)
    }
    assert {name for name, _ in REASONS} <= optimisers().keys()


@pytest.mark.parametrize("name", optimisers())
def test_what_means_the_same_has_the_name_and_the_default_of_adamw(name: str) -> None:
    kind = optimisers()[name]
    assert list(inspect.signature(kind).parameters)[:2] == ["params", "lr"]
    for setting in shared(kind):
        reasoned = (name, setting) in REASONS
        expected = OF_TORCH[setting] if name == "LowRank" or reasoned else default(LowRank, setting)
        assert (default(kind, setting) != expected) == reasoned, setting
    values = {"lr": 0.3, "betas": (0.5, 0.6), "eps": 0.1, "weight_decay": 0.2}
    given = {setting: values[setting] for setting in shared(kind)}
    rest = {"rank": 2} if issubclass(kind, LowRank) and name != "APOLLOMini" else {}
    group = kind([torch.nn.Parameter(torch.ones(6, 5))], **given, **rest).param_groups[0]
    assert {setting: group[setting] for setting in given} == given
