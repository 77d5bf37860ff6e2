"""Masks of steps of a sequence: each is hidden by itself with one probability, or spans of several at once.

Source: Amos, Berant, Gupta, "Never Train from Scratch", 2023, arXiv 2310.02980, section 3.
Shapes: B sequences, L steps.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lightspan.core.errors import UserError
from lightspan.core.noise import hashed_uniform, mixed_seed
from lightspan.core.ranges import require_shares


@dataclass(frozen=True)
class StepMasks:
    """Which steps are hidden: a function of seed, optimiser step and sequence, made on the device.

    Args:
        share: probability that a step is hidden, in [0, 1]; their number is not fixed. At 0 none is.
        span: length of what is hidden or seen as a whole, at least 1. Spans lie side by side, from a place that is
            drawn for each sequence, so that each step is still hidden with probability `share`; a sequence's first and
            last span may be shorter. The authors' code draws the places of its spans, which never reach the last step.
        seed: of all draws.
    """

    share: float = 0.5
    span: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        require_shares(share=self.share)
        if self.span < 1:
            raise UserError(f"StepMasks span={self.span} must be at least 1")

    def draw(self, length: int, step: int, index_B: Tensor) -> Tensor:
        """bool [B L], True where a step is hidden, on the device of `index_B`.

        Args:
            step: of the optimiser.
            index_B: int64, the sequences' numbers in their dataset.
        """
        seed_B = mixed_seed(index_B.long(), step, self.seed)
        count = -(-length // self.span) + 1
        hidden_BS = hashed_uniform(seed_B, 0, (count,)) < self.share
        shift_B1 = (hashed_uniform(seed_B, 1, (count,))[:, :1] * self.span).long()
        place_BL = (torch.arange(length, device=index_B.device) + shift_B1) // self.span
        return hidden_BS.gather(1, place_BL)
