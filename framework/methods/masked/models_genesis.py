"""Models Genesis: an encoder and a decoder restore volumes that were distorted.

Source: Zhou et al., "Models Genesis: Generic Autodidactic Models for 3D Medical Image Analysis", MICCAI 2019, arXiv
1908.06912, and its longer form, Medical Image Analysis 2021, arXiv 2004.07882. A volume x becomes x~ by any of four
distortions (`lightspan.nn.masking.volume_distortions`): intensities along a curve, voxels shuffled in small windows,
boxes painted inside, or all painted around boxes. A network maps x~ back: L = mean (sigmoid(f(x~)) - x)^2 over all
voxels. The encoder is kept for what classifies, encoder and decoder for what segments.
Flips, which the authors' code applies to both volumes, are the data's `augment`.
Shapes: B volumes of this rank, C channels, D H W voxels, F width of the finest maps.
"""

from typing import Any

import torch
from torch import Tensor, nn

from lightspan.core.batches import inputs_in
from lightspan.core.ranges import require_in
from lightspan.nn.image_numbers import image_numbers, index_in
from lightspan.nn.init import CONVOLUTIONS
from lightspan.nn.masking.hidden_patches import Reconstruction
from lightspan.nn.masking.volume_distortions import VolumeDistortions
from lightspan.nn.scales import coarsest_mean, require_scales
from lightspan.nn.valid_pixels import present_of
from lightspan.nn.views import image_of
from lightspan.objectives.means import squared_error_at
from lightspan.training.method import Method


class ModelsGenesis(Method):
    """Restores distorted volumes. The backbone is what is kept; probes read the mean over its coarsest maps.

    Batches have one crop of each volume, with intensities in [0, 1]. What a sample lacks (`present`) is no part of the
    loss.

    Args:
        backbone: [B C D H W] -> maps [B F D H W], with `scales` that gives all its maps from the finest on, and their
            `widths`, such as `lightspan.backbones.dense.UNet` with axes=3.
        in_chans: C, at least 1.
        distortions: None is `VolumeDistortions` with the authors' probabilities.
        optimization: `optimizer`, `lr_scheduler` and `groups`, see `Method`.
    """

    def __init__(
        self,
        backbone: nn.Module,
        in_chans: int = 1,
        distortions: VolumeDistortions | None = None,
        **optimization: Any,
    ) -> None:
        super().__init__(**optimization)
        require_in("[1, inf)", in_chans=in_chans)
        widths = require_scales(backbone, "ModelsGenesis")
        self.backbone, self.distortions = backbone, distortions or VolumeDistortions()
        self.head = CONVOLUTIONS[getattr(backbone, "axes", 3) - 1](widths[0], in_chans, 1)

    def features(self, batch: Any) -> Tensor:
        return coarsest_mean(self.backbone, *inputs_in(batch, self.read_type))

    def forward(self, volume_BCDHW: Tensor) -> Tensor:
        """The volume restored, in [0, 1]."""
        return self.head(self.backbone.scales(volume_BCDHW)[0]).sigmoid()  # type: ignore[operator]

    def distorted(self, volume_BCDHW: Tensor, index_B: Tensor) -> Tensor:
        """As the network sees it in this step."""
        return self.distortions(volume_BCDHW, self.global_step, image_numbers(index_B))

    def reconstruct(self, batch: Any) -> Reconstruction:
        """See `lightspan.nn.masking.hidden_patches`: what was distorted counts as hidden, and the network looked at the
        distorted volume.
        """
        volume_BCDHW = image_of(batch, "ModelsGenesis")
        seen_BCDHW = self.distorted(volume_BCDHW, index_in(batch, self))
        return Reconstruction(volume_BCDHW, seen_BCDHW != volume_BCDHW, self(seen_BCDHW), seen_BCDHW)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        volume_BCDHW = image_of(batch, "ModelsGenesis")
        present_BC = present_of(batch, volume_BCDHW, "ModelsGenesis")
        if present_BC is None:
            present_BC = volume_BCDHW.new_ones(volume_BCDHW.shape[:2], dtype=torch.bool)
        seen_BCDHW = self.distorted(volume_BCDHW, index_in(batch, self))
        known = present_BC.view(*present_BC.shape, *(1 for _ in volume_BCDHW.shape[2:])).expand_as(volume_BCDHW)
        loss = squared_error_at(self(seen_BCDHW), volume_BCDHW, known)
        # What leaving the volume as it is would cost.
        left = squared_error_at(seen_BCDHW, volume_BCDHW, known)
        self.log_training({"train/loss": loss, "train/distorted_mse": left})
        return loss
