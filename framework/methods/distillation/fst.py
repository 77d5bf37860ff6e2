"""FST: a teacher made of the student's future, by steps that are undone, labels the pixels of another domain.

Source: Du et al., "Learning from Future: A Novel Self-Training Framework for Semantic Segmentation", NeurIPS 2022,
arXiv 2209.06993. Of student theta, teacher phi, rate m and L(theta, phi) with phi's pseudo-labels, one step is

    deep    K times: theta~ takes a step on L(theta~, phi), and phi <- m phi + (1 - m) theta~
    wide    K times from theta one step with a mixture of its own; then phi <- m phi + (1 - m) mean of theta~
    then    theta~ is undone, theta takes a step on L(theta, phi), and phi <- m phi + (1 - m) theta

Nothing is differentiated through phi or theta~. With K = 0 it is the mean teacher. L is that of DACS (arXiv
2007.08702): cross-entropy on the source, and on mixtures that carry half of a source image's classes over to a target
image; target pixels have the teacher's answers, weighted by the share of pixels of which it is surer than `confidence`.
As in the authors' code the teacher keeps what it took from undone steps, and the same images serve virtual and real
steps, each with a mixture of its own. Theirs differs: wide steps have batches of their own, deep ones average theta
before the next step and not after this one, moments and running statistics stay where virtual steps leave them
(`keep_moments` does so with moments), mixtures are blurred and their colours jittered, and the first and last rows of
Cityscapes have no weight. ImageNet's feature distance, rare classes and the semi-supervised form are left out.
Shapes: B batch of this rank, C H W image, F width of maps, K classes.
"""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.func import functional_call
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex

from lightspan.core.errors import UserError
from lightspan.core.ranges import require_in, require_shares
from lightspan.nn.class_mix import pasted_pixels
from lightspan.nn.heads.pixel_classifier import PixelClassifier
from lightspan.nn.image_numbers import index_in
from lightspan.nn.labels import require_classes
from lightspan.nn.submodule_alias import submodule_alias
from lightspan.nn.teachers.ema import EMATeacher
from lightspan.nn.views import require_domains
from lightspan.objectives.means import own_mean
from lightspan.objectives.pseudo_labels import pixel_cross_entropy, pixel_labels
from lightspan.optim.virtual import copies, copy_into, mean_weights, rolled_back, step_on, tensors_of, virtual_steps
from lightspan.training.method import Method


class FST(Method):
    """Labels pixels of one domain with masks, and learns to do so in another without. The student is what is kept.

    A batch is a `lightspan.datamodules.image.batch.DomainsBatch`: `image`, `semantic`, `target_image` and `index`; with
    a `target_semantic` the accuracy of pseudo-labels is logged. Pixels below 0 have no class: they are not learned,
    pasted or counted. Validation logs val/pixel_accuracy and val/mean_iou of the target, the latter over the classes
    that it or an answer has. Virtual steps are the run's own optimiser's, without clipping, on the first micro-batch of
    a step. With the weights go back running statistics and the optimiser's state. What a step that is skipped would
    have given the teacher is dropped. Weights must be whole on each rank.

    Args:
        backbone: [B C H W] -> maps [B F H W] of the images' size, with `num_features` F; probes read their mean.
        num_classes: K, at least 2. The head is a linear map of each pixel.
        virtual_steps: K of the deep and of the wide form, at least 0.
        form: "deep" or "wide".
        momentum: m, in [0, 1].
        momentum_warmup: min(m, 1 - 1 / (t + 1)) in step t from 0, so that the first step copies the student.
        confidence: in [0, 1].
        keep_moments: let the optimiser's state go on from where virtual steps leave it.
        seed: of the mixtures.
        optimization: `optimizer`, `lr_scheduler` and `groups`, see `Method`.
    """

    backbone = submodule_alias("student.0", "The student's, whose maps are the features.")

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        virtual_steps: int = 3,
        form: Literal["deep", "wide"] = "deep",
        momentum: float = 0.999,
        momentum_warmup: bool = True,
        confidence: float = 0.968,
        keep_moments: bool = False,
        seed: int = 0,
        **optimization: Any,
    ) -> None:
        super().__init__(**optimization)
        require_shares(momentum=momentum, confidence=confidence)
        require_in("[0, inf)", virtual_steps=virtual_steps)
        require_in("[2, inf)", num_classes=num_classes)
        self.student = PixelClassifier(backbone, num_classes)
        self.teacher = EMATeacher(self.student)
        self.virtual_steps, self.form, self.keep_moments = virtual_steps, form, keep_moments
        self.momentum, self.momentum_warmup = momentum, momentum_warmup
        self.classes, self.confidence, self.seed = num_classes, confidence, seed
        settings: dict[str, Any] = {"num_classes": num_classes, "ignore_index": -1, "validate_args": False}
        self.scores = MetricCollection(
            {
                "pixel_accuracy": MulticlassAccuracy(average="micro", **settings),
                "mean_iou": MulticlassJaccardIndex(average="macro", **settings),
            },
            prefix="val/",
            compute_groups=False,
        )
        self.ahead: tuple[int, list[Tensor]] | None = None  # a step, and the teacher of its future

    def _on_before_batch_transfer(self, batch: Any, dataloader_idx: int = 0) -> Any:
        batch = super()._on_before_batch_transfer(batch, dataloader_idx)
        if isinstance(batch, Mapping) and "semantic" in batch:
            require_classes(batch["semantic"], self.classes, "FST")
        return batch

    def forward(self, image_BCHW: Tensor) -> Tensor:
        """Logits [B K H W]."""
        return self.student(image_BCHW)

    def features(self, batch: Any) -> Tensor:
        return self.backbone(batch["image"]).mean(dim=(2, 3))

    @torch.compiler.disable  # weights change under its feet
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        require_domains(batch, "FST")
        ahead = self.ahead
        if ahead is None or ahead[0] != self.global_step:
            ahead = self.global_step, self.look_ahead(batch)
        self.ahead = ahead if self._optimizers() else None
        figures = self.losses(batch, ahead[1], self.virtual_steps)
        self.log_training(figures)
        return figures["train/loss"]

    def losses(self, batch: Mapping[str, Tensor], teacher: list[Tensor], number: int) -> dict[str, Tensor]:
        """L(theta, phi) of the student as it is, with the mixture of a virtual step, and its parts.

        Args:
            teacher: phi, weights and buffers.
            number: of the virtual step, from 0; `virtual_steps` is the real one.
        """
        image_BCHW, target_BCHW, label_BHW = batch["image"], batch["target_image"], batch["semantic"].long()
        names = [name for name, _ in (*self.student.named_parameters(), *self.student.named_buffers())]
        self.teacher.require_wide()
        with torch.no_grad():
            answers = functional_call(self.teacher.module, dict(zip(names, teacher, strict=True)), (target_BCHW,))
        pseudo = pixel_labels(answers, self.confidence)
        draw = self.global_step * (self.virtual_steps + 1) + number
        pasted_BHW = pasted_pixels(label_BHW, self.classes, index_in(batch, self), self.seed, draw)
        mixed_BCHW = torch.where(pasted_BHW[:, None], image_BCHW, target_BCHW)
        mixed_label_BHW = torch.where(pasted_BHW, label_BHW, pseudo.label_BHW)
        weight_BHW = pseudo.sure_B[:, None, None].masked_fill(pasted_BHW, 1.0)
        source = pixel_cross_entropy(self.student(image_BCHW), label_BHW)
        mixed = pixel_cross_entropy(self.student(mixed_BCHW), mixed_label_BHW, weight_BHW)
        figures = {"train/loss": source + mixed, "train/source_nats": source, "train/mixed_nats": mixed}
        figures["train/sure"] = own_mean(pseudo.sure_B)
        if "target_semantic" in batch:
            known_BHW = batch["target_semantic"] >= 0
            right_BHW = known_BHW & (pseudo.label_BHW == batch["target_semantic"])
            figures["train/pseudo_accuracy"] = right_BHW.sum() / known_BHW.sum().clamp_min(1)
        return figures

    def look_ahead(self, batch: Mapping[str, Tensor]) -> list[Tensor]:
        """The teacher of the future: weights and buffers. Student, teacher and, without `keep_moments`, the optimiser
        are afterwards what they were. Where there is no run, as in `lightspan plan`, the present teacher.
        """
        optimizers = self._optimizers()
        if not self.virtual_steps or not optimizers:
            return copies(self.teacher.module)
        (optimizer,) = optimizers
        with rolled_back(self.student, self.teacher), virtual_steps(optimizer, self.keep_moments):
            branches = []
            for number in range(self.virtual_steps):
                loss = self.losses(batch, tensors_of(self.teacher.module), number)["train/loss"]
                if self.form == "deep":
                    step_on(loss, optimizer)
                    self.teacher.follow(self.student, self._momentum())
                else:
                    with rolled_back(self.student), virtual_steps(optimizer, self.keep_moments):
                        step_on(loss, optimizer)
                        branches.append(copies(self.student))
            if branches:
                copy_into(tensors_of(self.student), mean_weights(branches))
                self.teacher.follow(self.student, self._momentum())
            return copies(self.teacher.module)

    def after_optimizer_step(self) -> None:
        assert self.ahead is not None
        copy_into(tensors_of(self.teacher.module), self.ahead[1])
        self.ahead = None
        self.teacher.follow(self.student, self._momentum())

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        answer_BHW = self(batch["target_image"]).argmax(dim=1)
        self.scores.update(answer_BHW, batch["target_semantic"])
        self.log_dict(self.scores, prog_bar=True)

    def configure_model(self) -> None:
        if self._trainer is not None and isinstance(self._trainer.strategy, ModelParallelStrategy):
            raise UserError("FST takes steps that are undone, with whole weights; train with trainer.strategy=ddp")
        super().configure_model()

    def _optimizers(self) -> list[torch.optim.Optimizer]:
        """Those of a run; none where steps are only tried or counted, which are not followed by the next one."""
        return self.trainer.optimizers if self._trainer is not None and self.trainer.training else []

    def _momentum(self) -> float:
        return min(self.momentum, 1 - 1 / (self.global_step + 1)) if self.momentum_warmup else self.momentum
