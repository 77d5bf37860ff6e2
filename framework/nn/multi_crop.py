"""Views of several sizes through one network: one pass for each size, as DINO and SwAV make them of multi-crop."""

from collections.abc import Callable, Sequence
from itertools import groupby

import torch
from torch import Tensor


def one_pass_a_size(network: Callable[[Tensor], Tensor], views: Sequence[Tensor]) -> list[Tensor]:
    """What the network gives for each view, in their order: views of one size that follow each other go through it
    together, so that a BatchNorm sees all of them at once.

    Args:
        network: [R C h w] -> [R ...], such as a backbone, with or without a projector.
        views: [B C h w], each with a B of its own; none gives an empty list.
    """
    seen: list[Tensor] = []
    for _, same in groupby(views, key=lambda view: view.shape[1:]):
        run = [*same]
        seen += network(torch.cat(run)).split([len(view) for view in run])
    return seen
