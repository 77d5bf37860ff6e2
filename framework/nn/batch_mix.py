"""Pictures of a batch mixed with one another, and their labels in the same shares: MixUp and CutMix.

Source: Zhang et al., "mixup: Beyond Empirical Risk Minimization", ICLR 2018, arXiv 1710.09412; Yun et al., "CutMix",
ICCV 2019, arXiv 1905.04899; one of the two for each batch, with smoothed labels, as Touvron et al., "DeiT", ICML 2021,
arXiv 2012.12877, table 9, have it. Shapes: B batch of this rank, C H W image, K classes.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from lightspan.core.errors import UserError
from lightspan.core.ranges import require_shares


@dataclass(frozen=True)
class BatchMix:
    """Mixes each picture with the one at its place counted from the end of the batch: x and y of it become
    a x + (1 - a) x' and a y + (1 - a) y' (MixUp), or a box of it becomes that of the other, and a is the share of the
    picture that stays (CutMix). A batch of one stays as it is.

    What is drawn is a function of the seed and the optimiser's step, the same on all ranks and in all parts of a step;
    each rank mixes its own pictures, so the pairs depend on the number of ranks.

    Args:
        mixup, cutmix: alpha of the Beta distribution of a, >= 0; 0 leaves that kind out.
        switch: share of the steps with CutMix where both are there, in [0, 1].
        smoothing: share of each label that all classes get in equal parts, in [0, 1].
        seed: of the draws.
    Raises: UserError for values outside these ranges, or without either kind.
    """

    mixup: float = 0.8
    cutmix: float = 1.0
    switch: float = 0.5
    smoothing: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        finite = all(0 <= alpha < math.inf for alpha in (self.mixup, self.cutmix))
        if not finite or self.mixup == self.cutmix == 0 or self.seed < 0:
            raise UserError(
                f"BatchMix mixup={self.mixup} and cutmix={self.cutmix} must be at least 0 and finite, and one of them "
                f"above 0, and seed={self.seed} at least 0; leave mix out to mix nothing"
            )
        require_shares(switch=self.switch, smoothing=self.smoothing)

    @torch.compiler.disable  # what is drawn for a step would otherwise be part of a graph
    def __call__(self, image_BCHW: Tensor, label_B: Tensor, num_classes: int, step: int) -> tuple[Tensor, Tensor]:
        """(mixed images, their shares of the classes [B K] in float32).

        Args:
            label_B: whole numbers in [0, K).
            step: of the optimiser, from 0.
        """
        draw = np.random.default_rng((self.seed, step))
        cuts = self.cutmix > 0 and (not self.mixup or draw.random() < self.switch)
        alpha = self.cutmix if cuts else self.mixup
        share, other_BCHW = draw.beta(alpha, alpha), image_BCHW.flip(0)
        if cuts:
            height, width = image_BCHW.shape[2:]
            top, bottom = _side(height, share, draw)
            left, right = _side(width, share, draw)
            mixed_BCHW = image_BCHW.clone()
            mixed_BCHW[:, :, top:bottom, left:right] = other_BCHW[:, :, top:bottom, left:right]
            share = 1 - (bottom - top) * (right - left) / (height * width)
        else:
            mixed_BCHW = share * image_BCHW + (1 - share) * other_BCHW
        label_BK = F.one_hot(label_B.long(), num_classes).float()
        mixed_BK = share * label_BK + (1 - share) * label_BK.flip(0)
        return mixed_BCHW, (1 - self.smoothing) * mixed_BK + self.smoothing / num_classes


def _side(length: int, share: float, draw: np.random.Generator) -> tuple[int, int]:
    """Where a box begins and ends along an axis: sqrt(1 - share) of it around a random middle, cut off at its ends."""
    half, middle = int(length * math.sqrt(1 - share)) // 2, int(draw.integers(length))
    return max(middle - half, 0), min(middle + half, length)
