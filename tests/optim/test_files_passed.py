"""How far a step leads through the files of this project: someone who follows it has to read these."""

from pathlib import Path
from typing import Any

import pytest
import torch
from every_preset import WHOLE
from passed_files import files_passed
from torch import nn

from lightspan.optim import muon
from lightspan.optim.low_rank.optimizer import LowRank

FOLDER = Path(muon.__file__).parent


def passed_by(kind: type[Any], **options: Any) -> set[str]:
    """In the second step of two linear layers."""
    net = nn.Sequential(nn.Linear(12, 8, bias=False), nn.Linear(8, 12, bias=False))
    optimizer = kind(net.parameters(), **options)
    for _ in range(2):
        for parameter in net.parameters():
            parameter.grad = torch.ones_like(parameter)
        with files_passed(FOLDER) as passed:
            optimizer.step()
    return passed


@pytest.mark.parametrize("kind", WHOLE, ids=lambda kind: kind.__name__)
def test_a_step_of_whole_matrices_passes_nine_files_and_none_of_the_engine_of_subspaces(kind) -> None:
    passed = passed_by(kind)
    assert not [file for file in passed if file.startswith("low_rank/")]
    assert {"muon", "matrices/newton_schulz", "matrices/moments"} <= passed
    assert len(passed) <= 9


def test_a_step_inside_subspaces_passes_twelve_files_and_not_that_of_whole_matrices() -> None:
    passed = passed_by(LowRank, rank=4)
    assert "muon" not in passed
    assert len(passed) <= 12
