"""Selfie: from a summary of the visible patches of an image, tell which of its hidden patches belongs where.

Source: Trinh, Luong, Le, "Selfie: Self-supervised Pretraining for Image Embedding", 2019, arXiv 1906.02940; there is no
official code. The backbone P encodes each patch alone; attention pools the visible ones, each with its position, to one
vector u; at each hidden place j, v_j = u + e_j is compared with all hidden patches h_k, which have no position:
L = mean over j of -log softmax_k(v_j . h_k)[k = j]. Candidates are patches of the same image, so that its colours tell
nothing.
P is the first part of a network (in the paper three of the four stages of a ResNet-50), and is kept: it starts that
network, which sees whole images from then on. Patches without content, such as empty corners, cannot be told apart: the
loss has a floor above 0 and the accuracy one below 1.
Left out: noise patches in the places of hidden ones. Chosen, as the paper does not say or could not be looked up: dot
products are not divided (a temperature of 1), gradients go into the candidates too, norms of P see all patches of a
batch.
Shapes: B images of this rank, C h w image, H W grid of T patches, K visible and M hidden ones, D width.
"""

from typing import Any

import torch
from torch import Tensor, nn

from lightspan.core.devices import wide
from lightspan.core.errors import UserError
from lightspan.core.ranges import require_temperatures
from lightspan.nn.heads.attention_pool import SummaryTransformer
from lightspan.nn.image_numbers import image_numbers, index_in
from lightspan.nn.masking.mask_samplers import MaskSampler, RandomMasks, seen_and_hidden
from lightspan.nn.sequences.patches import at_places, patch_images
from lightspan.nn.sequences.positions import SummedPositions
from lightspan.nn.views import views_of
from lightspan.nn.widths import require_width
from lightspan.objectives.classes import share_right
from lightspan.objectives.info_nce import soft_info_nce
from lightspan.training.method import Method


class Selfie(Method):
    """Trains a patch encoder by a cloze test within each image. The backbone is what is kept.

    Where one patch or none of an image is hidden there is nothing to choose from: the loss is 0, and no weight moves
    but by its decay.

    Args:
        backbone: P, images of any size [N C p q] -> [N D]; what probes read, of whole images.
        summary: [B K D] -> [B D], whatever the order of the visible patches.
        grid: H and W, or as many numbers as samples have axes; their sides are multiples of them.
        masks: hides equally many patches of each image; None hides a quarter of them.
        temperature: > 0; dot products are divided by it.
        optimization: `optimizer`, `lr_scheduler` and `groups`, see `Method`.
    """

    keeps_apart = "the other hidden patches differ, and temperature fits"

    def __init__(
        self,
        backbone: nn.Module,
        summary: SummaryTransformer,
        grid: tuple[int, ...] = (7, 7),
        masks: MaskSampler | None = None,
        temperature: float = 1.0,
        **optimization: Any,
    ) -> None:
        super().__init__(**optimization)
        require_temperatures(temperature=temperature)
        require_width(backbone, "summary.width", summary.in_features)
        self.backbone, self.summary, self.grid = backbone, summary, tuple(map(int, grid))
        self.positions = SummedPositions(self.grid, summary.in_features)
        self.masks, self.temperature = masks or RandomMasks(0.25), temperature

    def patches(self, image_BChw: Tensor) -> Tensor:
        """What P says of each patch by itself, [B T D]. Raises: UserError for sides that the grid does not divide."""
        sides = image_BChw.shape[2:]
        if len(sides) != len(self.grid) or any(s % n or not s for s, n in zip(sides, self.grid, strict=True)):
            raise UserError(
                f"images of {' x '.join(map(str, sides))} pixels cannot be cut into grid={list(self.grid)} equal "
                "patches; set grid to divisors of all sides"
            )
        patches_BTCpq = patch_images(image_BChw, [side // count for side, count in zip(sides, self.grid, strict=True)])
        return self.backbone(patches_BTCpq.flatten(0, 1)).unflatten(0, patches_BTCpq.shape[:2])

    def logits(self, patches_BTD: Tensor, see_BK: Tensor, hide_BM: Tensor) -> Tensor:
        """v_j . h_k over the temperature, [B M M]: how well patch k fits place j; float32 or wider."""
        position_TD = self.positions()
        u_BD = self.summary(at_places(patches_BTD, see_BK) + position_TD[see_BK])
        v_BMD, h_BMD = u_BD[:, None] + position_TD[hide_BM], at_places(patches_BTD, hide_BM)
        with torch.autocast(v_BMD.device.type, enabled=False):
            return wide(v_BMD) @ wide(h_BMD).transpose(1, 2) / self.temperature

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        (image_BChw,) = views_of(batch, "Selfie", 1)
        masks_BHW = self.masks.draw(self.grid, self.global_step, image_numbers(index_in(batch, self)))
        see_BK, hide_BM = seen_and_hidden(masks_BHW, image_BChw.device)
        logits_RM = self.logits(self.patches(image_BChw), see_BK, hide_BM).flatten(0, 1)  # R = B M places
        own_R = torch.arange(hide_BM.shape[1], device=hide_BM.device).repeat(len(hide_BM))
        loss = soft_info_nce(logits_RM, own_R[:, None] == torch.arange(hide_BM.shape[1], device=own_R.device))
        figures = {"train/loss": loss}
        if hide_BM.shape[1]:
            figures["train/accuracy"] = share_right(logits_RM, own_R)
        self.log_training(figures)
        return loss
