"""SimSiam: one network, two views of an image; a predictor of one view's embedding is trained towards the other view's.

Source: Chen, He, "Exploring Simple Siamese Representation Learning", 2020, arXiv 2011.10566, equations 1 to 4. There
are no negatives, no teacher and no clusters: the predictor, and that what it is compared with passes no gradient,
keep the embeddings apart. Left out: a rate of the predictor that does not fall (the paper's section 4.2, as its
authors' code has).
Shapes: B batch of this rank, C H W image, F features of the backbone, D embedding.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from lightspan.core.batches import require_fields
from lightspan.core.devices import wide
from lightspan.core.distributed import all_reduce_sums
from lightspan.core.errors import UserError
from lightspan.core.unit_length import unit_length
from lightspan.datamodules.image.batch import ViewsBatch
from lightspan.nn.views import pictures
from lightspan.nn.widths import require_predictor, require_projector
from lightspan.training.method import Method

VIEWS = 2


def negative_cosine(prediction_BD: Tensor, target_BD: Tensor) -> Tensor:
    """Equation 1: minus the cosine of each prediction with its target, the mean over the rows of all ranks.

    A scalar in [-1, 1], in float32 or wider. A row of zeros has a cosine of 0 and no gradient, and no rows at all have
    a loss of 0. Ranks may differ in rows.
    """
    cosine_B = (unit_length(wide(prediction_BD)) * unit_length(wide(target_BD))).sum(dim=1)
    total, count = all_reduce_sums(cosine_B.sum(), cosine_B.new_tensor(float(len(cosine_B))))
    return -total / count.clamp_min(1)


class SimSiam(Method):
    """Trains `backbone`, `projector` and `predictor` on two views of each image.

    Args:
        backbone: [B C H W] -> [B num_features]; what probes read.
        projector: [B num_features] -> [B D], such as `lightspan.nn.heads.projector.Projector` with `batch_norm`.
        predictor: [B D] -> [B D]. The paper's has one hidden layer, a quarter as wide.
        optimization: `optimizer`, `lr_scheduler` and `groups`, see `Method`.
    Raises: UserError for parts whose widths do not fit, and in the first step for batches without two views.
    """

    keeps_apart = "the predictor learns as fast as the network, and that heads keep their BatchNorm"

    def __init__(self, backbone: nn.Module, projector: nn.Module, predictor: nn.Module, **optimization: Any) -> None:
        super().__init__(**optimization)
        require_projector(backbone, projector)
        require_predictor(projector, predictor)
        self.backbone, self.projector, self.predictor = backbone, projector, predictor

    def training_step(self, batch: ViewsBatch, batch_idx: int) -> Tensor:
        require_fields(batch, "SimSiam")
        loss = self.loss(pictures(batch.get("views", ()), "SimSiam"))
        self.log_training({"train/loss": loss}, prog_bar=True)
        return loss

    def loss(self, views: Sequence[Tensor]) -> Tensor:
        """Equation 4. Each view passes by itself, so that a BatchNorm sees one kind at a time."""
        if len(views) != VIEWS:
            raise UserError(
                f"SimSiam compares {VIEWS} views of each image, but the batch has {len(views)}; set "
                "data.init_args.views to lightspan.datamodules.image.augment.views.TwoViews"
            )
        z1_BD, z2_BD = (self.projector(self.backbone(view)) for view in views)
        p1_BD, p2_BD = self.predictor(z1_BD), self.predictor(z2_BD)
        return (negative_cosine(p1_BD, self.target(z2_BD)) + negative_cosine(p2_BD, self.target(z1_BD))) / 2

    def target(self, z_BD: Tensor) -> Tensor:
        """What a prediction is compared with: the embedding, as a constant (equation 3)."""
        return z_BD.detach()
