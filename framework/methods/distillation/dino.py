"""DINO: self-distillation without labels, from large crops seen by a teacher to all crops seen by a student.

    P_s(x) = softmax(g_s(x) / tau_s),  P_t(x) = softmax((g_t(x) - c) / tau_t)
    loss   = mean over global views x and other views x' of -sum_k P_t(x)_k log P_s(x')_k     (eq. 3)
    c     <- m c + (1 - m) mean over rows of g_t(x)                                           (eq. 4)

Source: Caron et al., "Emerging Properties in Self-Supervised Vision Transformers" (DINO), 2021, arXiv 2104.14294, with
the sharpening of section 3.1, and schedules and the last layer that waits for an epoch as in section 3.2, appendix C
and the authors' code. The last layer's rows have unit length, as that code's
`norm_last_layer` keeps them. A step's targets are all centred before they move the centre.
Shapes: B images of this rank, G global and V views, R = G B rows, K prototypes.
"""

from typing import Any

import torch
from torch import Tensor, nn

from lightspan.core.ranges import require_shares, require_temperatures
from lightspan.datamodules.image.batch import ViewsBatch
from lightspan.nn.heads.dino_head import DINOHead, zero_grads
from lightspan.nn.multi_crop import MultiCropNetwork
from lightspan.nn.submodule_alias import submodule_alias
from lightspan.nn.teachers.centring import Centre
from lightspan.nn.teachers.ema import EMATeacher
from lightspan.nn.views import global_first, require_global_views
from lightspan.nn.widths import require_width
from lightspan.objectives.prototypes import centred_softmax, cross_view_loss
from lightspan.optim.schedules import TeacherMomentum, TeacherTemperature
from lightspan.training.method import Method


class DINO(Method):
    """The student's answer on every crop is held to the teacher's on each other global one. The teacher is kept.

    Batches hold views of which the first `global_views` are of one size and shown to both networks; the rest is shown
    to the student alone.

    Args:
        backbone: the student's, [R C h w] -> [R num_features] for each size of view: a vision transformer or a
            convolutional network, whose teacher normalises by its own batches. The teacher is a copy.
        head: of both networks.
        student_temperature, teacher_temperature, final_temperature: > 0. The teacher's rises from its first to its
            final value over the first `temperature_warmup` of the run, a share in [0, 1].
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
    keeps_apart = "centre_momentum is below 1, and that teacher_temperature is below student_temperature"

    def __init__(
        self,
        backbone: nn.Module,
        head: DINOHead,
        student_temperature: float = 0.1,
        teacher_temperature: float = 0.04,
        final_temperature: float = 0.07,
        temperature_warmup: float = 0.3,
        momentum: float = 0.996,
        final_momentum: float = 1.0,
        centre_momentum: float = 0.9,
        freeze_prototypes: float = 0.01,
        global_views: int = 2,
        **optimization: Any,
    ) -> None:
        super().__init__(**optimization)
        require_shares(centre_momentum=centre_momentum, freeze_prototypes=freeze_prototypes)
        require_temperatures(student_temperature=student_temperature)
        self.momentum = TeacherMomentum(momentum, final_momentum)
        self.teacher_temperature = TeacherTemperature(teacher_temperature, final_temperature, temperature_warmup)
        require_global_views(global_views)
        require_width(backbone, "head.in_features", head.in_features)
        self.student = MultiCropNetwork(backbone, head)
        self.teacher = EMATeacher(self.student, batch_statistics=True)
        self.centre = Centre(len(head.prototypes.weight), centre_momentum)
        self.student_temperature, self.freeze_prototypes = student_temperature, freeze_prototypes
        self.global_views = global_views

    @torch.no_grad()
    def assignments(self, batch: Any) -> Tensor:
        """The teacher's to its prototypes, [B K], centred as targets are, at the last temperature of all steps."""
        scores_BK = self.teacher.module.head(self.features(batch))  # type: ignore[operator]
        return centred_softmax(scores_BK, self.centre(), self.teacher_temperature.final_temperature)

    def training_step(self, batch: ViewsBatch, batch_idx: int) -> Tensor:
        views = global_first(batch, "DINO", self.global_views)
        taught_GBK = self.teacher(views[: self.global_views])
        temperature = self.teacher_temperature(self.share_of_run())
        targets_RK = centred_softmax(taught_GBK.flatten(0, 1), self.centre(), temperature)
        self.centre.see(taught_GBK.flatten(0, 1), self.global_step)
        loss = cross_view_loss(targets_RK.view_as(taught_GBK), self.student(views), self.student_temperature)
        # 0 if all draw one prototype each time, log K if none is preferred: both are collapses.
        entropy = torch.special.entr(targets_RK).sum(dim=1).mean()
        self.log_training({"train/loss": loss, "train/target_entropy_nats": entropy})
        return loss

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        if self.share_of_run() < self.freeze_prototypes:
            zero_grads([self.student.head.prototypes])  # type: ignore[list-item]

    def after_optimizer_step(self) -> None:
        self.teacher.follow(self.student, self.momentum(self.share_of_run()))
        self.centre.follow()
