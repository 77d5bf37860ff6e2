"""Recall among the first k as a torchmetrics Metric, for queries that are compared with every document.

Shapes: B queries of a batch, G documents.
"""

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lightspan.core.devices import wide
from lightspan.core.errors import UserError


class RecallAtK(Metric):
    """Share of the documents a query looks for that are among its k best ones: the mean over queries that look for any,
    in [0, 1]; NaN without such a query.

    Of equal scores, those of others come first, so that scores that are all alike find nothing by the order of the
    documents. Sums over queries are kept, which ranks add: the result is the same for any batches and ranks.

    Args:
        k: at least 1; of fewer documents all are among the first.
        options: of torchmetrics.Metric.
    Raises: UserError for a k below 1.
    """

    higher_is_better = True
    is_differentiable = False
    full_state_update = False
    recall: Tensor
    queries: Tensor

    def __init__(self, k: int = 10, **options: Any) -> None:
        super().__init__(**options)
        if k < 1:
            raise UserError(f"RecallAtK k={k} must be at least 1")
        self.k = k
        self.add_state("recall", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("queries", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, scores_BG: Tensor, match_BG: Tensor) -> None:
        """Args: match_BG: bool, the documents that a query looks for, any number of them.

        Raises: UserError for scores that are not finite, and for matches of another shape.
        """
        if scores_BG.ndim != 2 or match_BG.shape != scores_BG.shape:
            raise UserError(
                f"RecallAtK compares scores [B, G] with matches of the same shape, and got {list(scores_BG.shape)} and "
                f"{list(match_BG.shape)}"
            )
        scores_BG = wide(scores_BG.detach())
        if not scores_BG.isfinite().all():
            raise UserError("scores contain NaN or infinite values, so nothing is the best; the model has diverged")
        match_BG = match_BG.bool()
        others_first = match_BG.to(torch.uint8).argsort(dim=1, stable=True)
        order = scores_BG.gather(1, others_first).argsort(dim=1, descending=True, stable=True)[:, : self.k]
        found_B = match_BG.gather(1, others_first.gather(1, order)).sum(dim=1)
        wanted_B = match_BG.sum(dim=1)
        self.recall = self.recall + (found_B.double() / wanted_B.clamp_min(1)).sum()
        self.queries = self.queries + (wanted_B > 0).sum()

    def compute(self) -> Tensor:
        """Scalar."""
        return self.recall / self.queries
