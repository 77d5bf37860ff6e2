"""PELA: the intermediate training of a factorised network, with the original network as its teacher.

Source: Guo, Wang, Kankanhalli, "PELA: Learning Parameter-Efficient Models with Low-Rank Approximation", CVPR 2024,
arXiv 2310.10700. The surgery is `lightspan.adapters.factorise`, the terms are `lightspan.objectives.distillation`:
L = L_task + alpha L_features + beta L_logits + lam L_perturbation.
The authors' code runs the student twice in a step; here one pass gives features and logits. Their beta is 0, and their
scripts for image classifiers switch the perturbation off, which the paper does not. As there, teacher and student see
the same mixed images.
Shapes: B batch of this rank, C H W image, F features, K classes.
"""

from typing import Any

import torch
from torch import Tensor, nn

from lightspan.adapters.factorise import factorise, factorised
from lightspan.core.errors import UserError
from lightspan.core.ranges import require_in
from lightspan.core.sharded import whole
from lightspan.datamodules.image.batch import ImageBatch
from lightspan.nn.batch_mix import BatchMix
from lightspan.nn.copies import copied
from lightspan.nn.labels import labels_of
from lightspan.nn.taps import blocks_of, tapped
from lightspan.nn.teachers.frozen import Frozen
from lightspan.nn.views import image_of
from lightspan.objectives.classes import label_cross_entropy, share_right
from lightspan.objectives.distillation import feature_distillation, mean_squared, weight_perturbation
from lightspan.training.method import Method


class PELA(Method):
    """Cuts a trained `backbone` to low rank and trains what is left, with `head`, to imitate the original.

    Afterwards they are an ordinary, smaller network with the names of `Classifier`: fine-tune it with any
    method, without its teacher.

    Args:
        backbone: trained, [B C H W] -> [B F].
        head: trained, [B F] -> logits [B K]; is not factorised.
        ratio, exclude: which layers are factorised and how far, as in `lightspan.adapters.factorise.factorise`.
        hidden: containers whose children's outputs are distilled, all in one pass; None is ["blocks"].
        alpha, beta, lam: weights of features, logits and perturbation, each >= 0. A term of weight 0 is neither
            computed nor logged; without features and logits the teacher does not run.
        eps: target for the largest change of a weight.
        task_loss: (logits, label) -> scalar, the loss the network was trained with; None is cross-entropy.
        mix: MixUp and CutMix of each training batch, whose labels then are shares [B K]; None leaves it as it is.
        optimization: `optimizer`, `lr_scheduler` and `groups`, see `Method`.
    """

    def __init__(
        self,
        backbone: nn.Module,
        head: nn.Module,
        ratio: float = 2.0,
        exclude: list[str] | None = None,
        hidden: list[str] | None = None,
        alpha: float = 1.0,
        beta: float = 0.0,
        lam: float = 1.0,
        eps: float = 1e-3,
        task_loss: nn.Module | None = None,
        mix: BatchMix | None = None,
        **optimization: Any,
    ) -> None:
        super().__init__(**optimization)
        require_in("[0, inf)", alpha=alpha, beta=beta, lam=lam, eps=eps)
        self.hidden = hidden or ["blocks"]
        blocks_of(backbone, self.hidden)
        self.teacher = Frozen(copied(nn.Sequential(backbone, head), "PELA"))
        self.backbone, self.head = factorise(backbone, ratio, exclude), head
        self.alpha, self.beta, self.lam, self.eps = alpha, beta, lam, eps
        self.task_loss = task_loss or label_cross_entropy
        self.num_classes = getattr(head, "out_features", None) if task_loss is None or mix is not None else None
        if mix is not None and self.num_classes is None:
            raise UserError(
                f"PELA mix needs a head with out_features, and {type(head).__name__} has none; leave mix out"
            )
        self.mix = mix

    def forward(self, image_BCHW: Tensor) -> Tensor:
        """Logits [B K]."""
        return self.head(self.backbone(image_BCHW))

    def training_step(self, batch: ImageBatch, batch_idx: int) -> Tensor:
        uncut, image_BCHW, label = list[Tensor](), image_of(batch, "PELA"), labels_of(batch, "PELA")
        if self.mix is not None and self.num_classes is not None:
            image_BCHW, label = self.mix(image_BCHW, label, self.num_classes, self.global_step)
        if self.alpha or self.beta:
            with tapped(blocks_of(self.original, self.hidden)) as uncut:
                target_BK = self.teacher(image_BCHW)
        with tapped(blocks_of(self.backbone, self.hidden)) as cut:
            logits_BK = self(image_BCHW)
        weighted = {"task": (1.0, self.task_loss(logits_BK, label))}
        if self.alpha:
            weighted["features"] = (self.alpha, feature_distillation(cut, uncut))
        if self.beta:
            weighted["logits"] = (self.beta, mean_squared(logits_BK, target_BK))
        if self.lam:
            weighted["perturbation"] = (self.lam, self.perturbation())
        loss = torch.stack([weight * term for weight, term in weighted.values()]).sum()
        self.log_training({"train/loss": loss} | {f"train/{name}": term for name, (_, term) in weighted.items()})
        return loss

    @property
    def original(self) -> nn.Module:
        """The backbone before it was factorised."""
        return self.teacher.module[0]  # type: ignore[index]

    def perturbation(self) -> Tensor:
        """L_perturbation of all factorised layers; ranks that have parts of them gather these first."""
        layers = dict(factorised(self.backbone))
        products = [whole(layer.up.weight) @ whole(layer.down.weight) for layer in layers.values()]
        originals = [whole(self.original.get_submodule(name).weight) for name in layers]  # type: ignore[arg-type]
        return weight_perturbation(products, originals, self.eps)

    def validation_step(self, batch: ImageBatch, batch_idx: int) -> None:
        logits_BK, label_B = self(batch["image"]), labels_of(batch, "PELA")
        measured = {"val/accuracy": share_right(logits_BK, label_B), "val/loss": self.task_loss(logits_BK, label_B)}
        self.log_dict(measured, batch_size=len(label_B), sync_dist=True, prog_bar=True)

    def predict_step(self, batch: ImageBatch, batch_idx: int) -> Tensor:
        """Logits [B K]."""
        return self(batch["image"])
