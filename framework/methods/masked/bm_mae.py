"""BM-MAE: a masked autoencoder of registered volumes, of which any may be missing.

Source: "Multimodal Masked Autoencoder Pre-training for 3D MRI-Based Brain Tumor Analysis with Missing Modalities",
2025, arXiv 2505.00568, and its code. Each modality is cut into patches with a linear map of its own; the encoder sees a
quarter of the tokens, which modalities share by a draw from a Dirichlet distribution, and a decoder guesses the voxels
of the others. With H_m the hidden patches of modality m in a batch and n the numbers of a patch:
L = sum over m of 1 / |H_m| sum over H_m of 1 / n ||guess - t||^2,
of voxels as they are: each modality weighs the same, however much of it is hidden.
The encoder takes a bag of tokens, so that the same weights serve any subset of modalities: `features` of those that a
sample has, and `synthesise` for the others.
Differences: a modality that a sample lacks (`present`) is neither seen nor guessed in training, where the code has all;
masks are functions of seed, step and sample, and a draw that gives a modality more than it has is always repeated,
where the code's test passes over the first sample of a batch; modalities keep the order of the data's channels; norms
add 1e-6, as MAE's, where the code has 1e-5.
Not here: the UNETR decoder and the survival head of fine-tuning; `lightspan.backbones.placed_vit.ModalityViT.at_places`
gives what they read.
Shapes: B samples, M modalities, D H W voxels, K seen and A hidden patches, n numbers of a patch.
"""

import math
from typing import Any

import torch
from torch import Tensor

from lightspan.backbones.placed_vit import ModalityViT
from lightspan.core.errors import UserError
from lightspan.datamodules.volume.batch import VolumeBatch
from lightspan.nn.decoders.modality_decoder import ModalityDecoder
from lightspan.nn.image_numbers import image_numbers, index_in
from lightspan.nn.masking.hidden_patches import HiddenPatches, Reconstruction
from lightspan.nn.masking.mask_samplers import DirichletMasks, MaskSampler, seen_and_hidden
from lightspan.nn.sequences.patches import unpatchify
from lightspan.nn.valid_pixels import present_of
from lightspan.nn.views import image_of
from lightspan.nn.widths import require_width
from lightspan.objectives.masked import regression_by_modality
from lightspan.objectives.means import squared_error_at
from lightspan.training.method import Method


class BMMAE(Method):
    """Trains an encoder and a decoder to guess hidden patches of several modalities; the encoder is kept, or both to
    synthesise what is missing.

    Batches are `VolumeBatch`, or have one view; without `present` all modalities are there. A sample without any adds
    nothing.

    Args:
        backbone: gives tokens for each modality.
        decoder: guesses all tokens, on places with as many axes.
        masks: hides equally many tokens of each sample, on a grid (M, ...); None is `DirichletMasks`.
        optimization: `optimizer`, `lr_scheduler` and `groups`, see `Method`.
    """

    def __init__(
        self, backbone: ModalityViT, decoder: ModalityDecoder, masks: MaskSampler | None = None, **optimization: Any
    ) -> None:
        super().__init__(**optimization)
        require_width(backbone, "decoder.in_features", decoder.in_features)
        if decoder.axes != len(backbone.patch):
            raise UserError(f"decoder.axes={decoder.axes} must be {len(backbone.patch)}, as many as backbone.patch has")
        decoder.build(backbone.in_chans, math.prod(backbone.patch))
        self.backbone, self.decoder, self.masks = backbone, decoder, masks or DirichletMasks()

    def read(self, batch: Any) -> tuple[Tensor, Tensor | None]:
        """Volumes of a batch [B M D H W], and the modalities that samples have, bool [B M]; None if all."""
        volume_BMDHW = image_of(batch, "BMMAE")
        return volume_BMDHW, present_of(batch, volume_BMDHW, "BMMAE")

    def features(self, batch: Any) -> Tensor:
        return self.backbone(*self.read(batch))

    def hidden(self, volume_BMDHW: Tensor, index_B: Tensor) -> HiddenPatches:
        """Of volumes as samples of one channel [B 1 M D H W], whose first axis is the modality."""
        grid = self.backbone.grid(volume_BMDHW)
        masks_BMDHW = self.masks.draw(grid, self.global_step, image_numbers(index_B))
        places = seen_and_hidden(masks_BMDHW, volume_BMDHW.device)
        return HiddenPatches(volume_BMDHW[:, None], (1, *self.backbone.patch), grid, *places)

    def guess(self, volume_BMDHW: Tensor, see_BK: Tensor, hide_BA: Tensor, present_BM: Tensor | None = None) -> Tensor:
        """What the seen and then the hidden patches may show, [B K+A n], from the seen ones of modalities that there
        are.
        """
        grid = self.backbone.grid(volume_BMDHW)
        seen_BSD = self.backbone.tokens(volume_BMDHW, keep_BK=see_BK, present_BM=present_BM)
        known_BK = None if present_BM is None else self.backbone.known(present_BM, grid, see_BK)
        return self.decoder(seen_BSD, see_BK, hide_BA, grid, known_BK)

    @torch.no_grad()
    def synthesise(self, volume_BMDHW: Tensor, present_BM: Tensor) -> Tensor:
        """The volumes with what a sample lacks guessed from all that it has, [B M D H W] in their type.

        Args:
            present_BM: bool.
        """
        grid = self.backbone.grid(volume_BMDHW)
        everything_BT = torch.arange(math.prod(grid), device=volume_BMDHW.device).expand(len(volume_BMDHW), -1)
        guess_BTn = self.guess(volume_BMDHW, everything_BT, everything_BT[:, :0], present_BM)
        guess_BMDHW = unpatchify(guess_BTn, (1, *self.backbone.patch), grid)[:, 0].to(volume_BMDHW)
        return volume_BMDHW.where(present_BM[:, :, None, None, None], guess_BMDHW)

    def reconstruct(self, batch: VolumeBatch) -> Reconstruction:
        """See `lightspan.nn.masking.hidden_patches`."""
        volume_BMDHW, present_BM = self.read(batch)
        hidden = self.hidden(volume_BMDHW, index_in(batch, self))
        guess_BTn = self.guess(volume_BMDHW, hidden.see_BK, hidden.hide_BM, present_BM)
        found = hidden.reconstruction(guess_BTn[:, hidden.see_BK.shape[1] :])
        return Reconstruction(*(part[:, 0] for part in found[:3]))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        volume_BMDHW, present_BM = self.read(batch)
        hidden = self.hidden(volume_BMDHW, index_in(batch, self))
        guess_BAn = self.guess(volume_BMDHW, hidden.see_BK, hidden.hide_BM, present_BM)[:, hidden.see_BK.shape[1] :]
        modality_BA = hidden.hide_BM // math.prod(hidden.grid[1:])
        known_BA = torch.ones_like(modality_BA, dtype=torch.bool)
        if present_BM is not None:
            known_BA = self.backbone.known(present_BM, hidden.grid, hidden.hide_BM)
        figures_M = regression_by_modality(guess_BAn, hidden.pixels(), modality_BA, known_BA, self.backbone.in_chans)
        loss = figures_M.sum()
        self.log_training({"train/loss": loss} | {f"train/mse_{m}": mse for m, mse in enumerate(figures_M.unbind())})
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Logs val/missing_mse_M for each modality M: the squared error of its voxels, guessed from all others that a
        sample has.
        """
        volume_BMDHW, present_BM = self.read(batch)
        if present_BM is None:
            present_BM = torch.ones_like(volume_BMDHW[:, :, 0, 0, 0], dtype=torch.bool)
        for modality in range(self.backbone.in_chans if self.backbone.in_chans > 1 else 0):
            others_BM = present_BM.clone()
            others_BM[:, modality] = False
            told_B = present_BM[:, modality] & others_BM.any(dim=1)
            guess, truth = (x[:, modality] for x in (self.synthesise(volume_BMDHW, others_BM), volume_BMDHW))
            at = told_B.view(-1, 1, 1, 1).expand_as(truth)
            # A batch weighs as much as it has samples of whom the modality is known.
            self.log(
                f"val/missing_mse_{modality}", squared_error_at(guess, truth, at), batch_size=int(told_B.sum()),
                sync_dist=True,
            )  # fmt: skip
