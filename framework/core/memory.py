"""How much memory optimiser state and parameters take. Sizes in bytes."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lightspan.core.sharded import local

MIB = 2**20


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of every tensor in `optimizer.state`, each storage counted once and whole; for a DTensor the local shard.

    A view counts with the storage that it keeps alive. Before the first step there is no state, so the result is 0.
    """
    storages = {}
    for tensor in _tensors(list(optimizer.state.values())):
        storage = tensor.untyped_storage()
        storages[storage._cdata] = storage.nbytes()
    return sum(storages.values())


def parameter_counts(module: nn.Module) -> tuple[int, int]:
    """(all, trainable) numbers in the parameters of `module`, shared parameters counted once."""
    parameters = list(module.parameters())
    return sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.requires_grad)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield local(value)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
