"""CroCo: one view of a scene, of which a tenth is seen, is completed from another view of the same scene.

Source: Weinzaepfel et al., "CroCo: Self-Supervised Pre-training for 3D Vision Tasks by Cross-View Completion", NeurIPS
2022, arXiv 2210.10716, sections 3.1 to 3.3, and the authors' code. One encoder sees the visible patches of the first
view and all of the second; a decoder guesses the hidden ones by looking at the second view through cross-attention.
The loss is MAE's, on hidden patches normalised by themselves.
What it trains serves two kinds of tasks: on single pictures the encoder alone, on pairs (flow, disparity, pose) encoder
and decoder with nothing hidden.
Two transforms of one photograph make poor pairs, as the network fits the transform (the paper's table 2); see
`lightspan.methods.masked.cropmae` for crops that serve.
Difference from the authors' code: the linear layer after the decoder runs on hidden patches alone, which are all that
the loss reads; masks are functions of seed, step and pair; and where nine tenths are no whole number the count of those
that stay is rounded to the nearest, theirs upwards, which is the same for 196.
Shapes: B pairs of this rank, C h w image, H W grid of T patches, K visible and M hidden ones, P prefix tokens, D width
of the encoder, w of the decoder, d = p q C numbers of a patch.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightspan.core.devices import wide
from lightspan.core.errors import UserError
from lightspan.datamodules.image.batch import PairBatch
from lightspan.nn.decoders.cross_decoder import CrossDecoder
from lightspan.nn.image_numbers import index_in
from lightspan.nn.masking.hidden_patches import HiddenPatches, Reconstruction
from lightspan.nn.masking.mask_samplers import MaskSampler, RandomMasks
from lightspan.nn.sequences.token_backbone import require_tokens, settle_patch_decoder
from lightspan.nn.tokens import Tokens, token_features
from lightspan.nn.views import require_one_size, views_of
from lightspan.objectives.masked import denormalised_patches, patch_regression
from lightspan.training.method import Method


class CroCo(Method):
    """Trains an encoder and a decoder to complete the first of two views from the second; both are kept.

    Args:
        backbone: a `lightspan.nn.sequences.token_backbone.TokenBackbone`; the authors' has no class token.
        decoder: with d outputs, or out_features=None for as many as the backbone's patches have. The paper's has
            `SelfFirst` blocks and place_other=True, the defaults.
        masks: hides equally many patches of each first view, some and not all; None is nine tenths of them at random,
            176 of the paper's 196.
        normalise: whether targets are normalised patch by patch; without it they are the pixels.
        optimization: `optimizer`, `lr_scheduler` and `groups`, see `Method`.
    """

    def __init__(
        self,
        backbone: nn.Module,
        decoder: CrossDecoder,
        masks: MaskSampler | None = None,
        normalise: bool = True,
        **optimization: Any,
    ) -> None:
        super().__init__(**optimization)
        settle_patch_decoder(backbone, decoder, "CroCo")
        self.backbone, self.decoder = backbone, decoder
        self.masks, self.normalise = masks or RandomMasks(0.9, nearest=True), normalise

    def guess(self, first_BChw: Tensor, second_BChw: Tensor, see_BK: Tensor, hide_BM: Tensor) -> Tensor:
        """What the hidden patches of the first view may show, [B M d], from its visible ones and the second view."""
        backbone = require_tokens(self.backbone, "CroCo")
        seen_BSD, other_BUD = backbone.tokens(first_BChw, keep_BK=see_BK), backbone.tokens(second_BChw)
        return self.decoder(seen_BSD, see_BK, hide_BM, other_BUD, backbone.grid(first_BChw))

    def pair_tokens(self, first_BChw: Tensor, second_BChw: Tensor) -> Tensor:
        """What the decoder says of each place of the first view in the light of the second, with nothing hidden, before
        its last layer: [B T w]. Heads for flow, disparity and pose stand on it.
        """
        backbone = require_tokens(self.backbone, "CroCo")
        grid = backbone.grid(first_BChw)
        every_BT = torch.arange(math.prod(grid), device=first_BChw.device).expand(len(first_BChw), -1)
        tokens_BPTD, other_BPTD = backbone.tokens(first_BChw), backbone.tokens(second_BChw)
        said_BPTw = self.decoder.decode(tokens_BPTD, every_BT, every_BT[:, :0], other_BPTD, grid)
        return said_BPTw[:, backbone.num_prefix_tokens :]

    def features(self, batch: Any) -> Tensor:
        """Of pairs the mean of `pair_tokens`, [B w]; of pictures what the encoder gives, [B D]."""
        if not _paired(batch):
            return super().features(batch)
        require_one_size(batch["views"], "CroCo")
        return wide(self.pair_tokens(*batch["views"])).mean(dim=1)

    def token_features(self, batch: Any, layers: Sequence[int] = (-1,)) -> list[Tokens]:
        """Of pairs the decoder's layers, one for each block; of pictures the encoder's."""
        reader = self.decoder if _paired(batch) else self.backbone
        return token_features(reader, lambda: self.features(batch), layers)

    def hidden(self, first_BChw: Tensor, index_B: Tensor) -> HiddenPatches:
        """Raises: UserError for masks that leave nothing to guess, or nothing to guess from."""
        backbone = require_tokens(self.backbone, "CroCo")
        hidden = HiddenPatches.draw(backbone, self.masks, first_BChw, index_B, self.global_step)
        seen, unseen = hidden.see_BK.shape[1], hidden.hide_BM.shape[1]
        if len(first_BChw) and not (seen and unseen):
            raise UserError(
                f"CroCo completes views of which some patches are hidden and some are seen, and masks hides {unseen} "
                f"of {seen + unseen}; set model.init_args.masks to others, or take smaller patches"
            )
        return hidden

    def reconstruct(self, batch: PairBatch) -> Reconstruction:
        """See `lightspan.nn.masking.hidden_patches`. Normalised guesses get the brightness and contrast of what was
        hidden.
        """
        first_BChw, second_BChw = _pair(batch)
        hidden = self.hidden(first_BChw, index_in(batch, self))
        guess_BMd = self.guess(first_BChw, second_BChw, hidden.see_BK, hidden.hide_BM)
        found = hidden.reconstruction(denormalised_patches(guess_BMd, hidden.pixels()) if self.normalise else guess_BMd)
        return found._replace(other_BChw=second_BChw)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        first_BChw, second_BChw = _pair(batch)
        hidden = self.hidden(first_BChw, index_in(batch, self))
        guess_BMd = self.guess(first_BChw, second_BChw, hidden.see_BK, hidden.hide_BM)
        loss = patch_regression(guess_BMd, hidden.pixels(), self.normalise)
        self.log_training({"train/loss": loss})
        return loss


def _pair(batch: Mapping[str, Any]) -> list[Tensor]:
    """Both views. Raises: UserError for another number of views, or two sizes."""
    views = views_of(batch, "CroCo", 2)
    require_one_size(views, "CroCo")
    return views


def _paired(batch: Any) -> bool:
    return isinstance(batch, Mapping) and "image" not in batch and len(batch.get("views", ())) == 2
