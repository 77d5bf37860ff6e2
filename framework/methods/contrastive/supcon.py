"""SupCon: images of one class are positives of one another.

Source: Khosla et al., "Supervised Contrastive Learning", NeurIPS 2020, arXiv 2004.11362: two views of each image, an
encoder and a projector (section 3.1), and L_out of equation 2, which is `lightspan.objectives.supcon`. The paper then
trains a linear classifier on the frozen encoder; here the callback `OnlineProbes` shows one while training goes on.
Shapes: B images of this rank, V views of each, R = B V rows, D embedding width.
"""

from typing import Any

import torch
from torch import Tensor, nn

from lightspan.core.ranges import require_temperatures
from lightspan.nn.views import labelled_views
from lightspan.nn.widths import require_projector
from lightspan.objectives.supcon import supcon
from lightspan.training.method import Method


class SupCon(Method):
    """Pulls rows of one class together, views of one image among them, and all others apart. Rows are those of all
    ranks; with sync_batchnorm N ranks train as one.

    Args:
        backbone: [R C H W] -> [R num_features]; what probes read, and all that is kept.
        projector: [R num_features] -> [R D].
        temperature: > 0; the paper has 0.1.
        optimization: `optimizer`, `lr_scheduler` and `groups`, see `Method`.
    """

    learns_from_labels = True
    least_rows = 2
    keeps_apart = "a batch has several classes (data.init_args.per_class) and temperature fits"

    def __init__(
        self, backbone: nn.Module, projector: nn.Module, temperature: float = 0.1, **optimization: Any
    ) -> None:
        super().__init__(**optimization)
        require_temperatures(temperature=temperature)
        require_projector(backbone, projector)
        self.backbone, self.projector, self.temperature = backbone, projector, temperature

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        views, label_B = labelled_views(batch, "SupCon")
        label_R = label_B.repeat(len(views))
        loss = supcon(self.projector(self.backbone(torch.cat(views))), label_R, self.temperature)
        self.log_training({"train/loss": loss})
        return loss
