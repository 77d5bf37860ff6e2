"""Labels of a clip's first frame carried on by similar patches, and how well their contours then lie.

Source: Jabri, Owens, Efros, "Space-Time Correspondence as a Contrastive Random Walk", 2020, arXiv 2006.14613, with
whose code CropMAE (arXiv 2403.17823) is evaluated; Perazzi et al., "A Benchmark Dataset and Evaluation Methodology for
Video Object Segmentation", CVPR 2016, and the code of DAVIS 2017 (F; J is
`lightspan.evaluation.dense.prompt_masks.iou`).
Differences: a patch of the first frame has the shares of objects of its pixels, and the first frame counts once among
the sources, where that code repeats it until there are enough frames.
Shapes: F frames, T patches of a frame on a grid H W, D features, h w pixels, O objects. `propagated_labels` takes
frames of any number of axes, such as volumes; contours are of two.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from lightspan.evaluation.dense.patches import at_pixels, fitted, pixels_of_patches
from lightspan.evaluation.rows import unit_rows

PAIRS = 1 << 22
"""Similarities that are held at once."""
TOLERANCE = 0.008
"""Share of an image's diagonal by which a contour may be off, as in DAVIS's code."""


def propagated_labels(
    patches_FTD: Tensor,
    first_hw: Tensor,
    grid: tuple[int, ...],
    context: int = 20,
    neighbours: int = 7,
    radius: float = 20.0,
    temperature: float = 0.7,
    whole_first: bool = True,
) -> Tensor:
    """Labels of all frames from those of the first, int64 [F h w]; those of the first stay as they are.

    A patch takes the mean of the label shares of the `neighbours` patches most similar to it, by cosine, weighted by a
    softmax of similarity over `temperature`, among those of the first frame and of the last `context` frames. Shares
    are enlarged to the pixels, linear along each axis, and a pixel has the label with the largest share.

    Args:
        patches_FTD: row by row.
        first_hw: whole numbers, of any size and numbering.
        radius: patches whose centres are so many patches away, or farther, are no neighbours; above 0.
        whole_first: whether all patches of the first frame may be, as in the authors' code.
    """
    patches_FTD = unit_rows(patches_FTD)
    known_O, number_hw = first_hw.unique(return_inverse=True)
    number_hw = number_hw.view_as(first_hw)
    pixels_Td = pixels_of_patches(fitted(number_hw[None], grid), grid)[0]
    shares = [F.one_hot(pixels_Td, len(known_O)).to(patches_FTD.dtype).mean(dim=1)]
    lines = (torch.arange(side, device=patches_FTD.device) for side in grid)
    place_TA = torch.stack(torch.meshgrid(*lines, indexing="ij"), dim=-1).flatten(0, -2)
    far_TT = (place_TA[:, None] - place_TA).square().sum(dim=2) >= radius**2
    for frame in range(1, len(patches_FTD)):
        sources = [0, *range(max(1, frame - context), frame)]
        far_TS = torch.cat([far_TT & (source > 0 or not whole_first) for source in sources], dim=1)
        source_SD, share_SO = patches_FTD[sources].flatten(0, 1), torch.cat([shares[source] for source in sources])
        size, found = max(1, PAIRS // len(source_SD)), []
        for query_BD, far_BS in zip(patches_FTD[frame].split(size), far_TS.split(size), strict=True):
            similar_BS = (query_BD @ source_SD.T).masked_fill(far_BS, -torch.inf)
            best_Bk, where_Bk = similar_BS.topk(min(neighbours, len(source_SD)), dim=1)
            weight_Bk1 = (best_Bk / temperature).softmax(dim=1)[..., None]
            found.append((weight_Bk1 * share_SO[where_Bk]).sum(dim=1))
        shares.append(torch.cat(found))
    labels = [number_hw]
    for share_TO in shares[1:]:
        maps_1OHW = share_TO.T.unflatten(1, grid)[None]
        labels.append(at_pixels(maps_1OHW, tuple(first_hw.shape))[0].argmax(dim=0))
    return known_O[torch.stack(labels)]


def contour_accuracy(found_Fhw: Tensor, true_Fhw: Tensor, tolerance: float = TOLERANCE) -> Tensor:
    """F of each frame, float64 [F] in [0, 1]: the harmonic mean of two shares, of the found contour that lies near the
    true one, and of the true one that lies near the found one; 1 where both masks have none, 0 where one has.

    Args:
        tolerance: what is near, as a share of the diagonal, rounded up to whole pixels.
    """
    reach = math.ceil(tolerance * math.hypot(*true_Fhw.shape[1:]))
    offset = torch.arange(-reach, reach + 1, device=true_Fhw.device).square()
    disk_11kk = (offset[:, None] + offset <= reach**2).float()[None, None]
    contours = [_contour(mask_Fhw) for mask_Fhw in (found_Fhw, true_Fhw)]
    near = [F.conv2d(each[:, None].float(), disk_11kk, padding=reach)[:, 0] > 0.5 for each in contours]
    count, hits = (
        [(each & of).flatten(1).sum(dim=1).double() for each, of in zip(contours, others, strict=True)]
        for others in (contours, near[::-1])
    )
    # Without a contour a mask is right about all of it, which is nothing.
    precision, recall = (torch.where(n > 0, hit / n.clamp_min(1), 1.0) for hit, n in zip(hits, count, strict=True))
    return 2 * precision * recall / (precision + recall).clamp_min(torch.finfo(torch.float64).tiny)


def _contour(mask_Fhw: Tensor) -> Tensor:
    """Pixels that differ from the one below, the one to the right or the one between these, bool [F h w]."""
    shifted = F.pad(mask_Fhw[:, None].float(), (0, 1, 0, 1), mode="replicate")[:, 0] > 0.5
    below, right, across = shifted[:, 1:, :-1], shifted[:, :-1, 1:], shifted[:, 1:, 1:]
    return (mask_Fhw ^ below) | (mask_Fhw ^ right) | (mask_Fhw ^ across)
