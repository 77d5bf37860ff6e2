"""Random draws of torch's own generator that leave no trace in it."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def drawn_from(seed: int) -> Iterator[None]:
    """Inside, torch's CPU generator starts from `seed`; afterwards its state is restored. Generators of other devices
    are left alone, which `torch.manual_seed` would set anew.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield
