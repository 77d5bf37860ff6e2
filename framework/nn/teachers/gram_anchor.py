"""An earlier network of the run, which gives the similarities between patches that a student has to keep.

Source: Siméoni et al., "DINOv3", 2025, arXiv 2508.10104, section 4 (Gram anchoring, and its form with larger pictures),
and the authors' code: the earlier network sees each global view at a larger size, its map is resampled by bicubic
interpolation without smoothing, and all patches count, also those that are hidden from the student.
Shapes: R global views of this rank, S their side and s the student's, T patches of these, H W grid of the others, w
width.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightspan.core.devices import has_values, wide
from lightspan.core.errors import UserError
from lightspan.core.ranges import require_in, require_shares, require_weights
from lightspan.nn.sequences.token_backbone import AllTokens, TokenBackbone
from lightspan.nn.teachers.ema import EMATeacher


class GramAnchor(nn.Module):
    """A copy of a method's teacher, which is taken at one step of the run, or anew at several, and is not trained.

    The method gives it its backbone (`build`), shows the student `shrunk` global views, where it `counts` adds `weight`
    times the loss of `lightspan.objectives.gram`, and calls `follow` after each step. The copy is part of the state of
    the run.

    Args:
        weight: of the loss, >= 0.
        scale: S / s, at least 1: by how much the views that the copy sees are larger than those of the student.
        taken: share of the run at which the copy is taken, in [0, 1]. At 0 it has the weights with which the run
            starts: those of an earlier run, say.
        start: share of the run from which the loss counts, in [taken, 1].
        renewed: share of the run after which, counted from `start`, the copy is taken anew, and again, in (0, 1]; None
            keeps the first.
    """

    def __init__(
        self,
        weight: float = 2.0,
        scale: float = 2.0,
        taken: float = 0.0,
        start: float = 0.0,
        renewed: float | None = None,
    ) -> None:
        super().__init__()
        require_weights(weight=weight)
        require_in("[1, inf)", scale=scale)
        require_shares(taken=taken, start=start)
        if renewed is not None:
            require_in("(0, 1]", renewed=renewed)
        if taken > start:
            raise UserError(f"GramAnchor taken={taken} must be at most start={start}, from which its loss counts")
        self.weight, self.scale, self.taken, self.start, self.renewed = weight, scale, taken, start, renewed

    def build(self, backbone: TokenBackbone) -> None:
        """Copies the backbone. Raises: UserError for patches of another number of axes than two."""
        if len(backbone.patch_shape) != 3:
            raise UserError(f"GramAnchor resamples pictures, and patches of this backbone are {backbone.patch_shape}")
        *self.patch, _ = backbone.patch_shape
        self.network = EMATeacher(AllTokens(backbone))  # type: ignore[arg-type]

    def shrunk(self, view_BCSS: Tensor) -> Tensor:
        """A global view as the student sees it: smoothed and resampled to 1 / scale of its sides, and to whole patches,
        one at least.
        """
        sides = [
            patch * max(1, round(side / self.scale / patch))
            for side, patch in zip(view_BCSS.shape[2:], self.patch, strict=True)
        ]
        if self.scale == 1 or [*view_BCSS.shape[2:]] == sides:
            return view_BCSS
        return F.interpolate(wide(view_BCSS), sides, mode="bicubic", antialias=True).to(view_BCSS.dtype)

    def counts(self, share: float, view_BCSS: Tensor) -> bool:
        """Whether the loss counts at this share of the run; a plan counts what such a step needs."""
        return share >= self.start or not has_values(view_BCSS)

    @torch.no_grad()
    def forward(self, view_RCSS: Tensor, grid: tuple[int, ...]) -> Tensor:
        """Its patches of views as they are, [R T w], at the places of the student's on `grid`, for
        `lightspan.objectives.gram.gram_loss`.
        """
        backbone: Any = self.network.module.backbone
        map_RwHW = self.network(view_RCSS)[:, backbone.num_prefix_tokens :].mT.unflatten(2, backbone.grid(view_RCSS))
        if map_RwHW.shape[2:] != grid:
            map_RwHW = F.interpolate(wide(map_RwHW), grid, mode="bicubic", align_corners=False)
        return map_RwHW.flatten(2).mT

    @torch.no_grad()
    def follow(self, backbone: nn.Module, before: float, after: float) -> None:
        """Takes the teacher's weights if a share of the run at which this is due lies in (before, after]."""
        if self._due(after) > self._due(before):
            self.network.follow(AllTokens(backbone), 0.0)

    def _due(self, share: float) -> int:
        """How often the copy has been taken once so much of the run is done."""
        renewals = 0 if self.renewed is None else math.floor(max(share - self.start, 0.0) / self.renewed + 1e-9)
        return (share >= self.taken) + renewals
