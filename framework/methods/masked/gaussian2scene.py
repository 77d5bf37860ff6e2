"""Gaussian2Scene: an encoder of points learns from guessing hidden points and patches, then from Gaussians that look
like the scene.

Source: "Gaussian2Scene: 3D Scene Representation Learning via Self-supervised Learning with 3D Gaussian Splatting",
2025, arXiv 2506.08777; its first stage follows Chen et al., "PiMAE", 2023, arXiv 2303.08129. No code of it is known, so
what follows is this project's reading.
First stage: groups of a cloud's points and patches of its pictures are hidden; an encoder for each sees the others, a
shared one joins their tokens, and a decoder for each guesses what was hidden:
points = Chamfer-L2 of hidden groups, as Point-MAE; pixels = mean squared error of hidden patches, as MAE.
Second stage: the first goes on, and the points P that the decoder gives of all groups are centres of Gaussians, whose
scales, turns, opacities and colours it gives too. They are drawn into the posed views (`lightspan.nn.gaussians`):
picture = (1 - l) mean |C' - C| + l (1 - SSIM(C', C)), l = 0.2 as in 3D Gaussian Splatting (arXiv 2308.04079, eq. 7);
position = Chamfer-L2 of all Gaussians of a scene and the points of all its groups.
The loss is the weighted sum. Only the encoder of points is kept.
Assumed: a Gaussian starts as a ball of `size` and half opaque; its scales stay within exp(-3) and exp(3) of that;
colours have no direction; masks of points and of pictures are drawn apart, where PiMAE aligns them, and there is no
guess of pictures from points.
Scenes without points have no part in the losses of points and pictures of Gaussians, nor have cameras that cannot see.
Shapes: B scenes, N points of all, G groups of K points, S seen and A hidden groups, V views, H W pixels, Q seen and M
hidden patches, d numbers of a patch.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from lightspan.backbones.point_vit import PointViT
from lightspan.core.devices import has_values, wide
from lightspan.core.errors import UserError
from lightspan.core.ranges import require_in, require_shares, require_weights
from lightspan.datamodules.points.batch import PosedPointsBatch
from lightspan.nn.decoders.mask_decoder import MaskDecoder
from lightspan.nn.decoders.point_decoder import PointDecoder
from lightspan.nn.gaussians import GaussianCameras, Gaussians, drawn, sound
from lightspan.nn.image_numbers import image_numbers, index_in
from lightspan.nn.masking.mask_samplers import MaskSampler, RandomMasks, require_seen_and_hidden, seen_and_hidden
from lightspan.nn.points.clouds import points_of
from lightspan.nn.points.groups import Groups
from lightspan.nn.points.posed import SceneViews, posed_views_of
from lightspan.nn.sequences.joint_encoder import JointEncoder
from lightspan.nn.sequences.patches import at_places, patchify
from lightspan.nn.sequences.token_backbone import patch_tokens, require_tokens, settle_patch_decoder
from lightspan.objectives.chamfer import chamfer_loss
from lightspan.objectives.masked import patch_regression
from lightspan.objectives.means import known_mean, weighted_sum
from lightspan.objectives.similarity import structural_similarity
from lightspan.training.method import Method

NUMBERS = 14
"""Of a Gaussian: 3 of its place, 3 of its scales, 4 of its turn, 1 of its opacity, 3 of its colour."""
MOST_LOG = 3.0  # of a scale over `size`


class SceneGuess(NamedTuple):
    """numbers_BGKn: what the decoder gives of all groups. pixels_PMd: of the hidden patches of all P = B V views."""

    numbers_BGKn: Tensor
    pixels_PMd: Tensor


def gaussians_of(numbers_BGKn: Tensor, centre_BG3: Tensor, size: float) -> Gaussians:
    """Of numbers of groups' points, G K Gaussians a scene, in float32 or wider.

    Args:
        numbers_BGKn: `NUMBERS` of each; zeros are a grey ball, half opaque, at its group's centre.
        size: standard deviation of such a ball, above 0.
    """
    shift, scale, turn, opacity, colour = wide(numbers_BGKn).split((3, 3, 4, 1, 3), dim=-1)
    real_4 = torch.eye(4, device=turn.device, dtype=turn.dtype)[0]
    return Gaussians(
        (wide(centre_BG3)[:, :, None] + shift).flatten(1, 2),
        (size * torch.exp(MOST_LOG * torch.tanh(scale / MOST_LOG))).flatten(1, 2),
        (turn + real_4).flatten(1, 2),
        opacity[..., 0].sigmoid().flatten(1, 2),
        colour.sigmoid().flatten(1, 2),
    )


def picture_loss(guess_PCHW: Tensor, pictures_PCHW: Tensor, known_P: Tensor, similarity: float) -> Tensor:
    """(1 - l) mean |C' - C| + l (1 - SSIM), the mean over the known pictures of all ranks, a scalar; 0 without any.

    Args:
        similarity: l, in [0, 1].
    """
    apart_P = (wide(guess_PCHW) - wide(pictures_PCHW)).abs().mean(dim=(1, 2, 3))
    alike_P = structural_similarity(guess_PCHW, pictures_PCHW).mean(dim=(1, 2, 3))
    return known_mean((1 - similarity) * apart_P + similarity * (1 - alike_P), known_P)


class Gaussian2Scene(Method):
    """Trains encoders of points and of pictures to guess what is hidden, and Gaussians to look like the scene; the
    encoder of points is kept.

    Batches are `PosedPointsBatch`, of which coordinates and views are read. Validation logs each loss as val/..., with
    the Gaussians drawn in either stage.

    Args:
        backbone: gives tokens of groups; what probes read.
        pictures: a `lightspan.nn.sequences.token_backbone.TokenBackbone` as wide as the backbone, of the views.
        joint: as wide, over the tokens of both.
        decoder: of points, with 14 K outputs, or out_features=None for as many.
        pixels: decoder of patches, with out_features=None or as many as a patch has numbers.
        masks: hides equally many groups of each cloud, on a grid of G; None is three fifths of them at random.
        picture_masks: hides equally many patches of each view; None is three fifths of them at random.
        draw_from: share of the run after which Gaussians are drawn, in [0, 1].
        size: of a Gaussian before any step, in the unit of the data, above 0.
        near: see `lightspan.nn.gaussians.splatted`.
        similarity: l, in [0, 1].
        point_weight, pixel_weight, picture_weight, position_weight: of the losses, >= 0.
        optimization: `optimizer`, `lr_scheduler` and `groups`, see `Method`.
    """

    batch_type = PosedPointsBatch

    def __init__(
        self,
        backbone: PointViT,
        pictures: nn.Module,
        joint: JointEncoder,
        decoder: PointDecoder,
        pixels: MaskDecoder,
        masks: MaskSampler | None = None,
        picture_masks: MaskSampler | None = None,
        draw_from: float = 0.8,
        size: float = 0.1,
        near: float = 0.2,
        similarity: float = 0.2,
        point_weight: float = 1.0,
        pixel_weight: float = 1.0,
        picture_weight: float = 1.0,
        position_weight: float = 1.0,
        **optimization: Any,
    ) -> None:
        super().__init__(**optimization)
        require_shares(draw_from=draw_from, similarity=similarity)
        require_in("(0, inf)", size=size, near=near)
        require_weights(
            point_weight=point_weight,
            pixel_weight=pixel_weight,
            picture_weight=picture_weight,
            position_weight=position_weight,
        )
        settle_patch_decoder(pictures, pixels, "Gaussian2Scene")
        widths = {
            "pictures.num_features": require_tokens(pictures, "Gaussian2Scene").num_features,
            "joint.width": joint.width,
            "decoder.in_features": decoder.in_features,
        }
        for name, width in widths.items():
            if width != backbone.width:
                raise UserError(
                    f"Gaussian2Scene: {name}={width} must be {backbone.width}, the width of the backbone's tokens"
                )
        decoder.build(NUMBERS * backbone.size)
        if decoder.out_features != NUMBERS * backbone.size:
            raise UserError(
                f"Gaussian2Scene: decoder.out_features={decoder.out_features} must be {NUMBERS * backbone.size}, "
                f"{NUMBERS} for each of the backbone.size={backbone.size} points of a group; leave it out"
            )
        self.backbone, self.pictures, self.joint, self.decoder, self.pixels = backbone, pictures, joint, decoder, pixels
        self.masks, self.picture_masks = masks or RandomMasks(0.6, nearest=True), picture_masks or RandomMasks(0.6)
        self.draw_from, self.size, self.near, self.similarity = draw_from, size, near, similarity
        self.weights = {
            "point": point_weight,
            "pixel": pixel_weight,
            "picture": picture_weight,
            "position": position_weight,
        }

    def features(self, batch: Any) -> Tensor:
        return self.backbone(*points_of(batch, "Gaussian2Scene"))

    def guess(
        self, groups: Groups, pictures_P3HW: Tensor, see_BS: Tensor, see_PQ: Tensor, hide_PM: Tensor
    ) -> SceneGuess:
        """What the seen groups of a scene and the seen patches of its views tell of everything.

        Args:
            pictures_P3HW: those of a scene one after the other, as many of each.
        """
        scenes, views = len(see_BS), len(see_PQ) // max(1, len(see_BS))
        points_BSD = self.backbone.tokens(groups, see_BS)
        patches_PQD = patch_tokens(self.pictures, pictures_P3HW, keep_BK=see_PQ)
        joint_BSD, joint_BLD = self.joint(
            points_BSD, patches_PQD.reshape(scenes, views * see_PQ.shape[1], self.joint.width)
        )
        seen_BS3 = at_places(groups.centre_BG3, see_BS)
        numbers_BGKn = self.decoder(joint_BSD, seen_BS3, groups.centre_BG3)
        grid = self.pictures.grid(pictures_P3HW)  # type: ignore[operator]
        pixels_PMd = self.pixels(joint_BLD.reshape(patches_PQD.shape), see_PQ, hide_PM, grid)
        return SceneGuess(numbers_BGKn.unflatten(2, (self.backbone.size, NUMBERS)), pixels_PMd)

    def losses(self, batch: Any, step: int, drawing: bool) -> dict[str, Tensor]:
        """`point` and `pixel`, and if Gaussians are drawn `picture` and `position`, scalars: with a step's masks."""
        groups = self.backbone.grouped(*points_of(batch, "Gaussian2Scene"))
        views = posed_views_of(batch, len(groups.real_B), "Gaussian2Scene")
        pictures_P3HW, device = views.pictures_BV3HW.flatten(0, 1), groups.centre_BG3.device
        numbers, grid = image_numbers(index_in(batch, self)), self.pictures.grid(pictures_P3HW)  # type: ignore[operator]
        masks_BG = self.masks.draw((self.backbone.groups,), step, numbers)
        by_view = [self.picture_masks.draw(grid, step, numbers, view) for view in range(views.pictures_BV3HW.shape[1])]
        masks_PHW = np.stack(by_view, axis=1).reshape(-1, *grid)
        for masks in (masks_BG, masks_PHW):
            require_seen_and_hidden(masks, "Gaussian2Scene")
        see_BS, hide_BA = seen_and_hidden(masks_BG, device)
        see_PQ, hide_PM = seen_and_hidden(masks_PHW, device)
        guess = self.guess(groups, pictures_P3HW, see_BS, see_PQ, hide_PM)
        near_BAK3, guess_BAK3 = (
            at_places(part.flatten(2), hide_BA).unflatten(2, (self.backbone.size, 3))
            for part in (groups.near_BGK3, guess.numbers_BGKn[..., :3])
        )
        known_BA = groups.real_B[:, None].expand(-1, hide_BA.shape[1])
        patch = tuple(self.pictures.patch_shape[:-1])  # type: ignore[index]
        hidden_PMd = at_places(patchify(pictures_P3HW, patch), hide_PM)
        losses = {
            "point": chamfer_loss(guess_BAK3.flatten(0, 1), near_BAK3.flatten(0, 1), known_BA.flatten()),
            "pixel": patch_regression(guess.pixels_PMd, hidden_PMd),
        }
        return losses | self.drawing_losses(guess, groups, views) if drawing else losses

    def drawing_losses(self, guess: SceneGuess, groups: Groups, views: SceneViews) -> dict[str, Tensor]:
        """`picture` and `position`, see `losses`."""
        gaussians = gaussians_of(guess.numbers_BGKn, groups.centre_BG3, self.size)
        pictures_P3HW, _, place_P3, rotation_P33, lens_P33 = (part.flatten(0, 1) for part in views)
        per_scene = views.pictures_BV3HW.shape[1]
        cameras = GaussianCameras(place_P3, rotation_P33, lens_P33)
        each = Gaussians(*(part.repeat_interleave(per_scene, dim=0) for part in gaussians))
        height, width = pictures_P3HW.shape[2:]
        shown = drawn(each, cameras, height, width, self.near)
        known_P = groups.real_B.repeat_interleave(per_scene) & sound(cameras)
        cloud_BN3 = (groups.centre_BG3[:, :, None] + groups.near_BGK3).flatten(1, 2)
        return {
            "picture": picture_loss(shown.colour_BCHW, pictures_P3HW, known_P, self.similarity),
            "position": chamfer_loss(gaussians.centre_BG3, cloud_BN3, groups.real_B),
        }

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        # A plan counts what the second stage needs, which is more.
        drawing = self.share_of_run() >= self.draw_from or not has_values(batch["index"])
        losses = self.losses(batch, self.global_step, drawing)
        loss = weighted_sum(losses, self.weights)
        self.log_training({"train/loss": loss, **{f"train/{name}_loss": value for name, value in losses.items()}})
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Logs the losses, with the masks of step 0 in every epoch."""
        losses = self.losses(batch, 0, True)
        figures = {f"val/{name}_loss": value for name, value in losses.items()}
        figures["val/loss"] = weighted_sum(losses, self.weights)
        self.log_dict(figures, batch_size=len(batch["index"]), sync_dist=True)
