"""Mixed Barlow Twins: redundancy reduction that does not decay in long training, for one more forward pass.

Source: Bandara, De Melo, Patel, "Guarding Barlow Twins Against Overfitting with Mixed Samples", 2023, arXiv 2312.02151.
The two terms of the loss are in `lightspan.objectives.barlow`; here they are combined:
L = L_BT + lam_reg * lam * L_reg, on x_m = a x1 + (1 - a) x2[p] with a ~ Beta(alpha, alpha), one a and one p per step.
As in the authors' code each rank draws its own a and p for its own rows. Statistics and correlations, which that code
takes per rank, run over all ranks; with sync_batchnorm N ranks therefore give the gradient of one.
Shapes: B batch of this rank, C H W image, D embedding width.
"""

from typing import Any

import torch
from torch import Tensor, nn

from lightspan.core.ranges import require_in
from lightspan.core.unit_length import unit_length
from lightspan.nn.views import views_of
from lightspan.nn.widths import require_projector
from lightspan.objectives.barlow import barlow_twins_loss, mixed_regulariser, standardise
from lightspan.training.method import Method


class MixedBarlowTwins(Method):
    """Two views of an image must agree feature by feature, and a mixture of images must embed as their mixture.

    Args:
        backbone: [B C H W] -> [B num_features]; what probes read.
        projector: [B num_features] -> [B D]. The mixed term is needed if it is wide (D of 512 or more).
        lam: weight of the off-diagonal correlations, >= 0.
        lam_reg: weight of the mixed term relative to `lam`, >= 0; at 0 this is Barlow Twins and the third forward pass
            is left out.
        alpha: of the Beta distribution of a, > 0; 1 is uniform.
        normalize: scale each embedding to length 1 before it is standardised, as the authors' code does for small
            images and neither paper mentions.
        optimization: `optimizer`, `lr_scheduler` and `groups`, see `Method`.
    """

    least_rows = 2
    keeps_apart = "lam is above 0 and the batch (data.init_args.batch_size) large enough for correlations"

    def __init__(
        self,
        backbone: nn.Module,
        projector: nn.Module,
        lam: float = 1 / 128,
        lam_reg: float = 4.0,
        alpha: float = 1.0,
        normalize: bool = False,
        **optimization: Any,
    ) -> None:
        super().__init__(**optimization)
        require_in("[0, inf)", lam=lam, lam_reg=lam_reg)
        require_in("(0, inf)", alpha=alpha)
        require_projector(backbone, projector)
        self.backbone, self.projector = backbone, projector
        self.lam, self.lam_reg, self.alpha, self.normalize = lam, lam_reg, alpha, normalize

    def embed(self, image_BCHW: Tensor) -> Tensor:
        """Embedding before standardising, [B D]."""
        e_BD = self.projector(self.backbone(image_BCHW))
        return unit_length(e_BD) if self.normalize else e_BD

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x1_BCHW, x2_BCHW = views_of(batch, "MixedBarlowTwins", 2)
        e1_BD, e2_BD = self.embed(x1_BCHW), self.embed(x2_BCHW)
        z1_BD, z2_BD = standardise(e1_BD), standardise(e2_BD)
        barlow = barlow_twins_loss(z1_BD, z2_BD, self.lam)
        regulariser = self.regulariser(x1_BCHW, x2_BCHW, z1_BD, z2_BD) if self.lam_reg > 0 else torch.zeros_like(barlow)
        loss = barlow + self.lam_reg * self.lam * regulariser
        # 1 if unit-length embeddings fill the sphere evenly, 0 if all images share one.
        spread = unit_length(e1_BD.detach()).std(dim=0, correction=0).mean() * e1_BD.shape[1] ** 0.5
        self.log_training(
            {
                "train/loss": loss,
                "train/barlow": barlow,
                "train/mix_regulariser": regulariser,
                "train/embedding_spread": spread,
            }
        )
        return loss

    def regulariser(self, x1_BCHW: Tensor, x2_BCHW: Tensor, z1_BD: Tensor, z2_BD: Tensor) -> Tensor:
        """L_reg of one mixture, drawn from torch's CPU generator on every device: a resumed run then draws the same."""
        # Unchecked, since the constructor has checked alpha, and a plan has no numbers to look at.
        # In float32 also where half precision is torch's default, which cannot draw it.
        alpha = torch.tensor(self.alpha, dtype=torch.float32)
        mix = torch.distributions.Beta(alpha, alpha, validate_args=False).sample().to(x1_BCHW)
        permutation_B = torch.randperm(len(x1_BCHW)).to(x1_BCHW.device)
        zm_BD = standardise(self.embed(mix * x1_BCHW + (1 - mix) * x2_BCHW[permutation_B]))
        return mixed_regulariser(zm_BD, z1_BD, z2_BD, mix, permutation_B)
