"""Prithvi: a masked autoencoder of series of pictures, whose patches lie in time and space.

Source: Jakubik et al., "Foundation Models for Generalist Geospatial Artificial Intelligence", 2023, arXiv 2310.18660,
and its code. The encoder sees a quarter of the patches of a series, drawn from all dates alike; a decoder guesses the
others, as in MAE (He et al., 2021, arXiv 2111.06377), by positions of time, row and column:
L = mean over hidden patches and their numbers of (guess - t)^2, of pixels as they are, standardised by band.
To fill gaps, the same network is trained further with masks in the shape of clouds over one date
(`lightspan.nn.masking.cloud_masks`), and then guesses what real clouds hide: `fill`.
Differences: masks are functions of seed, step and sample, and a share of 0 hides nothing; a pixel that is not valid
adds nothing to the loss, and is 0, its band's mean, in what the encoder sees.
Not here: codes of year, day and place, which later versions add.
Shapes: B series, C bands, T dates, h w sides, K seen and M hidden patches, d = t p q C numbers of a patch.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightspan.backbones.placed_vit import SeriesViT
from lightspan.core.errors import UserError
from lightspan.datamodules.multispectral.batch import MultispectralSeriesBatch
from lightspan.evaluation.scores.gap_filling import between_dates
from lightspan.nn.decoders.mask_decoder import MaskDecoder
from lightspan.nn.image_numbers import index_in
from lightspan.nn.masking.hidden_patches import HiddenPatches, Reconstruction
from lightspan.nn.masking.mask_samplers import MaskSampler, RandomMasks
from lightspan.nn.sequences.patches import patchify
from lightspan.nn.sequences.token_backbone import settle_patch_decoder
from lightspan.nn.valid_pixels import valid_of
from lightspan.nn.views import image_of
from lightspan.objectives.masked import seen_patch_regression
from lightspan.objectives.means import squared_error_at
from lightspan.training.method import Method


class Prithvi(Method):
    """Trains an encoder of series; the encoder is kept, or all of it to fill gaps.

    Batches are `MultispectralSeriesBatch`; of series without `valid` all pixels are. A series without a valid pixel has
    a loss of zero. Validation batches with `clear`, the truth under clouds, give the error of `fill` beside that of
    interpolation between dates and of the bands' means.

    Args:
        backbone: gives tokens on a grid of time, row and column.
        decoder: with axis_widths as those of the encoder, and d outputs, or out_features=None.
        masks: hides equally many patches of each series; None is three quarters of them at random.
        optimization: `optimizer`, `lr_scheduler` and `groups`, see `Method`.
    """

    def __init__(
        self, backbone: SeriesViT, decoder: MaskDecoder, masks: MaskSampler | None = None, **optimization: Any
    ) -> None:
        super().__init__(**optimization)
        settle_patch_decoder(backbone, decoder, "Prithvi")
        self.backbone, self.decoder, self.masks = backbone, decoder, masks or RandomMasks(0.75)

    def guess(self, image_BCThw: Tensor, see_BK: Tensor, hide_BM: Tensor) -> Tensor:
        """What the hidden patches may show, [B M d], from the visible ones."""
        seen_BSD = self.backbone.tokens(image_BCThw, keep_BK=see_BK)
        return self.decoder(seen_BSD, see_BK, hide_BM, self.backbone.grid(image_BCThw))

    def hidden(self, image_BCThw: Tensor, index_B: Tensor) -> HiddenPatches:
        return HiddenPatches.draw(self.backbone, self.masks, image_BCThw, index_B, self.global_step)

    def reconstruct(self, batch: MultispectralSeriesBatch) -> Reconstruction:
        """See `lightspan.nn.masking.hidden_patches`."""
        hidden = self.hidden(image_of(batch, "Prithvi"), index_in(batch, self))
        return hidden.reconstruction(self.guess(hidden.image_BChw, hidden.see_BK, hidden.hide_BM))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        image_BCThw = image_of(batch, "Prithvi")
        valid_BCThw = valid_of(batch, image_BCThw, "Prithvi")
        image_BCThw = image_BCThw.where(valid_BCThw, 0)  # which may hold anything elsewhere
        hidden = self.hidden(image_BCThw, index_in(batch, self))
        valid = HiddenPatches(valid_BCThw, hidden.patch, hidden.grid, hidden.see_BK, hidden.hide_BM)
        guess_BMd = self.guess(image_BCThw, hidden.see_BK, hidden.hide_BM)
        loss = seen_patch_regression(guess_BMd, hidden.pixels(), valid.pixels())
        self.log_training({"train/loss": loss})
        return loss

    @torch.no_grad()
    def fill(self, batch: Any) -> Tensor:
        """The series with guesses where pixels are not valid, [B C T h w].

        Patches with such a pixel are hidden, whole. Series with equally many of them are guessed at once. One of which
        no patch is whole keeps the bands' means.
        """
        image_BCThw = image_of(batch, "Prithvi")
        valid_BCThw = valid_of(batch, image_BCThw, "Prithvi")
        grid, patch = self.backbone.grid(image_BCThw), self.backbone.patch
        hidden_BN = ~patchify(valid_BCThw, patch).all(dim=2)
        counts_B, filled = hidden_BN.sum(dim=1), image_BCThw.clone()
        for count in counts_B.unique().tolist():
            rows = (counts_B == count).nonzero()[:, 0]
            if not 0 < count < hidden_BN.shape[1]:
                continue
            order_RN = hidden_BN[rows].long().argsort(dim=1, stable=True)
            see_RK, hide_RM = order_RN[:, :-count], order_RN[:, -count:]
            hidden = HiddenPatches(image_BCThw[rows], patch, grid, see_RK, hide_RM)
            guess_RMd = self.guess(image_BCThw[rows], see_RK, hide_RM)
            filled[rows] = hidden.reconstruction(guess_RMd).guess_BChw.to(filled)
        return filled.where(~valid_BCThw, image_BCThw)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """With `clear` in the batch, logs val/gap_mse, val/gap_mse_interpolated and val/gap_mse_mean: mean squared
        errors over all that is not valid.

        Raises: UserError for `clear` of another shape than the series, and for days that are not [B T] in their order.
        """
        if "clear" not in batch:
            return
        image_BCThw = image_of(batch, "Prithvi")
        gaps_BCThw, clear_BCThw = ~valid_of(batch, image_BCThw, "Prithvi"), batch["clear"]
        if clear_BCThw.shape != image_BCThw.shape:
            raise UserError(
                f"Prithvi compares with clear, the truth under clouds, which is {[*clear_BCThw.shape]} in this batch "
                f"with image {[*image_BCThw.shape]}; let the dataset give both in one shape, or no clear"
            )
        fillings = {
            "": self.fill(batch),
            "_interpolated": between_dates(image_BCThw, ~gaps_BCThw, days_of(batch, image_BCThw)),
            "_mean": image_BCThw,
        }
        errors = {
            f"val/gap_mse{name}": squared_error_at(filled_BCThw, clear_BCThw, gaps_BCThw)
            for name, filled_BCThw in fillings.items()
        }
        # A batch weighs as much as it has gaps, and one without none.
        self.log_dict(errors, batch_size=int(gaps_BCThw.sum()), sync_dist=True)


def days_of(batch: Mapping[str, Any], image_BCThw: Tensor) -> Tensor:
    """`day` of a batch, [B T]. Raises: UserError for one that is absent, of another shape or not in order."""
    day_BT, dates = batch.get("day"), (len(image_BCThw), image_BCThw.shape[2])
    if not isinstance(day_BT, Tensor) or day_BT.shape != dates or bool((day_BT.diff(dim=1) < 0).any()):
        found = day_BT.tolist() if isinstance(day_BT, Tensor) else day_BT
        raise UserError(
            f"Prithvi interpolates between dates by day, numbers {[*dates]} that rise along a series, and this batch "
            f"has {found}; let the dataset give the dates in their order, with their days, or no clear"
        )
    return day_BT
