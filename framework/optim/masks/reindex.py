"""What an optimiser keeps for a parameter that stores active coordinates alone, when others become active."""

import torch
from torch import Tensor
from torch.optim import Optimizer


@torch.no_grad()
def reindex(optimizer: Optimizer, parameter: Tensor, source_k: Tensor) -> None:
    """Moves the state of each entry to where its coordinate is now: moments of coordinates that left vanish, and those
    of new ones start at zero. For optimisers that keep one number an entry, see `follow.require_entrywise`.

    Args:
        source_k: int64, where the coordinate of each entry was before; -1 for a new one.
    """
    for value in optimizer.state.get(parameter, {}).values():
        if isinstance(value, Tensor) and value.shape == parameter.shape and value.ndim:
            value.copy_(torch.where(source_k >= 0, value[source_k.clamp_min(0)], 0))
