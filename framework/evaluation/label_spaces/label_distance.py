"""The mean squared distance of predicted labels to the right ones, on any number of ranks."""

import torch
from torch import Tensor
from torchmetrics import Metric

from lightspan.core.errors import UserError
from lightspan.evaluation.label_spaces.label_metrics import LabelMetric


class ExpectedSquaredDistance(Metric):
    """Mean of D(prediction, label)^2 over all rows of all ranks, which Loki lowers (arXiv 2307.12226). NaN without
    rows.

    Args:
        metric: of the labels; its distances are squared here.
    """

    total: Tensor
    rows: Tensor

    def __init__(self, metric: LabelMetric) -> None:
        super().__init__()
        self.metric = metric
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("rows", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, predicted_B: Tensor, label_B: Tensor) -> None:
        """Numbers of labels, int64. Raises: UserError for another number of them, or one outside the metric."""
        if predicted_B.shape != label_B.shape or predicted_B.ndim != 1:
            raise UserError(
                f"a distance takes a predicted label for each right one, but got {list(predicted_B.shape)} for "
                f"{list(label_B.shape)}"
            )
        self.metric.require_numbers(predicted_B, "the prediction")
        self.metric.require_numbers(label_B, "the batch")
        self.total += self.metric.squared_pairs(predicted_B, label_B).sum()
        self.rows += len(label_B)

    def compute(self) -> Tensor:
        return self.total / self.rows
