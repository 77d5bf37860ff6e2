"""How far a step leads through the files of this project, kernels included: who follows it has to read these."""

from typing import Any

import torch
from every_preset import WHOLE
from passed_files import files_passed
from torch import nn

from lightspan.optim.low_rank.optimizer import LowRank
from lightspan.optim.muon import FactoredMuon

OF_WHOLE_MATRICES, IN_SUBSPACES, OF_8_BITS = 8, 10, 2
"""Files; those of moments in 8 bits are their kernel and the noise of its rounding."""


def passed_by(kind: type[Any], **options: Any) -> set[str]:
    """In the second step of two linear layers."""
    net = nn.Sequential(nn.Linear(12, 8, bias=False), nn.Linear(8, 12, bias=False))
    optimizer = kind(net.parameters(), **options)
    for _ in range(2):
        for parameter in net.parameters():
            parameter.grad = torch.ones_like(parameter)
        with files_passed() as passed:
            optimizer.step()
    return passed


def test_a_step_of_whole_matrices_passes_eight_files_and_none_of_the_engine_of_subspaces() -> None:
    for kind in WHOLE:
        passed = passed_by(kind)
        assert not [file for file in passed if file.startswith("framework/optim/low_rank/")]
        assert {f"framework/optim/{file}" for file in ("muon", "matrices/newton_schulz", "matrices/moments")} <= passed
        assert len(passed) <= OF_WHOLE_MATRICES + (kind is FactoredMuon) * OF_8_BITS, (kind, sorted(passed))


def test_a_step_inside_subspaces_passes_ten_files_and_not_that_of_whole_matrices() -> None:
    passed = passed_by(LowRank, rank=4)
    assert "framework/optim/muon" not in passed
    assert "framework/optim/low_rank/core" in passed
    assert len(passed) <= IN_SUBSPACES, sorted(passed)
