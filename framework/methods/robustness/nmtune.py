"""NMTune: tunes a small network behind a frozen encoder that was pre-trained on noisy labels, and shapes its spectrum.

Source: Chen, Wang, Shah, Tao, Wei, Xie, Sugiyama, Raj, "Understanding and Mitigating the Label Noise in Pre-training on
Downstream Tasks", ICLR 2024, arXiv 2309.17002, and the authors' code. Noise in pre-training spreads the energy of
features from their strong directions to weak ones. Of frozen features f a residual MLP makes z
(`lightspan.nn.heads.residual_mlp`), and a linear head reads z:

    L = CE(head(z), y) + mse |z/|z| - f/|f||^2 / D + covariance (sum over i != j of Cov(z)_ij^2) / D
        - svd (mean of the 5 largest singular values of z, over the sum of all)

The first regulariser keeps what was learned, the second takes correlations out of z, the third is a reward of the
strong directions. Details as the code has them: rows are those of both views; z of the second view, the strongly
changed one, is compared with f of the first; z is centred for the covariance and not for the singular values, five of
them where the paper has one; the head's bias begins at 0 and its weights He-uniform. Covariance and singular values are
those of all ranks' rows, and with fewer rows than features they are the batch's and not those of the data.
`lightspan.evaluation.geometry.feature_spread` tells by how much noise has spread the features of an encoder.
Shapes: B images of this rank, D features, K classes.
"""

from typing import Any

import torch
from torch import Tensor, nn

from lightspan.core.devices import wide
from lightspan.core.errors import UserError
from lightspan.core.ranges import require_in, require_weights
from lightspan.core.unit_length import unit_length
from lightspan.datamodules.image.batch import ImageBatch, ViewsBatch
from lightspan.nn.heads.residual_mlp import Tuned
from lightspan.nn.labels import labels_of
from lightspan.nn.teachers.frozen import Frozen
from lightspan.nn.views import image_of, views_of
from lightspan.nn.widths import given_features, require_width
from lightspan.objectives.classes import label_cross_entropy, share_right
from lightspan.objectives.means import squared_error
from lightspan.objectives.singular import leading_singular_share
from lightspan.objectives.vicreg import covariance
from lightspan.training.method import Method


def kept_geometry(z_BD: Tensor, f_BD: Tensor) -> Tensor:
    """Mean over rows and features of (z/|z| - f/|f|)^2, a scalar >= 0 in float32 or wider, without a gradient into f; 0
    without rows.
    """
    return squared_error(unit_length(wide(z_BD)), unit_length(wide(f_BD.detach())))


class NMTune(Method):
    """Trains an MLP and a linear classifier on the features of an encoder that stays as it is.

    Batches have two views of labelled images. The encoder is in evaluation mode and without gradients; it is part of
    the checkpoint. Probes read z. Validation logs val/accuracy and val/loss_nats of images.

    Args:
        encoder: [B ...] -> [B D], with the weights of pre-training, such as
            `lightspan.backbones.weights.with_weights` loads.
        mlp: [B D] -> [B P], such as `lightspan.nn.heads.residual_mlp.ResidualMLP`.
        num_classes: K, >= 2; labels are in [0, K).
        mse, covariance, svd: weights of the regularisers, at least 0; all 0 is MLP tuning, and with an identity as
            `mlp` it is the linear probe. The defaults are the code's.
        leading: singular values that are rewarded, at least 1.
        optimization: `optimizer`, `lr_scheduler` and `groups`, see `Method`.
    Raises: UserError for an MLP of another width than the encoder's, or that does not say its own.
    """

    def __init__(
        self,
        encoder: nn.Module,
        mlp: nn.Module,
        num_classes: int,
        mse: float = 1.0,
        covariance: float = 0.04,
        svd: float = 0.001,
        leading: int = 5,
        **optimization: Any,
    ) -> None:
        super().__init__(**optimization)
        require_weights(mse=mse, covariance=covariance, svd=svd)
        require_in("[2, inf)", num_classes=num_classes)
        require_in("[1, inf)", leading=leading)
        require_width(encoder, "mlp.in_features", getattr(mlp, "in_features", None))
        width = given_features(mlp) or given_features(encoder)
        if width is None:
            raise UserError(
                f"NMTune needs the width of its features, and neither {type(mlp).__name__} nor "
                f"{type(encoder).__name__} says one; set out_features of mlp"
            )
        self.num_classes, self.backbone = num_classes, Tuned(Frozen(encoder), mlp)
        self.mse, self.covariance, self.svd, self.leading = mse, covariance, svd, leading
        self.head = nn.Linear(width, num_classes)
        nn.init.kaiming_uniform_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B K]."""
        return self.head(self.backbone(x))

    def training_step(self, batch: ViewsBatch, batch_idx: int) -> Tensor:
        weak, strong = views_of(batch, "NMTune", count=2)
        label_B = labels_of(batch, "NMTune")
        f_2BD = torch.cat([self.backbone.encoder(view) for view in (weak, strong)])
        z_2BD = self.backbone.mlp(f_2BD)
        logits_2BK, label_2B = self.head(z_2BD), label_B.repeat(2)
        terms = {
            "loss_nats": label_cross_entropy(logits_2BK, label_2B),
            "mse": kept_geometry(z_2BD[len(label_B) :], f_2BD[: len(label_B)]),
            "covariance": covariance(z_2BD),
            "leading_share": leading_singular_share(z_2BD, self.leading),
        }
        regularised = (
            self.mse * terms["mse"] + self.covariance * terms["covariance"] - self.svd * terms["leading_share"]
        )
        loss = terms["loss_nats"] + regularised
        figures = {"loss": loss, **terms, "accuracy": share_right(logits_2BK, label_2B)}
        self.log_training({f"train/{name}": figure for name, figure in figures.items()})
        return loss

    def validation_step(self, batch: ImageBatch, batch_idx: int) -> None:
        self._evaluate("val", batch)

    def test_step(self, batch: ImageBatch, batch_idx: int) -> None:
        self._evaluate("test", batch)

    def predict_step(self, batch: ImageBatch, batch_idx: int) -> Tensor:
        """Logits [B K]."""
        return self(image_of(batch, "NMTune"))

    def _evaluate(self, stage: str, batch: ImageBatch) -> None:
        image, label_B = image_of(batch, "NMTune"), labels_of(batch, "NMTune")
        logits_BK = self(image)
        figures = {"loss_nats": label_cross_entropy(logits_BK, label_B), "accuracy": share_right(logits_BK, label_B)}
        self.log_dict(
            {f"{stage}/{name}": figure for name, figure in figures.items()},
            batch_size=len(image),
            sync_dist=True,
            prog_bar=True,
        )
