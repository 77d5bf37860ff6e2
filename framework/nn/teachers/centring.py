"""The running mean of a teacher's scores, which DINO takes off them so that no prototype draws all images.

Source: Caron et al., "DINO", 2021, arXiv 2104.14294, eq. 4.
Shapes: B rows of this rank, K prototypes.
"""

import torch
from torch import Tensor, nn

from lightspan.devices import wide
from lightspan.distributed import all_reduce_sums


class Centre(nn.Module):
    """c <- m c + (1 - m) mean over the rows of all ranks; call it for c [K] in float32, `follow` it with each batch.

    Args:
        prototypes: K.
        momentum: m, in [0, 1).
    """

    centre_K: Tensor

    def __init__(self, prototypes: int, momentum: float = 0.9) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("centre_K", torch.zeros(prototypes))

    def forward(self) -> Tensor:
        return self.centre_K

    @torch.no_grad()
    def follow(self, scores_BK: Tensor) -> None:
        """Every rank must call it; batches without a row anywhere leave the centre."""
        rows = wide(scores_BK)
        count = torch.full((), float(len(rows)), dtype=rows.dtype, device=rows.device)
        total_K, count = all_reduce_sums(rows.sum(dim=0), count)
        mean_K = torch.where(count > 0, total_K / count.clamp_min(1), self.centre_K)
        self.centre_K.lerp_(mean_K.to(self.centre_K.dtype), 1 - self.momentum)
