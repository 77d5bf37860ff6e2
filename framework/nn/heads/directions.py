"""Prototypes as directions: how they score vectors, before a small temperature divides that, and how they wait."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from lightspan.core.devices import wide


def dot_products(x: Tensor, direction_KD: Tensor) -> Tensor:
    """[..., D] -> [..., K], in float32 or wider, also under autocast.

    Cosines near 1 are 2^-8 apart in bfloat16, of which a temperature of 0.04 makes 0.1 nats.
    """
    with torch.autocast(x.device.type, enabled=False):
        return wide(x) @ wide(direction_KD).T


def zero_grads(parts: Iterable[nn.Module]) -> None:
    """The next step of the optimiser leaves the weights of these parts alone, as DINO and SwAV treat prototypes in
    their first epoch: they have no gradient, which is not a gradient of zero, so they do not decay either.
    """
    for part in parts:
        for parameter in part.parameters():
            parameter.grad = None
