"""VoCo-L: where in a body a crop lies, by its own base crops and by those of another body.

Source: Wu, Zhuang, Chen, "Large-Scale 3D Medical Image Pre-training with Geometric Context Priors", 2024, arXiv
2410.09890, and its official code, whose losses differ from those of VoCo's paper (`voco`). One backbone gives features
to a student head and a teacher head, the moving average of the first. Three losses weigh 1 each:
- within: the cosine of a crop, by the student, with the base crops of its volume, by the teacher, is the overlap;
- across: that with the base crops of the next volume of the batch, all by the student, is what the teacher alone makes
  of the same crops, so that bodies are laid over one another;
- bases: base crops of a volume are unlike, squared cosines, the second one of each pair without gradient.
`lightspan.objectives.overlaps` has them. Across volumes, a crop and a base crop count as apart where the teacher's
rectified cosine is exactly 0, as in the code.
The student's features pass a dropout. The code calls one for series on a matrix, which drops all features of a crop
together, with probability 0.2, and not single features as the paper suggests: `drops` chooses, by default as the code.
Differs from the code: the teacher starts as a copy; the next volume is that of all ranks; a batch of a single volume
has no loss across, where the code compares it with itself. Left out: the training on labelled and pseudo-labelled
volumes that follows.
Shapes: B volumes of this rank, R of all ranks, M crops at random places, K base crops, V = K + M, F features, D
embedding width.
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightspan.core.distributed import gather_rows
from lightspan.core.noise import hashed_uniform, mixed_seed
from lightspan.core.ranges import require_in, require_shares
from lightspan.nn.base_crops import base_crops_of, by_volume
from lightspan.nn.heads.projector import Projector
from lightspan.nn.image_numbers import index_in
from lightspan.nn.teachers.ema import EMATeacher
from lightspan.nn.widths import require_projector
from lightspan.objectives.means import mean
from lightspan.objectives.overlaps import base_similarities, positive_cosines, split_overlap_loss
from lightspan.training.method import Method


class VoCoLarge(Method):
    """Places of crops among base crops of their own and of another volume. The backbone is what is kept.

    Args:
        backbone: [B C D H W] -> [B F], best from all levels (`lightspan.backbones.dense.PooledMaps`).
        projector: the student's head, [B F] -> [B D]; the teacher's is a copy.
        momentum: of the teacher, in [0, 1].
        drop: share of the student's features that training drops, in [0, 1); the rest is scaled up.
        drops: "crops", all features of a crop together, or "features", each by itself.
        optimization: `optimizer`, `lr_scheduler` and `groups`, see `Method`.
    """

    keeps_apart = "base crops (data.init_args.bases) show different places, and batch_size is above 1"

    def __init__(
        self,
        backbone: nn.Module,
        projector: Projector,
        momentum: float = 0.9,
        drop: float = 0.2,
        drops: Literal["crops", "features"] = "crops",
        **optimization: Any,
    ) -> None:
        super().__init__(**optimization)
        require_shares(momentum=momentum)
        require_in("[0, 1)", drop=drop)
        require_projector(backbone, projector)
        self.backbone, self.projector = backbone, projector
        self.teacher = EMATeacher(projector, batch_statistics=True)
        self.momentum, self.drop, self.drops = momentum, drop, drops

    def thinned(self, features_NF: Tensor, index_B: Tensor) -> Tensor:
        """The features of all crops, those of one place together, with some at 0: a function of volume and step."""
        if not self.drop:
            return features_NF
        crops = len(features_NF) // max(len(index_B), 1)
        shape = crops, 1 if self.drops == "crops" else features_NF.shape[1]
        drawn_BVF = hashed_uniform(mixed_seed(index_B, self.global_step), 0, shape)
        kept_NF = (drawn_BVF >= self.drop).transpose(0, 1).flatten(0, 1)
        return features_NF * kept_NF / (1 - self.drop)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        crops_N, overlap_BMK = base_crops_of(batch, "VoCoLarge")
        features_NF = self.backbone(crops_N)
        student = self.projector(self.thinned(features_NF, index_in(batch, self)))
        bases_BKD, crops_BMD = by_volume(student, overlap_BMK)
        taught_BKD, taught_BMD = by_volume(self.teacher(features_NF), overlap_BMK)
        losses = {
            "within": split_overlap_loss(overlap_BMK, positive_cosines(crops_BMD, taught_BKD)),
            "bases": mean(base_similarities(bases_BKD, bases_BKD.detach()).square()),
        }
        # Both heads' base crops travel together.
        both_RKE, first = gather_rows(torch.cat([bases_BKD, taught_BKD], dim=2))
        if len(both_RKE) > 1:
            next_B = (first + 1 + torch.arange(len(crops_BMD), device=both_RKE.device)) % len(both_RKE)
            other_BKD, taught_other_BKD = both_RKE[next_B].chunk(2, dim=2)
            target_BMK = positive_cosines(taught_BMD, taught_other_BKD).detach()
            losses["across"] = split_overlap_loss(target_BMK, positive_cosines(crops_BMD, other_BKD))
        loss = torch.stack([*losses.values()]).sum()
        self.log_training({"train/loss": loss, **{f"train/{name}": value for name, value in losses.items()}})
        return loss

    def after_optimizer_step(self) -> None:
        self.teacher.follow(self.projector, self.momentum)
