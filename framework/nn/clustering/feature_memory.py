"""The last features of each image of the data, on every rank: what methods cluster between epochs.

Shapes: B images of this rank, N of all ranks, M places, F features.
"""

import torch
from torch import Tensor, nn

from lightspan.core.distributed import gather_rows, rank, register_replicated, world_size
from lightspan.core.ranges import require_in
from lightspan.nn.clustering.spherical_kmeans import drawn_rows, spherical_kmeans
from lightspan.nn.step_buffer import StepBuffer


class FeatureMemory(nn.Module):
    """Rows by the number of their image, the same on all ranks. An image that was not seen yet has a row of zeros.

    Args:
        images: M; numbers of images lie in [0, M). Places without an image do no harm.
        width: F.
    """

    rows_MF: Tensor

    def __init__(self, images: int, width: int) -> None:
        super().__init__()
        require_in("[1, inf)", images=images)
        register_replicated(self, "rows_MF", torch.zeros(images, width))
        self._seen = StepBuffer[tuple[Tensor, Tensor]]()

    def see(self, row_BF: Tensor, index_B: Tensor, step: int) -> None:
        """What a micro-batch of this step gave; it takes its place with `follow`."""
        self._seen.add((row_BF.detach(), index_B), step)

    @torch.no_grad()
    def follow(self) -> None:
        """Puts the rows of all ranks and micro-batches into their places, after the step."""
        rows, numbers = zip(*self._seen.take(), strict=True)
        index_N = gather_rows(torch.cat(numbers))[0]
        self.rows_MF[index_N] = gather_rows(torch.cat(rows))[0].to(self.rows_MF)

    def known(self) -> Tensor:
        """Numbers of the images that have a row, int64 [N] in ascending order."""
        return self.rows_MF.any(dim=1).nonzero()[:, 0]

    def clusters(self, count: int, seeds: list[int], steps: int) -> tuple[Tensor, Tensor]:
        """Spherical k-means of the known rows, the best of a start from each seed.

        Returns: (numbers of the images, their clusters), int64 [N], equal on all ranks.
        Raises: UserError for fewer known images than clusters.
        """
        own_M = self.known()[rank() :: world_size()]
        row_MF = self.rows_MF[own_M]
        starts = [drawn_rows(row_MF, own_M, count, seed) for seed in seeds]
        found = max((spherical_kmeans(row_MF, start, steps) for start in starts), key=lambda one: float(one.objective))
        return gather_rows(own_M)[0], gather_rows(found.nearest_M)[0]
