"""Which pixels and channels of a batch were seen, and pictures reduced to the means over what was.

Shapes: B pictures, C bands, H W pixels; a series has an axis of its dates before these.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightspan.core.batches import described
from lightspan.core.errors import UserError


def valid_of(batch: Mapping[str, Any], image: Tensor, method: str) -> Tensor:
    """`valid` of a batch as bool, of the shape of its pictures; all pixels where the batch has none.

    Args:
        image: the pictures as the method reads them.
        method: its name, for messages.
    Raises: UserError for one of another shape.
    """
    valid = batch.get("valid")
    if valid is None:
        return torch.ones_like(image, dtype=torch.bool)
    if not isinstance(valid, Tensor) or valid.shape != image.shape:
        found = [*valid.shape] if isinstance(valid, Tensor) else type(valid).__name__
        raise UserError(
            f"{method} needs to know of each pixel and band whether it is valid, and this batch has image "
            f"{[*image.shape]} and valid {found}; let the dataset give both in one shape, or no valid"
        )
    return valid > 0


def present_of(batch: Mapping[str, Any], image: Tensor, method: str) -> Tensor | None:
    """`present` of a batch, bool [B C]: which channels a sample has; None where the batch does not say: all are there.

    Args:
        image: what the method reads of the batch, [B C ...].
        method: its name, for messages.
    Raises: UserError for anything else.
    """
    present_BC = batch.get("present")
    if present_BC is None:
        return None
    if not isinstance(present_BC, Tensor) or present_BC.shape != image.shape[:2] or present_BC.is_floating_point():
        found = (
            f"{present_BC.dtype} {[*present_BC.shape]}" if isinstance(present_BC, Tensor) else type(present_BC).__name__
        )
        raise UserError(
            f"{method} needs to know of each channel whether a sample has it, bool {[*image.shape[:2]]}, and this "
            f"batch gives {found} as present; let the dataset give that, or none"
        )
    return present_BC > 0


def inside_of(batch: Mapping[str, Any], image: Tensor, method: str) -> Tensor:
    """`inside` of a batch, bool [B sides...]: which voxels lie in the sample and do not pad it; all where the batch has
    none.

    Args:
        image: what the method reads of the batch, [B C sides...].
        method: its name, for messages.
    Raises: UserError for anything else.
    """
    inside_B = batch.get("inside")
    if inside_B is None:
        return torch.ones_like(image[:, 0], dtype=torch.bool)
    shape = (len(image), *image.shape[2:])
    if not isinstance(inside_B, Tensor) or inside_B.shape != shape or inside_B.is_floating_point():
        raise UserError(
            f"{method} needs to know of each voxel whether it lies inside, bool {[*shape]}, and this batch gives "
            f"{described(inside_B)} as inside; let the dataset give that, or none"
        )
    return inside_B > 0


def area_reduced(image_BCHW: Tensor, valid_BCHW: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """Means of squares of `factor` pixels a side over what is valid there, 0 where nothing is, and whether all is.

    Raises: UserError for sides that squares do not fill.
    """
    image_BCHW = image_BCHW.where(valid_BCHW, 0)  # which may hold anything elsewhere
    if factor == 1:
        return image_BCHW, valid_BCHW
    if any(side % factor for side in image_BCHW.shape[2:]):
        raise UserError(
            f"pictures of {' x '.join(map(str, image_BCHW.shape[2:]))} pixels cannot be reduced {factor} times; give "
            f"pictures whose sides are multiples of {factor}"
        )
    seen_BCHW = F.avg_pool2d(valid_BCHW.to(image_BCHW.dtype), factor)
    # An average of a power of two of ones is exactly 1 in every floating-point type.
    sums_BCHW = F.avg_pool2d(image_BCHW, factor)
    return sums_BCHW / seen_BCHW.clamp_min(1 / (2 * factor**2)), F.avg_pool2d(valid_BCHW.float(), factor) > 1 - 1e-4
