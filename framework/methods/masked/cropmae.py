"""CropMAE: an encoder learns correspondence from two crops of one image, of which one is hidden but for two patches.

Source: Eymael et al., "Efficient Image Pre-Training with Siamese Cropped Masked Autoencoders", ECCV 2024, arXiv
2403.17823, and the authors' code. One encoder sees all patches of the one view and the few visible patches of the
other; a decoder guesses the hidden ones by looking at the first view through cross-attention. The loss is MAE's.
By default the hidden view is a crop of a crop (`lightspan.datamodules.image.augment.views.NestedCrops`). The paper's
other pairs are other views: two random crops (`TwoViews`), the same view twice (`Plain`), and with `hidden_view=0` the
outer crop is hidden.
Shapes: B batch of this rank, C h w image, H W grid, K visible and M hidden patches, d = p q C numbers of a patch.
"""

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from lightspan.core.errors import UserError
from lightspan.datamodules.image.batch import ImageBatch
from lightspan.nn.decoders.cross_decoder import CrossDecoder
from lightspan.nn.image_numbers import index_in
from lightspan.nn.masking.hidden_patches import HiddenPatches, Reconstruction
from lightspan.nn.masking.mask_samplers import MaskSampler, RandomMasks
from lightspan.nn.sequences.token_backbone import require_tokens, settle_patch_decoder
from lightspan.nn.views import views_of
from lightspan.objectives.masked import denormalised_patches, patch_regression
from lightspan.training.method import Method


def middle(image_BChw: Tensor) -> Tensor:
    """The inner half of pictures by area, enlarged to their size."""
    height, width = image_BChw.shape[2:]
    top, left = (round(side * (1 - 0.5**0.5) / 2) for side in (height, width))
    inner = image_BChw[..., top : height - top, left : width - left]
    return F.interpolate(inner, (height, width), mode="bilinear")


class CropMAE(Method):
    """Trains an encoder and a decoder to guess the hidden patches of one view with the help of another; the encoder is
    kept.

    Args:
        backbone: a `lightspan.nn.sequences.token_backbone.TokenBackbone`; what probes read.
        decoder: with d outputs, or out_features=None for as many as the backbone's patches have. The authors' has
            `CrossFirst` blocks and place_other=False.
        masks: hides equally many patches of each image; None hides 0.985 of them, which leaves 2 of 196 and never less
            than 1.
        hidden_view: which of the two views of a batch is hidden, 0 or 1.
        normalise: whether targets are normalised patch by patch; without it they are the pixels.
        optimization: `optimizer`, `lr_scheduler` and `groups`, see `Method`.
    """

    def __init__(
        self,
        backbone: nn.Module,
        decoder: CrossDecoder,
        masks: MaskSampler | None = None,
        hidden_view: int = 1,
        normalise: bool = True,
        **optimization: Any,
    ) -> None:
        super().__init__(**optimization)
        settle_patch_decoder(backbone, decoder, "CropMAE")
        if hidden_view not in (0, 1):
            raise UserError(f"hidden_view={hidden_view} must be 0 or 1, one of the two views of a batch")
        self.backbone, self.decoder, self.masks = backbone, decoder, masks or RandomMasks(0.985)
        self.hidden_view, self.normalise = hidden_view, normalise

    def guess(self, image_BChw: Tensor, whole_BChw: Tensor, see_BK: Tensor, hide_BM: Tensor) -> Tensor:
        """What the hidden patches of `image` may show, [B M d], from its visible ones and the whole other view."""
        backbone = require_tokens(self.backbone, "CropMAE")
        seen_BSD, other_BUD = backbone.tokens(image_BChw, keep_BK=see_BK), backbone.tokens(whole_BChw)
        return self.decoder(seen_BSD, see_BK, hide_BM, other_BUD, backbone.grid(image_BChw))

    def hidden(self, image_BChw: Tensor, index_B: Tensor) -> HiddenPatches:
        backbone = require_tokens(self.backbone, "CropMAE")
        return HiddenPatches.draw(backbone, self.masks, image_BChw, index_B, self.global_step)

    def reconstruct(self, batch: ImageBatch) -> Reconstruction:
        """See `lightspan.nn.masking.hidden_patches`: the views are the picture and its middle, which has half of its
        area. Normalised guesses get the brightness and contrast of what was hidden.
        """
        views = batch["image"], middle(batch["image"])
        hidden = self.hidden(views[self.hidden_view], index_in(batch, self))
        guess_BMd = self.guess(hidden.image_BChw, views[1 - self.hidden_view], hidden.see_BK, hidden.hide_BM)
        return hidden.reconstruction(denormalised_patches(guess_BMd, hidden.pixels()) if self.normalise else guess_BMd)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        views = views_of(batch, "CropMAE", 2)
        image_BChw, whole_BChw = views[self.hidden_view], views[1 - self.hidden_view]
        if image_BChw.shape != whole_BChw.shape:
            raise UserError(
                f"CropMAE needs both views of one size, and these are {[*image_BChw.shape[2:]]} and "
                f"{[*whole_BChw.shape[2:]]}; set the same size in data.init_args.views"
            )
        hidden = self.hidden(image_BChw, index_in(batch, self))
        guess_BMd = self.guess(image_BChw, whole_BChw, hidden.see_BK, hidden.hide_BM)
        loss = patch_regression(guess_BMd, hidden.pixels(), self.normalise)
        self.log_training({"train/loss": loss})
        return loss
