"""SparK: a convolutional network that sees some cells of an image, sparsely, learns from guessing the pixels of others.

Source: Tian et al., "Designing BERT for Convolutional Networks: Sparse and Hierarchical Masked Modeling", ICLR 2023,
arXiv 2301.03580, and the authors' code. Any dense network of convolutions runs as a sparse one
(`lightspan.nn.masking.sparse_convs`); maps at four strides are filled with mask tokens and decoded from coarse to fine;
and guesses are compared with hidden cells, each normalised by its own mean and deviation:
L = mean over hidden cells and their numbers of (guess - (t - mean t) / sqrt(var t + 1e-6))^2.
Wolf et al., 2023, arXiv 2308.06534 (SparK-CT) compare it with contrastive methods on slices of computed tomography; see
evidence/test_85_spark_ct.py.
Shapes: B images of this rank, C h w image, H W grid of cells, K active and M hidden ones, d numbers of a cell.
"""

from typing import Any

import torch
from torch import Tensor, nn

from lightspan.core.errors import UserError
from lightspan.datamodules.image.batch import ImageBatch
from lightspan.nn.decoders.unet_decoder import UNetDecoder
from lightspan.nn.image_numbers import image_numbers, index_in
from lightspan.nn.masking.hidden_patches import HiddenPatches, Reconstruction
from lightspan.nn.masking.mask_samplers import MaskSampler, RandomMasks, seen_and_hidden
from lightspan.nn.masking.sparse_convs import ActiveCells, require_sparse, sparse
from lightspan.nn.sequences.patches import at_places, grid_of, patchify
from lightspan.nn.taps import tapped
from lightspan.nn.tokens import feature_modules
from lightspan.nn.views import image_of
from lightspan.objectives.masked import denormalised_patches, patch_regression
from lightspan.training.method import Method


class SparK(Method):
    """Trains a convolutional network and a decoder to guess hidden cells; the network is kept, as a dense one.

    With sync_batchnorm N ranks train as one. Parts of the network behind its last map, which the loss does not read,
    such as a norm of pooled features, are frozen.

    Args:
        backbone: of timm, or one whose `feature_modules` give maps at strides that double (`lightspan.nn.tokens`), made
            of layers that can be sparse; [B C h w] -> [B num_features] is what probes read, dense.
        decoder: of the last maps, the coarsest first; its `cell` is the stride of the coarsest.
        masks: hides equally many cells of each image; None hides 0.6 of them, rounded to the nearest whole number.
            Where none is hidden, as on a grid of one cell, the loss is 0.
        normalise: whether targets are normalised cell by cell; without it they are the pixels.
        optimization: `optimizer`, `lr_scheduler` and `groups`, see `Method`.
    Raises: UserError for a network that cannot be made sparse, or a decoder of other maps.
    """

    def __init__(
        self,
        backbone: nn.Module,
        decoder: UNetDecoder,
        masks: MaskSampler | None = None,
        normalise: bool = True,
        **optimization: Any,
    ) -> None:
        super().__init__(**optimization)
        self.backbone, self.decoder = backbone, decoder
        self.masks, self.normalise = masks or RandomMasks(0.6, nearest=True), normalise
        self._require_fitting_parts()

    def _require_fitting_parts(self) -> None:
        """Looks at the maps of one cell; freezes what the network does not run for them."""
        cell, channels = self.decoder.cell, self.decoder.channels
        modes = [(module, module.training) for module in self.backbone.modules()]
        first, found = next(self.backbone.parameters()), list[Tensor]()
        image_BChw = torch.zeros(1, self.decoder.in_chans, cell, cell, device=first.device, dtype=first.dtype)
        self.backbone.eval()
        with torch.no_grad():
            try:
                unused = require_sparse(self.backbone, lambda: found.extend(self._dense_maps(image_BChw)))
            except (RuntimeError, AssertionError) as error:
                raise UserError(
                    f"{type(self.backbone).__name__} does not see an image of one cell, {cell} x {cell} pixels with "
                    f"{self.decoder.in_chans} channels ({' '.join(str(error).split())[:200]}); set decoder.cell to the "
                    "stride of its last map, and decoder.in_chans to the channels that it takes"
                ) from error
        for module, training in modes:
            module.training = training
        given, sides = [x.shape[1] for x in found], [x.shape[2] for x in found]
        if (given, sides) != (channels, [2**level for level in range(len(channels))]):
            raise UserError(
                f"decoder.channels={channels} and decoder.cell={cell} do not fit {type(self.backbone).__name__}: the "
                f"last {len(found)} of its layers, the coarsest first, have channels {given}, and {sides} positions "
                "along a cell, which should be 1 and double from layer to layer"
            )
        for parameter in (each for module in unused for each in module.parameters(recurse=False)):
            parameter.requires_grad_(False)

    def _dense_maps(self, image_BChw: Tensor) -> list[Tensor]:
        """The last maps of the network as it is, the coarsest first."""
        run: Any = getattr(self.backbone, "forward_features", self.backbone)  # timm's; its head pools whole images
        with tapped(feature_modules(self.backbone)) as maps:
            run(image_BChw)
        return maps[-len(self.decoder.channels) :][::-1]

    def maps(self, image_BChw: Tensor, active: ActiveCells) -> list[Tensor]:
        """What the network says of active cells, and zeros elsewhere: maps [B C h w], the coarsest first."""
        with sparse(self.backbone, active):
            return self._dense_maps(active.alone(image_BChw))

    def hidden(self, image_BChw: Tensor, index_B: Tensor) -> HiddenPatches:
        """The cells that this step hides. Raises: UserError for images that cells do not divide."""
        cell = self.decoder.cell
        height, width = grid_of(image_BChw.shape[2:], (cell, cell))
        masks_BHW = self.masks.draw((height, width), self.global_step, image_numbers(index_B))
        return HiddenPatches(image_BChw, (cell, cell), (height, width), *seen_and_hidden(masks_BHW, image_BChw.device))

    def guess(self, hidden: HiddenPatches) -> Tensor:
        """What the hidden cells may show, [B M d]."""
        active = ActiveCells(hidden.grid, hidden.see_BK)
        guess_BChw = self.decoder(self.maps(hidden.image_BChw, active), active)
        return at_places(patchify(guess_BChw, hidden.patch), hidden.hide_BM)

    def reconstruct(self, batch: ImageBatch) -> Reconstruction:
        """See `lightspan.nn.masking.hidden_patches`. Normalised guesses get the brightness and contrast of what was
        hidden.
        """
        hidden = self.hidden(batch["image"], index_in(batch, self))
        guess_BMd = self.guess(hidden)
        return hidden.reconstruction(denormalised_patches(guess_BMd, hidden.pixels()) if self.normalise else guess_BMd)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        image_BChw = image_of(batch, "SparK")
        hidden = self.hidden(image_BChw, index_in(batch, self))
        loss = patch_regression(self.guess(hidden), hidden.pixels(), self.normalise)
        self.log_training({"train/loss": loss})
        return loss
