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

from lightspan.method import Method
from lightspan.nn.decoders.mask_decoder import MaskDecoder
from lightspan.nn.image_numbers import image_numbers
from lightspan.nn.masking.mask_samplers import MaskSampler, RandomMasks, seen_and_hidden
from lightspan.nn.sequences.patches import at_places, patchify
from lightspan.nn.sequences.token_backbone import require_tokens, settle_patch_decoder
from lightspan.nn.views import views_of
from lightspan.objectives.masked import patch_regression


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

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        (image_BChw,) = views_of(batch, "MAE", 1)
        backbone = require_tokens(self.backbone, "MAE")
        grid = backbone.grid(image_BChw)
        drawn_BHW = self.masks.draw(grid, self.global_step, image_numbers(batch["index"]))
        see_BK, hide_BM = seen_and_hidden(drawn_BHW, image_BChw.device)
        hidden_BMd = at_places(patchify(image_BChw, backbone.patch_shape[:2]), hide_BM)
        loss = patch_regression(self.guess(image_BChw, see_BK, hide_BM), hidden_BMd, self.normalise)
        self.log_training({"train/loss": loss})
        return loss
