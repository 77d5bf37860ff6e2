"""ScatSimCLR: SimCLR on wavelets, with a pretext task that keeps in the features what the augmentations would remove.

Source: Kinakh, Taran, Voloshynovskyy, "ScatSimCLR: Self-supervised contrastive learning with pretext task
regularization for small-scale datasets", ICCV workshops 2021, arXiv 2108.13939, and the authors' code: L = L_ntxent +
lambda L_pretext. The network is `lightspan.backbones.scattering.ScatteringNet`, tasks are in
`lightspan.nn.pretext`. That code normalises twice, ties the loss to one batch size, and lets the rate fall over
batches where it steps in epochs; none of that is here.
Shapes: B images of this rank, C H W image, D embedding width.
"""

from typing import Any

import torch
from torch import Tensor, nn

from lightspan.core.ranges import require_temperatures, require_weights
from lightspan.datamodules.image.batch import ViewsBatch
from lightspan.nn.image_numbers import index_in
from lightspan.nn.pretext import PretextTask
from lightspan.nn.views import views_of
from lightspan.nn.widths import require_projector, require_width
from lightspan.objectives.classes import label_cross_entropy, share_right
from lightspan.objectives.info_nce import nt_xent
from lightspan.training.method import Method


class ScatSimCLR(Method):
    """Contrast of the first two views, and the task on the views after them. Backbone and features are those of SimCLR,
    and without a task so is everything.

    Args:
        backbone: [R C H W] -> [R num_features]; what probes read, and all that is kept.
        projector: [R num_features] -> [R D].
        pretext: what is guessed of an image, such as its turn; None guesses nothing.
        pretext_weight: lambda, >= 0.
        temperature: > 0.
        optimization: `optimizer`, `lr_scheduler` and `groups`, see `Method`.
    """

    least_rows = 2
    keeps_apart = "there are enough negatives (data.init_args.batch_size) and temperature fits"

    def __init__(
        self,
        backbone: nn.Module,
        projector: nn.Module,
        pretext: PretextTask | None = None,
        pretext_weight: float = 0.3,
        temperature: float = 0.5,
        **optimization: Any,
    ) -> None:
        super().__init__(**optimization)
        require_temperatures(temperature=temperature)
        require_weights(pretext_weight=pretext_weight)
        require_projector(backbone, projector)
        require_width(backbone, "pretext.in_features", getattr(pretext, "in_features", None))
        self.backbone, self.projector, self.pretext = backbone, projector, pretext
        self.pretext_weight, self.temperature = pretext_weight, temperature

    def training_step(self, batch: ViewsBatch, batch_idx: int) -> Tensor:
        views = views_of(batch, "ScatSimCLR", 2 if self.pretext is None else 2 + self.pretext.views)
        z1_BD, z2_BD = self.projector(self.backbone(torch.cat(views[:2]))).chunk(2)
        loss = nt_xent(z1_BD, z2_BD, self.temperature)
        figures = {"contrast": loss}
        if self.pretext is not None:
            guess = self.pretext(self.backbone, views[2:], index_in(batch, self), self.global_step)
            figures["pretext"] = label_cross_entropy(*guess)
            figures["pretext_accuracy"] = share_right(*guess)
            loss = loss + self.pretext_weight * figures["pretext"]
        self.log_training({"train/loss": loss} | {f"train/{name}": figure for name, figure in figures.items()})
        return loss
