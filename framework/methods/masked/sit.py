"""SiT: a transformer rebuilds corrupted regions of two views, and tells by class tokens which views are of one image.

Source: Atito, Awais, Kittler, "SiT: Self-supervised vIsion Transformer", 2021, arXiv 2104.03602, as revised, and the
authors' code: group masking and momentum contrast. The first version of the paper, with a rotation token and learned
weights of the losses, is another method. Of two views the student sees corrupted ones c(x1) and c(x2), and a teacher
that follows it the clean ones:
- L_rec: mean over the corrupted pixels of both views of |guess - pixel|;
- L_con = 2 tau (ctr(c(x1), x2) + ctr(c(x2), x1)), InfoNCE of class tokens among all images of the other view, without
  predictor and queue;
- L = contrast L_con + reconstruction L_rec.
Corruption: rectangles over half of the image that become zeros or, in every other image, over 0.3 of it that show
another one. As in the code masks are of pixels (set `align` for whole patches), with their full share in each image.
Differences: masks are functions of seed, step and image, where the code seeds numpy anew in each call; the other image
is the one before in the batch; the decoder's last layer has a bias for each pixel of a patch, where a transposed
convolution has one for each channel; the teacher has no decoder, of which the code makes no use.
Unverified: that the code shows both views to a network in one pass, and that the student is what is kept.
Shapes: B images of this rank, two views, R = 2 B rows, C h w image, H W grid of T patches, E embedding width.
"""

from typing import Any

import torch
from torch import Tensor, nn

from lightspan.core.ranges import require_temperatures, require_weights
from lightspan.datamodules.image.batch import ImageBatch, ViewsBatch
from lightspan.nn.heads.mlp_head import MLPHead
from lightspan.nn.image_numbers import index_in
from lightspan.nn.masking.block_masks import RectangleMasks
from lightspan.nn.masking.corruption import GroupCorruption
from lightspan.nn.masking.hidden_patches import Reconstruction
from lightspan.nn.sequences.patches import unpatchify
from lightspan.nn.sequences.token_backbone import ClassTokenNetwork, require_class_token, settle_patch_decoder
from lightspan.nn.submodule_alias import submodule_alias
from lightspan.nn.teachers.ema import EMATeacher
from lightspan.nn.views import global_first
from lightspan.nn.widths import require_projector
from lightspan.objectives.info_nce import crossed_info_nce
from lightspan.objectives.masked import hidden_absolute_error
from lightspan.objectives.means import weighted_sum
from lightspan.optim.schedules import TeacherMomentum
from lightspan.training.method import Method


class SiT(Method):
    """Masked modelling and contrast of one transformer. The student is kept, without its heads.

    Batches hold two views of one size. A batch of one image has no other one to tell it from: its contrast is 0, and so
    is the reconstruction where nothing is corrupted. With sync_batchnorm N ranks train as one if `corruption.alien` is
    0.

    Args:
        backbone: the student's, a transformer with tokens and a class token, such as `lightspan.backbones.vit.vit`; the
            teacher is a copy. To fine-tune it as the authors do, put it into
            `lightspan.nn.sequences.token_backbone.ClassAndMean`.
        projector: [R D] -> [R E], of class tokens, copied too.
        decoder: [R T D] -> [R T d], d the numbers of a patch; None makes three hidden layers as wide as the backbone.
        contrast, reconstruction: weights of the losses, each >= 0; the authors take 1 and 1, and 5 of the second for
            small sets.
        corruption: of pixels; None is the source's.
        temperature: tau > 0.
        momentum, final_momentum: of the teacher, in [0, 1], on a half cosine over the run.
        optimization: `optimizer`, `lr_scheduler` and `groups`, see `Method`.
    """

    backbone = submodule_alias("student.backbone", "The student's, which gives the features.")
    projector = submodule_alias("student.projector", "The student's, which gives the embeddings.")

    def __init__(
        self,
        backbone: nn.Module,
        projector: nn.Module,
        decoder: MLPHead | None = None,
        contrast: float = 1.0,
        reconstruction: float = 1.0,
        corruption: GroupCorruption | None = None,
        temperature: float = 0.2,
        momentum: float = 0.996,
        final_momentum: float = 1.0,
        **optimization: Any,
    ) -> None:
        super().__init__(**optimization)
        require_temperatures(temperature=temperature)
        require_weights(contrast=contrast, reconstruction=reconstruction)
        self.temperature, self.momentum = temperature, TeacherMomentum(momentum, final_momentum)
        width = require_class_token(backbone, "SiT").num_features
        require_projector(backbone, projector)
        self.decoder = decoder or MLPHead(width, hidden=[width] * 3)
        self.weights = {"contrast": contrast, "reconstruction": reconstruction}
        settle_patch_decoder(backbone, self.decoder, "SiT")
        self.student = ClassTokenNetwork(backbone, projector)
        self.teacher = EMATeacher(self.student, batch_statistics=True)
        self.corruption = corruption or GroupCorruption(
            RectangleMasks(0.5), alien=0.5, fill="zeros", alien_masks=RectangleMasks(0.3)
        )

    def corrupted(self, image_BChw: Tensor, index_B: Tensor, view: int) -> tuple[Tensor, Tensor]:
        """(what the student sees of a view, which of its pixels are corrupted: bool [B 1 h w])."""
        sides = tuple(image_BChw.shape[2:])
        seen_BChw, hidden_Bhw = self.corruption(image_BChw, sides, index_B, self.global_step, view)
        return seen_BChw, torch.from_numpy(hidden_Bhw).to(image_BChw.device)[:, None]

    def pixels(self, patches_RTD: Tensor, grid: tuple[int, ...]) -> Tensor:
        """Guesses of whole images, [R C h w]."""
        return unpatchify(self.decoder(patches_RTD), self.backbone.patch_shape[:-1], grid)

    def reconstruct(self, batch: ImageBatch) -> Reconstruction:
        """See `lightspan.nn.masking.hidden_patches`."""
        image_BChw = batch["image"]
        seen_BChw, hidden_B1hw = self.corrupted(image_BChw, index_in(batch, self), 0)
        guess_BChw = self.pixels(self.student(seen_BChw).patches_BTD, self.backbone.grid(image_BChw))
        return Reconstruction(image_BChw, hidden_B1hw, guess_BChw.to(image_BChw).where(hidden_B1hw, image_BChw))

    def training_step(self, batch: ViewsBatch, batch_idx: int) -> Tensor:
        views = global_first(batch, "SiT", 2)[:2]
        grid, index_B = self.backbone.grid(views[0]), index_in(batch, self)
        pairs = [self.corrupted(view, index_B, number) for number, view in enumerate(views)]
        seen_RChw, hidden_R1hw = (torch.cat(parts) for parts in zip(*pairs, strict=True))
        clean_RChw = torch.cat(views)
        student, taught = self.student(seen_RChw), self.teacher(clean_RChw)
        figures = {
            "contrast": crossed_info_nce(student.z_BE.tensor_split(2), taught.z_BE.tensor_split(2), self.temperature),
            "reconstruction": hidden_absolute_error(self.pixels(student.patches_BTD, grid), clean_RChw, hidden_R1hw),
        }
        loss = weighted_sum(figures, self.weights)
        self.log_training({"train/loss": loss} | {f"train/{name}": figure for name, figure in figures.items()})
        return loss

    def after_optimizer_step(self) -> None:
        self.teacher.follow(self.student, self.momentum(self.share_of_run()))
