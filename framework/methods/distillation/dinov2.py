"""DINOv2, and DINOv3's Gram anchoring of it.

    L = L_class + L_patches + w_K L_KoLeo  [+ w_G L_Gram]

Source: Oquab et al., "DINOv2: Learning Robust Visual Features without Supervision", 2023, arXiv 2304.07193, section 4
and appendix B: class tokens across views (DINO's loss), masked patches within a view (iBOT's), a head for each of both,
targets by three rounds of Sinkhorn-Knopp, and KoLeo with weight 0.1 on the class tokens of the first global view, as
they enter the head (the authors' code takes it of both views). Siméoni et al., "DINOv3", 2025, arXiv 2508.10104,
sections 3 and 4: the same with KoLeo in groups of 16 images, and Gram anchoring (`lightspan.nn.teachers.gram_anchor`).
Left out of DINOv3: a norm of its own for class tokens of local views, and a weight of these that falls late in its run.
Class tokens of global views come from masked images, and a view without a masked patch counts as 0, as in iBOT. KoLeo's
neighbours are exact, sought among the images of all ranks; DINOv2's code seeks them on each rank alone.
Shapes: B images of this rank, G global and V views, K prototypes, N masked patches.
"""

from typing import Any

import torch
from torch import Tensor, nn

from lightspan.core.devices import wide
from lightspan.core.ranges import require_in, require_shares, require_temperatures, require_weights
from lightspan.datamodules.image.batch import ViewsBatch
from lightspan.nn.heads.dino_head import DINOHead, zero_grads
from lightspan.nn.image_numbers import index_in
from lightspan.nn.masking.block_masks import BlockMasks
from lightspan.nn.masking.view_masks import masks_of_views
from lightspan.nn.submodule_alias import submodule_alias
from lightspan.nn.teachers.ema import EMATeacher
from lightspan.nn.teachers.gram_anchor import GramAnchor
from lightspan.nn.teachers.prototype_network import SeenByTwo, TwoHeadNetwork
from lightspan.nn.views import global_first, require_global_views
from lightspan.objectives.gram import gram_loss
from lightspan.objectives.koleo import koleo
from lightspan.objectives.means import weighted_sum
from lightspan.objectives.prototypes import class_and_patch_losses, sinkhorn
from lightspan.optim.schedules import TeacherMomentum, TeacherTemperature
from lightspan.training.method import Method


class DINOv2(Method):
    """The student sees what the teacher says of a crop in other crops, and of a hidden patch around it, by two heads;
    class tokens of different images keep apart. The teacher is kept.

    Batches hold views of which the first `global_views` are of one size and shown to both networks; the rest is shown
    to the student alone.

    Args:
        backbone: the student's, a transformer with tokens, a class token and a mask token, such as
            `lightspan.backbones.vit.vit`, or `lightspan.backbones.published.timm_tokens` to continue from weights. The
            teacher is a copy.
        head: of class tokens.
        patch_head: of masked patches.
        anchor: DINOv3's; the views of the data are then `anchor.scale` times as large as both networks see them. None
            is DINOv2.
        student_temperature, teacher_temperature, final_temperature: > 0. The teacher's rises from its first to its
            final value over the first `temperature_warmup` of the run, a share in [0, 1].
        momentum, final_momentum: of the teacher, in [0, 1], on a half cosine over the run.
        koleo_weight: of the term that spreads class tokens, >= 0; at 0 it is left out.
        koleo_group: images among which it seeks a neighbour, at least 2; None is the batch of all ranks. DINOv3: 16.
        masks: of the student's global views; None is half of the images at ratios of 0.1 to 0.5.
        freeze_prototypes: share of the run in which prototypes keep their place, in [0, 1].
        global_views: at least 2.
        optimization: `optimizer`, `lr_scheduler` and `groups`, see `Method`.
    """

    backbone = submodule_alias("teacher.module.backbone", "The teacher's, which gives the features.")
    projector = submodule_alias(
        "teacher.module.head.mlp", "The teacher's, to the bottleneck whose direction prototypes score."
    )
    keeps_apart = "koleo_weight is above 0, and that teacher_temperature is below student_temperature"

    def __init__(
        self,
        backbone: nn.Module,
        head: DINOHead,
        patch_head: DINOHead,
        anchor: GramAnchor | None = None,
        student_temperature: float = 0.1,
        teacher_temperature: float = 0.04,
        final_temperature: float = 0.07,
        temperature_warmup: float = 0.06,
        momentum: float = 0.994,
        final_momentum: float = 1.0,
        koleo_weight: float = 0.1,
        koleo_group: int | None = None,
        masks: BlockMasks | None = None,
        freeze_prototypes: float = 0.002,
        global_views: int = 2,
        **optimization: Any,
    ) -> None:
        super().__init__(**optimization)
        require_shares(freeze_prototypes=freeze_prototypes)
        require_temperatures(student_temperature=student_temperature)
        self.momentum = TeacherMomentum(momentum, final_momentum)
        self.teacher_temperature = TeacherTemperature(teacher_temperature, final_temperature, temperature_warmup)
        require_weights(koleo_weight=koleo_weight)
        if koleo_group is not None:
            require_in("[2, inf)", koleo_group=koleo_group)
        require_global_views(global_views)
        self.student = TwoHeadNetwork(backbone, head, patch_head, global_views, "DINOv2")
        self.teacher = EMATeacher(self.student)
        self.anchor = anchor
        if anchor is not None:
            anchor.build(self.backbone)
        self.student_temperature, self.koleo_weight, self.koleo_group = student_temperature, koleo_weight, koleo_group
        self.masks, self.freeze_prototypes, self.global_views = masks or BlockMasks(), freeze_prototypes, global_views

    @torch.no_grad()
    def assignments(self, batch: Any) -> Tensor:
        """The teacher's of class tokens to the prototypes, [B K], by softmax: Sinkhorn-Knopp hides collapse."""
        scores_BK = self.teacher.module.head(self.features(batch))  # type: ignore[operator]
        return (wide(scores_BK) / self.teacher_temperature.final_temperature).softmax(dim=1)

    def training_step(self, batch: ViewsBatch, batch_idx: int) -> Tensor:
        views, share = global_first(batch, "DINOv2", self.global_views), self.share_of_run()
        large = views[: self.global_views]
        if self.anchor is not None:
            views = [*map(self.anchor.shrunk, large), *views[self.global_views :]]
        grid = self.backbone.grid(views[0])
        masked = masks_of_views(self.masks, grid, self.global_step, index_in(batch, self), self.global_views)
        targets = self.targets(self.teacher(views[: self.global_views], masked, hide=False))
        seen = self.student(views, masked, hide=True)
        rest = self.student_temperature, masked.weight_N, masked.images
        of_class, of_patches = class_and_patch_losses([targets], seen.by_head, *rest)
        losses, weights = {"class": of_class[0], "patches": of_patches[0]}, {"class": 1.0, "patches": 1.0}
        if self.koleo_weight:
            losses["koleo"], weights["koleo"] = koleo(seen.class_VBw[0], self.koleo_group), self.koleo_weight
        if self.anchor is not None and self.anchor.counts(share, large[0]):
            losses["gram"] = gram_loss(seen.patches_RTw, self.anchor(torch.cat(large), grid))
            weights["gram"] = self.anchor.weight
        loss = weighted_sum(losses, weights)
        self.log_training({"train/loss": loss} | {f"train/{name}": figure for name, figure in losses.items()})
        return loss

    @torch.no_grad()
    def targets(self, taught: SeenByTwo) -> tuple[Tensor, Tensor]:
        """Those of class tokens of global views [G B K], all views in one assignment, and of masked patches [N K]."""
        temperature = self.teacher_temperature(self.share_of_run())
        class_RK = sinkhorn(taught.scores_VBK.flatten(0, 1), temperature)
        return class_RK.view_as(taught.scores_VBK), sinkhorn(taught.masked_NK, temperature)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        if self.share_of_run() < self.freeze_prototypes:
            zero_grads(self.student.prototypes)

    def after_optimizer_step(self) -> None:
        self.teacher.follow(self.student, self.momentum(self.share_of_run()))
        if self.anchor is not None:
            self.anchor.follow(self.backbone, self.share_of_run(), self.share_of_run(ahead=1))
