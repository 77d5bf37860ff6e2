"""Mean average precision of tags as a torchmetrics Metric, for many tags of which some are not known.

AP of a tag = sum_t (R_t - R_(t-1)) P_t over thresholds t from the highest down, with precision P and recall R among the
samples whose tag is known. torchmetrics' own `MultilabelAveragePrecision` keeps every score, or makes a tensor of
samples x tags x thresholds in each batch; it counts a tag that no sample has as 0, and scores in [0, 1] as no logits.
Shapes: B samples, G tags, T bins of scores.
"""

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lightspan.core.devices import wide

EDGES = torch.linspace(-10, 10, 401)
"""Of the bins: logits that fall between two of them count as equal."""


class TagPrecision(Metric):
    """The mean over tags that some sample is known to have, in [0, 1]; NaN where there is none.

    Counts alone are kept, 16 bytes a tag and bin, which ranks sum: the result is the same for any batches and ranks.

    Args:
        num_tags: G.
        options: of torchmetrics.Metric.
    """

    higher_is_better = True
    is_differentiable = False
    full_state_update = False
    known_TG: Tensor
    hold_TG: Tensor

    def __init__(self, num_tags: int, **options: Any) -> None:
        super().__init__(**options)
        for name in ("known_TG", "hold_TG"):
            empty_TG = torch.zeros(len(EDGES) + 1, num_tags, dtype=torch.int64)
            self.add_state(name, empty_TG, dist_reduce_fx="sum")

    def update(self, logits_BG: Tensor, hold_BG: Tensor, known_BG: Tensor) -> None:
        """Args: hold_BG, known_BG: whether a tag holds, and whether that is known, both bool."""
        bin_BG = torch.bucketize(wide(logits_BG.detach()).contiguous(), EDGES.to(logits_BG.device), right=True)
        self.known_TG = self.known_TG.scatter_add(0, bin_BG, known_BG.long())
        self.hold_TG = self.hold_TG.scatter_add(0, bin_BG, (known_BG & hold_BG).long())

    def compute(self) -> Tensor:
        """Scalar."""
        hold_TG, known_TG = self.hold_TG.flip(0), self.known_TG.flip(0)  # from the highest scores down
        precision_TG = hold_TG.cumsum(0) / known_TG.cumsum(0).clamp_min(1)
        total_G = hold_TG.sum(0)
        ap_G = (precision_TG * hold_TG).sum(0) / total_G  # R_t - R_(t-1) = what holds in bin t over all that holds
        return ap_G[total_G > 0].mean()
