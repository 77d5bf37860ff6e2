"""The running mean of a teacher's scores, which DINO takes off them so that no prototype draws all images.

Source: Caron et al., "DINO", 2021, arXiv 2104.14294, eq. 4.
Shapes: B rows of this rank, K prototypes.
"""

import torch
from torch import Tensor, nn

from lightspan.core.devices import wide
from lightspan.core.distributed import all_reduce_sum, register_replicated
from lightspan.nn.step_buffer import StepBuffer


class Centre(nn.Module):
    """c <- m c + (1 - m) mean over the rows of all ranks and micro-batches of a step; call it for c [K] in float32.

    It is shown the scores of each micro-batch (`see`) and follows them once after the step (`follow`), so that all
    targets of a step are centred alike and accumulated gradients train as one batch.

    Args:
        prototypes: K.
        momentum: m, in [0, 1).
    """

    centre_K: Tensor

    def __init__(self, prototypes: int, momentum: float = 0.9) -> None:
        super().__init__()
        self.momentum = momentum
        register_replicated(self, "centre_K", torch.zeros(prototypes))
        self.seen = StepBuffer[Tensor]()  # of each micro-batch [K + 1]: this rank's sum of rows, and their number

    def forward(self) -> Tensor:
        return self.centre_K

    @torch.no_grad()
    def see(self, scores_BK: Tensor, step: int = 0) -> None:
        """Keeps a micro-batch of this step for `follow`; rows of another step, which was not taken, are forgotten."""
        rows = wide(scores_BK)
        self.seen.add(torch.cat([rows.sum(dim=0), rows.new_full((1,), len(rows))]), step)

    @torch.no_grad()
    def follow(self) -> None:
        """Moves the centre by what was seen. Every rank must call it; a step without a row anywhere leaves it."""
        seen = self.seen.take()
        if not seen:
            return
        total = all_reduce_sum(torch.stack(seen).sum(dim=0))
        mean_K = torch.where(total[-1] > 0, total[:-1] / total[-1].clamp_min(1), self.centre_K)
        self.centre_K.lerp_(mean_K.to(self.centre_K.dtype), 1 - self.momentum)
