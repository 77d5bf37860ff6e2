"""How far a step leads through the files of this project: someone who follows it has to read these."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from every_preset import WHOLE
from torch import nn

from lightspan.optim import muon
from lightspan.optim.low_rank.optimizer import LowRank

FOLDER = Path(muon.__file__).parent


@contextmanager
def files_passed() -> Iterator[set[str]]:
    """The files of `lightspan.optim` of which functions are called inside, such as `matrices/layout`."""
    passed, before = set[str](), sys.getprofile()

    def watch(frame: FrameType, event: str, argument: Any) -> None:
        path = Path(frame.f_code.co_filename)
        if event == "call" and FOLDER in path.parents:
            passed.add(path.relative_to(FOLDER).with_suffix("").as_posix())

    sys.setprofile(watch)
    try:
        yield passed
    finally:
        sys.setprofile(before)


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
