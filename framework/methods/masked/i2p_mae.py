"""I2P-MAE: an encoder of points by levels learns from guessing hidden points, and what a frozen network sees at the
others.

Source: Zhang, Wang, Qiao, Gao, Li, "Learning 3D Representations from 2D Pre-trained Models via Image-to-Point Masked
Autoencoders", 2022, arXiv 2212.06785, section 3, and its code; encoder and decoder are those of Zhang et al.,
"Point-M2AE", 2022, arXiv 2205.14401, section 3. A cloud is cut into groups of points, groups of groups, and so on, and
drawn from three sides as depth maps. A frozen network, the guide, gives features and a saliency of each map. Of the
coarsest groups a fifth stays visible, drawn by the saliency at their centres, the mean over the three maps; of finer
ones those that belong to a visible one. The encoder sees visible groups, the decoder goes back to the second coarsest
level, and there
L = L_3D + w L_2D, with w = 1 in the paper,
L_3D = mean over hidden groups of the squared Chamfer distance between their points, from their centre, and a guess,
L_2D = mean over visible groups, their points, three maps and D features of the squared error of a guess of the guide's
features at the point's pixel, between which bicubic interpolation fills in.
Differences from the code: hidden groups are not embedded, and norms take statistics of visible ones alone; the code
always sees the first group of a batch's first cloud at finer levels. A map's depth is the mean over the points of a
pixel, from 0.5 far to 1 near, on black, where the code adds up the coordinates of a pixel's points and takes the
sigmoid; blocks of points stay inside of the map. Odds of masks are proportional to saliency, where the code takes its
softmax, as `GuidedMasks(odds="softmax")` does. Clouds may have any numbers of points, and one without points adds
nothing; masks are functions of seed, step and cloud.
Not here: attention within a radius and heads of fine-tuning.
Shapes: B clouds, N points of all, G groups of K points, S of them visible, at most, V maps of a cloud, D features.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightspan.backbones.point_pyramid import PointPyramid
from lightspan.core.errors import UserError
from lightspan.core.ranges import require_weights
from lightspan.datamodules.points.batch import PointsBatch
from lightspan.nn.decoders.pyramid_decoder import PyramidDecoder
from lightspan.nn.image_numbers import index_in
from lightspan.nn.masking.guided_masks import GuidedMasks, hidden_at_levels, require_hidden, seen_first
from lightspan.nn.points.clouds import points_of
from lightspan.nn.points.depth_maps import CloudMaps, cloud_maps
from lightspan.nn.points.groups import NestedGroups, places_in_cloud, points_of_groups
from lightspan.nn.points.projection import AXIS_ORDERS
from lightspan.nn.sequences.patches import at_places
from lightspan.nn.teachers.image_guide import Guidance, ImageGuide
from lightspan.objectives.chamfer import chamfer_loss
from lightspan.objectives.means import squared_error_at
from lightspan.training.method import Method


class I2PMAE(Method):
    """Trains an encoder and a decoder to guess hidden groups of points, and the guide's features at visible ones; the
    encoder is kept.

    Batches are `PointsBatch`, of which coordinates are read.

    Args:
        backbone: gives tokens of groups by levels; what probes read.
        decoder: with the widths of the backbone's coarsest levels, the coarsest first; it guesses at the finest of its
            levels.
        guide: the frozen network of pictures, with the side of the maps.
        masks: hides groups of the coarsest level; None is four fifths, by saliency.
        image_weight: w, at least 0.
        spread: side of the block of pixels that a point fills in a map, odd and below the maps' side.
        optimization: `optimizer`, `lr_scheduler` and `groups`, see `Method`.
    """

    batch_type = PointsBatch

    def __init__(
        self,
        backbone: PointPyramid,
        decoder: PyramidDecoder,
        guide: ImageGuide,
        masks: GuidedMasks | None = None,
        image_weight: float = 1.0,
        spread: int = 5,
        **optimization: Any,
    ) -> None:
        super().__init__(**optimization)
        require_weights(image_weight=image_weight)
        if decoder.widths != backbone.widths[::-1][: len(decoder.widths)]:
            raise UserError(
                f"decoder.widths={[*decoder.widths]} must be those of the backbone's coarsest levels, the coarsest "
                f"first, and these are {[*backbone.widths[::-1]]}"
            )
        if not (0 < spread < guide.side and spread % 2):
            raise UserError(f"spread={spread} must be odd, above 0 and below guide.side={guide.side}")
        self.backbone, self.decoder, self.guide = backbone, decoder, guide
        self.masks, self.image_weight, self.spread = masks or GuidedMasks(), image_weight, spread
        require_hidden(self.masks, backbone.groups[-1], "I2PMAE")
        self.level = len(backbone.groups) - len(decoder.widths)
        size = backbone.sizes[self.level]
        self.points_head = nn.Linear(decoder.out_features, 3 * size)
        self.image_head = nn.Linear(decoder.out_features, size * len(AXIS_ORDERS) * guide.width)

    def features(self, batch: Any) -> Tensor:
        return self.backbone(*points_of(batch, "I2PMAE"))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        xyz_N3, offsets = points_of(batch, "I2PMAE")
        levels = self.backbone.grouped(xyz_N3, offsets)
        maps, guidance = self.guided(xyz_N3, offsets)
        hidden = hidden_at_levels(self.drawn_masks(batch, maps, guidance, levels), levels)
        decoded_BGD = self.decoded(levels, hidden)
        asked, hidden_BG, known_B1 = levels[self.level], hidden[self.level], levels[self.level].real_B[:, None]

        guess_BGK3 = self.points_head(decoded_BGD).unflatten(2, (-1, 3))
        known_BG = hidden_BG & known_B1
        points = chamfer_loss(guess_BGK3.flatten(0, 1), asked.near_BGK3.flatten(0, 1), known_BG.flatten())

        at_BS, seen_BS = seen_first(hidden_BG)
        place_BSK = at_places(places_in_cloud(levels, self.level), at_BS)
        target_BPVD = maps.read(guidance.features_VDhw.unflatten(0, maps.grey_BVSS.shape[:2]), place_BSK.flatten(1))
        guess_BSF = self.image_head(at_places(decoded_BGD, at_BS))
        target_BSF = target_BPVD.unflatten(1, place_BSK.shape[1:]).flatten(2)
        known_BS1 = (seen_BS & known_B1)[..., None]
        image = squared_error_at(guess_BSF, target_BSF, known_BS1.expand_as(guess_BSF))

        loss = points + self.image_weight * image
        self.log_training({"train/loss": loss, "train/points": points, "train/image": image})
        return loss

    @torch.no_grad()
    def pictures(self, batch: Any) -> dict[str, Tensor]:
        """For the picture of the first batch: each map, [B 3 S S], the redder the more salient, and centres of coarsest
        groups, green where they are seen and blue where they are hidden.
        """
        xyz_N3, offsets = points_of(batch, "I2PMAE")
        levels = self.backbone.grouped(xyz_N3, offsets)
        maps, guidance = self.guided(xyz_N3, offsets)
        drawn = self.drawn_masks(batch, maps, guidance, levels)
        side = self.guide.side
        heat_VSS = F.interpolate(guidance.saliency_Vhw[:, None], (side, side), mode="bilinear")[:, 0]
        heat_BVSS = (heat_VSS / heat_VSS.amax((1, 2), keepdim=True).clamp_min(1e-9)).view_as(maps.grey_BVSS)
        red, green, blue = torch.eye(3, device=heat_VSS.device).view(3, 3, 1, 1)
        coloured_BV3SS = maps.grey_BVSS[:, :, None].lerp(red, 0.5 * heat_BVSS[:, :, None])
        centre_BVG = maps.pixel_BVM.gather(2, self.centres(levels)[:, None].expand(-1, len(AXIS_ORDERS), -1))
        for which_BG, colour in ((drawn, blue), (~drawn, green)):
            marks_BVP = heat_BVSS.new_zeros(heat_BVSS.shape).flatten(2)
            marks_BVP = marks_BVP.scatter_reduce(
                2, centre_BVG, which_BG[:, None].to(marks_BVP).expand_as(centre_BVG), "amax"
            )
            marks_BVSS = F.max_pool2d(marks_BVP.view_as(heat_BVSS), 3, 1, 1)
            coloured_BV3SS = torch.where(marks_BVSS[:, :, None] > 0, colour, coloured_BV3SS)
        names = (f"{'xyz'[right]} right, {'xyz'[down]} down; red: salient" for right, down, _ in AXIS_ORDERS)
        return dict(zip(names, coloured_BV3SS.unbind(1), strict=True))

    @torch.no_grad()
    def seen_points(self, batch: Any) -> Tensor:
        """For the picture of the first batch: which points are in a seen group of the finest level, bool [N]."""
        xyz_N3, offsets = points_of(batch, "I2PMAE")
        levels = self.backbone.grouped(xyz_N3, offsets)
        finest = hidden_at_levels(self.drawn_masks(batch, *self.guided(xyz_N3, offsets), levels), levels)[0]
        return points_of_groups(levels[0].near_BGK, ~finest, levels[0].real_B, offsets)

    def guided(self, xyz_N3: Tensor, offsets: Tensor) -> tuple[CloudMaps, Guidance]:
        """Maps of the clouds from three sides, and what the guide makes of all of them, cloud by cloud."""
        maps = cloud_maps(xyz_N3, offsets, self.guide.side, self.spread)
        return maps, self.guide(maps.grey_BVSS.flatten(0, 1))

    def drawn_masks(self, batch: Any, maps: CloudMaps, guidance: Guidance, levels: Sequence[NestedGroups]) -> Tensor:
        """Which of the coarsest groups are hidden in this step, bool [B G]."""
        return self.masks.draw(self.saliency(maps, guidance, levels), self.global_step, index_in(batch, self))

    def saliency(self, maps: CloudMaps, guidance: Guidance, levels: Sequence[NestedGroups]) -> Tensor:
        """At the centres of the coarsest groups, the mean over a cloud's maps, [B G]."""
        saliency_BVhw = guidance.saliency_Vhw.unflatten(0, maps.grey_BVSS.shape[:2])
        return maps.read(saliency_BVhw[:, :, None], self.centres(levels)).mean(dim=(2, 3))

    def centres(self, levels: Sequence[NestedGroups]) -> Tensor:
        """Places in their clouds of the centres of the coarsest groups, int64 [B G]."""
        return places_in_cloud(levels, len(levels) - 1)[:, :, 0]

    def decoded(self, levels: Sequence[NestedGroups], hidden: Sequence[Tensor]) -> Tensor:
        """The decoder's tokens of the level at which it guesses, [B G D], of which nothing hidden is seen but centres.

        Args:
            hidden: bool [B G] of each level, see `hidden_at_levels`.
        """
        tokens = self.backbone.tokens(levels, hidden)
        return self.decoder(tokens, [groups.centre_BG3 for groups in levels], hidden)
