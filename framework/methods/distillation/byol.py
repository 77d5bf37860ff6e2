"""BYOL: one view's embedding, by a predictor, becomes that which a teacher gives of the other view; no negatives.

Source: Grill et al., "Bootstrap Your Own Latent", NeurIPS 2020, arXiv 2006.07733: loss (eq. 2, symmetric), momentum
(section 3.1: 1 - (1 - tau)(cos(pi k / K) + 1) / 2). The teacher normalises by its own batches, as in the authors' code.
Shapes: B images of this rank, C H W image, D embedding width.
"""

from typing import Any

from torch import Tensor, nn

from lightspan.nn.submodule_alias import submodule_alias
from lightspan.nn.teachers.ema import EMATeacher
from lightspan.nn.views import views_of
from lightspan.nn.widths import require_predictor, require_projector
from lightspan.objectives.prediction import prediction_distance
from lightspan.optim.schedules import TeacherMomentum
from lightspan.training.method import Method


class BYOL(Method):
    """Two views of an image predict one another's embeddings. The student is what is kept.

    Args:
        backbone: the student's, [B C H W] -> [B num_features]; the teacher is a copy.
        projector: [B num_features] -> [B D], copied too.
        predictor: [B D] -> [B D], the student's alone.
        momentum, final_momentum: of the teacher, in [0, 1], on a half cosine over the run.
        optimization: `optimizer`, `lr_scheduler` and `groups`, see `Method`.
    """

    backbone = submodule_alias("student.0", "The student's, which gives the features.")
    projector = submodule_alias("student.1", "The student's, which gives the embeddings.")
    keeps_apart = "the predictor is the student's alone, and momentum near 1"

    def __init__(
        self,
        backbone: nn.Module,
        projector: nn.Module,
        predictor: nn.Module,
        momentum: float = 0.996,
        final_momentum: float = 1.0,
        **optimization: Any,
    ) -> None:
        super().__init__(**optimization)
        self.momentum = TeacherMomentum(momentum, final_momentum)
        require_projector(backbone, projector)
        require_predictor(projector, predictor)
        self.student, self.predictor = nn.Sequential(backbone, projector), predictor
        self.teacher = EMATeacher(self.student, batch_statistics=True)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        views = views_of(batch, "BYOL", 2)
        # One pass for each view, as published: a BatchNorm sees one view of all images.
        guesses_BD = [self.predictor(self.student(view_BCHW)) for view_BCHW in views]
        targets_BD = [self.teacher(view_BCHW) for view_BCHW in reversed(views)]
        loss = sum(prediction_distance(*pair) for pair in zip(guesses_BD, targets_BD, strict=True))
        assert isinstance(loss, Tensor)
        self.log_training({"train/loss": loss})
        return loss

    def after_optimizer_step(self) -> None:
        self.teacher.follow(self.student, self.momentum(self.share_of_run()))
