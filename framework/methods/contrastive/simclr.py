"""SimCLR: two views of an image find one another among all views of all images of the batch.

Source: Chen, Kornblith, Norouzi, Hinton, "A Simple Framework for Contrastive Learning of Visual Representations", ICML
2020, arXiv 2002.05709: NT-Xent (equation 1 and algorithm 1), which is `lightspan.objectives.info_nce.nt_xent`, behind a
projector that is thrown away (section 4.2). Both views go through the network together, so a BatchNorm sees 2 B rows.
Shapes: B images of this rank, C H W image, D embedding width.
"""

from typing import Any

import torch
from torch import Tensor, nn

from lightspan.core.ranges import require_temperatures
from lightspan.nn.views import views_of
from lightspan.nn.widths import require_projector
from lightspan.objectives.info_nce import nt_xent
from lightspan.training.method import Method


class SimCLR(Method):
    """Contrast with the rest of the batch, of all ranks: the larger the batch, the more it has to tell apart. With
    sync_batchnorm N ranks train as one.

    Args:
        backbone: [2 B C H W] -> [2 B num_features]; what probes read, and all that is kept.
        projector: [2 B num_features] -> [2 B D].
        temperature: > 0; the paper has 0.1 for ImageNet and 0.5 for CIFAR-10.
        optimization: `optimizer`, `lr_scheduler` and `groups`, see `Method`.
    """

    least_rows = 2
    keeps_apart = "there are enough negatives (data.init_args.batch_size) and temperature fits"

    def __init__(
        self, backbone: nn.Module, projector: nn.Module, temperature: float = 0.5, **optimization: Any
    ) -> None:
        super().__init__(**optimization)
        require_temperatures(temperature=temperature)
        require_projector(backbone, projector)
        self.backbone, self.projector, self.temperature = backbone, projector, temperature

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        views = views_of(batch, "SimCLR", 2)
        z1_BD, z2_BD = self.projector(self.backbone(torch.cat(views))).chunk(2)
        loss = nt_xent(z1_BD, z2_BD, self.temperature)
        self.log_training({"train/loss": loss})
        return loss
