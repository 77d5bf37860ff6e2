"""Joint learning of images and volumes: one network of images is trained by clusters of slices and of whole volumes.

Source: Nguyen et al., "Joint Self-Supervised Image-Volume Representation Learning with Intra-Inter Contrastive
Clustering", AAAI 2023, arXiv 2212.01893. Three losses train the parts together:
- intra: SwAV of images, here slices of the volumes (`lightspan.objectives.swapped_prediction`);
- inter: the same of volumes. The network embeds each slice, a transformer with deformable attention relates the slices
  (`lightspan.backbones.slices`), and the mean over them is the vector of a volume; each of two differently augmented
  crops predicts the code of the other;
- masked: a share of the slice embeddings gives way to a learned token, and behind the transformer a linear map guesses
  them. The squared error is over the hidden slices, and no gradient reaches the network of slices, which the paper
  holds fixed there.
Differences: the paper alternates between objectives of images and of volumes, and here each step has the sum of all, so
that every weight has a gradient in every step, as several ranks need; the network runs once for the two losses of
volumes, in training mode. In the authors' code, which trains in stages, attention runs along the numbers of an
embedding, an augmented pair is drawn once for all epochs, and the masked loss counts visible slices too; here, as in
the paper, none of these.
Shapes: B volumes of this rank, N images of each, V views, S slices of a crop, D H W voxels, w width of a slice
embedding, E embedding width of an image, K prototypes.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightspan.backbones.slices import SlicedVolumes
from lightspan.core.batches import described
from lightspan.core.errors import UserError
from lightspan.core.ranges import require_weights
from lightspan.nn.image_numbers import image_numbers, index_in
from lightspan.nn.masking.mask_samplers import MaskSampler, RandomMasks
from lightspan.nn.multi_crop import one_pass_a_size
from lightspan.nn.views import pictures, require_one_size, views_of
from lightspan.nn.widths import given_width, require_projector, require_width
from lightspan.objectives.means import squared_error_at, weighted_sum
from lightspan.objectives.swapped_prediction import SwappedPrediction
from lightspan.training.method import Method


class Joint2D3D(Method):
    """Clusters of slices and of volumes, and hidden slices guessed from the others. Of the backbone both are kept: the
    network of slices for images, and all of it for volumes, whose features it gives.

    Batches have two crops of each volume as `views`, and `slices`, views of N images of each
    (`lightspan.datamodules.volume.slices`), of which the first ones are of one size. A volume of a single slice has
    none to hide.

    Args:
        backbone: with the network of slices in it, as `embedding.encoder`: images [R C h w] -> [R num_features].
        projector: of images, [R num_features] -> [R E].
        intra, inter: prototypes of images, of width E, and of volumes, of width w. Batches have few volumes: take few
            prototypes for these, or a queue.
        masks: hides equally many slices of each volume; None is `RandomMasks` of a tenth, rounded up.
        intra_weight, inter_weight, masked_weight: of the losses, >= 0.
        optimization: `optimizer`, `lr_scheduler` and `groups`, see `Method`.
    """

    keeps_apart = "inter.code_temperature and inter.iterations give codes that use all prototypes of volumes alike"

    def __init__(
        self,
        backbone: SlicedVolumes,
        projector: nn.Module,
        intra: SwappedPrediction,
        inter: SwappedPrediction,
        masks: MaskSampler | None = None,
        intra_weight: float = 1.0,
        inter_weight: float = 1.0,
        masked_weight: float = 1.0,
        **optimization: Any,
    ) -> None:
        super().__init__(**optimization)
        self.weights = {"intra": intra_weight, "inter": inter_weight, "masked_mse": masked_weight}
        require_weights(intra_weight=intra_weight, inter_weight=inter_weight, masked_weight=masked_weight)
        require_projector(backbone.embedding.encoder, projector)
        given_width(projector)
        require_width(projector, "intra.in_features", intra.in_features)
        require_width(backbone, "inter.in_features", inter.in_features)
        width = backbone.num_features
        self.backbone, self.projector, self.intra, self.inter = backbone, projector, intra, inter
        self.masks = masks or RandomMasks(ratio=0.1)
        self.mask_token, self.decoder = nn.Parameter(torch.randn(width)), nn.Linear(width, width)

    def embeddings(self, batch: Any) -> Tensor:
        """The vectors of volumes, which prototypes score."""
        return self.features(batch)

    @torch.no_grad()
    def assignments(self, batch: Any) -> Tensor:
        """Which prototypes of volumes a batch predicts, [B K]."""
        return self.inter.assignments(self.features(batch))

    def hidden(self, slices: int, index_B: Tensor, views: int) -> Tensor:
        """Which slices of each view are hidden in this step, bool [V B S]."""
        numbers = image_numbers(index_B)
        drawn = [self.masks.draw((slices,), self.global_step, numbers, view) for view in range(views)]
        return torch.stack([torch.from_numpy(one_BS) for one_BS in drawn]).to(index_B.device)

    def guess(self, slices_BSw: Tensor, hidden_BS: Tensor) -> Tensor:
        """Embeddings of all slices, from those that are not hidden, [B S w]."""
        seen_BSw = torch.where(hidden_BS[..., None], self.mask_token.to(slices_BSw.dtype), slices_BSw)
        return self.decoder(self.backbone.transformer(seen_BSw))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        volumes = views_of(batch, "Joint2D3D", self.inter.global_views)
        require_one_size(volumes, "Joint2D3D")
        images = slice_views(batch, len(volumes[0]), self.intra.global_views)
        z_RE = self.projector(torch.cat(one_pass_a_size(self.backbone.embedding.encoder, images)))
        intra = self.intra(z_RE.unflatten(0, (len(images), len(images[0]))), self.share_of_run(), self.global_step)

        slices_RSw, views = self.backbone.slices(torch.cat(volumes)), (len(volumes), len(volumes[0]))
        v_VBw = self.backbone.transformer(slices_RSw).mean(dim=1).unflatten(0, views)
        inter = self.inter(v_VBw, self.share_of_run(), self.global_step)

        known_RSw = slices_RSw.detach()
        hidden_RS = self.hidden(slices_RSw.shape[1], index_in(batch, self), len(volumes)).flatten(0, 1)
        guess_RSw = self.guess(known_RSw, hidden_RS)
        masked = squared_error_at(guess_RSw, known_RSw, hidden_RS[..., None].expand_as(known_RSw))

        losses = {"intra": intra.loss, "inter": inter.loss, "masked_mse": masked}
        loss = weighted_sum(losses, self.weights)
        figures = {"intra_entropy_nats": intra.entropy, "inter_entropy_nats": inter.entropy, **losses}
        self.log_training({"train/loss": loss, **{f"train/{name}": value for name, value in figures.items()}})
        return loss

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        for part in (self.intra, self.inter):
            part.hold(self.share_of_run())

    def after_optimizer_step(self) -> None:
        for part in (self.intra, self.inter):
            part.follow()


def slice_views(batch: Mapping[str, Any], volumes: int, global_views: int) -> list[Tensor]:
    """The views of a batch's images, [B N C h w], as those of single images, [B*N C h w].

    Raises: UserError for a batch without them, or of images of other volumes, and for views of which the first
        `global_views` are not of one size.
    """
    given = batch.get("slices")
    views = pictures(given, "Joint2D3D") if isinstance(given, list | tuple) else []
    sizes = {view.shape for view in views[:global_views]}
    if len(views) < global_views or len(sizes) > 1 or any(view.ndim != 5 or len(view) != volumes for view in views):
        found = [described(view) for view in views] if views else "none"
        raise UserError(
            f"Joint2D3D needs slices of {volumes} volumes as images, with views [B N C h w] of which the first "
            f"global_views={global_views} are of one size, and this batch gives {found}; set data.init_args.slices, "
            "such as {count: 8, views: {class_path: lightspan.datamodules.image.augment.views.RandomViews}}"
        )
    return [view.flatten(0, 1) for view in views]
