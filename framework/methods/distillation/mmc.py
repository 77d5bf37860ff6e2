"""MMC: masked modelling, momentum distillation of patches and contrast between images, in one loss.

Source: "Masked Momentum Contrastive Learning for Zero-shot Semantic Understanding", 2023, arXiv 2308.11448. Only its
idea could be looked up; losses and weights are a composition of the methods that it names:
L = w_m L_M + w_d L_D + w_c L_C, all three of the student's corrupted views (`lightspan.nn.masking.corruption`), where
- L_M: pixels of corrupted patches by a linear layer, L1 (SiT, arXiv 2104.03602);
- L_D: corrupted patches are held to the teacher's patches at the same place of the clean view, on prototypes, centred
  and sharpened (iBOT, arXiv 2111.07832, eq. 2);
- L_C: the student's class token of one view finds the teacher's of the other view among those of all images of all
  ranks, both ways, by a predictor (MoCo v3, arXiv 2104.02057; its factor of 2 tau is left out).
Assumed: L_D takes corrupted patches alone, as L_M does; means over an image's patches, then over images.
Shapes: B images of this rank, two views, R = 2 B rows, N corrupted patches, d numbers of a patch, D and E widths, K
prototypes.
"""

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from lightspan.core.devices import wide
from lightspan.core.ranges import require_shares, require_temperatures, require_weights
from lightspan.datamodules.image.batch import ViewsBatch
from lightspan.nn.heads.dino_head import DINOHead, zero_grads
from lightspan.nn.image_numbers import index_in
from lightspan.nn.masking.block_masks import MaskedPatches
from lightspan.nn.masking.corruption import GroupCorruption
from lightspan.nn.sequences.patches import patchify
from lightspan.nn.sequences.token_backbone import ClassTokenNetwork, require_class_token, settle_patch_decoder
from lightspan.nn.submodule_alias import submodule_alias
from lightspan.nn.teachers.centring import Centre
from lightspan.nn.teachers.ema import EMATeacher
from lightspan.nn.views import global_first
from lightspan.nn.widths import require_predictor, require_projector, require_width
from lightspan.objectives.info_nce import paired_info_nce
from lightspan.objectives.means import mean_of, weighted_sum
from lightspan.objectives.prototypes import centred_softmax, prototype_cross_entropy
from lightspan.optim.schedules import TeacherMomentum, TeacherTemperature
from lightspan.training.method import Method


class TokenNetworkOutput(NamedTuple):
    """What a network says of views: embeddings of class tokens, tokens of corrupted patches, and their scores."""

    z_RE: Tensor
    patches_ND: Tensor
    scores_NK: Tensor


class TokenNetwork(ClassTokenNetwork):
    """A transformer, a projector of its class token and a head of its patches; images are [R C h w]."""

    def __init__(self, backbone: nn.Module, projector: nn.Module, head: DINOHead) -> None:
        super().__init__(backbone, projector)
        self.head = head

    def forward(self, image_RChw: Tensor, masked: MaskedPatches) -> TokenNetworkOutput:  # type: ignore[override]
        z_RE, patches_RTD = super().forward(image_RChw)
        patches_ND = masked.tokens(patches_RTD)
        return TokenNetworkOutput(z_RE, patches_ND, self.head(patches_ND))


class MMC(Method):
    """Patches that know their object without a label: `lightspan.evaluation.dense.prompt_masks` measures it. The
    teacher is kept.

    Batches hold two views of one size.

    Args:
        backbone: the student's, a transformer with tokens and a class token, such as `lightspan.backbones.vit.vit`; the
            teacher is a copy.
        projector: [R D] -> [R E], of class tokens, copied too.
        predictor: [R E] -> [R E], the student's alone.
        head: of patches, copied too.
        decoder: [N D] -> [N d], pixels of a patch; d is its area times the channels. None makes the linear layer.
        reconstruction, distillation, contrast: w_m, w_d and w_c, each >= 0.
        corruption: of the student's views; None has the defaults of `GroupCorruption`.
        student_temperature, teacher_temperature, final_temperature: of L_D, > 0. The teacher's rises from its first to
            its final value over the first `temperature_warmup` of the run, a share in [0, 1].
        contrast_temperature: of L_C, > 0.
        momentum, final_momentum: of the teacher, in [0, 1], on a half cosine over the run.
        centre_momentum: of the mean that is taken off the teacher's scores, in [0, 1].
        freeze_prototypes: share of the run in which prototypes keep their place, in [0, 1].
        optimization: `optimizer`, `lr_scheduler` and `groups`, see `Method`.
    """

    backbone = submodule_alias("teacher.module.backbone", "The teacher's, which gives the features.")
    projector = submodule_alias("teacher.module.projector", "The teacher's, which gives the embeddings.")
    keeps_apart = "centre_momentum is below 1, and that teacher_temperature is below student_temperature"

    def __init__(
        self,
        backbone: nn.Module,
        projector: nn.Module,
        predictor: nn.Module,
        head: DINOHead,
        decoder: nn.Linear | None = None,
        reconstruction: float = 1.0,
        distillation: float = 1.0,
        contrast: float = 1.0,
        corruption: GroupCorruption | None = None,
        student_temperature: float = 0.1,
        teacher_temperature: float = 0.04,
        final_temperature: float = 0.07,
        temperature_warmup: float = 0.3,
        contrast_temperature: float = 0.2,
        momentum: float = 0.996,
        final_momentum: float = 1.0,
        centre_momentum: float = 0.9,
        freeze_prototypes: float = 0.01,
        **optimization: Any,
    ) -> None:
        super().__init__(**optimization)
        require_weights(reconstruction=reconstruction, distillation=distillation, contrast=contrast)
        require_shares(centre_momentum=centre_momentum, freeze_prototypes=freeze_prototypes)
        require_temperatures(student_temperature=student_temperature, contrast_temperature=contrast_temperature)
        self.momentum = TeacherMomentum(momentum, final_momentum)
        self.teacher_temperature = TeacherTemperature(teacher_temperature, final_temperature, temperature_warmup)
        tokens = require_class_token(backbone, "MMC")
        require_projector(backbone, projector)
        require_predictor(projector, predictor)
        require_width(backbone, "head.in_features", head.in_features)
        decoder = decoder or nn.Linear(tokens.num_features, math.prod(tokens.patch_shape))
        settle_patch_decoder(backbone, decoder, "MMC")
        self.student = TokenNetwork(backbone, projector, head)
        self.predictor, self.decoder = predictor, decoder
        self.teacher = EMATeacher(self.student, batch_statistics=True)
        self.centre = Centre(len(head.prototypes.weight), centre_momentum)
        self.weights = {"reconstruction": reconstruction, "distillation": distillation, "contrast": contrast}
        self.corruption = corruption or GroupCorruption()
        self.student_temperature, self.contrast_temperature = student_temperature, contrast_temperature
        self.freeze_prototypes = freeze_prototypes

    def training_step(self, batch: ViewsBatch, batch_idx: int) -> Tensor:
        views = global_first(batch, "MMC", 2)[:2]
        grid, step = self.backbone.grid(views[0]), self.global_step
        index_B = index_in(batch, self)
        corrupted = [self.corruption(view, grid, index_B, step, number) for number, view in enumerate(views)]
        masks_RHW = np.concatenate([masks_BHW for _, masks_BHW in corrupted])
        masked, clean_RChw = MaskedPatches.of(masks_RHW, views[0].device), torch.cat(views)
        seen = self.student(torch.cat([image for image, _ in corrupted]), masked)
        taught = self.teacher(clean_RChw, masked)
        figures = {
            "reconstruction": self.reconstruction(seen.patches_ND, clean_RChw, grid, masked),
            "distillation": self.distillation(seen.scores_NK, taught.scores_NK, masked),
            "contrast": self.contrast(seen.z_RE, taught.z_RE),
        }
        loss = weighted_sum(figures, self.weights)
        self.log_training({"train/loss": loss} | {f"train/{name}": figure for name, figure in figures.items()})
        return loss

    def reconstruction(
        self, patches_ND: Tensor, clean_RChw: Tensor, grid: tuple[int, ...], masked: MaskedPatches
    ) -> Tensor:
        """L_M."""
        sides = [side // count for side, count in zip(clean_RChw.shape[2:], grid, strict=True)]
        pixels_RTd = patchify(clean_RChw, sides)
        error_N = (wide(self.decoder(patches_ND)) - masked.tokens(pixels_RTd)).abs().mean(dim=1)
        return mean_of((masked.weight_N * error_N).sum(), masked.images)

    def distillation(self, scores_NK: Tensor, taught_NK: Tensor, masked: MaskedPatches) -> Tensor:
        """L_D; the centre sees what it was taken off."""
        temperature = self.teacher_temperature(self.share_of_run())
        targets_NK = centred_softmax(taught_NK, self.centre(), temperature)
        self.centre.see(taught_NK, self.global_step)
        weights = masked.weight_N, masked.images
        return prototype_cross_entropy(targets_NK, scores_NK, self.student_temperature, *weights)

    def contrast(self, z_RE: Tensor, taught_RE: Tensor) -> Tensor:
        """L_C, the mean of both ways."""
        queries, keys = self.predictor(z_RE).chunk(2), taught_RE.chunk(2)
        pairs = zip(queries, reversed(keys), strict=True)
        return torch.stack([paired_info_nce(query, key, self.contrast_temperature) for query, key in pairs]).mean()

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        if self.share_of_run() < self.freeze_prototypes:
            zero_grads([self.student.head.prototypes])

    def after_optimizer_step(self) -> None:
        self.teacher.follow(self.student, self.momentum(self.share_of_run()))
        self.centre.follow()
