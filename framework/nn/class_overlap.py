"""How well guessed classes cover the true ones, from how often each is taken for which.

Shapes: K classes.
"""

from torch import Tensor

from lightspan.core.devices import widest_float


def overlap(counts_KK: Tensor, first: int = 1) -> dict[str, Tensor]:
    """`dice`, 2 |A and B| / (|A| + |B|), and `iou`, |A and B| / |A or B|, each the mean over all classes from `first`
    on that are there or guessed, in [0, 1]; 1 if none is.

    Args:
        counts_KK: places of each class, along the rows, by what they are guessed to be.
        first: 1 leaves out the ground, 0 nothing.
    """
    counts_KK = counts_KK.to(widest_float(counts_KK.device))
    both_K, sizes_K = counts_KK.diagonal()[first:], (counts_KK.sum(dim=0) + counts_KK.sum(dim=1))[first:]
    there_K = sizes_K > 0
    if not there_K.any():
        return {"dice": both_K.new_ones(()), "iou": both_K.new_ones(())}
    both_K, sizes_K = both_K[there_K], sizes_K[there_K]
    return {"dice": (2 * both_K / sizes_K).mean(), "iou": (both_K / (sizes_K - both_K)).mean()}
