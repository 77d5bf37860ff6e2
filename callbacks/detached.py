"""Looking at a model in training without touching it."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn


@contextmanager
def detached(module: nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradients inside; the mode of every submodule and all random states as before outside."""
    modes = [(part, part.training) for part in module.modules()]
    try:
        with torch.no_grad(), isolate_rng():
            module.eval()
            yield
    finally:
        for part, training in modes:
            part.training = training
