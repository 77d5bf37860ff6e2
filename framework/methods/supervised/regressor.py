"""Regression: mean squared error of a linear layer on a backbone's features.

Shapes: B batch of this rank, C H W image or F columns of a table, D features.
"""

from typing import Any

from torch import Tensor, nn

from lightspan.core.devices import wide
from lightspan.core.errors import UserError
from lightspan.core.ranges import require_in
from lightspan.datamodules.table.batch import TableBatch
from lightspan.nn.labels import targets_of
from lightspan.nn.views import image_of
from lightspan.nn.widths import given_features, require_width
from lightspan.objectives.means import own_mean, squared_error
from lightspan.training.method import Method


class Regressor(Method):
    """Trains a backbone and a head to predict the number that a batch gives each sample as `target`.

    The prediction is target_mean + target_deviation * head(backbone(x)), so that a head of small weights begins at the
    mean. The loss is the squared error in units of target_deviation^2: 1 is that of always predicting the mean, if both
    are those of the training targets.

    Args:
        backbone: [B C H W] or [B F] -> [B D]; what probes read. It says its width.
        target_mean, target_deviation: of the training targets, in their unit; the deviation is above 0.
        head: [B D] -> [B 1]; None makes a linear layer.
        optimization: `optimizer`, `lr_scheduler` and `groups`, see `Method`.
    Raises: UserError for a deviation of 0, a backbone that does not say its width, or a head of another one.
    """

    def __init__(
        self,
        backbone: nn.Module,
        target_mean: float = 0.0,
        target_deviation: float = 1.0,
        head: nn.Module | None = None,
        **optimization: Any,
    ) -> None:
        super().__init__(**optimization)
        require_in("(0, inf)", target_deviation=target_deviation)
        width = given_features(backbone)
        if width is None:
            raise UserError(
                f"Regressor needs the width of its backbone, but {type(backbone).__name__} has no attribute "
                "num_features; use one of lightspan.backbones.vision or set it"
            )
        head = head or nn.Linear(width, 1)
        require_width(backbone, "head.in_features", getattr(head, "in_features", None))
        self.backbone, self.head = backbone, head
        self.target_mean, self.target_deviation = target_mean, target_deviation

    def forward(self, x: Tensor) -> Tensor:
        """Predictions [B], in the unit of the targets."""
        return self.target_mean + self.target_deviation * self._standard(x)

    def training_step(self, batch: TableBatch, batch_idx: int) -> Tensor:
        figures = self._measure("train", batch)
        self.log_training(figures, batch_size=len(image_of(batch, "Regressor")), prog_bar=True)
        return figures["train/loss"]

    def validation_step(self, batch: TableBatch, batch_idx: int) -> None:
        self._evaluate("val", batch)

    def test_step(self, batch: TableBatch, batch_idx: int) -> None:
        self._evaluate("test", batch)

    def predict_step(self, batch: TableBatch, batch_idx: int) -> Tensor:
        """Predictions [B], in the unit of the targets."""
        return self(image_of(batch, "Regressor"))

    def _standard(self, x: Tensor) -> Tensor:
        """Predictions [B] around 0, in units of the deviation."""
        return wide(self.head(self.backbone(x))).flatten(0)

    def _evaluate(self, stage: str, batch: TableBatch) -> None:
        size = len(image_of(batch, "Regressor"))
        self.log_dict(self._measure(stage, batch), batch_size=size, sync_dist=True, prog_bar=True)

    def _measure(self, stage: str, batch: TableBatch) -> dict[str, Tensor]:
        """The loss, and the mean absolute error in the unit of the targets."""
        guess_B = self._standard(image_of(batch, "Regressor"))
        target_B = (wide(targets_of(batch, "Regressor")) - self.target_mean) / self.target_deviation
        error = own_mean((guess_B - target_B).abs()) * self.target_deviation
        return {f"{stage}/loss": squared_error(guess_B, target_B), f"{stage}/mean_absolute_error": error}
