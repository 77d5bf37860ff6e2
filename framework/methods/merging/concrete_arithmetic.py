"""Concrete task arithmetic: a mask over all parameters, learned from unlabelled images, before task vectors are added.

Source: arXiv 2312.06173; the mask is `lightspan.merging.concrete`. The coefficients stand,
and the logits of the mask are trained to make the entropy of predictions small:
theta = theta_0 + w sum_i tau_i m / mean(m),  L = sum_i mean H(softmax(h_i(f_theta(x_i)))).
The paper adapts on the test images; `TaskImages(adapt_on=...)` says on which ones here.
"""

from typing import Any

import torch
from torch import Tensor, nn

from lightspan.datamodules.image.batch import TasksBatch
from lightspan.merging.concrete import ConcreteMask, Final
from lightspan.merging.learned import LearnedMerging
from lightspan.merging.models import Models


class ConcreteArithmetic(LearnedMerging):
    """Args:
    backbone, models, heads: as of `LearnedMerging`.
    weight: w, the same for all tasks.
    temperature, start, final, seed: of `ConcreteMask`.
    settings: the others of `LearnedMerging`.
    """

    def __init__(
        self,
        backbone: nn.Module,
        models: Models,
        heads: dict[str, nn.Module],
        weight: float = 0.3,
        temperature: float = 0.5,
        start: float = 0.0,
        final: Final = "sample",
        seed: int = 0,
        **settings: Any,
    ) -> None:
        super().__init__(backbone, models, heads, **settings)
        self.weight = weight
        self.concrete = ConcreteMask(self.span.shapes, temperature, start, final, seed)

    def coefficients(self) -> dict[str, Tensor]:
        w_K = torch.full((len(self.span.tasks),), self.weight, device=self.device)
        return dict.fromkeys(self.span.shapes, w_K)

    def mask(self) -> dict[str, Tensor]:
        return self.concrete.settled()

    def training_step(self, batch: TasksBatch, batch_idx: int) -> Tensor:
        theta = self.span.merged(self.coefficients(), self.concrete.drawn(self.global_step))
        loss = self.entropy(theta, batch)
        figures = {"train/entropy_nats": loss, "train/density": self.concrete.density()}
        self.log_training(figures, batch_size=len(batch["index"]), prog_bar=True)
        return loss
