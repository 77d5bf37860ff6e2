"""Masks of groups of points that leave in sight what is salient, and what they hide at finer levels.

Source: Zhang et al., "Learning 3D Representations from 2D Pre-trained Models via Image-to-Point Masked Autoencoders",
2022, arXiv 2212.06785, section 3.3; levels as in "Point-M2AE", 2022, arXiv 2205.14401, section 3.1.
Shapes: B clouds, G groups of a level, F of the finer one, K groups of a group, S groups that are
seen, at most.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightspan.core.devices import has_values, wide
from lightspan.core.errors import UserError
from lightspan.core.noise import hashed_uniform, mixed_seed
from lightspan.core.ranges import require_in
from lightspan.nn.masking.mask_samplers import visible_count
from lightspan.nn.points.groups import NestedGroups


@dataclass(frozen=True)
class GuidedMasks:
    """Draws the groups that stay visible one after another, without replacement, salient ones more often: a function of
    seed, step and cloud, made on the device.

    Args:
        ratio: hidden share, in [0, 1); the nearest whole number of groups stays, at least one.
        odds: how saliency s becomes the odds of a draw, with a temperature T: "power" is s^(1/T), so that at T = 1 they
            are proportional to it; "softmax" is exp(s/T), as in the authors' code with T = 1, where attention, which
            sums to 1 over a picture, makes hardly a difference.
        temperature: above 0; with infinity all groups have the same odds.
        seed: >= 0.
    """

    ratio: float = 0.8
    odds: Literal["power", "softmax"] = "power"
    temperature: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        require_in("[0, 1)", ratio=self.ratio)
        require_in("(0, inf]", temperature=self.temperature)
        require_in("[0, inf)", seed=self.seed)

    def visible(self, groups: int) -> int:
        """How many of so many groups stay visible."""
        return visible_count(self.ratio, groups, nearest=True)

    def draw(self, saliency_BG: Tensor, step: int, index_B: Tensor) -> Tensor:
        """bool [B G], True where a group is hidden.

        Args:
            saliency_BG: at least 0; what is below counts as 0, and what is no number too.
            step: of the optimiser.
            index_B: int64, the clouds' numbers in their dataset, on the device of saliency.
        """
        saliency_BG = wide(saliency_BG).nan_to_num(0.0).clamp_min(0)
        if self.odds == "power":
            saliency_BG = saliency_BG.clamp_min(torch.finfo(saliency_BG.dtype).tiny).log()
        # The places of the largest log-odds with Gumbel noise are a draw without replacement.
        noise_BG = hashed_uniform(mixed_seed(index_B.long(), step, self.seed), 0, (saliency_BG.shape[1],)) + 2.0**-25
        keys_BG = saliency_BG / self.temperature - (-noise_BG.log()).log()
        kept_BV = keys_BG.topk(self.visible(saliency_BG.shape[1]), dim=1).indices
        return torch.ones_like(keys_BG, dtype=torch.bool).scatter(1, kept_BV, False)


def hidden_at_levels(hidden_BG: Tensor, levels: Sequence[NestedGroups]) -> list[Tensor]:
    """What is hidden at each level, the finest first, bool [B G] each, by what is hidden at the coarsest: a finer group
    is seen if it belongs to a coarser one that is.

    Args:
        levels: of groups, the finest first.
    """
    hidden = [hidden_BG]
    for coarse, fine in zip(levels[:0:-1], levels[-2::-1], strict=True):
        finer = fine.centre_BG.shape[1]
        # Groups that are hidden write to a place beyond the last, so that all writes to a place agree.
        at_BGK = coarse.near_BGK.masked_fill(hidden[-1][..., None], finer)
        hidden_BF = torch.ones(len(at_BGK), finer + 1, dtype=torch.bool, device=at_BGK.device)
        hidden.append(hidden_BF.scatter(1, at_BGK.flatten(1), False)[:, :finer])
    return hidden[::-1]


def seen_first(hidden_BG: Tensor) -> tuple[Tensor, Tensor]:
    """Places of the groups that are seen, in their order, followed by hidden ones where a cloud has fewer than the one
    with most, int64 [B S]; and which are seen, bool [B S]. S is at least 1, and in a plan G.
    """
    counts_B = (~hidden_BG).sum(dim=1)
    most = max(int(counts_B.max()), 1) if len(counts_B) and has_values(counts_B) else hidden_BG.shape[1]
    at_BS = hidden_BG.to(torch.uint8).argsort(dim=1, stable=True)[:, :most]
    return at_BS, torch.arange(most, device=at_BS.device) < counts_B[:, None]


def require_hidden(masks: GuidedMasks, groups: int, method: str) -> None:
    """Raises: UserError for masks that hide none of so many groups."""
    if masks.visible(groups) >= groups:
        raise UserError(
            f"{method}: masks.ratio={masks.ratio} hides none of the {groups} groups of the coarsest level, which "
            "leaves nothing to guess; raise it, or backbone.groups"
        )
