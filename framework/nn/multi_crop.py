"""Views of several sizes through one network: one pass for each size, as DINO and SwAV make them of multi-crop."""

from collections.abc import Callable, Sequence
from itertools import groupby

import torch
from torch import Tensor, nn


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


class MultiCropNetwork(nn.Module):
    """A backbone, one pass for each size of view, and one pass of its head over what all of them give: V views
    [B C h w] of the same images -> [V B D].

    Args:
        backbone: [R C h w] -> [R F].
        head: [R F] -> [R D]; a BatchNorm in it sees the rows of all views at once.
    """

    def __init__(self, backbone: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, views: Sequence[Tensor]) -> Tensor:
        """At least one view."""
        rows_RD = self.head(torch.cat(one_pass_a_size(self.backbone, views)))
        return rows_RD.unflatten(0, (len(views), len(views[0])))
