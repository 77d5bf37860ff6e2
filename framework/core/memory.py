"""How much memory a run takes: optimiser state, process, parameters. Sizes in bytes."""

import resource
import sys
from collections.abc import Iterator
from pathlib import Path
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


def peak_rss_bytes() -> int:
    """Largest resident set of this process since it started; child processes such as data workers are not included."""
    try:
        status = Path("/proc/self/status").read_text()
        return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        # On Linux this value includes the peak of the process that started this one.
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def rss_bytes() -> int:
    """Resident set of this process now; if the system does not report it, its peak."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return peak_rss_bytes()
    return pages * resource.getpagesize()


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield local(value)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
