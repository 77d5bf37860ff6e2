"""NeRF-MAE: hidden blocks of radiance fields, as grids of colour and opacity, are guessed by a Swin transformer.

Source: Irshad et al., "NeRF-MAE", ECCV 2024, arXiv 2404.01300, and the authors' code. A scene is a grid of (r, g, b,
alpha), padded to a cube. Its patches get fixed positions; blocks of 4^3 patches are hidden, three quarters of them, by
a learned token that takes the place of a patch and its position. The encoder sees the whole grid, as windows need it,
and a UNETR decoder guesses all voxels from the maps of all stages. With M the hidden voxels inside of the scene and A
those with alpha > 0.01, hidden or not,
L = 1 / |A| sum over A of ||c - c'||^2 + 1 / |M| sum over M of (alpha - sigmoid(a'))^2.
Colour has no activation, and squared distances of the three channels are summed, not averaged, as in the code.
Differences: each sample has a mask of its own, where the code has one for a batch, and exactly the share of blocks that
its sampler says; the encoder's coarsest map has a norm; its decoder's convolutions have no biases ahead of norms.
Not here: the pyramid and the box heads of fine-tuning. `lightspan.backbones.dense.DecodedMaps` puts a decoder behind
the encoder for voxels; `lightspan.nn.voxel_fields` makes grids of posed views.
Shapes: B samples, D H W voxels, grid of patches, w width of a patch.
"""

from typing import Any

import torch
from torch import Tensor, nn

from lightspan.backbones.grid_swin import GridSwin
from lightspan.core.devices import wide
from lightspan.core.errors import UserError
from lightspan.datamodules.volume.batch import VolumeBatch
from lightspan.nn.decoders.unetr_decoder import UNETRDecoder, require_maps
from lightspan.nn.image_numbers import image_numbers, index_in
from lightspan.nn.masking.hidden_patches import Reconstruction
from lightspan.nn.masking.mask_samplers import CoarseMasks, MaskSampler
from lightspan.nn.sequences.patches import cells_to_pixels
from lightspan.nn.valid_pixels import inside_of
from lightspan.nn.views import image_of
from lightspan.objectives.means import known_mean, squared_error_at
from lightspan.training.method import Method

FILLED = 0.01
"""A voxel with a larger alpha has a colour."""
CHANNELS = 4


def radiance_losses(guess_B4: Tensor, grid_B4: Tensor, hidden_B: Tensor, inside_B: Tensor) -> tuple[Tensor, Tensor]:
    """(of colours, of alpha): scalars in float32 or wider, over the voxels of all ranks; 0 without any.

    The first is the mean of ||c - c'||^2 over voxels inside with alpha > `FILLED`, in [0, 3] for guesses in [0, 1]; the
    second the mean of (alpha - sigmoid(a'))^2 over hidden voxels inside.

    Args:
        guess_B4: [B 4 D H W], alpha before its sigmoid.
        grid_B4: [B 4 D H W] in [0, 1].
        hidden_B, inside_B: bool [B D H W].
    """
    filled_B = inside_B & (grid_B4[:, 3] > FILLED)
    colour_B = (wide(guess_B4[:, :3]) - wide(grid_B4[:, :3])).square().sum(dim=1)
    alpha = squared_error_at(wide(guess_B4[:, 3]).sigmoid(), grid_B4[:, 3], inside_B & hidden_B)
    return known_mean(colour_B, filled_B), alpha


class NeRFMAE(Method):
    """Trains an encoder and a decoder to guess what hidden blocks of radiance fields hold; the encoder is kept.

    Batches are `VolumeBatch` with channels red, green, blue and alpha, or have one view; without `inside` nothing pads
    a scene.

    Args:
        backbone: reads four channels; what probes read.
        decoder: of the backbone's maps, with four channels.
        masks: hides patches of each sample; None hides three quarters of its blocks of 4^3.
        optimization: `optimizer`, `lr_scheduler` and `groups`, see `Method`.
    """

    def __init__(
        self, backbone: GridSwin, decoder: UNETRDecoder, masks: MaskSampler | None = None, **optimization: Any
    ) -> None:
        super().__init__(**optimization)
        require_maps(backbone, decoder)
        if len(backbone.patch) != 3 or backbone.in_chans != CHANNELS or decoder.out_chans != CHANNELS:
            raise UserError(
                f"NeRFMAE: backbone.in_chans={backbone.in_chans} and decoder.out_chans={decoder.out_chans} must be "
                f"{CHANNELS}, red, green, blue and alpha, and backbone.patch={[*backbone.patch]} have three sides"
            )
        self.backbone, self.decoder, self.masks = backbone, decoder, masks or CoarseMasks()
        self.mask_token = nn.Parameter(torch.randn(backbone.widths[0]) * 0.02)

    def hidden(self, volume_B4: Tensor, index_B: Tensor, step: int) -> Tensor:
        """Which patches a step hides, bool [B grid...].

        Args:
            index_B: the samples' numbers in their dataset.
        """
        patches = zip(volume_B4.shape[2:], self.backbone.patch, strict=True)
        grid = tuple(-(-side // patch) for side, patch in patches)
        return torch.from_numpy(self.masks.draw(grid, step, image_numbers(index_B))).to(volume_B4.device)

    def voxels(self, hidden_B: Tensor, volume_B4: Tensor) -> Tensor:
        """Of hidden patches [B grid...] their voxels, bool [B D H W]."""
        depth, height, width = volume_B4.shape[2:]
        return cells_to_pixels(hidden_B, self.backbone.patch)[:, :depth, :height, :width]

    def guess(self, volume_B4: Tensor, hidden_B: Tensor) -> Tensor:
        """[B 4 D H W], alpha before its sigmoid, from the patches that are not hidden."""
        patches_Bw = self.backbone.patches(volume_B4)
        patches_Bw = patches_Bw.where(~hidden_B[..., None], self.mask_token.to(patches_Bw.dtype))
        return self.decoder(self.backbone.stage_maps(patches_Bw), volume_B4.shape[2:])

    def losses(self, batch: Any, step: int) -> tuple[Tensor, Tensor]:
        """`radiance_losses` with the masks of a step. Raises: UserError for a batch of other channels or axes."""
        volume_B4 = image_of(batch, "NeRFMAE")
        if volume_B4.ndim != 5 or volume_B4.shape[1] != CHANNELS:
            raise UserError(
                f"NeRFMAE needs grids of red, green, blue and alpha, [B, {CHANNELS}, D, H, W], and this batch gives "
                f"{[*volume_B4.shape]}; take data such as lightspan.datamodules.volume.rooms.DrawnRooms or "
                "lightspan.datamodules.volume.radiance.RadianceFolder"
            )
        hidden_B = self.hidden(volume_B4, index_in(batch, self), step)
        guess_B4 = self.guess(volume_B4, hidden_B)
        inside_B = inside_of(batch, volume_B4, "NeRFMAE")
        return radiance_losses(guess_B4, volume_B4, self.voxels(hidden_B, volume_B4), inside_B)

    def reconstruct(self, batch: VolumeBatch) -> Reconstruction:
        """See `lightspan.nn.masking.hidden_patches`: colours in front of black, as opaque as voxels are."""
        volume_B4 = image_of(batch, "NeRFMAE")
        hidden_B = self.hidden(volume_B4, index_in(batch, self), self.global_step)
        guess_B4, voxels_B1 = self.guess(volume_B4, hidden_B), self.voxels(hidden_B, volume_B4)[:, None]
        shown_B3, guess_B3 = volume_B4[:, :3] * volume_B4[:, 3:], guess_B4[:, :3] * guess_B4[:, 3:].sigmoid()
        return Reconstruction(shown_B3, voxels_B1, guess_B3.to(shown_B3.dtype).where(voxels_B1, shown_B3))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        colour, alpha = self.losses(batch, self.global_step)
        loss = colour + alpha
        self.log_training({"train/loss": loss, "train/colour_error": colour, "train/alpha_mse": alpha})
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Logs val/colour_error and val/alpha_mse, with the masks of step 0 in every epoch."""
        colour, alpha = self.losses(batch, 0)
        figures = {"val/colour_error": colour, "val/alpha_mse": alpha}
        self.log_dict(figures, batch_size=len(batch["index"]), sync_dist=True)
