"""Asymmetric loss: many tags an image, of which few hold, so that those that do not are to weigh less.

Source: Ben-Baruch et al., "Asymmetric Loss For Multi-Label Classification", ICCV 2021, arXiv 2009.14119, equations 4 to
7: with p = sigmoid(logit) and p_m = max(p - m, 0), a tag that holds costs -(1 - p)^g+ log p, and one that does not
-p_m^g- log(1 - p_m). Without focus and margin it is the binary cross-entropy.
Differences: the mean over the tags of an image in place of their sum, so that its scale is independent of how many
tags there are; tags that are not known have no say; gradients go through the weights (1 - p)^g+ and p_m^g- too, as in
the equations, where the authors' code lets one choose.
Shapes: B images of this rank, G tags.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from lightspan.core.devices import wide
from lightspan.core.errors import UserError
from lightspan.core.ranges import require_in
from lightspan.objectives.means import known_mean


def require_asymmetry(positive_focus: float, negative_focus: float, margin: float) -> None:
    """Raises: UserError for a focus between 0 and 1, whose slope is infinite at a certain tag, or a margin outside
    [0, 1).
    """
    for name, focus in (("positive_focus", positive_focus), ("negative_focus", negative_focus)):
        if focus != 0 and not 1 <= focus < math.inf:
            raise UserError(f"{name}={focus} must be 0 or at least 1, and finite")
    require_in("[0, 1)", margin=margin)


def asymmetric_loss(
    logits_BG: Tensor,
    holds_BG: Tensor,
    known_BG: Tensor | None = None,
    positive_focus: float = 0.0,
    negative_focus: float = 4.0,
    margin: float = 0.05,
) -> Tensor:
    """Mean over the known tags of all ranks, in nats; 0 if none is known.

    Args:
        holds_BG: whether a tag holds: bool, or numbers that are 0 or not.
        known_BG: likewise, whether that is known; None is everywhere.
        positive_focus, negative_focus: g+ and g-, 0 or at least 1.
        margin: m, in [0, 1).
    Returns: scalar >= 0, the same on all ranks, in float32 or wider.
    Raises: UserError for settings out of these ranges.
    """
    require_asymmetry(positive_focus, negative_focus, margin)
    x_BG = wide(logits_BG)
    right_BG = (1 - x_BG.sigmoid()).pow(positive_focus) * F.logsigmoid(x_BG)
    # log(1 - p_m) = log min(1 - p + m, 1), from logarithms: 1 - p rounds to 0 where its logarithm is still exact.
    log_margin = x_BG.new_full((), margin).log()
    above_BG = (x_BG.sigmoid() - margin).clamp_min(0).pow(negative_focus)
    wrong_BG = above_BG * torch.logaddexp(F.logsigmoid(-x_BG), log_margin).clamp_max(0)
    known_BG = torch.ones_like(x_BG, dtype=torch.bool) if known_BG is None else known_BG.bool()
    return known_mean(-torch.where(holds_BG.bool(), right_BG, wrong_BG), known_BG)
