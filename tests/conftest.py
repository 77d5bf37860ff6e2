"""Settings of the whole suite: offline, quiet, and two threads at most, whatever the machine."""

import os
from collections.abc import Iterator

os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is defined, so before any test imports one
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(min(2, os.cpu_count() or 1))

# Timings mean nothing on a shared machine, and a suite that others rely on should not draw new cases every night.
settings.register_profile("suite", deadline=None, derandomize=True)
settings.load_profile("suite")


@pytest.fixture(autouse=True)
def no_seed_is_left() -> Iterator[None]:
    """Lightning leaves its seed in the environment, where processes that later tests start would find it."""
    yield
    os.environ.pop("PL_GLOBAL_SEED", None)
