"""Small zoos of weights, made on the spot: a network of one layer with a card and an index."""

import json
from pathlib import Path
from typing import Any

import pytest

from lightspan.cli.zoo.index import FORMAT, INDEX
from lightspan.core.files.runs import MODEL
from lightspan.datamodules.shards.index import sha256_of

NETWORK = {"class_path": "lightspan.backbones.vision.MLP", "init_args": {"in_shape": [1, 8, 8], "hidden": [4]}}


def described(weights: Path, **changed: Any) -> dict[str, Any]:
    """What an index says of a network with these weights."""
    return {
        "title": "A toy",
        "modality": "image",
        "kind": "encoder",
        "recipe": "supervised/turned_digits",
        "flags": [],
        "seed": 0,
        "settings": "0" * 64,
        "network": NETWORK,
        "place": "model.init_args.backbone",
        "metric": "val/accuracy",
        "trained": {"0": 0.75, "1": 0.5},
        "untrained": {"0": 0.125, "1": 0.125},
        "data": "digits",
        "data_licence": "CC BY 4.0",
        "licence": "apache-2.0",
        "bytes": weights.stat().st_size,
        "sha256": sha256_of(weights),
        "made": {"processor": "a toy"},
    } | changed


def write_index(zoo: Path, **networks: Any) -> Path:
    """The index of a zoo with these networks, whose underscores are hyphens."""
    named = {name.replace("_", "-"): network for name, network in networks.items()}
    (zoo / INDEX).write_text(json.dumps({"format": FORMAT, "networks": named}))
    return zoo / INDEX


def toy_network() -> Any:
    import torch

    from lightspan.backbones.vision import MLP

    torch.manual_seed(0)
    return MLP(in_shape=(1, 8, 8), hidden=[4])


@pytest.fixture
def zoo(tmp_path: Path) -> Path:
    """A folder with one network, toy-digits."""
    from lightspan.adapters.state import write_tensors

    weights = tmp_path / "zoo" / "toy-digits" / MODEL
    weights.parent.mkdir(parents=True)
    state = {f"backbone.{name}": tensor for name, tensor in toy_network().state_dict().items()}
    write_tensors(weights, state, {"format": "pt"})
    write_index(tmp_path / "zoo", toy_digits=described(weights))
    return tmp_path / "zoo"
