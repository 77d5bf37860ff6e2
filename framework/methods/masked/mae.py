"""MAE: an encoder that sees a quarter of an image's patches learns from guessing the pixels of the others.

Source: He et al., "Masked Autoencoders Are Scalable Vision Learners", 2021, arXiv 2111.06377, section 3. The encoder
gets the visible patches alone; a small decoder gets their codes and a mask token at each hidden place, and its guesses
are compared with the hidden patches, each normalised by its own mean and deviation:
L = mean over hidden patches and their numbers of (guess - (t - mean t) / sqrt(var t + 1e-6))^2.
Difference from the authors' code: the linear layer after the decoder runs on hidden patches alone, which are all that
the loss reads; and masks are functions of seed, step and image.
Shapes: B batch of this rank, C h w image, H W grid, K visible and M hidden patches, d = p q C numbers of a patch.
"""

from typing import Any

from torch import Tensor, nn

from lightspan.datamodules.image.batch import ImageBatch
from lightspan.nn.decoders.mask_decoder import MaskDecoder
from lightspan.nn.image_numbers import index_in
from lightspan.nn.masking.hidden_patches import HiddenPatches, Reconstruction
from lightspan.nn.masking.mask_samplers import MaskSampler, RandomMasks
from lightspan.nn.sequences.token_backbone import require_tokens, settle_patch_decoder
from lightspan.nn.views import image_of, views_of
from lightspan.objectives.masked import denormalised_patches, patch_regression
from lightspan.training.method import Method


class MAE(Method):
    """Trains an encoder and a decoder to guess hidden patches; the encoder is kept.

    Args:
        backbone: a `lightspan.nn.sequences.token_backbone.TokenBackbone`, such as `lightspan.backbones.vit.vit`; what
            probes read.
        decoder: with d outputs, or out_features=None for as many as the backbone's patches have.
        masks: hides equally many patches of each image; None is three quarters of them at random.
        normalise: whether targets are normalised patch by patch; without it they are the pixels.
        optimization: `optimizer`, `lr_scheduler` and `groups`, see `Method`.
    """

    def __init__(
        self,
        backbone: nn.Module,
        decoder: MaskDecoder,
        masks: MaskSampler | None = None,
        normalise: bool = True,
        **optimization: Any,
    ) -> None:
        super().__init__(**optimization)
        settle_patch_decoder(backbone, decoder, "MAE")
        self.backbone, self.decoder = backbone, decoder
        self.masks, self.normalise = masks or RandomMasks(0.75), normalise

    def guess(self, image_BChw: Tensor, see_BK: Tensor, hide_BM: Tensor) -> Tensor:
        """What the hidden patches may show, [B M d], from the visible ones."""
        backbone = require_tokens(self.backbone, "MAE")
        seen_BSD = backbone.tokens(image_BChw, keep_BK=see_BK)
        return self.decoder(seen_BSD, see_BK, hide_BM, backbone.grid(image_BChw))

    def hidden(self, image_BChw: Tensor, index_B: Tensor) -> HiddenPatches:
        backbone = require_tokens(self.backbone, "MAE")
        return HiddenPatches.draw(backbone, self.masks, image_BChw, index_B, self.global_step)

    def reconstruct(self, batch: ImageBatch) -> Reconstruction:
        """See `lightspan.nn.masking.hidden_patches`. Normalised guesses get the brightness and contrast of what was
        hidden.
        """
        hidden = self.hidden(image_of(batch, "MAE"), index_in(batch, self))
        guess_BMd = self.guess(hidden.image_BChw, hidden.see_BK, hidden.hide_BM)
        return hidden.reconstruction(denormalised_patches(guess_BMd, hidden.pixels()) if self.normalise else guess_BMd)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        (image_BChw,) = views_of(batch, "MAE", 1)
        hidden = self.hidden(image_BChw, index_in(batch, self))
        guess_BMd = self.guess(image_BChw, hidden.see_BK, hidden.hide_BM)
        loss = patch_regression(guess_BMd, hidden.pixels(), self.normalise)
        self.log_training({"train/loss": loss})
        return loss
