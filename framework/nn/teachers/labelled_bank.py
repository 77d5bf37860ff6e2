"""The last embeddings of all ranks with the label and the image of each, in which samples look for their neighbours.

Shapes: B rows of this rank, L rows in the bank, D width.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightspan.nn.teachers.feature_queue import FeatureQueue


class Bank(NamedTuple):
    """Embeddings [L D], labels int64 [L], numbers of images int64 [L], and which of the rows count, bool [L]."""

    rows_LD: Tensor
    label_L: Tensor
    index_L: Tensor
    held_L: Tensor


class LabelledBank(nn.Module):
    """Two `FeatureQueue`s in step, of embeddings and of their labels and images; call it for the `Bank`.

    Args:
        length: L, at least 1. Longer than the data, it holds an image several times.
        width: D.
    """

    def __init__(self, length: int, width: int) -> None:
        super().__init__()
        self.rows, self.marks = FeatureQueue(length, width), FeatureQueue(length, 2, torch.int64)

    def forward(self) -> Bank:
        label_L, index_L = self.marks.rows_LD.unbind(1)
        return Bank(self.rows.rows_LD, label_L, index_L, self.rows.held_L)

    def see(self, rows_BD: Tensor, label_B: Tensor, index_B: Tensor, step: int = 0) -> None:
        """Keeps a micro-batch of this step for `follow`, see `FeatureQueue.see`."""
        self.rows.see(rows_BD, step)
        self.marks.see(torch.stack([label_B, index_B], dim=1), step)

    def follow(self) -> None:
        """Takes in what was seen. Every rank must call it."""
        self.rows.follow()
        self.marks.follow()
