"""PonderV2: an encoder of points learns from rendering the pictures in which the points were seen.

Source: Zhu et al., "PonderV2: Pave the Way for 3D Foundation Model with A Universal Pre-training Paradigm", 2023, arXiv
2310.08586, sections 3.2 and 3.3, and its code. Four fifths of a scene's points are left out; the features of the others
are means in a dense grid over the scene's box, which is scaled into a unit cube; a small network of that grid gives a
field of signed distances and colours (`lightspan.nn.signed_fields`), of which rays through random pixels of posed views
see a colour C' and a depth D'. With C and D of the pixel, places z along a ray and signed distances s there,
L = 10 mean |C' - C| + mean |D' - D| + 10 mean |z + s - D| where |z - D| <= tau
  + mean max(tau - s, 0) where z < D - tau + 0.01 mean (|slope of s| - 1)^2.
Rays that miss the box, or whose pixel has no depth, are left out of the terms in which they have no part. Lengths are
those of the unit cube. The encoder is kept.
Differences: pieces of rays are judged in their middles, as in NeuS, where the code takes their beginnings; points are
means in the grid, where the code has voxels; D is the length of a ray; points, pixels and places are functions of
seed, step and scene; a scene without points shows nothing. The field's perceptrons have one hidden layer and are not
told where a place is, and distances and colours have channels of their own, where those of the code's configuration
share all channels. The classes of pixels play no part.
Not here: the rendering of texts' features, which needs labels, hidden blocks, and outdoor scenes of pictures alone.
Shapes: B scenes, N points of all, M that are kept, D features, V views, H W pixels, R rays of a scene, S places on a
ray.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightspan.backbones.voxel_points import VoxelPoints
from lightspan.core.devices import has_values, wide
from lightspan.core.errors import UserError
from lightspan.core.noise import hashed_uniform, mixed_seed
from lightspan.core.ragged import kept_offsets, ragged_maxima, ragged_means, row_owners
from lightspan.core.ranges import require_in, require_weights
from lightspan.datamodules.points.batch import PosedPointsBatch
from lightspan.nn.decoders.grid_unet import GridUNet
from lightspan.nn.image_numbers import index_in
from lightspan.nn.points.clouds import point_fields_of, points_of
from lightspan.nn.points.grids import pooled_grid
from lightspan.nn.points.posed import posed_views_of
from lightspan.nn.rendering import Rays, rays_through
from lightspan.nn.signed_fields import RayView, SignedField
from lightspan.objectives.means import known_mean, weighted_sum
from lightspan.training.method import Method

MARGIN = 0.05  # of the longest side, around a scene's points
THIN = 0.05  # of the longest side, the least half side of a box


class SceneBoxes(NamedTuple):
    """middle_B3: of the boxes around scenes. side_B: the unit cube's, in the unit of the data, above 0.
    half_B3: half of a box's sides in the unit cube, at most 1/2.
    """

    middle_B3: Tensor
    side_B: Tensor
    half_B3: Tensor


def scene_boxes(xyz_N3: Tensor, offsets: Tensor) -> SceneBoxes:
    """Around all points of each scene, with a margin; of a scene of one point or none the unit of the data."""
    high_B3, low_B3 = ragged_maxima(wide(xyz_N3), offsets), -ragged_maxima(-wide(xyz_N3), offsets)
    longest_B = (high_B3 - low_B3).amax(dim=1)
    longest_B = longest_B.where(longest_B > 0, 1)
    side_B = longest_B * (1 + 2 * MARGIN)
    half_B3 = ((high_B3 - low_B3) / 2).maximum(THIN * longest_B[:, None]) + MARGIN * longest_B[:, None]
    return SceneBoxes((high_B3 + low_B3) / 2, side_B, half_B3 / side_B[:, None])


class Targets(NamedTuple):
    """What rays should see: colour_BR3, and depth_BR in the unit cube, 0 where it is not known."""

    colour_BR3: Tensor
    depth_BR: Tensor


def rendering_losses(seen: RayView, targets: Targets, drawn_B: Tensor, truncation: float) -> dict[str, Tensor]:
    """`colour`, `depth`, `surface`, `free` and `slope`, each a mean over what has a part in it of all ranks, scalars.

    Args:
        drawn_B: bool, the scenes that have a part at all.
        truncation: tau, above 0.
    """
    crosses_BR = seen.crosses & drawn_B[:, None]
    known_BR = crosses_BR & (targets.depth_BR > 0)
    ahead_BRS = targets.depth_BR[..., None] - seen.at  # how far behind a place the surface is
    near_BRS = known_BR[..., None] & (ahead_BRS.abs() <= truncation)
    free_BRS = known_BR[..., None] & (ahead_BRS > truncation)
    # The length of a slope of 0 has no derivative.
    steep_BRS = (seen.slope.square().sum(dim=-1) + 1e-12).sqrt()
    return {
        "colour": known_mean((seen.colour - targets.colour_BR3).abs().mean(dim=-1), crosses_BR),
        "depth": known_mean((seen.depth - targets.depth_BR).abs(), known_BR),
        "surface": known_mean((seen.distance - ahead_BRS).abs(), near_BRS),
        "free": known_mean((truncation - seen.distance).relu(), free_BRS),
        "slope": known_mean((steep_BRS - 1).square(), crosses_BR[..., None].expand_as(steep_BRS)),
    }


class PonderV2(Method):
    """Trains an encoder of points, a network of grids and a field to render posed views; the encoder is kept.

    Batches are `PosedPointsBatch`. Validation logs each loss as val/..., and val/depth_error, the mean error of
    rendered depths in the unit of the data.

    Args:
        backbone: gives features of points; probes read their mean over a scene.
        volume: of grids with as many channels as the backbone has features, to as many as the field reads.
        field: what is rendered.
        grid: cells along z, y and x of a scene's box.
        keep: share of the points that are seen, in (0, 1].
        rays: of each view.
        pieces, finer: into which a ray is cut, and how many more where it shows a surface.
        truncation: tau, in (0, 1).
        colour, depth, surface, free, slope: weights of the losses, >= 0.
        seed: of points, pixels and places.
        optimization: `optimizer`, `lr_scheduler` and `groups`, see `Method`.
    """

    batch_type = PosedPointsBatch

    def __init__(
        self,
        backbone: VoxelPoints,
        volume: GridUNet,
        field: SignedField,
        grid: Sequence[int] = (32, 128, 128),
        keep: float = 0.2,
        rays: int = 256,
        pieces: int = 96,
        finer: int = 36,
        truncation: float = 0.05,
        colour: float = 10.0,
        depth: float = 1.0,
        surface: float = 10.0,
        free: float = 1.0,
        slope: float = 0.01,
        seed: int = 0,
        **optimization: Any,
    ) -> None:
        super().__init__(**optimization)
        require_in("[1, inf)", grid=grid, rays=rays)
        require_in("[2, inf)", pieces=pieces)
        require_in("[0, inf)", finer=finer, seed=seed)
        require_in("(0, 1]", keep=keep)
        require_in("(0, 1)", truncation=truncation)
        self.weights = {"colour": colour, "depth": depth, "surface": surface, "free": free, "slope": slope}
        require_weights(**self.weights)
        if len(grid) != 3:
            raise UserError(f"PonderV2: grid={[*grid]} must be three numbers, cells along z, y and x")
        if volume.in_chans != backbone.num_features or volume.out_chans != field.channels:
            raise UserError(
                f"PonderV2: volume.in_chans={volume.in_chans} must be {backbone.num_features}, the features of the "
                f"backbone, and volume.out_chans={volume.out_chans} be {field.channels}, field.geometry + "
                "field.appearance"
            )
        self.backbone, self.volume, self.field = backbone, volume, field
        self.grid, self.keep, self.rays, self.pieces, self.finer = tuple(grid), keep, rays, pieces, finer
        self.truncation, self.seed = truncation, seed

    def point_features(self, batch: Any) -> Tensor:
        """[N D]."""
        xyz_N3, offsets = points_of(batch, "PonderV2")
        return self.backbone(xyz_N3, offsets, *point_fields_of(batch, self.backbone.fields, len(xyz_N3), "PonderV2"))

    def features(self, batch: Any) -> Tensor:
        return ragged_means(self.point_features(batch), points_of(batch, "PonderV2")[1])

    def kept_points(self, offsets: Tensor, points: int, seed_B: Tensor) -> Tensor:
        """Which points a step sees, bool [N]."""
        owner_N = row_owners(offsets, points)
        place_N = torch.arange(points, device=offsets.device) - offsets[owner_N]
        return hashed_uniform(mixed_seed(seed_B, 1)[owner_N] + place_N, 0, (1,))[:, 0] < self.keep

    def rendered_field(self, batch: Any, boxes: SceneBoxes, seed_B: Tensor) -> Tensor:
        """The grids of scenes, [B C, *self.grid], from the points that a step sees."""
        xyz_N3, offsets = points_of(batch, "PonderV2")
        fields = point_fields_of(batch, self.backbone.fields, len(xyz_N3), "PonderV2")
        if self.keep < 1:
            kept_N = self.kept_points(offsets, len(xyz_N3), seed_B)
            offsets = kept_offsets(kept_N, offsets)
            # A plan, which knows no draws, sees as many as there are on average.
            most = round(self.keep * len(xyz_N3))
            at_M = kept_N.nonzero()[:, 0] if has_values(kept_N) else torch.arange(most, device=kept_N.device)
            xyz_N3, *fields = (rows[at_M] for rows in (xyz_N3, *fields))
        features_MD = self.backbone(xyz_N3, offsets, *fields)
        owner_M = row_owners(offsets, len(xyz_N3))
        inside_M3 = (wide(xyz_N3) - boxes.middle_B3[owner_M]) / boxes.side_B[owner_M, None] / boxes.half_B3[owner_M]
        return self.volume(pooled_grid(features_MD, (inside_M3 + 1) / 2, owner_M, len(offsets) - 1, self.grid))

    def drawn_rays(self, batch: Any, boxes: SceneBoxes, seed_B: Tensor) -> tuple[Rays, Targets]:
        """Rays through random pixels of all views, in the unit cube, and what their pixels show."""
        pictures, depth, place, rotation, intrinsics = posed_views_of(batch, len(seed_B), "PonderV2")
        B, V, _, H, W = pictures.shape
        pixel_BVR = (hashed_uniform(mixed_seed(seed_B, 2), 0, (V, self.rays)) * (H * W)).long().clamp_max(H * W - 1)
        at_BVR2 = torch.stack([pixel_BVR % W, pixel_BVR // W], dim=-1).to(wide(place).dtype)
        place, rotation, intrinsics = (wide(part).flatten(0, 1) for part in (place, rotation, intrinsics))
        through = rays_through(place, rotation, intrinsics, at_BVR2.flatten(0, 1))
        origin_BR3, ahead_BR3 = (part.unflatten(0, (B, V)).flatten(1, 2) for part in through)
        origin_BR3 = (origin_BR3 - boxes.middle_B3[:, None]) / boxes.side_B[:, None, None]
        # A camera that is none, such as one of zeros, has rays that miss the box.
        sound_BR1 = (origin_BR3 + ahead_BR3).isfinite().all(dim=-1, keepdim=True)
        up_3 = torch.eye(3, device=ahead_BR3.device, dtype=ahead_BR3.dtype)[2]
        rays = Rays(origin_BR3.where(sound_BR1, 2), ahead_BR3.where(sound_BR1, up_3))
        colour_BV3R = wide(pictures).flatten(3).gather(3, pixel_BVR[:, :, None].expand(-1, -1, 3, -1))
        depth_BR = wide(depth).flatten(2).gather(2, pixel_BVR).flatten(1) / boxes.side_B[:, None]
        targets = Targets(colour_BV3R.movedim(2, 3).flatten(1, 2), depth_BR)
        return rays, targets

    def losses(self, batch: Any, step: int) -> tuple[dict[str, Tensor], Tensor]:
        """(`rendering_losses`, the mean error of depths in the unit of the data), with the draws of a step."""
        xyz_N3, offsets = points_of(batch, "PonderV2")
        seed_B = mixed_seed(index_in(batch, self).to(xyz_N3.device), self.seed, step)
        boxes = scene_boxes(xyz_N3, offsets)
        grid_BC = self.rendered_field(batch, boxes, seed_B)
        rays, targets = self.drawn_rays(batch, boxes, seed_B)
        shape = rays.origin.shape[1:2]
        jitter_BRS = hashed_uniform(mixed_seed(seed_B, 3), 0, (*shape, self.pieces))
        # The middle of each of K equal shares, all moved alike.
        moved_BR1 = hashed_uniform(mixed_seed(seed_B, 4), 0, (*shape, 1))
        share_BRK = (torch.arange(self.finer, device=moved_BR1.device) + moved_BR1) / max(self.finer, 1)
        seen = self.field(grid_BC, boxes.half_B3, rays, self.pieces, jitter_BRS, share_BRK)
        drawn_B = offsets.diff() > 0
        losses = rendering_losses(seen, targets, drawn_B, self.truncation)
        known_BR = seen.crosses & drawn_B[:, None] & (targets.depth_BR > 0)
        error_BR = (seen.depth - targets.depth_BR).abs().detach() * boxes.side_B[:, None]
        return losses, known_mean(error_BR, known_BR)

    def configure_model(self) -> None:
        # A backward pass within the forward one, for slopes, would end the gathering of FSDP2's parts too soon.
        self.require_whole("takes slopes of its field within a step")

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        losses, error = self.losses(batch, self.global_step)
        loss = weighted_sum(losses, self.weights)
        figures = {f"train/{name}_loss": value for name, value in losses.items()}
        self.log_training({"train/loss": loss, **figures, "train/depth_error": error})
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Logs the losses and val/depth_error, with the draws of step 0 in every epoch."""
        losses, error = self.losses(batch, 0)
        figures = {f"val/{name}_loss": value for name, value in losses.items()}
        figures |= {"val/loss": weighted_sum(losses, self.weights), "val/depth_error": error}
        self.log_dict(figures, batch_size=len(batch["index"]), sync_dist=True)
