"""VICReg: two views agree, and no feature of theirs may stand still or repeat another one.

Source: Bardes, Ponce, LeCun, "VICReg: Variance-Invariance-Covariance Regularization for Self-Supervised Learning", ICLR
2022, arXiv 2105.04906. Its three terms are in `lightspan.objectives.vicreg`. Each view goes through the network by
itself, as in the authors' code, so a BatchNorm sees one view of all images.
Shapes: B images of this rank, C H W image, D embedding width.
"""

from typing import Any

from torch import Tensor, nn

from lightspan.core.ranges import require_weights
from lightspan.nn.views import views_of
from lightspan.nn.widths import require_projector
from lightspan.objectives.vicreg import vicreg_terms
from lightspan.training.method import Method


class VICReg(Method):
    """No negatives, no teacher, and nothing that must be alike in both branches. Variances and covariances run over the
    rows of all ranks; with sync_batchnorm N ranks train as one.

    Args:
        backbone: [B C H W] -> [B num_features]; what probes read, and all that is kept.
        projector: [B num_features] -> [B D], the paper's expander: D is several times num_features there.
        invariance_weight, variance_weight, covariance_weight: lambda, mu and nu, >= 0; without the second all images
            may have one embedding.
        optimization: `optimizer`, `lr_scheduler` and `groups`, see `Method`.
    """

    keeps_apart = "variance_weight is as large as invariance_weight, and covariance_weight above 0"

    def __init__(
        self,
        backbone: nn.Module,
        projector: nn.Module,
        invariance_weight: float = 25.0,
        variance_weight: float = 25.0,
        covariance_weight: float = 1.0,
        **optimization: Any,
    ) -> None:
        super().__init__(**optimization)
        require_weights(invariance_weight=invariance_weight, variance_weight=variance_weight)
        require_weights(covariance_weight=covariance_weight)
        self.weights = invariance_weight, variance_weight, covariance_weight
        require_projector(backbone, projector)
        self.backbone, self.projector = backbone, projector

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        z1_BD, z2_BD = (self.projector(self.backbone(view)) for view in views_of(batch, "VICReg", 2))
        terms = vicreg_terms(z1_BD, z2_BD)
        loss = terms.weighted(*self.weights)
        self.log_training({"train/loss": loss} | {f"train/{name}": term for name, term in terms._asdict().items()})
        return loss
