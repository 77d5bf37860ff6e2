"""VoCo: tell where in a body a crop lies by how much of it is in each cell of a grid.

Source: Wu, Zhuang, Chen, "VoCo: A Simple-yet-Effective Volume Contrastive Learning Framework for 3D Medical Image
Analysis", CVPR 2024, arXiv 2402.17300. Base crops are the cells of a grid over a volume. The similarity of a crop at a
random place with each of them, s = max(0, cos), is to be the share y of the crop that lies in it: L_pred is the mean of
-log(1 - |y - s|), without gradient into the base crops. Base crops of one volume are pushed apart, since they show
different places: L_reg is the mean of max(0, cos) over their pairs. The loss is L_pred + L_reg (section 3);
`lightspan.objectives.overlaps` has both.
Base crops and crops pass the network together, so that BatchNorm sees them all. Each crop is augmented on its own, also
turned and flipped, so that orientation gives no place away.
The paper has no teacher. The code that its authors released later has one, with which, as users report, the loss falls
where it would stay flat: `momentum`. As there, s is then the mean of two cosines: of the crop with the teacher's base
crops, and of the teacher's crop with the base crops. Differs from that code: the losses are the paper's (`voco_large`
has those of the successor), and the teacher starts as a copy of the student.
Assumed, as the paper could not be looked up again: the mean over crops and volumes. The code's projector has norms
without weights and running statistics; `Projector`'s hidden ones have both.
Shapes: B volumes of this rank, M crops at random places, K base crops, D embedding width.
"""

from typing import Any

from torch import Tensor, nn

from lightspan.core.ranges import require_shares, require_weights
from lightspan.nn.base_crops import base_crops_of, by_volume
from lightspan.nn.heads.projector import Projector
from lightspan.nn.submodule_alias import submodule_alias
from lightspan.nn.teachers.ema import EMATeacher
from lightspan.nn.widths import require_projector
from lightspan.objectives.means import mean, weighted_sum
from lightspan.objectives.overlaps import base_similarities, overlap_loss, positive_cosines
from lightspan.training.method import Method


class VoCo(Method):
    """Places of crops among base crops (`base_crops_of`). The backbone is what is kept, the student's.

    A volume of a single number has one embedding everywhere: its loss is finite, and the same for all weights.

    Args:
        backbone: [B C D H W] -> [B num_features], best from all levels (`lightspan.backbones.dense.PooledMaps`).
        projector: [B num_features] -> [B D].
        momentum: of a teacher, in [0, 1], 0.9 in the authors' later code; None is the paper's form, without one.
        bases_weight: of the similarity of base crops, >= 0.
        optimization: `optimizer`, `lr_scheduler` and `groups`, see `Method`.
    """

    backbone = submodule_alias("student.0", "The student's, which gives the features.")
    projector = submodule_alias("student.1", "The student's, which gives the embeddings.")
    keeps_apart = "bases_weight is above 0, and base crops (data.init_args.bases) show different places"

    def __init__(
        self,
        backbone: nn.Module,
        projector: Projector,
        momentum: float | None = None,
        bases_weight: float = 1.0,
        **optimization: Any,
    ) -> None:
        super().__init__(**optimization)
        require_weights(bases_weight=bases_weight)
        require_projector(backbone, projector)
        self.student = nn.Sequential(backbone, projector)
        self.momentum, self.weights = momentum, {"places": 1.0, "bases": bases_weight}
        self.teacher: EMATeacher | None = None
        if momentum is not None:
            require_shares(momentum=momentum)
            self.teacher = EMATeacher(self.student, batch_statistics=True)

    def similarities(self, crops_N: Tensor, bases_BKD: Tensor, crops_BMD: Tensor, overlap_BMK: Tensor) -> Tensor:
        """s, [B M K]."""
        if self.teacher is None:
            return positive_cosines(crops_BMD, bases_BKD.detach())
        taught_BKD, taught_BMD = by_volume(self.teacher(crops_N), overlap_BMK)
        return (positive_cosines(crops_BMD, taught_BKD) + positive_cosines(taught_BMD, bases_BKD)) / 2

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        crops_N, overlap_BMK = base_crops_of(batch, "VoCo")
        bases_BKD, crops_BMD = by_volume(self.student(crops_N), overlap_BMK)
        similarity_BMK = self.similarities(crops_N, bases_BKD, crops_BMD, overlap_BMK)
        losses = {
            "places": overlap_loss(overlap_BMK, similarity_BMK),
            "bases": mean(base_similarities(bases_BKD, bases_BKD)),
        }
        loss = weighted_sum(losses, self.weights)
        self.log_training({"train/loss": loss, **{f"train/{name}": value for name, value in losses.items()}})
        return loss

    def after_optimizer_step(self) -> None:
        if self.teacher is not None:
            assert self.momentum is not None
            self.teacher.follow(self.student, self.momentum)
