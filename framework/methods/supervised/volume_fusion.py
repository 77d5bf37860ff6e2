"""Volume Fusion (MIS-FM): tell at each voxel by how much one crop of a volume was mixed into another.

Source: Wang et al., "MIS-FM: 3D Medical Image Segmentation using Foundation Models Pretrained on a Large-Scale
Unannotated Dataset", 2023, arXiv 2306.16925, section 3, and its code. Of two crops I_f and I_b of one volume and a map
of coefficients alpha in {0, 1/K, ..., 1} in blocks,
X = alpha I_f + (1 - alpha) I_b,
a network segments X into the K + 1 classes K alpha: L = (Dice + cross-entropy) / 2, at each of its scales. No labels
are needed, and encoder and decoder both learn what segmentation takes; all but the last layer is kept.
With probability `inversion` both crops are inverted, x -> 1 - x, which inverts their mixture.
Differences from the authors' code: crops are scaled by one factor for all axes, and what the data's `augment` offers
stands for its percentiles; maps are functions of seed, step and sample.
Shapes: B volumes of this rank, C channels, D H W voxels, F width of the finest maps.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightspan.core.batches import inputs_in
from lightspan.core.ranges import require_in, require_shares
from lightspan.nn.image_numbers import image_numbers, index_in
from lightspan.nn.init import CONVOLUTIONS
from lightspan.nn.masking.coefficient_maps import CoefficientMaps
from lightspan.nn.scales import coarsest_mean, require_scales
from lightspan.nn.views import require_one_size, views_of
from lightspan.objectives.dice import dice_loss
from lightspan.objectives.pseudo_labels import pixel_cross_entropy
from lightspan.training.method import Method


class VolumeFusion(Method):
    """Segments mixtures of two crops. The backbone is what is kept; probes read the mean over its coarsest maps.

    Batches have two views of a size, with intensities in [0, 1] for the inversion. Two equal crops leave nothing to
    tell: the loss is finite, and the answer the share of each class.

    Args:
        backbone: [B C D H W] -> maps [B F D H W], with `scales` that gives all its maps from the finest on, and their
            `widths`, such as `lightspan.backbones.dense.UNet` with axes=3 or `lightspan.backbones.pct_net.PCTNet`.
        coefficients: draws the maps; None is `CoefficientMaps` with K = 4.
        supervised_scales: how many of the scales guess, from the finest on, at least 1; the paper's PCT-Net has 4.
        inversion: in [0, 1].
        optimization: `optimizer`, `lr_scheduler` and `groups`, see `Method`.
    """

    def __init__(
        self,
        backbone: nn.Module,
        coefficients: CoefficientMaps | None = None,
        supervised_scales: int = 1,
        inversion: float = 0.25,
        **optimization: Any,
    ) -> None:
        super().__init__(**optimization)
        widths = require_scales(backbone, "VolumeFusion")
        require_in(f"[1, {len(widths)}]", supervised_scales=supervised_scales)
        require_shares(inversion=inversion)
        self.backbone, self.coefficients, self.inversion = backbone, coefficients or CoefficientMaps(), inversion
        classes = self.coefficients.levels + 1
        axes = getattr(backbone, "axes", 3)
        self.heads = nn.ModuleList(CONVOLUTIONS[axes - 1](width, classes, 1) for width in widths[:supervised_scales])

    def features(self, batch: Any) -> Tensor:
        return coarsest_mean(self.backbone, *inputs_in(batch, self.read_type))

    def forward(self, volume_BCDHW: Tensor) -> list[Tensor]:
        """Logits [B K+1 d h w], from the finest scale on."""
        maps: list[Tensor] = self.backbone.scales(volume_BCDHW)  # type: ignore[operator]
        return [head(each) for head, each in zip(self.heads, maps, strict=False)]

    def fused(self, front_BCDHW: Tensor, back_BCDHW: Tensor, index_B: Tensor) -> tuple[Tensor, Tensor]:
        """The mixtures of this step, and K alpha, int64 [B D H W]."""
        indices, step = image_numbers(index_B), self.global_step
        drawn = self.coefficients.draw(front_BCDHW.shape[2:], step, indices)
        label_BDHW = torch.from_numpy(drawn).to(front_BCDHW.device)
        alpha_B1DHW = (label_BDHW / self.coefficients.levels)[:, None].to(front_BCDHW)
        fused_BCDHW = torch.lerp(back_BCDHW, front_BCDHW, alpha_B1DHW)
        draws = [np.random.default_rng((self.coefficients.seed, step, index, 1)).random() for index in indices]
        kept = [draw >= self.inversion for draw in draws]
        kept_B = torch.tensor(kept, dtype=torch.bool, device=fused_BCDHW.device)
        return fused_BCDHW.where(kept_B.view(-1, *(1 for _ in fused_BCDHW.shape[1:])), 1 - fused_BCDHW), label_BDHW

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        views = views_of(batch, "VolumeFusion", 2)
        require_one_size(views, "VolumeFusion")
        front_BCDHW, back_BCDHW = views
        fused_BCDHW, label_BDHW = self.fused(front_BCDHW, back_BCDHW, index_in(batch, self))
        scales = [enlarged(logits, label_BDHW.shape[1:]) for logits in self(fused_BCDHW)]
        dice = torch.stack([dice_loss(each, label_BDHW, smooth=1e-5, first=0) for each in scales]).mean()
        nats = torch.stack([pixel_cross_entropy(each, label_BDHW) for each in scales]).mean()
        loss = (dice + nats) / 2
        self.log_training({"train/loss": loss, "train/dice_loss": dice, "train/cross_entropy_nats": nats})
        return loss


def enlarged(maps_BKDHW: Tensor, sides: Sequence[int]) -> Tensor:
    """Linearly, to these sides."""
    mode = ("linear", "bilinear", "trilinear")[len(sides) - 1]
    return maps_BKDHW if maps_BKDHW.shape[2:] == sides else F.interpolate(maps_BKDHW, tuple(sides), mode=mode)
