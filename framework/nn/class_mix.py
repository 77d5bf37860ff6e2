"""ClassMix: half of the classes of one image are pasted, pixel by pixel, on another.

Source: Olsson et al., "ClassMix", WACV 2021, arXiv 2007.07936; between domains Tranheden et al., "DACS", WACV 2021,
arXiv 2007.08702.
Shapes: B images, C channels, H W image, K classes.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from lightspan.core.noise import hashed_noise, mixed_seed


def pasted_pixels(label_BHW: Tensor, num_classes: int, index_B: Tensor, *seeds: int) -> Tensor:
    """Where an image is pasted, bool [B H W]: the pixels of half of its classes, rounded up, drawn at random.

    Args:
        label_BHW: int64 in [0, K); below 0 where a pixel has no class, which is never pasted.
        index_B: int64, the images' numbers; with `seeds` they decide the draw.
    """
    known_BHW = label_BHW >= 0
    class_BHWK = F.one_hot(label_BHW.clamp_min(0), num_classes).bool() & known_BHW[..., None]
    present_BK = class_BHWK.flatten(1, 2).any(dim=1)
    score_BK = hashed_noise(mixed_seed(index_B, *seeds), 0, (num_classes,))
    # Places in the order of scores, present classes first.
    place_BK = score_BK.masked_fill(~present_BK, torch.inf).argsort(dim=1, stable=True).argsort(dim=1, stable=True)
    chosen_BK = present_BK & (2 * place_BK < present_BK.sum(dim=1, keepdim=True))
    at_BHW = chosen_BK.gather(1, label_BHW.clamp_min(0).flatten(1)).view_as(label_BHW)
    return at_BHW & known_BHW
