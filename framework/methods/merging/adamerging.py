"""AdaMerging: coefficients of task vectors that make the merged model sure of its answers on unlabelled images.

Source: Yang, Wang, Shen, Liu, Guo, Wang, Tao, "AdaMerging: Adaptive Model Merging for Multi-Task Learning", ICLR 2024,
arXiv 2310.02575: theta = theta_0 + sum_k lambda_k^l tau_k^l for each layer l, here each parameter
tensor, or one lambda_k for all, and L = sum over tasks of the mean entropy of predictions.
Coefficients are free, as in fusion_bench, whose settings the recipes of CLIP have; the code of both papers clamps them
to [0, 1] in each pass.
With a mask of `ConcreteAdaMerging` it is the second stage of that method (arXiv 2312.06173): the mask stands, the
coefficients are learned from 0.3 anew.
"""

from typing import Any

from torch import Tensor, nn

from lightspan.core.distributed import register_replicated
from lightspan.core.errors import UserError
from lightspan.core.files.places import ReadPath
from lightspan.datamodules.image.batch import TasksBatch
from lightspan.merging.coefficients import Wise, wise_as
from lightspan.merging.learned import LearnedMerging
from lightspan.merging.models import Models
from lightspan.merging.weights import open_weights, real_finite


class AdaMerging(LearnedMerging):
    """Args:
    backbone, models, heads: as of `LearnedMerging`.
    wise: one coefficient a "task", or a task and "layer".
    start: of the coefficients.
    mask: path of a stored mask that all changes go through, or None.
    settings: the others of `LearnedMerging`.
    """

    def __init__(
        self,
        backbone: nn.Module,
        models: Models,
        heads: dict[str, nn.Module],
        wise: Wise = "layer",
        start: float = 0.3,
        mask: ReadPath | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(backbone, models, heads, **settings)
        self.learned = wise_as(wise, self.span.shapes, len(self.span.tasks), start)
        self._masked = mask is not None
        if mask is not None:
            stored = open_weights(mask)
            for i, (name, shape) in enumerate(self.span.shapes.items()):
                there = self.span.prefix + name
                form = stored.forms.get(there)
                if form is None or form.shape != shape:
                    raise UserError(f"{mask} has no mask {list(shape)} of {there}; it belongs to another network")
                register_replicated(self, f"mask_{i}", real_finite(stored, there, "mask").clone(), persistent=False)

    def coefficients(self) -> dict[str, Tensor]:
        return {name: self.learned.of(name) for name in self.span.shapes}

    def mask(self) -> dict[str, Tensor] | None:
        return {name: getattr(self, f"mask_{i}") for i, name in enumerate(self.span.shapes)} if self._masked else None

    def training_step(self, batch: TasksBatch, batch_idx: int) -> Tensor:
        loss = self.entropy(self.merged(), batch)
        self.log_training({"train/entropy_nats": loss}, batch_size=len(batch["index"]), prog_bar=True)
        return loss
