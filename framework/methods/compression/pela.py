"""PELA: the intermediate training of a factorised network against the network it was cut from.

Source: Guo, Wang, Kankanhalli, "PELA: Learning Parameter-Efficient Models with Low-Rank Approximation", CVPR 2024,
arXiv 2310.10700. The surgery is `lightspan.adapters.pela`, the terms are `lightspan.objectives.distillation`:
L = L_task + alpha L_features + beta L_logits + lam L_perturbation.
The authors' code runs the student twice in a step; here one pass gives features and logits. Their beta is 0, and their
scripts for image classifiers switch the perturbation off, which the paper does not.
Shapes: B batch of this rank, C H W image, K classes, D width.
"""

import copy
from typing import Any

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn

from lightspan.adapters.pela import factorise, factorised
from lightspan.datamodules.batches import ImageBatch
from lightspan.errors import UserError
from lightspan.method import Method
from lightspan.nn.frozen import Frozen
from lightspan.nn.taps import blocks_of, tapped
from lightspan.objectives.distillation import feature_distillation, mean_squared, weight_perturbation
from lightspan.optim.groups import ParameterGroups
from lightspan.optim.schedules import ScheduleCallable


class PELA(Method):
    """Cuts `backbone` to low rank and trains what is left to do what the whole did.

    Afterwards `backbone` is an ordinary, smaller network: fine-tune it with any method, its teacher left behind.

    Args:
        backbone: a trained network, [B C H W] -> logits [B K].
        ratio, exclude: which layers are factorised and how far, as in `lightspan.adapters.pela.factorise`.
        hidden: containers whose children's outputs are distilled, all in one pass; None is ["blocks"].
        alpha, beta, lam: weights of features, logits and perturbation, each >= 0.
        eps: what the largest change of a weight is drawn to.
        task_loss: (logits, label) -> scalar, the loss the network was trained with; None is cross-entropy.
    """

    def __init__(
        self,
        backbone: nn.Module,
        optimizer: OptimizerCallable,
        lr_scheduler: ScheduleCallable | None = None,
        groups: ParameterGroups | None = None,
        ratio: float = 2.0,
        exclude: list[str] | None = None,
        hidden: list[str] | None = None,
        alpha: float = 1.0,
        beta: float = 0.0,
        lam: float = 1.0,
        eps: float = 1e-3,
        task_loss: nn.Module | None = None,
    ) -> None:
        super().__init__(optimizer, lr_scheduler, groups)
        if min(alpha, beta, lam, eps) < 0:
            raise UserError(f"alpha={alpha}, beta={beta}, lam={lam} and eps={eps} must each be at least 0")
        self.hidden = hidden or ["blocks"]
        blocks_of(backbone, self.hidden)
        self.teacher = Frozen(copy.deepcopy(backbone))
        self.backbone = factorise(backbone, ratio, exclude)
        self.alpha, self.beta, self.lam, self.eps = alpha, beta, lam, eps
        self.task_loss = task_loss or nn.CrossEntropyLoss()

    def features(self, batch: ImageBatch) -> Tensor:
        """What the network's own head reads, [B D]."""
        if not hasattr(self.backbone, "forward_head"):
            raise UserError(f"{type(self.backbone).__name__} has no timm forward_head, so its features are not known")
        return self.backbone.forward_head(self.backbone.forward_features(batch["image"]), pre_logits=True)  # type: ignore[operator]

    def training_step(self, batch: ImageBatch, batch_idx: int) -> Tensor:
        image_BCHW, label_B = batch["image"], batch["label"]
        with tapped(blocks_of(self.teacher.module, self.hidden)) as whole:
            target_BK = self.teacher(image_BCHW)
        with tapped(blocks_of(self.backbone, self.hidden)) as cut:
            logits_BK = self.backbone(image_BCHW)
        terms = {
            "task": self.task_loss(logits_BK, label_B),
            "features": feature_distillation(cut, whole),
            "logits": mean_squared(logits_BK, target_BK),
            "perturbation": self.perturbation(),
        }
        weights = {"task": 1.0, "features": self.alpha, "logits": self.beta, "perturbation": self.lam}
        loss = sum((weights[name] * terms[name] for name in terms if weights[name]), torch.zeros_like(terms["task"]))
        self.log_dict({"train/loss": loss} | {f"train/{name}": term for name, term in terms.items()})
        return loss

    def perturbation(self) -> Tensor:
        """L_perturbation of all factorised layers."""
        layers = dict(factorised(self.backbone))
        originals = [self.teacher.module.get_submodule(name).weight for name in layers]
        return weight_perturbation([layer.weight for layer in layers.values()], originals, self.eps)  # type: ignore[misc]

    def validation_step(self, batch: ImageBatch, batch_idx: int) -> None:
        logits_BK, size = self.backbone(batch["image"]), len(batch["label"])
        accuracy = (logits_BK.argmax(dim=1) == batch["label"]).float().mean()
        loss = self.task_loss(logits_BK, batch["label"])
        self.log_dict({"val/accuracy": accuracy, "val/loss": loss}, batch_size=size, sync_dist=True, prog_bar=True)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Logits [B K]."""
        return self.backbone(batch["image"])
