"""iBOT: self-distillation of class tokens across views and of masked patches within a view, by one head.

Source: Zhou et al., "iBOT: Image BERT Pre-Training with Online Tokenizer", ICLR 2022, arXiv 2111.07832: patches (eq.
2), class tokens (eq. 3), their sum, a centre for each of both, block-wise masks of half of the images (section 3.3,
appendix and the authors' code). The student's class tokens of global views come from masked images, local views are
never masked, and a view without a masked patch counts as 0. The centre of patches follows the masked ones, the only
patches that the teacher's head sees here, as in DINOv2's code; that of iBOT's authors follows all of them. Without
centres (targets by Sinkhorn-Knopp) and with a KoLeo weight of 0.1, this is the loss of DINOv2 (Oquab et al., 2023,
arXiv 2304.07193) with heads that class tokens and patches share.
Shapes: B images of this rank, G global and V views, H heads, K prototypes, N masked patches.
"""

from typing import Any

import torch
from torch import Tensor, nn

from lightspan.core.ranges import require_shares, require_temperatures, require_weights
from lightspan.datamodules.image.batch import ViewsBatch
from lightspan.nn.heads.dino_head import DINOHead, zero_grads
from lightspan.nn.image_numbers import index_in
from lightspan.nn.masking.block_masks import BlockMasks
from lightspan.nn.masking.view_masks import masks_of_views
from lightspan.nn.submodule_alias import submodule_alias
from lightspan.nn.teachers.centring import Centre
from lightspan.nn.teachers.ema import EMATeacher
from lightspan.nn.teachers.prototype_network import PrototypeNetwork
from lightspan.nn.views import global_first, require_global_views
from lightspan.objectives.koleo import koleo
from lightspan.objectives.prototypes import centred_softmax, class_and_patch_losses, sinkhorn
from lightspan.optim.schedules import TeacherMomentum, TeacherTemperature
from lightspan.training.method import Method


class IBOT(Method):
    """The student sees what the teacher says of a crop in other crops, and of a hidden patch around it. The teacher is
    kept.

    Batches hold views of which the first `global_views` are of one size and shown to both networks; the rest is shown
    to the student alone.

    Args:
        backbone: the student's, a transformer with tokens, a class token and a mask token; see
            `lightspan.nn.teachers.prototype_network`. The teacher is a copy.
        heads: at least one; iBOT has one. Their losses are averaged.
        student_temperature, teacher_temperature, final_temperature: > 0. The teacher's rises from its first to its
            final value over the first `temperature_warmup` of the run, a share in [0, 1].
        momentum, final_momentum: of the teacher, in [0, 1], on a half cosine over the run.
        centre_momentum: of the means that are taken off the teacher's scores, in [0, 1]; None normalises these by
            Sinkhorn-Knopp instead.
        koleo_weight: of the term that spreads class tokens, >= 0; at 0 it is left out.
        masks: of the student's global views; None is half of the images at ratios of 0.1 to 0.5.
        patch_loss_from: share of the run before which no patch is masked, in [0, 1].
        freeze_prototypes: share of the run in which prototypes keep their place, in [0, 1].
        global_views: at least 2.
        optimization: `optimizer`, `lr_scheduler` and `groups`, see `Method`.
    """

    backbone = submodule_alias("teacher.module.backbone", "The teacher's, which gives the features.")
    keeps_apart = "centre_momentum is below 1, and that teacher_temperature is below student_temperature"

    def __init__(
        self,
        backbone: nn.Module,
        heads: list[DINOHead],
        student_temperature: float = 0.1,
        teacher_temperature: float = 0.04,
        final_temperature: float = 0.07,
        temperature_warmup: float = 0.3,
        momentum: float = 0.996,
        final_momentum: float = 1.0,
        centre_momentum: float | None = 0.9,
        koleo_weight: float = 0.0,
        masks: BlockMasks | None = None,
        patch_loss_from: float = 0.0,
        freeze_prototypes: float = 0.01,
        global_views: int = 2,
        **optimization: Any,
    ) -> None:
        super().__init__(**optimization)
        require_shares(centre_momentum=centre_momentum or 0.0)
        require_shares(patch_loss_from=patch_loss_from, freeze_prototypes=freeze_prototypes)
        require_temperatures(student_temperature=student_temperature)
        self.momentum = TeacherMomentum(momentum, final_momentum)
        self.teacher_temperature = TeacherTemperature(teacher_temperature, final_temperature, temperature_warmup)
        require_weights(koleo_weight=koleo_weight)
        require_global_views(global_views)
        self.student = PrototypeNetwork(backbone, heads, global_views)
        self.teacher = EMATeacher(self.student)
        self.centres = nn.ModuleList()
        if centre_momentum is not None:
            counts = [len(head.prototypes.weight) for head in heads]
            self.centres.extend(nn.ModuleList(Centre(count, centre_momentum) for _ in range(2)) for count in counts)
        self.student_temperature, self.koleo_weight = student_temperature, koleo_weight
        self.masks, self.patch_loss_from = masks or BlockMasks(), patch_loss_from
        self.freeze_prototypes, self.global_views = freeze_prototypes, global_views

    def embeddings(self, batch: Any) -> Tensor:
        """Bottleneck of the teacher's first head, [B R], whose direction prototypes score."""
        return self.teacher.module.bottleneck(self.features(batch))  # type: ignore[operator]

    @torch.no_grad()
    def assignments(self, batch: Any) -> Tensor:
        """The teacher's to the prototypes of its first head, [B K], centred as targets are, at the last temperature of
        all steps; without centres the softmax alone, as Sinkhorn-Knopp hides collapse.
        """
        centres: Any = self.centres[0] if self.centres else None
        scores_BK = self.teacher.module.heads[0](self.features(batch))  # type: ignore[operator, index]
        centre_K = scores_BK.new_zeros(scores_BK.shape[1]) if centres is None else centres[0]()
        return centred_softmax(scores_BK, centre_K, self.teacher_temperature.final_temperature)

    def training_step(self, batch: ViewsBatch, batch_idx: int) -> Tensor:
        views = global_first(batch, "IBOT", self.global_views)
        grid, masking = self.backbone.grid(views[0]), self.share_of_run() >= self.patch_loss_from
        masked = masks_of_views(self.masks, grid, self.global_step, index_in(batch, self), self.global_views, masking)
        targets = self.targets(self.teacher(views[: self.global_views], masked, hide=False).by_head)
        seen = self.student(views, masked, hide=True)
        weights = masked.weight_N, masked.images
        losses = class_and_patch_losses(targets, seen.by_head, self.student_temperature, *weights)
        figures = dict(zip(("class", "patches"), (of_heads_H.mean() for of_heads_H in losses), strict=True))
        loss = figures["class"] + figures["patches"]
        if self.koleo_weight:
            figures["koleo"] = torch.stack([koleo(of_view) for of_view in seen.class_VBw[: self.global_views]]).sum()
            loss = loss + self.koleo_weight * figures["koleo"]
        self.log_training({"train/loss": loss} | {f"train/{name}": figure for name, figure in figures.items()})
        return loss

    @torch.no_grad()
    def targets(self, taught: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
        """Of each head those of class tokens [G B K] and of masked patches [N K]; centres see what they were taken
        off.
        """
        temperature = self.teacher_temperature(self.share_of_run())
        targets = []
        for head, (of_class, of_patches) in enumerate(taught):
            centres: Any = self.centres[head] if self.centres else (None, None)
            class_RK = self.target(of_class.flatten(0, 1), centres[0], temperature)
            targets.append((class_RK.view_as(of_class), self.target(of_patches, centres[1], temperature)))
        return targets

    def target(self, scores_RK: Tensor, centre: Centre | None, temperature: float) -> Tensor:
        if centre is None:
            return sinkhorn(scores_RK, temperature)
        targets_RK = centred_softmax(scores_RK, centre(), temperature)
        centre.see(scores_RK, self.global_step)
        return targets_RK

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        if self.share_of_run() < self.freeze_prototypes:
            zero_grads(self.student.prototypes)

    def after_optimizer_step(self) -> None:
        self.teacher.follow(self.student, self.momentum(self.share_of_run()))
        for of_head in self.centres:
            for centre in of_head:  # type: ignore[attr-defined]
                centre.follow()
