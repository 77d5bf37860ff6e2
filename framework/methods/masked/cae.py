"""CAE: features of hidden patches are predicted in the space of the encoder, and only then turned into targets.

Source: Chen et al., "Context Autoencoder for Self-Supervised Representation Learning", 2022, arXiv 2202.03026, section
3, and the authors' code. The encoder F sees the visible patches; a regressor predicts from them the features of the
hidden ones; a decoder turns these predictions, and nothing else, into the code of each hidden patch:
L = cross-entropy(decoder(predicted), codes) + 2 |predicted - F(hidden patches alone)|^2, the second a mean over numbers
and without a gradient into F there: "alignment". The class token goes through the encoder, and neither regressor nor
decoder read it. The encoder of the alignment is the encoder itself, in training mode, as in the code: no average.
Codes are those of a tokenizer (in the paper the dVAE of DALL-E, on an image of half the size); without one the targets
are the pixels of MAE, which the paper tries as well, with three quarters of the patches hidden.
Shapes: B batch of this rank, C h w image, H W grid, K visible and M hidden patches, P prefix tokens, w width, V codes.
"""

from typing import Any

import torch
from torch import Tensor, nn

from lightspan.core.errors import UserError
from lightspan.core.ranges import require_weights
from lightspan.datamodules.image.batch import ImageBatch
from lightspan.nn.decoders.latent_regressor import LatentDecoder, LatentRegressor
from lightspan.nn.image_numbers import index_in
from lightspan.nn.masking.block_masks import BlockMasks
from lightspan.nn.masking.hidden_patches import HiddenPatches, Reconstruction
from lightspan.nn.masking.mask_samplers import MaskSampler
from lightspan.nn.sequences.token_backbone import patch_tokens, require_tokens, settle_patch_decoder
from lightspan.nn.views import views_of
from lightspan.nn.widths import build_outputs, require_width
from lightspan.objectives.classes import label_cross_entropy
from lightspan.objectives.masked import denormalised_patches, patch_regression
from lightspan.objectives.means import squared_error
from lightspan.training.method import Method


class CAE(Method):
    """Trains an encoder to say of visible patches what it would say of hidden ones; the encoder is kept.

    Args:
        backbone: a `lightspan.nn.sequences.token_backbone.TokenBackbone`; what probes read.
        regressor, decoder: of the backbone's width; the decoder's outputs are V, or the numbers of a patch, and
            out_features=None takes what is needed.
        tokenizer: [B C h w] -> int64 [B H*W] codes in [0, V), and says V in its attribute `codes`; not trained. One
            with `set_patch_shape` is given the height, width and channels of the backbone's patches. None: pixels.
        masks: hides equally many patches of each image; None hides half of them by blocks of 16 and more.
        alignment_weight: >= 0; at 0 the second pass of the encoder is left out.
        optimization: `optimizer`, `lr_scheduler` and `groups`, see `Method`.
    """

    def __init__(
        self,
        backbone: nn.Module,
        regressor: LatentRegressor,
        decoder: LatentDecoder,
        tokenizer: nn.Module | None = None,
        masks: MaskSampler | None = None,
        alignment_weight: float = 2.0,
        **optimization: Any,
    ) -> None:
        super().__init__(**optimization)
        shape = require_tokens(backbone, "CAE").patch_shape
        require_width(backbone, "regressor.width", regressor.in_features)
        require_width(backbone, "decoder.width", decoder.in_features)
        require_weights(alignment_weight=alignment_weight)
        if tokenizer is None:
            settle_patch_decoder(backbone, decoder, "CAE")
        else:
            codes = getattr(tokenizer, "codes", None)
            if not isinstance(codes, int):
                raise UserError(f"{type(tokenizer).__name__} must say in its attribute `codes` how many codes it has")
            build_outputs(decoder, codes)
            if decoder.out_features != codes:
                raise UserError(
                    f"decoder.out_features={decoder.out_features}, and {type(tokenizer).__name__} has {codes} codes; "
                    "make both the same, or leave out_features out"
                )
            if callable(set_patch_shape := getattr(tokenizer, "set_patch_shape", None)):
                set_patch_shape(shape)
        self.backbone, self.regressor, self.decoder = backbone, regressor, decoder
        self.tokenizer = None if tokenizer is None else tokenizer.requires_grad_(False)
        self.masks = masks or BlockMasks(1.0, (0.5, 0.5), least_block=16)
        self.alignment_weight = alignment_weight

    def patch_features(self, image_BChw: Tensor, keep_BK: Tensor) -> Tensor:
        """What the encoder says of these patches, of which it sees no others: [B K w]."""
        return patch_tokens(self.backbone, image_BChw, keep_BK=keep_BK)

    def predict(self, image_BChw: Tensor, see_BK: Tensor, hide_BM: Tensor) -> Tensor:
        """The features of the hidden patches as the visible ones let expect them, [B M w]."""
        grid = require_tokens(self.backbone, "CAE").grid(image_BChw)
        return self.regressor(self.patch_features(image_BChw, see_BK), see_BK, hide_BM, grid)

    def hidden(self, image_BChw: Tensor, index_B: Tensor) -> HiddenPatches:
        backbone = require_tokens(self.backbone, "CAE")
        return HiddenPatches.draw(backbone, self.masks, image_BChw, index_B, self.global_step)

    def reconstruct(self, batch: ImageBatch) -> Reconstruction | None:
        """See `lightspan.nn.masking.hidden_patches`: what the likeliest codes stand for, or pixels with the brightness
        and contrast of what was hidden. None of a tokenizer without `patches_of`, which shows codes: [B M] -> [B M d].
        """
        hidden = self.hidden(batch["image"], index_in(batch, self))
        predicted_BMw = self.predict(hidden.image_BChw, hidden.see_BK, hidden.hide_BM)
        guess_BMo = self.decoder(predicted_BMw, hidden.hide_BM, hidden.grid)
        if self.tokenizer is None:
            return hidden.reconstruction(denormalised_patches(guess_BMo, hidden.pixels()))
        patches_of = getattr(self.tokenizer, "patches_of", None)
        return hidden.reconstruction(patches_of(guess_BMo.argmax(dim=2))) if callable(patches_of) else None

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        (image_BChw,) = views_of(batch, "CAE", 1)
        hidden = self.hidden(image_BChw, index_in(batch, self))
        predicted_BMw = self.predict(image_BChw, hidden.see_BK, hidden.hide_BM)
        figures = {"target": self.target_loss(self.decoder(predicted_BMw, hidden.hide_BM, hidden.grid), hidden)}
        loss = figures["target"]
        if self.alignment_weight:
            with torch.no_grad():
                own_BMw = self.patch_features(image_BChw, hidden.hide_BM)
            figures["alignment"] = squared_error(predicted_BMw, own_BMw)
            loss = loss + self.alignment_weight * figures["alignment"]
        self.log_training({"train/loss": loss} | {f"train/{name}": figure for name, figure in figures.items()})
        return loss

    def target_loss(self, guess_BMo: Tensor, hidden: HiddenPatches) -> Tensor:
        """Mean over hidden patches; 0 without any."""
        if self.tokenizer is None:
            return patch_regression(guess_BMo, hidden.pixels())
        codes_BM = self.tokenizer(hidden.image_BChw).gather(1, hidden.hide_BM)
        return label_cross_entropy(guess_BMo.flatten(0, 1), codes_BM.flatten())
