"""POA: one self-distillation run that gives a network of every width and depth.

Source: Zhang et al., "POA: Pre-training Once for Models of All Sizes", ECCV 2024, arXiv 2408.01031, and the authors'
code. Beside the teacher and the whole ("intact") student, a part of the student of another size each step (the
"elastic" student) is trained:
L = lam L_IT + (1 - lam) (L_ET + L_EI), each a mean over the heads, plus the weighted KoLeo term (the numbers of these
equations in the paper could not be looked up), where
- L_IT, L_ET: cross-view loss of class tokens and, of masked patches, of the same view; targets are the teacher's scores
  after Sinkhorn-Knopp (both students have the same targets and the same masks);
- L_EI: class tokens of the elastic student against those of the intact one, same view: the mean over global views plus
  the mean over local views, which no number of pairs divides;
- KoLeo: of both students' class tokens before the heads, summed over the global views.
The parts are `lightspan.backbones.elastic`, `.nn.teachers.prototype_network`, `.nn.teachers.ema`, `.nn.subnets`,
`.nn.masking.block_masks` and `.objectives.prototypes`. Differences from the authors' code: prototypes have unit length
(their gains start at 1 and are trained), KoLeo looks for neighbours on all ranks, masks depend on each image alone.
Shapes: B batch of this rank, G global and V views, H W grid of a global view, w width, K prototypes, N masked patches.
"""

from typing import Any

import torch
from torch import Tensor

from lightspan.backbones.elastic import ElasticViT
from lightspan.core.devices import wide
from lightspan.core.errors import UserError
from lightspan.core.ranges import require_shares, require_temperatures, require_weights
from lightspan.datamodules.image.batch import ViewsBatch
from lightspan.nn.heads.dino_head import DINOHead, zero_grads
from lightspan.nn.image_numbers import index_in
from lightspan.nn.masking.block_masks import BlockMasks
from lightspan.nn.masking.view_masks import masks_of_views
from lightspan.nn.submodule_alias import submodule_alias
from lightspan.nn.subnets import SubNetSampler
from lightspan.nn.teachers.ema import EMATeacher
from lightspan.nn.teachers.prototype_network import PrototypeNetwork, SeenViews
from lightspan.nn.views import global_first, require_global_views
from lightspan.objectives.koleo import koleo
from lightspan.objectives.prototypes import class_and_patch_losses, prototype_cross_entropy, sinkhorn
from lightspan.optim.schedules import TeacherMomentum, TeacherTemperature
from lightspan.training.method import Method


class POA(Method):
    """Trains an elastic vision transformer so that each of its sizes is a good encoder. The teacher is what is kept.

    Batches hold views of which the first `global_views` are of one size and shown to all three networks; the rest is
    shown to both students.

    Args:
        backbone: the student's; the teacher is a copy.
        heads: with different numbers of prototypes, at least one; their losses are averaged.
        lam: share of the intact student's loss, in [0, 1). Without an elastic student the loss is that of
            `lightspan.methods.distillation.ibot.IBOT` with Sinkhorn-Knopp, which trains an elastic backbone as well.
        koleo_weight: of the term that spreads features, >= 0; at 0 it is left out.
        student_temperature, teacher_temperature, final_temperature: > 0. The teacher's rises from its first to its
            final value over the first `temperature_warmup` of the run, a share in [0, 1].
        momentum, final_momentum: of the teacher, in [0, 1], on a half cosine over the run.
        global_views: at least 2.
        masks: of the students' global views; None is half of the images at ratios of 0.1 to 0.5.
        patch_loss_from: share of the run before which no patch is masked, in [0, 1].
        freeze_prototypes: share of the run in which prototypes keep their place, in [0, 1].
        small_first: how much more often small sizes are drawn; see `SubNetSampler`.
        seed: of the sizes drawn.
        optimization: `optimizer`, `lr_scheduler` and `groups`, see `Method`.
    """

    backbone = submodule_alias(
        "teacher.module.backbone",
        "The teacher's, which gives the features (class tokens of the whole network) and the networks of all sizes.",
    )
    keeps_apart = "koleo_weight is above 0, and that teacher_temperature is below student_temperature"

    def __init__(
        self,
        backbone: ElasticViT,
        heads: list[DINOHead],
        lam: float = 0.8,
        koleo_weight: float = 0.1,
        student_temperature: float = 0.1,
        teacher_temperature: float = 0.04,
        final_temperature: float = 0.07,
        temperature_warmup: float = 30 / 346,
        momentum: float = 0.992,
        final_momentum: float = 0.9999,
        global_views: int = 2,
        masks: BlockMasks | None = None,
        patch_loss_from: float = 30 / 346,
        freeze_prototypes: float = 1 / 346,
        small_first: float = 3.0,
        seed: int = 0,
        **optimization: Any,
    ) -> None:
        super().__init__(**optimization)
        require_shares(lam=lam, patch_loss_from=patch_loss_from, freeze_prototypes=freeze_prototypes)
        require_temperatures(student_temperature=student_temperature)
        self.momentum = TeacherMomentum(momentum, final_momentum)
        self.teacher_temperature = TeacherTemperature(teacher_temperature, final_temperature, temperature_warmup)
        if lam == 1:
            raise UserError(
                "lam=1.0 leaves the elastic student without a loss; without one this is "
                "lightspan.methods.distillation.ibot.IBOT with centre_momentum=null"
            )
        require_weights(koleo_weight=koleo_weight)
        require_global_views(global_views)
        self.student = PrototypeNetwork(backbone, heads, global_views)
        self.teacher = EMATeacher(self.student)
        self.lam, self.koleo_weight, self.student_temperature = lam, koleo_weight, student_temperature
        self.global_views, self.masks = global_views, masks or BlockMasks()
        self.patch_loss_from, self.freeze_prototypes = patch_loss_from, freeze_prototypes
        self.sampler = SubNetSampler(backbone.widths, backbone.depths, small_first, seed)

    def embeddings(self, batch: Any) -> Tensor:
        """Bottleneck of the teacher's first head, [B R], whose direction prototypes score."""
        return self.teacher.module.bottleneck(self.features(batch))  # type: ignore[operator]

    @torch.no_grad()
    def assignments(self, batch: Any) -> Tensor:
        """The teacher's, to the prototypes of its first head, [B K], by softmax: Sinkhorn-Knopp hides collapse."""
        scores_BK = self.teacher.module.heads[0](self.features(batch))  # type: ignore[operator, index]
        return (wide(scores_BK) / self.teacher_temperature.final_temperature).softmax(dim=1)

    def training_step(self, batch: ViewsBatch, batch_idx: int) -> Tensor:
        views = global_first(batch, "POA", self.global_views)
        grid, masking = self.backbone.grid(views[0]), self.share_of_run() >= self.patch_loss_from
        masked = masks_of_views(self.masks, grid, self.global_step, index_in(batch, self), self.global_views, masking)
        taught = self.teacher(views[: self.global_views], masked, hide=False)
        temperature = self.teacher_temperature(self.share_of_run())
        targets = [
            (sinkhorn(of_class.flatten(0, 1), temperature).view_as(of_class), sinkhorn(of_patches, temperature))
            for of_class, of_patches in taught.by_head
        ]

        def from_teacher(seen: SeenViews) -> Tensor:
            """L_IT or L_ET."""
            weights = masked.weight_N, masked.images
            losses_H = class_and_patch_losses(targets, seen.by_head, self.student_temperature, *weights)
            return sum(losses_H).mean()  # type: ignore[union-attr]

        intact = self.student(views, masked, hide=True)
        elastic = self.student(views, masked, hide=True, size=self.sampler.at(self.global_step))
        figures = {
            "intact": from_teacher(intact), "elastic": from_teacher(elastic),
            "same_view": self.same_view(intact, elastic),
        }  # fmt: skip
        loss = self.lam * figures["intact"] + (1 - self.lam) * (figures["elastic"] + figures["same_view"])
        if self.koleo_weight:
            spread = [koleo(class_Bw) for seen in (intact, elastic) for class_Bw in seen.class_VBw[: self.global_views]]
            figures["koleo"] = torch.stack(spread).sum() / 2
            loss = loss + self.koleo_weight * figures["koleo"]
        self.log_training({"train/loss": loss} | {f"train/{name}": figure for name, figure in figures.items()})
        return loss

    def same_view(self, intact: SeenViews, elastic: SeenViews) -> Tensor:
        """L_EI."""
        losses = []
        for target_VBK, scores_VBK in zip(intact.scores_VBK, elastic.scores_VBK, strict=True):
            target_VBK = (wide(target_VBK.detach()) / self.student_temperature).softmax(dim=2)
            for views in (slice(0, self.global_views), slice(self.global_views, None)):
                rows = target_VBK[views].flatten(0, 1), scores_VBK[views].flatten(0, 1)
                losses.append(prototype_cross_entropy(*rows, self.student_temperature))
        return torch.stack(losses).sum() / len(intact.scores_VBK)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        if self.share_of_run() < self.freeze_prototypes:
            zero_grads(self.student.prototypes)

    def after_optimizer_step(self) -> None:
        self.teacher.follow(self.student, self.momentum(self.share_of_run()))
