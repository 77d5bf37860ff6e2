"""POA: one self-distillation run that gives a network of every width and depth.

Source: Zhang et al., "POA: Pre-training Once for Models of All Sizes", ECCV 2024, arXiv 2408.01031, and the authors'
code. Beside the teacher and the whole ("intact") student, a part of the student of another size each step (the
"elastic" student) is trained:
L = lam L_IT + (1 - lam) (L_ET + L_EI), each a mean over the heads, plus the weighted KoLeo term (the numbers of these
equations in the paper could not be looked up), where
- L_IT, L_ET: cross-view loss of class tokens and, of masked patches, of the same view; targets are the teacher's scores
  after Sinkhorn-Knopp (both students have the same targets and the same masks);
- L_EI: class tokens of the elastic student against those of the intact one, same view: the mean over global views plus
  the mean over local views, which no number of pairs divides;
- KoLeo: of both students' class tokens before the heads, summed over the global views.
The parts are `lightspan.backbones.elastic`, `.nn.prototype_network`, `.nn.ema`, `.nn.subnets`, `.nn.block_masks` and
`.objectives.prototypes`. Differences from the authors' code: prototypes have unit length (their gains start at 1 and
are trained), KoLeo looks for neighbours on all ranks, masks depend on each image alone. With `lam` = 1 this is DINOv2's
loss with several heads.
Shapes: B batch of this rank, G global and V views, H W grid of a global view, w width, K prototypes, N masked patches.
"""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightspan.backbones.elastic import ElasticViT
from lightspan.datamodules.batches import ViewsBatch
from lightspan.devices import has_values, wide
from lightspan.errors import UserError
from lightspan.method import Method
from lightspan.nn.block_masks import BlockMasks, MaskedPatches
from lightspan.nn.dino_head import DINOHead
from lightspan.nn.ema import EMATeacher
from lightspan.nn.prototype_network import PrototypeNetwork, SeenViews
from lightspan.nn.subnets import SubNetSampler
from lightspan.objectives.koleo import koleo
from lightspan.objectives.prototypes import cross_view_loss, prototype_cross_entropy, sinkhorn
from lightspan.optim.schedules import cosine_between, line_between

PLANNED = 64
"""Images whose masks stand for those of all others in a plan."""


class POA(Method):
    """Trains an elastic vision transformer so that each of its sizes is a good encoder. The teacher is what is kept.

    Batches hold views of which the first `global_views` are of one size and shown to all three networks; the rest is
    shown to both students.

    Args:
        backbone: the student's; the teacher is a copy.
        heads: with different numbers of prototypes, at least one; their losses are averaged.
        lam: share of the intact student's loss, in [0, 1]; at 1 the elastic student is left out.
        koleo_weight: of the term that spreads features, >= 0; at 0 it is left out.
        student_temperature, teacher_temperature, final_temperature: > 0. The teacher's rises from its first to its
            final value over the first `temperature_warmup` of the run, a share in [0, 1].
        momentum, final_momentum: of the teacher, in [0, 1], on a half cosine over the run.
        global_views: at least 2.
        masks: of the students' global views; None is half of the images at ratios of 0.1 to 0.5.
        patch_loss_from: share of the run before which no patch is masked, in [0, 1].
        freeze_prototypes: share of the run in which prototypes keep their place, in [0, 1].
        small_first: how much more often small sizes are drawn; see `SubNetSampler`.
        seed: of the sizes drawn.
        optimization: `optimizer`, `lr_scheduler` and `groups`, see `Method`.
    """

    def __init__(
        self,
        backbone: ElasticViT,
        heads: list[DINOHead],
        lam: float = 0.8,
        koleo_weight: float = 0.1,
        student_temperature: float = 0.1,
        teacher_temperature: float = 0.04,
        final_temperature: float = 0.07,
        temperature_warmup: float = 30 / 346,
        momentum: float = 0.992,
        final_momentum: float = 0.9999,
        global_views: int = 2,
        masks: BlockMasks | None = None,
        patch_loss_from: float = 30 / 346,
        freeze_prototypes: float = 1 / 346,
        small_first: float = 3.0,
        seed: int = 0,
        **optimization: Any,
    ) -> None:
        super().__init__(**optimization)
        shares = {
            "lam": lam, "momentum": momentum, "final_momentum": final_momentum, "patch_loss_from": patch_loss_from,
            "freeze_prototypes": freeze_prototypes, "temperature_warmup": temperature_warmup,
        }  # fmt: skip
        for name, value in shares.items():
            if not 0 <= value <= 1:
                raise UserError(f"{name}={value} must lie in [0, 1]")
        temperatures = student_temperature, teacher_temperature, final_temperature
        if not (all(0 < value < math.inf for value in temperatures) and 0 <= koleo_weight < math.inf):
            raise UserError(
                f"student_temperature={student_temperature}, teacher_temperature={teacher_temperature} and "
                f"final_temperature={final_temperature} must be above 0, and koleo_weight={koleo_weight} at least 0, "
                "and all finite"
            )
        if global_views < 2:
            raise UserError(
                f"global_views={global_views} leaves a global view without another one; it must be 2 or more"
            )
        widths = [head.in_features for head in heads]
        if not heads or set(widths) != {backbone.num_features}:
            raise UserError(
                f"heads take {widths} features, and {type(backbone).__name__} gives {backbone.num_features}; give one "
                f"head or more with in_features={backbone.num_features}"
            )
        self.student = PrototypeNetwork(backbone, heads)
        self.teacher = EMATeacher(self.student)
        self.lam, self.koleo_weight, self.student_temperature = lam, koleo_weight, student_temperature
        self.teacher_temperatures, self.temperature_warmup = (
            (teacher_temperature, final_temperature),
            temperature_warmup,
        )
        self.momenta, self.global_views, self.masks = (momentum, final_momentum), global_views, masks or BlockMasks()
        self.patch_loss_from, self.freeze_prototypes = patch_loss_from, freeze_prototypes
        self.sampler = SubNetSampler(backbone.widths, backbone.depths, small_first, seed) if lam < 1 else None

    @property
    def backbone(self) -> ElasticViT:
        """The teacher's, which gives the features and the networks of all sizes."""
        return self.teacher.module.backbone  # type: ignore[return-value]

    def features(self, batch: Any) -> Tensor:
        """Class tokens of the whole teacher, [B num_features]."""
        return self.backbone(batch["image"] if "image" in batch else batch["views"][0])

    def assignments(self, batch: Any) -> Tensor:
        """The teacher's, to the prototypes of its first head, [B K]."""
        teacher: PrototypeNetwork = self.teacher.module  # type: ignore[assignment]
        scores_BK = teacher.heads[0](self.features(batch))
        return (scores_BK / self.teacher_temperatures[1]).softmax(dim=-1)

    def training_step(self, batch: ViewsBatch, batch_idx: int) -> Tensor:
        views, masked = self._views(batch), self._masks(batch)
        taught = self.teacher(views[: self.global_views], masked, hide=False)
        temperature = line_between(*self.teacher_temperatures, self.share_of_run(), self.temperature_warmup)
        targets_GBK = [sinkhorn(scores.flatten(0, 1), temperature).view_as(scores) for scores in taught.scores_VBK]
        targets_NK = [sinkhorn(scores, temperature) for scores in taught.patches_NK]

        def from_teacher(seen: SeenViews) -> Tensor:
            """L_IT or L_ET."""
            heads = zip(targets_GBK, targets_NK, seen.scores_VBK, seen.patches_NK, strict=True)
            losses = [
                cross_view_loss(target_GBK, scores_VBK, self.student_temperature)
                + prototype_cross_entropy(target_NK, patches_NK, self.student_temperature, masked.weight_N)
                for target_GBK, target_NK, scores_VBK, patches_NK in heads
            ]
            return torch.stack(losses).mean()

        intact = self.student(views, masked, hide=True)
        students, figures = [intact], {"intact": from_teacher(intact)}
        loss = self.lam * figures["intact"]
        if self.sampler is not None:
            elastic = self.student(views, masked, hide=True, size=self.sampler.at(self.global_step))
            students.append(elastic)
            figures |= {"elastic": from_teacher(elastic), "same_view": self.same_view(intact, elastic)}
            loss = loss + (1 - self.lam) * (figures["elastic"] + figures["same_view"])
        if self.koleo_weight:
            spread = [koleo(class_Bw) for seen in students for class_Bw in seen.class_VBw[: self.global_views]]
            figures["koleo"] = torch.stack(spread).sum() / len(students)
            loss = loss + self.koleo_weight * figures["koleo"]
        self.log_training({"train/loss": loss} | {f"train/{name}": figure for name, figure in figures.items()})
        return loss

    def same_view(self, intact: SeenViews, elastic: SeenViews) -> Tensor:
        """L_EI."""
        losses = []
        for target_VBK, scores_VBK in zip(intact.scores_VBK, elastic.scores_VBK, strict=True):
            target_VBK = (wide(target_VBK.detach()) / self.student_temperature).softmax(dim=2)
            for views in (slice(0, self.global_views), slice(self.global_views, None)):
                rows = target_VBK[views].flatten(0, 1), scores_VBK[views].flatten(0, 1)
                losses.append(prototype_cross_entropy(*rows, self.student_temperature))
        return torch.stack(losses).sum() / len(intact.scores_VBK)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        if self.share_of_run() < self.freeze_prototypes:
            for head in self.student.heads:
                head.prototypes.weight.grad = None  # type: ignore[union-attr]

    def after_optimizer_step(self) -> None:
        self.teacher.follow(self.student, cosine_between(*self.momenta, self.share_of_run()))

    def _views(self, batch: Any) -> list[Tensor]:
        views: list[Tensor] = batch.get("views", [])
        if len(views) < self.global_views or len({view.shape for view in views[: self.global_views]}) > 1:
            raise UserError(
                f"POA needs views of which the first global_views={self.global_views} are of one size, and the batch "
                f"has views of {[[*view.shape[2:]] for view in views] or 'no kind'}; set data.init_args.views to a "
                "MultiCrop with the global views first"
            )
        return views

    def _masks(self, batch: ViewsBatch) -> MaskedPatches:
        """Of the global views, one after the other; nothing is masked before `patch_loss_from`."""
        image, index_B = batch["views"][0], batch["index"]
        height, width = (side // self.backbone.patch_embed.patch_size[0] for side in image.shape[2:])
        masks = np.zeros((self.global_views, len(image), height, width), dtype=bool)
        # A plan knows no index and may try any number of images; it counts what a step needs from then on.
        planned = not has_values(index_B)
        if planned or self.share_of_run() >= self.patch_loss_from:
            indices = range(min(len(image), PLANNED)) if planned else index_B.tolist()
            for view, masks_BHW in enumerate(masks):
                drawn = self.masks.draw((height, width), self.global_step, indices, view)
                masks_BHW[:] = np.resize(drawn, masks_BHW.shape)
        return MaskedPatches.of(masks.reshape(-1, height, width), image.device)
