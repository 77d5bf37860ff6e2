"""The last embeddings of all ranks, first in, first out: more rows than a batch has, for what compares or counts rows.

Shapes: B rows of this rank, N rows of all ranks, L rows in the queue, D width.
"""

import torch
from torch import Tensor, nn

from lightspan.core.devices import has_values
from lightspan.core.distributed import gather_rows, register_replicated
from lightspan.core.ranges import require_in
from lightspan.nn.step_buffer import StepBuffer


class FeatureQueue(nn.Module):
    """Holds L rows, the same on all ranks and part of the state, so a run resumes on any number of ranks.

    It is shown the rows of each micro-batch (`see`) and takes them in once after the step (`follow`), so that all
    micro-batches of a step meet the same rows.

    Args:
        length: L, at least 1.
        width: D.
        dtype: of the rows; whole numbers, such as labels, keep theirs when the module around is given another type.
    """

    rows_LD: Tensor
    filled: Tensor

    def __init__(self, length: int, width: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        require_in("[1, inf)", length=length, width=width)
        register_replicated(self, "rows_LD", torch.zeros(length, width, dtype=dtype))
        register_replicated(self, "filled", torch.zeros((), dtype=torch.int64))
        self.seen = StepBuffer[Tensor]()

    @property
    def full(self) -> bool:
        """Whether L rows have come in since the start, which is read from the device. `lightspan plan` has no rows to
        count and takes the queue for full, which is when a step needs most memory.
        """
        return not has_values(self.filled) or int(self.filled) >= len(self.rows_LD)

    @property
    def held_L(self) -> Tensor:
        """Which places hold a row, bool [L], read on the device: the newest rows are last."""
        places_L = torch.arange(len(self.rows_LD), device=self.rows_LD.device)
        return places_L >= len(self.rows_LD) - self.filled

    @torch.no_grad()
    def see(self, rows_BD: Tensor, step: int = 0) -> None:
        """Keeps a micro-batch of this step for `follow`; rows of another step, which was not taken, are forgotten."""
        self.seen.add(rows_BD.detach(), step)

    @torch.no_grad()
    def follow(self) -> None:
        """Takes in what was seen, micro-batch by micro-batch within a rank. Every rank must call it."""
        if seen := self.seen.take():
            self.push(torch.cat(seen))

    @torch.no_grad()
    def push(self, rows_BD: Tensor) -> None:
        """The rows of all ranks come in and as many of the oldest go; every rank must call it. The newest are last."""
        new_ND = gather_rows(rows_BD.detach())[0].to(self.rows_LD)
        self.filled += len(new_ND)
        self.rows_LD.copy_(torch.cat([self.rows_LD, new_ND])[-len(self.rows_LD) :])
