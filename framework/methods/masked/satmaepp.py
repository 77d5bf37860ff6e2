"""SatMAE++: a masked autoencoder of pictures with groups of bands, whose guess must also grow to the finer scene.

Source: Noman et al., "Rethinking Transformers Pre-training for Multi-Spectral Satellite Imagery", 2024, arXiv
2403.05419, and the authors' code; groups of bands are those of Cong et al., "SatMAE", 2022, arXiv 2207.08051. The
encoder sees x, the picture of a batch reduced 2^steps times, and of that a quarter of the tokens, one for each patch
and group. A decoder guesses all tokens, and an upsampler grows the guessed picture to the larger ones:
- L_base: mean over hidden tokens of their mean squared error, of pixels as they are;
- L_ms: mean over the scales of mean |grown - picture|, over seen and hidden places alike;
- L = base L_base + multi_scale L_ms, 0.6 and 0.4 of pixels that are clipped to four deviations and scaled to [0, 1].
  Of standardised pixels, which are four times as large, L_base is 16 and L_ms 4 times as large, so that 0.6 and 1.6
  weigh them alike.
Decoder and upsampler are thrown away.
Masks: `RandomMasks` draws tokens of all groups from one urn, so that each group is hidden by itself, as in the code;
`TubeMasks` hides the same places in all groups.
Differences: guesses and targets have one order of bands, where the code compares guesses in the order of the groups
with targets in their own; scales are means over squares, where the code's bilinear reduction reads every other pixel;
bands are standardised, where the code clips them to 8 bits; pixels that are not valid add nothing to either loss.
Assumed: an upsampler that keeps four features for each band throughout.
Shapes: B pictures, C bands, h w those of the encoder, S = 2^steps, G groups, H W grid, L = H W, K seen and M hidden
tokens.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightspan.backbones.placed_vit import GroupedViT
from lightspan.core.errors import UserError
from lightspan.core.ranges import require_weights
from lightspan.datamodules.multispectral.batch import MultispectralBatch
from lightspan.nn.decoders.grouped_mask_decoder import GroupedMaskDecoder
from lightspan.nn.decoders.upsampler import UpsamplerPyramid
from lightspan.nn.image_numbers import image_numbers, index_in
from lightspan.nn.masking.hidden_patches import Reconstruction
from lightspan.nn.masking.mask_samplers import MaskSampler, RandomMasks, seen_and_hidden
from lightspan.nn.sequences.patches import patchify, unpatchify
from lightspan.nn.valid_pixels import area_reduced, valid_of
from lightspan.nn.views import image_of
from lightspan.nn.widths import require_width
from lightspan.objectives.masked import seen_absolute_error, seen_group_regression
from lightspan.objectives.means import squared_error_at, weighted_sum
from lightspan.training.method import Method


class SatMAEpp(Method):
    """Trains an encoder on groups of bands; the encoder is kept, and sees pictures reduced as in training.

    Batches are `MultispectralBatch`; of other pictures all pixels are valid. A picture without a valid pixel has a loss
    of zero.

    Args:
        backbone: gives tokens for each group.
        decoder: guesses all tokens.
        upsampler: grows the guesses; None trains at the encoder's scale alone, as SatMAE.
        steps: halvings between the pictures of a batch and what the encoder sees, at least 0: 2, or 1 for RGB, is the
            source's. That of the upsampler, if there is one.
        masks: hides equally many tokens of each picture, on a grid (G, H, W); None is three quarters at random.
        base, multi_scale: weights of the losses, each >= 0; the source's are for pixels in [0, 1], see above.
        optimization: `optimizer`, `lr_scheduler` and `groups`, see `Method`.
    """

    def __init__(
        self,
        backbone: GroupedViT,
        decoder: GroupedMaskDecoder,
        upsampler: UpsamplerPyramid | None = None,
        steps: int = 2,
        masks: MaskSampler | None = None,
        base: float = 0.6,
        multi_scale: float = 0.4,
        **optimization: Any,
    ) -> None:
        super().__init__(**optimization)
        require_weights(base=base, multi_scale=multi_scale)
        require_width(backbone, "decoder.in_features", decoder.in_features)
        if steps < 0 or (upsampler is not None and (upsampler.steps, upsampler.channels) != (steps, backbone.in_chans)):
            found = "no upsampler" if upsampler is None else f"one for {upsampler.channels} bands and {upsampler.steps}"
            raise UserError(
                f"SatMAEpp steps={steps} must be at least 0 and that of the upsampler, which is for the bands of the "
                f"backbone, {backbone.in_chans}; this is {found}"
            )
        self.patch = backbone.patch_shape[:2]
        decoder.build([self.patch[0] * self.patch[1] * len(group) for group in backbone.groups])
        self.backbone, self.decoder, self.upsampler = backbone, decoder, upsampler
        self.steps, self.masks = steps, masks or RandomMasks(0.75)
        self.weights = {"base": base, "multi_scale": multi_scale if upsampler is not None else 0.0}

    def scales(self, batch: Any) -> list[tuple[Tensor, Tensor]]:
        """Pictures of a batch and which of their pixels are valid, from the encoder's scale to the batch's own."""
        image_BChw = image_of(batch, "SatMAEpp")
        self.backbone.grid(image_BChw)  # which refuses what cannot be reduced, such as a series
        valid_BChw = valid_of(batch, image_BChw, "SatMAEpp")
        return [area_reduced(image_BChw, valid_BChw, 2**step) for step in range(self.steps, -1, -1)]

    def features(self, batch: Any) -> Tensor:
        return self.backbone(self.scales(batch)[0][0])

    def guess(self, image_BChw: Tensor, see_BK: Tensor, hide_BM: Tensor) -> list[Tensor]:
        """What all tokens may show, of each group [B L n], from the seen ones."""
        seen_BSD = self.backbone.tokens(image_BChw, keep_BK=see_BK)
        return self.decoder(seen_BSD, see_BK, hide_BM, self.backbone.grid(image_BChw))

    def picture(self, guesses: list[Tensor], grid: tuple[int, ...]) -> Tensor:
        """Guesses as one picture, [B C h w], with each band in its place."""
        parts = [unpatchify(guess_BLn, self.patch, grid[1:]) for guess_BLn in guesses]
        bands = torch.tensor([band for group in self.backbone.groups for band in group], device=parts[0].device)
        return torch.cat(parts, dim=1)[:, bands.argsort()]

    def grown(self, image_BChw: Tensor) -> list[Tensor]:
        """The picture at each scale above the encoder's, guessed with nothing hidden: [B C 2h 2w] and so on.

        Raises: UserError without an upsampler.
        """
        if self.upsampler is None:
            raise UserError("SatMAEpp grows pictures by its upsampler, and this one was made without")
        grid = self.backbone.grid(image_BChw)
        everything = torch.arange(math.prod(grid), device=image_BChw.device).expand(len(image_BChw), -1)
        return self.upsampler(self.picture(self.guess(image_BChw, everything, everything[:, :0]), grid))

    def hidden(self, image_BChw: Tensor, index_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Places of seen and of hidden tokens, [B K] and [B M], and which are hidden, bool [B G L]."""
        masks_BGHW = self.masks.draw(self.backbone.grid(image_BChw), self.global_step, image_numbers(index_B))
        see_BK, hide_BM = seen_and_hidden(masks_BGHW, image_BChw.device)
        return see_BK, hide_BM, torch.from_numpy(masks_BGHW).flatten(2).to(image_BChw.device)

    def patches(self, image_BChw: Tensor) -> list[Tensor]:
        """What tokens show, of each group [B L n]."""
        return [patchify(image_BChw[:, list(group)], self.patch) for group in self.backbone.groups]

    def reconstruct(self, batch: MultispectralBatch) -> Reconstruction:
        """See `lightspan.nn.masking.hidden_patches`, at the encoder's scale."""
        image_BChw = self.scales(batch)[0][0]
        grid, (see_BK, hide_BM, hidden_BGL) = (
            self.backbone.grid(image_BChw),
            self.hidden(image_BChw, index_in(batch, self)),
        )
        guess_BChw = self.picture(self.guess(image_BChw, see_BK, hide_BM), grid).to(image_BChw)
        pixels = [
            hidden_BL[..., None].expand(-1, -1, self.patch[0] * self.patch[1] * len(group))
            for hidden_BL, group in zip(hidden_BGL.unbind(1), self.backbone.groups, strict=True)
        ]
        hidden_BChw = self.picture(pixels, grid)
        return Reconstruction(image_BChw, hidden_BChw, guess_BChw.where(hidden_BChw, image_BChw))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        (image_BChw, valid_BChw), *larger = self.scales(batch)
        see_BK, hide_BM, hidden_BGL = self.hidden(image_BChw, index_in(batch, self))
        guesses = self.guess(image_BChw, see_BK, hide_BM)
        figures = {
            "base": seen_group_regression(guesses, self.patches(image_BChw), self.patches(valid_BChw), hidden_BGL)
        }
        if self.upsampler is not None:
            grown = self.upsampler(self.picture(guesses, self.backbone.grid(image_BChw)))
            errors = [seen_absolute_error(made, *scale) for made, scale in zip(grown, larger, strict=True)]
            figures["multi_scale"] = torch.stack(errors).mean()
        loss = weighted_sum(figures, self.weights)
        self.log_training({"train/loss": loss} | {f"train/{name}": figure for name, figure in figures.items()})
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Logs val/grown_mse of the finest picture, guessed with nothing hidden, and that of bilinear enlargement, over
        valid pixels.
        """
        if self.upsampler is None:
            return
        (image_BChw, _), *_, (finest, valid) = self.scales(batch)
        made = {
            "grown": self.grown(image_BChw)[-1],
            "bilinear": F.interpolate(image_BChw, finest.shape[2:], mode="bilinear"),
        }
        figures = {f"val/{name}_mse": squared_error_at(guess, finest, valid) for name, guess in made.items()}
        # A batch weighs as much as it has valid pixels, and one without none.
        self.log_dict(figures, batch_size=int(valid.sum()), sync_dist=True)
