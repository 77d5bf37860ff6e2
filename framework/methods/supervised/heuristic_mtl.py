"""Heuristic multi-task pre-training: tags, masked pixels and contrast train one backbone at once.

Source: Qian, "Heuristic Vision Pre-Training with Self-Supervised and Supervised Multi-Task Learning", 2023, arXiv
2310.07510. The paper gives no equations and no code; all of the following is a reading of it (unverified).
Of two views of an image:
- L_tags, of the clean first view: the asymmetric loss of a head on the mean of its patches (2009.14119);
- L_pixels, of the first view with hidden patches: SimMIM's, mean |guess - pixel| over hidden pixels (2111.09886);
- L_contrast: InfoNCE of the mean of that view's patches with a teacher's of the clean second view, negatives from the
  batch of all ranks;
- L = tags L_tags + pixels L_pixels + contrast L_contrast, with fixed weights.
Left out: learned weights of the tasks and a contrast of local features, both of which the abstract leaves open.
Shapes: B images of this rank, C h w image, H W grid of T patches, D width, G tags, d = p q C numbers of a patch.
"""

from typing import Any

import torch
from torch import Tensor, nn

from lightspan.core.ranges import require_temperatures, require_weights
from lightspan.datamodules.image.batch import ImageBatch, TaggedBatch, TaggedViewsBatch
from lightspan.evaluation.scores.tag_precision import TagPrecision
from lightspan.nn.heads.mlp_head import MLPHead
from lightspan.nn.image_numbers import image_numbers, index_in
from lightspan.nn.masking.hidden_patches import Reconstruction
from lightspan.nn.masking.mask_samplers import MaskSampler, RandomMasks, require_seen_and_hidden
from lightspan.nn.sequences.patches import cells_to_pixels, unpatchify
from lightspan.nn.sequences.token_backbone import (
    PatchMeanNetwork,
    patch_tokens,
    require_tokens,
    settle_patch_decoder,
)
from lightspan.nn.submodule_alias import submodule_alias
from lightspan.nn.tags import tags_of
from lightspan.nn.teachers.ema import EMATeacher
from lightspan.nn.views import global_first, views_of
from lightspan.nn.widths import given_width, require_projector, require_width
from lightspan.objectives.asymmetric import asymmetric_loss, require_asymmetry
from lightspan.objectives.info_nce import paired_info_nce
from lightspan.objectives.masked import hidden_absolute_error
from lightspan.objectives.means import weighted_sum
from lightspan.optim.schedules import TeacherMomentum
from lightspan.training.method import Method


class HeuristicMTL(Method):
    """One backbone on labels, masked modelling and contrast. The student's is kept, without heads.

    Batches hold two views of one size and `tags`, with `tags_known` where not all are. An image alone has no other one
    to tell it from, and its contrast is 0; so is the loss of tags where none is known. With a weight of 0 the other two
    tasks train as they would alone. Validation logs val/mean_average_precision of the known tags, over those that some
    image has.

    Args:
        backbone: of tokens, with a mask token, such as `lightspan.backbones.swin.swin` or `lightspan.backbones.vit.vit`
            with `mask_token`; the teacher is a copy.
        tagger: [B D] -> [B G], such as `torch.nn.Linear`; its `out_features` is G.
        projector: [B D] -> [B E], copied too.
        decoder: [B T D] -> [B T d]; None is one linear layer, SimMIM's.
        masks: of patches; None hides 0.6 of them.
        tags, pixels, contrast: weights of the losses, each >= 0.
        positive_focus, negative_focus, margin: of `lightspan.objectives.asymmetric`.
        temperature: tau > 0.
        momentum, final_momentum: of the teacher, in [0, 1], on a half cosine over the run.
        optimization: `optimizer`, `lr_scheduler` and `groups`, see `Method`.
    """

    backbone = submodule_alias("student.backbone", "The student's, which gives the features.")
    projector = submodule_alias("student.projector", "The student's, which gives the embeddings.")

    def __init__(
        self,
        backbone: nn.Module,
        tagger: nn.Module,
        projector: nn.Module,
        decoder: MLPHead | None = None,
        masks: MaskSampler | None = None,
        tags: float = 1.0,
        pixels: float = 1.0,
        contrast: float = 0.5,
        positive_focus: float = 0.0,
        negative_focus: float = 4.0,
        margin: float = 0.05,
        temperature: float = 0.2,
        momentum: float = 0.996,
        final_momentum: float = 1.0,
        **optimization: Any,
    ) -> None:
        super().__init__(**optimization)
        require_temperatures(temperature=temperature)
        require_weights(tags=tags, pixels=pixels, contrast=contrast)
        require_asymmetry(positive_focus, negative_focus, margin)
        width = require_tokens(backbone, "HeuristicMTL").num_features
        require_width(backbone, "tagger.in_features", getattr(tagger, "in_features", None))
        require_projector(backbone, projector)
        self.weights = {"tags": tags, "pixels": pixels, "contrast": contrast}
        self.asymmetry = {"positive_focus": positive_focus, "negative_focus": negative_focus, "margin": margin}
        self.temperature, self.momentum = temperature, TeacherMomentum(momentum, final_momentum)
        self.tagger, self.decoder, self.num_tags = tagger, decoder or MLPHead(width), given_width(tagger)
        settle_patch_decoder(backbone, self.decoder, "HeuristicMTL")
        self.student = PatchMeanNetwork(backbone, projector)
        self.teacher = EMATeacher(self.student, batch_statistics=True)
        self.masks = masks or RandomMasks(0.6)
        self.precision_of_tags = TagPrecision(self.num_tags)

    def features(self, batch: Any) -> Tensor:
        """The mean over patches, [B D]."""
        image_BChw = batch["image"] if "image" in batch else views_of(batch, "HeuristicMTL")[0]
        return patch_tokens(self.backbone, image_BChw).mean(dim=1)

    def hidden(self, image_BChw: Tensor, index_B: Tensor) -> Tensor:
        """Which patches this step hides, bool [B H W]."""
        grid = self.backbone.grid(image_BChw)
        masks_BHW = self.masks.draw(grid, self.global_step, image_numbers(index_B))
        require_seen_and_hidden(masks_BHW, "HeuristicMTL")
        return torch.from_numpy(masks_BHW).to(image_BChw.device)

    def pixels(self, patches_BTD: Tensor, hidden_BHW: Tensor) -> tuple[Tensor, Tensor]:
        """(guesses of whole images [B C h w], which of their pixels are hidden, bool [B 1 h w])."""
        patch = self.backbone.patch_shape[:-1]
        guess_BChw = unpatchify(self.decoder(patches_BTD), patch, hidden_BHW.shape[1:])
        return guess_BChw, cells_to_pixels(hidden_BHW, patch)[:, None]

    def reconstruct(self, batch: ImageBatch) -> Reconstruction:
        """See `lightspan.nn.masking.hidden_patches`."""
        image_BChw = batch["image"]
        hidden_BHW = self.hidden(image_BChw, index_in(batch, self))
        guess_BChw, hidden_B1hw = self.pixels(self.student(image_BChw, hidden_BHW).patches_BTD, hidden_BHW)
        return Reconstruction(image_BChw, hidden_B1hw, guess_BChw.to(image_BChw).where(hidden_B1hw, image_BChw))

    def losses(self, batch: TaggedViewsBatch) -> dict[str, Tensor]:
        """Of each task, before its weight; scalars."""
        first_BChw, second_BChw = global_first(batch, "HeuristicMTL", 2)[:2]
        tags, hidden_BHW = tags_of(batch, "HeuristicMTL", self.num_tags), self.hidden(first_BChw, index_in(batch, self))
        clean, masked = self.student(first_BChw), self.student(first_BChw, hidden_BHW)
        guess_BChw, hidden_B1hw = self.pixels(masked.patches_BTD, hidden_BHW)
        key_BE = self.teacher(second_BChw).z_BE
        return {
            "tags": asymmetric_loss(self.tagger(clean.mean_BD), tags.hold_BG, tags.known_BG, **self.asymmetry),
            "pixels": hidden_absolute_error(guess_BChw, first_BChw, hidden_B1hw),
            "contrast": paired_info_nce(masked.z_BE, key_BE, self.temperature),
        }

    def training_step(self, batch: TaggedViewsBatch, batch_idx: int) -> Tensor:
        losses = self.losses(batch)
        loss = weighted_sum(losses, self.weights)
        self.log_training({"train/loss": loss} | {f"train/{name}": each for name, each in losses.items()})
        return loss

    def validation_step(self, batch: TaggedBatch, batch_idx: int) -> None:
        tags = tags_of(batch, "HeuristicMTL", self.num_tags)
        self.precision_of_tags.update(self.tagger(self.features(batch)), tags.hold_BG, tags.known_BG)
        self.log("val/mean_average_precision", self.precision_of_tags, prog_bar=True)

    def after_optimizer_step(self) -> None:
        self.teacher.follow(self.student, self.momentum(self.share_of_run()))
