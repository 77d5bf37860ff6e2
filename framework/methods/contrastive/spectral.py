"""The spectral contrastive loss on two views: contrast whose minimum is known, with which heads can be studied.

Source: HaoChen et al., 2021, arXiv 2106.04156, is `lightspan.objectives.spectral`. Xue et al., "Investigating the
Benefits of Projection Head for Representation Learning", ICLR 2024, arXiv 2403.11391, follow it through linear layers.
From balanced weights gradient flow keeps W1 W1' = W2' W2 (section 4): the singular values of the layer before the head
are the square roots of those behind it, so that weak features are weighted more evenly before it. Any head can take the
projector's place: a linear layer, `lightspan.nn.heads.reweighting.ReweightingHead`, or none by `torch.nn.Identity`.
Shapes: B images of this rank, C H W image, D embedding width.
"""

from typing import Any

from torch import Tensor, nn

from lightspan.core.devices import wide
from lightspan.core.ranges import require_in
from lightspan.core.unit_length import unit_length
from lightspan.nn.views import views_of
from lightspan.nn.widths import require_projector
from lightspan.objectives.spectral import spectral_contrastive
from lightspan.training.method import Method


class SpectralContrastive(Method):
    """Two views of an image are alike, and images spread over all directions. Sums run over the rows of all ranks.

    Args:
        backbone: [B C H W] -> [B num_features]; what probes read, and all that is kept.
        projector: [B num_features] -> [B D].
        length: of the embeddings, whose square is HaoChen's mu; they are scaled to it. None leaves them as they are, as
            in the theory.
        optimization: `optimizer`, `lr_scheduler` and `groups`, see `Method`.
    """

    keeps_apart = "there are enough negatives (data.init_args.batch_size) and length fits"

    def __init__(
        self, backbone: nn.Module, projector: nn.Module, length: float | None = None, **optimization: Any
    ) -> None:
        super().__init__(**optimization)
        require_in("(0, inf)", length=length)
        require_projector(backbone, projector)
        self.backbone, self.projector, self.length = backbone, projector, length

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        z_2BD = [self.projector(self.backbone(view_BCHW)) for view_BCHW in views_of(batch, "SpectralContrastive", 2)]
        if self.length is not None:
            z_2BD = [self.length * unit_length(wide(z_BD)) for z_BD in z_2BD]
        loss = spectral_contrastive(*z_2BD)
        self.log_training({"train/loss": loss})
        return loss
