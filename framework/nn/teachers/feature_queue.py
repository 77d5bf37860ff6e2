"""The last embeddings of all ranks, first in, first out: more rows than a batch has, for what compares or counts rows.

Shapes: B rows of this rank, N rows of all ranks, L rows in the queue, D width.
"""

import torch
from torch import Tensor, nn

from lightspan.devices import has_values
from lightspan.distributed import gather_rows
from lightspan.errors import UserError


class FeatureQueue(nn.Module):
    """Holds L rows, the same on all ranks and part of the state, so a run resumes on any number of ranks.

    It is shown the rows of each micro-batch (`see`) and takes them in once after the step (`follow`): no row of a step
    meets another one of it in the queue, and a step that was skipped leaves nothing there.

    Args:
        length: L, at least 1.
        width: D.
    """

    rows_LD: Tensor
    filled: Tensor

    def __init__(self, length: int, width: int) -> None:
        super().__init__()
        if min(length, width) < 1:
            raise UserError(f"FeatureQueue: length={length} and width={width} must each be at least 1")
        self.register_buffer("rows_LD", torch.zeros(length, width))
        self.register_buffer("filled", torch.zeros((), dtype=torch.int64))
        self.step = 0  # whose rows are in `seen`
        self.seen: list[Tensor] = []  # of each micro-batch, on this rank

    @property
    def full(self) -> bool:
        """Whether L rows have come, which asks the device for it; a plan counts the rows as there."""
        return not has_values(self.filled) or int(self.filled) >= len(self.rows_LD)

    def see(self, rows_BD: Tensor, step: int = 0) -> None:
        """Keeps a micro-batch of this step for `follow`; rows of another step, which was not taken, are forgotten."""
        if step != self.step:
            self.seen.clear()
            self.step = step
        self.seen.append(rows_BD.detach())

    def follow(self) -> None:
        """Takes in what was seen. Every rank must call it; without a micro-batch it does nothing."""
        if self.seen:
            self.push(torch.cat(self.seen))
            self.seen.clear()

    @torch.no_grad()
    def push(self, rows_BD: Tensor) -> None:
        """The rows of all ranks come in and as many of the oldest go; every rank must call it. The newest are last."""
        new_ND = gather_rows(rows_BD.detach())[0].to(self.rows_LD)
        self.filled += len(new_ND)
        self.rows_LD.copy_(torch.cat([self.rows_LD, new_ND])[-len(self.rows_LD) :])
