"""Labels that a table has no row for, told before they are looked up."""

import torch
from torch import Tensor

from lightspan.devices import has_values
from lightspan.errors import UserError


def require_labels(label_B: Tensor, num_classes: int, owner: object) -> None:
    """Raises: UserError for labels that are no whole numbers [B], and for one outside [0, num_classes) on the CPU;
    asking an accelerator would wait for it.
    """
    if label_B.ndim != 1 or label_B.dtype == torch.bool or label_B.is_floating_point():
        raise UserError(
            f"{type(owner).__name__} takes classes as whole numbers [B], and labels are {label_B.dtype} "
            f"{list(label_B.shape)}; let the dataset give one number for each sample, from 0 to {num_classes - 1}"
        )
    if label_B.device.type != "cpu" or not has_values(label_B) or not len(label_B):
        return
    least, largest = (int(end) for end in torch.aminmax(label_B))
    if least < 0 or largest >= num_classes:
        raise UserError(
            f"labels from {least} to {largest} do not fit {type(owner).__name__} of {num_classes} classes; "
            f"labels count from 0, so it needs {largest + 1} classes or more"
        )
