"""Point-MAE: an encoder that sees two fifths of a cloud's groups of points learns from guessing the other groups.

Source: Pang et al., "Masked Autoencoders for Point Cloud Self-supervised Learning", 2022, arXiv 2203.06604, section 3,
and its code. A cloud is cut into G groups of the K points nearest to centres that are spread over it, each taken from
its centre. The encoder gets the seen groups and their centres; a decoder gets its tokens, and a mask token and the
centre of each hidden group, whose points P it guesses. With the guess Q of a hidden group:
L = mean over hidden groups of 1/K sum over p in P of min over q ||p - q||^2 + 1/K sum over q of min over p ||p - q||^2.
Differences from the code: hidden groups are not embedded, as the paper says, so that norms take statistics of seen ones
alone; centres begin with the point farthest from the mean, where the code begins with the first point, so that the
order of points tells nothing; clouds may have any numbers of points, and one without points adds nothing; masks are
functions of seed, step and cloud. `features` are the maximum and mean over tokens, where fine-tuning in the code has a
class token in place of the mean.
Not here: the token and head of fine-tuning, and masks of neighbouring groups.
Shapes: B clouds, N points of all, G groups of K points, S seen and A hidden groups.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightspan.backbones.point_vit import PointViT
from lightspan.core.errors import UserError
from lightspan.datamodules.points.batch import PointsBatch
from lightspan.nn.decoders.point_decoder import PointDecoder
from lightspan.nn.image_numbers import image_numbers, index_in
from lightspan.nn.masking.mask_samplers import MaskSampler, RandomMasks, require_seen_and_hidden, seen_and_hidden
from lightspan.nn.points.clouds import points_of
from lightspan.nn.points.groups import Groups, nested_groups, points_of_groups
from lightspan.nn.sequences.patches import at_places
from lightspan.objectives.chamfer import chamfer_loss
from lightspan.training.method import Method


class PointMAE(Method):
    """Trains an encoder and a decoder to guess hidden groups of points; the encoder is kept.

    Batches are `PointsBatch`, of which coordinates are read.

    Args:
        backbone: gives tokens of groups; what probes read.
        decoder: with 3K outputs, or out_features=None for as many.
        masks: hides equally many groups of each cloud, on a grid of G; None is three fifths of them at random.
        optimization: `optimizer`, `lr_scheduler` and `groups`, see `Method`.
    """

    batch_type = PointsBatch

    def __init__(
        self, backbone: PointViT, decoder: PointDecoder, masks: MaskSampler | None = None, **optimization: Any
    ) -> None:
        super().__init__(**optimization)
        if decoder.in_features != backbone.width:
            raise UserError(
                f"decoder.in_features={decoder.in_features}, but the tokens of the backbone have {backbone.width} "
                f"numbers; set it to {backbone.width}"
            )
        decoder.build(3 * backbone.size)
        if decoder.out_features != 3 * backbone.size:
            raise UserError(
                f"decoder.out_features={decoder.out_features} must be {3 * backbone.size}, three for each of the "
                f"backbone.size={backbone.size} points of a group; leave it out"
            )
        self.backbone, self.decoder = backbone, decoder
        self.masks = masks or RandomMasks(0.6, nearest=True)

    def features(self, batch: Any) -> Tensor:
        return self.backbone(*points_of(batch, "PointMAE"))

    def drawn_masks(self, batch: Any) -> np.ndarray:
        """Which groups are hidden in this step, bool [B G]."""
        return self.masks.draw((self.backbone.groups,), self.global_step, image_numbers(index_in(batch, self)))

    def seen_points(self, batch: Any) -> Tensor:
        """For the picture of the first batch: which points are in a seen group, bool [N]."""
        xyz_N3, offsets = points_of(batch, "PointMAE")
        (groups,) = nested_groups(xyz_N3, offsets, [self.backbone.groups], [self.backbone.size])
        seen_BG = ~torch.from_numpy(self.drawn_masks(batch)).to(offsets.device)
        return points_of_groups(groups.near_BGK, seen_BG, groups.real_B, offsets)

    def guess(self, groups: Groups, see_BS: Tensor, hide_BA: Tensor) -> Tensor:
        """The points of the hidden groups, from their centres, [B A K 3], from the seen groups."""
        seen_BSD = self.backbone.tokens(groups, see_BS)
        seen_BS3, hidden_BA3 = (at_places(groups.centre_BG3, at) for at in (see_BS, hide_BA))
        return self.decoder(seen_BSD, seen_BS3, hidden_BA3).unflatten(2, (self.backbone.size, 3))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        groups = self.backbone.grouped(*points_of(batch, "PointMAE"))
        masks_BG = self.drawn_masks(batch)
        require_seen_and_hidden(masks_BG, "PointMAE")
        see_BS, hide_BA = seen_and_hidden(masks_BG, groups.centre_BG3.device)
        guess_BAK3 = self.guess(groups, see_BS, hide_BA)
        points_BAK3 = at_places(groups.near_BGK3.flatten(2), hide_BA).unflatten(2, (self.backbone.size, 3))
        known_BA = groups.real_B[:, None].expand(-1, hide_BA.shape[1])
        loss = chamfer_loss(guess_BAK3.flatten(0, 1), points_BAK3.flatten(0, 1), known_BA.flatten())
        self.log_training({"train/loss": loss})
        return loss
