"""Whatever a launcher leaves unwritten shows: torch.empty is filled with NaN (integers: with their largest value).
Kernels are compiled ahead of time for one GPU, and for the others under `-m other_targets`."""

from collections.abc import Iterator

import pytest
import torch
from ahead_of_time import TARGETS

USUAL = "sm_90"


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=[pytest.param(name, marks=[pytest.mark.other_targets][name == USUAL :]) for name in TARGETS])
def target(request: pytest.FixtureRequest) -> str:
    """The GPU that a kernel is compiled for."""
    return request.param
