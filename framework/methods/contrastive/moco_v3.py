"""MoCo v3: contrast between a predicted view and the teacher's embedding of the other one, made for transformers.

Source: Chen, Xie, He, "An Empirical Study of Training Self-Supervised Vision Transformers", ICCV 2021, arXiv
2104.02057: ctr(q1, k2) + ctr(q2, k1) with ctr = 2 tau times the InfoNCE of all keys of the batch (equation 1, algorithm
1), no queue, a predictor, a momentum that rises on a half cosine, and a patch projection that keeps its random start
(section 4.2). The loss is `lightspan.objectives.info_nce.crossed_info_nce`. The teacher normalises by its own batches,
as in the authors' code, and with sync_batchnorm by those of all ranks.
Shapes: B images of this rank, C H W image, D embedding width.
"""

from typing import Any

from torch import Tensor, nn

from lightspan.core.patterns import any_matches, require_matches
from lightspan.core.ranges import require_temperatures
from lightspan.nn.submodule_alias import submodule_alias
from lightspan.nn.teachers.ema import EMATeacher
from lightspan.nn.views import views_of
from lightspan.nn.widths import require_predictor, require_projector
from lightspan.objectives.info_nce import crossed_info_nce
from lightspan.optim.schedules import TeacherMomentum
from lightspan.training.method import Method


class MoCoV3(Method):
    """Both views are query and key in turn; negatives are the keys of the other images of all ranks. The student is
    what is kept.

    Args:
        backbone: the student's, [B C H W] -> [B num_features]; the teacher is a copy.
        projector: [B num_features] -> [B D], copied too.
        predictor: [B D] -> [B D], the student's alone.
        frozen: name patterns of the backbone's parameters that keep their start, "patch_embed.*" in the paper: the
            patch projection's gradients have spikes that cost accuracy.
        momentum, final_momentum: of the teacher, in [0, 1], on a half cosine over the run.
        temperature: tau > 0; the paper has 0.2 for transformers and 1.0 for ResNet-50.
        optimization: `optimizer`, `lr_scheduler` and `groups`, see `Method`.
    """

    least_rows = 2

    backbone = submodule_alias("student.0", "The student's, which gives the features.")
    projector = submodule_alias("student.1", "The student's, which gives the embeddings.")
    keeps_apart = (
        "there are enough negatives (data.init_args.batch_size) and temperature fits, and that momentum is near 1"
    )

    def __init__(
        self,
        backbone: nn.Module,
        projector: nn.Module,
        predictor: nn.Module,
        frozen: tuple[str, ...] = (),
        momentum: float = 0.99,
        final_momentum: float = 1.0,
        temperature: float = 0.2,
        **optimization: Any,
    ) -> None:
        super().__init__(**optimization)
        require_temperatures(temperature=temperature)
        self.temperature, self.momentum = temperature, TeacherMomentum(momentum, final_momentum)
        require_projector(backbone, projector)
        require_predictor(projector, predictor)
        parameters = dict(backbone.named_parameters())
        require_matches(frozen, list(parameters), "parameter of the backbone (frozen)", "frozen")
        for name, parameter in parameters.items():
            parameter.requires_grad_(parameter.requires_grad and not any_matches([name], list(frozen)))
        self.student, self.predictor = nn.Sequential(backbone, projector), predictor
        self.teacher = EMATeacher(self.student, batch_statistics=True)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        views = views_of(batch, "MoCoV3", 2)
        # One pass for each view, as published: a BatchNorm sees one view of all images.
        queries = [self.predictor(self.student(view_BCHW)) for view_BCHW in views]
        loss = crossed_info_nce(queries, [self.teacher(view_BCHW) for view_BCHW in views], self.temperature)
        self.log_training({"train/loss": loss})
        return loss

    def after_optimizer_step(self) -> None:
        self.teacher.follow(self.student, self.momentum(self.share_of_run()))
