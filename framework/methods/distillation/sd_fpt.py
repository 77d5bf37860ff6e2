"""SD-FPT: masked modelling on a small set, once more from the start, held near what the first time learned.

Source: Lee, Kang, Lee, Hwang, Kawaguchi, "Self-Distillation for Further Pre-training of Transformers", ICLR 2023, arXiv
2210.02871, algorithm 1. Of theta_init, an autoencoder that was pre-trained elsewhere:

    teacher   theta_0 = theta_init after steps of L_MAE on the new images; its encoder f is frozen, its decoder dropped
    student   from theta_init again: L = L_MAE(theta; x) + |f_theta(x) - f_theta_0(x)|^2 on whole images

The first line is a run of `lightspan.methods.masked.mae.MAE`, this method is the second; another round takes the
student as teacher. L_MAE is MAE's (see there). As in the authors' code f is what a classifier would read, the class
token after the last norm for a network that pools by it, the squares are summed over its numbers and averaged over
images, and the student sees the whole image in training mode. Text (masked tokens instead of patches) is left out.
Shapes: B batch of this rank, C h w image, D width of the features.
"""

from typing import Any

from torch import Tensor, nn

from lightspan.core.devices import wide
from lightspan.core.errors import UserError
from lightspan.core.ranges import require_weights
from lightspan.nn.decoders.mask_decoder import MaskDecoder
from lightspan.nn.image_numbers import index_in
from lightspan.nn.masking.hidden_patches import HiddenPatches
from lightspan.nn.masking.mask_samplers import MaskSampler, RandomMasks
from lightspan.nn.sequences.token_backbone import require_tokens, settle_patch_decoder
from lightspan.nn.teachers.frozen import Frozen, require_apart
from lightspan.nn.views import views_of
from lightspan.nn.widths import given_features
from lightspan.objectives.masked import patch_regression
from lightspan.objectives.means import mean
from lightspan.training.method import Method


def hidden_distance(student_BD: Tensor, teacher_BD: Tensor) -> Tensor:
    """Mean over the rows of all ranks of |s - t|^2, a scalar >= 0 in float32 or wider; no gradient into the teacher."""
    return mean((wide(student_BD) - wide(teacher_BD.detach())).square().sum(dim=1))


class SDFPT(Method):
    """Trains an encoder and a decoder to guess hidden patches, the encoder near a teacher; the encoder is kept.

    Args:
        backbone: a `lightspan.nn.sequences.token_backbone.TokenBackbone` with the weights of theta_init, such as
            `lightspan.backbones.weights.with_weights` loads; what probes read.
        decoder: with those of theta_init too; as of `lightspan.methods.masked.mae.MAE`.
        teacher: [B C h w] -> [B D], a backbone with the weights of theta_0. It is frozen, in evaluation mode, and part
            of the checkpoint.
        distillation: weight of the distance, at least 0; 0 is further pre-training alone.
        masks, normalise: as of `MAE`.
        optimization: `optimizer`, `lr_scheduler` and `groups`, see `Method`.
    Raises: UserError for parts of different widths, or a teacher that is the backbone itself.
    """

    def __init__(
        self,
        backbone: nn.Module,
        decoder: MaskDecoder,
        teacher: nn.Module,
        distillation: float = 1.0,
        masks: MaskSampler | None = None,
        normalise: bool = True,
        **optimization: Any,
    ) -> None:
        super().__init__(**optimization)
        require_weights(distillation=distillation)
        settle_patch_decoder(backbone, decoder, "SDFPT")
        if given_features(teacher) != given_features(backbone):
            raise UserError(
                f"the teacher gives {given_features(teacher)} features and the backbone {given_features(backbone)}; "
                "both must be the same network, with weights of their own"
            )
        require_apart(teacher, backbone)
        self.backbone, self.decoder, self.teacher = backbone, decoder, Frozen(teacher)
        self.masks, self.normalise, self.distillation = masks or RandomMasks(0.75), normalise, distillation

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        (image_BChw,) = views_of(batch, "SDFPT", 1)
        reconstruction = self.reconstruction_loss(image_BChw, index_in(batch, self))
        if not self.distillation:
            self.log_training({"train/loss": reconstruction})
            return reconstruction
        distance = hidden_distance(self.backbone(image_BChw), self.teacher(image_BChw))
        loss = reconstruction + self.distillation * distance
        self.log_training({"train/loss": loss, "train/reconstruction": reconstruction, "train/distance": distance})
        return loss

    def reconstruction_loss(self, image_BChw: Tensor, index_B: Tensor) -> Tensor:
        """L_MAE of this step's masks."""
        backbone = require_tokens(self.backbone, "SDFPT")
        hidden = HiddenPatches.draw(backbone, self.masks, image_BChw, index_B, self.global_step)
        seen_BSD = backbone.tokens(image_BChw, keep_BK=hidden.see_BK)
        guess_BMd = self.decoder(seen_BSD, hidden.see_BK, hidden.hide_BM, hidden.grid)
        return patch_regression(guess_BMd, hidden.pixels(), self.normalise)
