"""LeJEPA: views of an image agree, and their embeddings are an isotropic Gaussian; without a teacher or a predictor.

Source: Balestriero, LeCun, "LeJEPA: Provable and Scalable Self-Supervised Learning Without the Heuristics", 2025, arXiv
2511.08544: the loss of section 5 and algorithm 2, (1 - lambda) times the squared distance of all views from the mean of
the global ones plus lambda times SIGReg, which is `lightspan.objectives.sigreg`, as the mean over views.
Shapes: V views of B images of this rank, the first G of them global, C h w image, D embedding width.
"""

from typing import Any

import torch
from torch import Tensor, nn

from lightspan.core.devices import wide
from lightspan.core.errors import UserError
from lightspan.core.ranges import require_in
from lightspan.datamodules.image.batch import ViewsBatch
from lightspan.nn.multi_crop import one_pass_a_size
from lightspan.nn.views import views_of
from lightspan.nn.widths import require_projector
from lightspan.objectives.means import sum_over_rows
from lightspan.objectives.sigreg import sigreg
from lightspan.training.method import Method


def distance_from_centre(z_VBD: Tensor, global_views: int) -> Tensor:
    """Mean of (z_vb - mean of the first `global_views` of b)^2 over views, rows of all ranks and features.

    The mean has gradients as well. Returns: scalar >= 0, the same on all ranks; 0 without rows.
    """
    z_VBD = wide(z_VBD)
    squares_VD = (z_VBD - z_VBD[:global_views].mean(dim=0)).square().sum(dim=1)
    total_VD, rows = sum_over_rows(squares_VD, z_VBD.shape[1])
    return (total_VD / rows.clamp_min(1)).mean()


class LeJEPA(Method):
    """One hyperparameter, lambda. Sums of both terms run over all ranks; with sync_batchnorm N ranks train as one.

    Args:
        backbone: [R C h w] -> [R num_features], for each size of view; what probes read, and all that is kept.
        projector: [R num_features] -> [R D]. It must not normalise: the scale of its rows is what SIGReg sees.
        lam: lambda in [0, 1]; the paper has 0.05 and finds 0.01 to 0.1 alike.
        global_views: G >= 1, views whose mean the others follow.
        directions: random ones that SIGReg looks along in each step.
        seed: of these.
        optimization: `optimizer`, `lr_scheduler` and `groups`, see `Method`.
    """

    keeps_apart = "lam is above 0, 0.01 to 0.1, and that the projector does not normalise"

    def __init__(
        self,
        backbone: nn.Module,
        projector: nn.Module,
        lam: float = 0.05,
        global_views: int = 2,
        directions: int = 1024,
        seed: int = 0,
        **optimization: Any,
    ) -> None:
        super().__init__(**optimization)
        if not 0 <= lam <= 1:
            raise UserError(f"lam={lam} must lie in [0, 1]; 0.01 to 0.1 are usual")
        require_in("[1, inf)", global_views=global_views, directions=directions)
        require_projector(backbone, projector)
        self.backbone, self.projector = backbone, projector
        self.lam, self.global_views, self.directions, self.seed = lam, global_views, directions, seed

    def training_step(self, batch: ViewsBatch, batch_idx: int) -> Tensor:
        views = views_of(batch, "LeJEPA")
        if len(views) < max(self.global_views, 2):
            raise UserError(
                f"LeJEPA needs two views or more, of which the first global_views={self.global_views} are global, and "
                f"this batch has {len(views)}; set data.init_args.views or global_views"
            )
        rows_RD = self.projector(torch.cat(one_pass_a_size(self.backbone, views)))
        z_VBD = rows_RD.unflatten(0, (len(views), len(views[0])))
        distance = distance_from_centre(z_VBD, self.global_views)
        gauss = sigreg(z_VBD, self.seed, self.global_step, self.directions)
        loss = (1 - self.lam) * distance + self.lam * gauss
        self.log_training({"train/loss": loss, "train/distance": distance, "train/sigreg": gauss})
        return loss
