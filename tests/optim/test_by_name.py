"""`lightspan.optim.create` makes every listed optimiser; of a model with the groups that every method uses."""

import importlib

import pytest
import torch
from torch import nn

import lightspan.methods
import lightspan.optim
from lightspan.core.errors import UserError
from lightspan.optim.groups import ParameterGroups
from lightspan.optim.muon import FactoredMuon

RATE = {"lr": 1e-2}
SETTINGS = {
    "LARS": RATE,
    "APOLLOMini": RATE,
    "RandomSubspace": {"dim": 3, "inner": lambda parameters: torch.optim.SGD(parameters, lr=1e-2)},
    "RiemannianSGD": {"lr": 1e-2, "rest": torch.optim.AdamW},
    **{
        name: {**RATE, "rank": 2} for name in ("LowRank", "GaLore", "FiraAdam", "APOLLO", "LDAdam", "DCTAdamW", "Trion")
    },
}


def net() -> nn.Sequential:
    return nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 8), nn.LayerNorm(8))


def test_every_listed_optimiser_is_made_by_its_name_and_steps() -> None:
    entries = lightspan.optim.list()
    assert {"FactoredMuon", "GaLore", "LARS"} <= {entry.name for entry in entries}
    for entry in entries:
        model = net()
        if entry.name == "RiemannianSGD":
            nn.init.orthogonal_(model[1].weight)
            model[1].parameter_kinds = {"weight": "frames"}
        optimizer = lightspan.optim.create(entry.name.lower(), model, **SETTINGS.get(entry.name, RATE))
        module, _, name = entry.class_path.rpartition(".")
        assert type(optimizer) is getattr(importlib.import_module(module), name)
        before = model[1].weight.detach().clone()
        model(torch.arange(8)).square().sum().backward()
        optimizer.step()
        assert not torch.equal(model[1].weight, before), name


def test_of_a_model_norms_biases_and_embeddings_do_not_decay_and_are_not_projected() -> None:
    model = net()
    optimizer = lightspan.optim.create("factored_muon", model, lr=1e-2, weight_decay=0.1)
    assert type(optimizer) is FactoredMuon
    assert {
        name: (group["weight_decay"], optimizer.projected(p, group))
        for group in optimizer.param_groups
        for name, p in zip(group["param_names"], group["params"], strict=True)
    } == {
        "1.weight": (0.1, True),
        "0.weight": (0.0, False),
        "1.bias": (0.0, False),
        "2.weight": (0.0, False),
        "2.bias": (0.0, False),
    }


def test_groups_of_ones_own_split_the_model_and_parameters_go_to_the_optimiser_as_they_are() -> None:
    model = net()
    groups = ParameterGroups(other_lr=0.5)
    rates = {
        group["name"]: group["lr"]
        for group in lightspan.optim.create("lars", model, lr=0.1, groups=groups).param_groups
    }
    assert rates["embeddings"] == rates["vectors"] == 0.5
    (group,) = lightspan.optim.create("lars", model.parameters(), lr=0.1, weight_decay=0.1).param_groups
    assert group["weight_decay"] == 0.1
    assert len(group["params"]) == 5


def test_mistakes_name_what_was_meant() -> None:
    for values, settings, message in (
        (("factored_moun", net()), {}, "did you mean FactoredMuon"),
        (("adamw", net()), {"lr": 0.1}, "torch.optim.AdamW"),
        (("s_g_d", net().parameters()), {"lr": 0.1}, "torch.optim.SGD"),
        (("optimizer", net()), {}, "no optimizer has the name 'optimizer'"),
        (("lars", net()), {"lr": 0.1, "momentun": 0.9}, "momentun"),
        (("factored_muon", net()), {"momentun": 0.9}, "momentun"),
        (("lars", net().parameters()), {"groups": ParameterGroups()}, "groups"),
    ):
        with pytest.raises(UserError, match=message):
            lightspan.optim.create(*values, **settings)


def test_methods_are_made_by_name() -> None:
    from lightspan.methods.supervised.classifier import Classifier

    backbone = nn.Linear(4, 3)
    backbone.num_features = 3
    method = lightspan.methods.create("classifier", backbone=backbone, num_classes=2, optimizer=torch.optim.SGD)
    assert type(method) is Classifier
    with pytest.raises(UserError, match="did you mean SimCLR"):
        lightspan.methods.create("sim_clrr")
    with pytest.raises(UserError, match=r"Classifier.*num_classes"):
        lightspan.methods.create("classifier", backbone=backbone)
