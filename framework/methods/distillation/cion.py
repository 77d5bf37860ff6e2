"""CION: DINO in which a teacher's view of a picture teaches the student's views of other pictures of that person.

Source: Zuo et al., "Cross-video Identity Correlating for Person Re-identification Pre-training", NeurIPS 2024, arXiv
2409.18569, section 3.3: identity-guided self-distillation, with the details of the authors' code. Of teacher's answers
q and student's answers p, with H their cross-entropy, and K pictures n, m of an identity in a rank's batch:

    L = mean over large crops g and crops v != g of
        (mean_n H(q_g[n], p_v[n]) + sum over places i != j of mean over identities H(q_g[i], p_v[j])) / (K (K - 1) + 1)

As H is linear in q, it is DINO's loss with mixed targets: `lightspan.objectives.prototypes.identity_shares`. As in
their code two pictures are compared in different crops alone, the teacher's temperature is constant, and K grows during
training (`lightspan.datamodules.loading.order.GroupSizes`). Identities are found first, in noisy tracklets
(`lightspan.evaluation.geometry.identities`). The last layer waits for an epoch and is of unit length, as DINO's.
Shapes: B pictures of this rank, G global and V views, R = G B rows, P prototypes.
"""

from typing import Any

import torch
from torch import Tensor, nn

from lightspan.core.ranges import require_shares, require_temperatures
from lightspan.datamodules.image.batch import ViewsBatch
from lightspan.nn.heads.dino_head import DINOHead, zero_grads
from lightspan.nn.labels import labels_of
from lightspan.nn.multi_crop import MultiCropNetwork
from lightspan.nn.submodule_alias import submodule_alias
from lightspan.nn.teachers.centring import Centre
from lightspan.nn.teachers.ema import EMATeacher
from lightspan.nn.views import global_first, require_global_views
from lightspan.nn.widths import require_width
from lightspan.objectives.prototypes import centred_softmax, cross_view_loss, mixed_targets
from lightspan.optim.schedules import TeacherMomentum
from lightspan.training.method import Method


class CION(Method):
    """The student's answer on every crop is held to the teacher's on each other global one, of all pictures of the
    same person. The teacher is kept.

    Batches hold views of which the first `global_views` are of one size and shown to both networks, and a `label`, the
    person, or below 0 for somebody unknown. Pictures see others of the same rank and micro-batch: give whole groups to
    each, as `ClassGroups` orders them.

    Args:
        backbone: the student's, [R C h w] -> [R num_features] for each size of view; the teacher is a copy, which
            normalises by its own batches.
        head: of both networks.
        student_temperature, teacher_temperature: > 0.
        momentum, final_momentum: of the teacher, in [0, 1], on a half cosine over the run.
        centre_momentum: of the mean that is taken off the teacher's scores, in [0, 1].
        freeze_prototypes: share of the run in which prototypes keep their place, in [0, 1]: the paper's first epoch.
        global_views: at least 2.
        optimization: `optimizer`, `lr_scheduler` and `groups`, see `Method`.
    """

    backbone = submodule_alias("teacher.module.backbone", "The teacher's, which gives the features.")
    projector = submodule_alias(
        "teacher.module.head.mlp", "The teacher's, to the bottleneck whose direction prototypes score."
    )
    learns_from_labels = True
    keeps_apart = "centre_momentum is below 1, and that teacher_temperature is below student_temperature"

    def __init__(
        self,
        backbone: nn.Module,
        head: DINOHead,
        student_temperature: float = 0.1,
        teacher_temperature: float = 0.04,
        momentum: float = 0.996,
        final_momentum: float = 1.0,
        centre_momentum: float = 0.9,
        freeze_prototypes: float = 0.01,
        global_views: int = 2,
        **optimization: Any,
    ) -> None:
        super().__init__(**optimization)
        require_shares(centre_momentum=centre_momentum, freeze_prototypes=freeze_prototypes)
        require_temperatures(student_temperature=student_temperature, teacher_temperature=teacher_temperature)
        require_global_views(global_views)
        require_width(backbone, "head.in_features", head.in_features)
        self.momentum = TeacherMomentum(momentum, final_momentum)
        self.student = MultiCropNetwork(backbone, head)
        self.teacher = EMATeacher(self.student, batch_statistics=True)
        self.centre = Centre(len(head.prototypes.weight), centre_momentum)
        self.student_temperature, self.teacher_temperature = student_temperature, teacher_temperature
        self.freeze_prototypes, self.global_views = freeze_prototypes, global_views

    @torch.no_grad()
    def assignments(self, batch: Any) -> Tensor:
        """The teacher's to its prototypes, [B P], centred as targets are."""
        scores_BP = self.teacher.module.head(self.features(batch))  # type: ignore[operator]
        return centred_softmax(scores_BP, self.centre(), self.teacher_temperature)

    def training_step(self, batch: ViewsBatch, batch_idx: int) -> Tensor:
        views = global_first(batch, "CION", self.global_views)
        label_B = labels_of(batch, "CION", len(views[0]))
        taught_GBP = self.teacher(views[: self.global_views])
        targets_RP = centred_softmax(taught_GBP.flatten(0, 1), self.centre(), self.teacher_temperature)
        self.centre.see(taught_GBP.flatten(0, 1), self.global_step)
        targets_GBP = mixed_targets(targets_RP.view_as(taught_GBP), label_B)
        loss = cross_view_loss(targets_GBP, self.student(views), self.student_temperature)
        # 0 if all draw one prototype each time, log P if none is preferred: both are collapses.
        entropy = torch.special.entr(targets_RP).sum(dim=1).mean()
        self.log_training({"train/loss": loss, "train/target_entropy_nats": entropy})
        return loss

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        if self.share_of_run() < self.freeze_prototypes:
            zero_grads([self.student.head.prototypes])  # type: ignore[list-item]

    def after_optimizer_step(self) -> None:
        self.teacher.follow(self.student, self.momentum(self.share_of_run()))
        self.centre.follow()
