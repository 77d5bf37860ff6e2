"""What can be said of a hidden pixel of a series without learning.

Shapes: B series, C bands, T dates, h w sides.
"""

import torch
from torch import Tensor

from lightspan.core.devices import wide


def between_dates(image_BCThw: Tensor, valid_BCThw: Tensor, day_BT: Tensor) -> Tensor:
    """Each pixel that is not valid, by linear interpolation between the nearest valid dates before and after it; where
    there is one side alone by the nearest date there, and 0, the band's mean, where no date is valid. [B C T h w]

    Args:
        valid_BCThw: bool.
        day_BT: ascending.
    """
    dates = range(image_BCThw.shape[2])
    # Half types hold no day of a year exactly.
    wide_BCThw = wide(image_BCThw)
    day_BT111 = day_BT[:, :, None, None, None].to(wide_BCThw)
    zero, never = torch.zeros_like(wide_BCThw[:, :, 0]), torch.zeros_like(valid_BCThw[:, :, 0])

    def nearest(order: list[int]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Of the dates up to and with each, in this order: the last valid value, its day, and whether there is one."""
        values, days, known = [zero] * len(order), [zero] * len(order), [never] * len(order)
        value, day, seen = zero, zero, never
        for t in order:
            here = valid_BCThw[:, :, t]
            value = wide_BCThw[:, :, t].where(here, value)
            day = day_BT111[:, t].expand_as(zero).where(here, day)
            seen = seen | here
            values[t], days[t], known[t] = value, day, seen
        return values, days, known

    (before, day_before, has_before), (after, day_after, has_after) = nearest([*dates]), nearest([*dates][::-1])
    filled = []
    for t in dates:
        share = (day_BT111[:, t] - day_before[t]) / (day_after[t] - day_before[t]).clamp_min(1e-6)
        middle = before[t] + share.clamp(0, 1) * (after[t] - before[t])
        one_side = before[t].where(has_before[t], after[t])
        filled.append(middle.where(has_before[t] & has_after[t], one_side))
    return torch.stack(filled, dim=2).to(image_BCThw).where(~valid_BCThw, image_BCThw)
