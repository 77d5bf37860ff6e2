"""Tied parameters: one tensor of a file is loaded into them only if all of their names have it there."""

from pathlib import Path

import pytest
import torch
from lightning import LightningModule
from safetensors.torch import save_file
from torch import Tensor, nn

from lightspan.cli.runs.train import load_merged_weights
from lightspan.core.errors import UserError
from lightspan.core.ties import every_name, require_ties


class Tied(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(5, 3), nn.Linear(3, 5)
        self.head.weight = self.table.weight


def stored(change: float = 0.0) -> dict[str, Tensor]:
    state = {name: tensor.clone() for name, tensor in Tied().state_dict().items()}
    state["head.weight"] = state["table.weight"] + change
    return state


def test_every_name_is_known_under_the_first() -> None:
    assert every_name(Tied()) == {"table.weight": ["table.weight", "head.weight"], "head.bias": ["head.bias"]}


def test_equal_tensors_are_tied_whatever_numbers_they_have_and_others_are_refused() -> None:
    require_ties(Tied(), stored().__getitem__, "a file")
    broken = stored()
    for name in ("table.weight", "head.weight"):
        broken[name][0, 0] = torch.nan
    require_ties(Tied(), broken.__getitem__, "a file")
    broken["head.weight"][1, 1] = torch.nan
    for state in (stored(1.0), broken):
        with pytest.raises(UserError, match=r"table\.weight and head\.weight are tied in Tied, .* a file"):
            require_ties(Tied(), state.__getitem__, "a file")


def test_a_file_that_is_evaluated_or_exported_must_agree_with_the_ties_of_the_model(tmp_path: Path) -> None:
    for change in (0.0, 1.0):
        save_file(stored(change), tmp_path / f"{change}.safetensors")
    load_merged_weights(Tied(), tmp_path / "0.0.safetensors")
    with pytest.raises(UserError, match=r"head\.weight are tied in Tied"):
        load_merged_weights(Tied(), tmp_path / "1.0.safetensors")
