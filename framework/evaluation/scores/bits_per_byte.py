"""Bits per byte as a torchmetrics Metric: what a byte of real text costs, whatever its tokens are."""

import math
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric


class BitsPerByte(Metric):
    """All nats over all bytes, in bits, at least 0; NaN without a byte.

    Nats and bytes are summed over batches and ranks before one is divided by the other, so texts of any length weigh by
    their bytes, and a last batch that is smaller changes nothing. A mean of bytes per token, by which losses per token
    are divided elsewhere, knows nothing of the text at hand.

    Args:
        options: of torchmetrics.Metric.
    """

    higher_is_better = False
    is_differentiable = False
    full_state_update = False
    nats: Tensor
    bytes: Tensor

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        # Float64: a float32 sum stops to grow when it is 2^24 times what is added.
        self.add_state("nats", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("bytes", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, nats: Tensor, byte_counts: Tensor) -> None:
        """Of some text: nats of its tokens and bytes they stand for, each of any shape, summed here."""
        self.nats = self.nats + nats.detach().double().sum()
        self.bytes = self.bytes + byte_counts.sum()

    def compute(self) -> Tensor:
        """Scalar."""
        return self.nats / (math.log(2) * self.bytes)
