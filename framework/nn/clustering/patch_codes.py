"""Codes of patches: what a patch shows, as one of a few numbers, for methods that predict such codes.

Shapes: B images, T patches, N patches of all images, d numbers of a patch, V codes.
"""

from typing import Any

import numpy as np
import torch
from sklearn.cluster import KMeans
from torch import Tensor, nn

from lightspan.devices import has_values, wide
from lightspan.distributed import copy_of_first_rank, gather_rows, register_replicated, world_size
from lightspan.errors import UserError
from lightspan.nn.sequences.patches import patchify


class PatchCodes(nn.Module):
    """The nearest of V centres of each patch: [B C h w] -> int64 [B T].

    Centres are those of k-means over the patches of the first batch, of all ranks, and are kept from then on; they are
    part of the state. They take the place of a trained tokenizer of images, whose weights are not always at hand. Where
    the batch has fewer patches than there are codes, the last codes are copies of the first ones, and are never given.

    Args:
        codes: V, at least 2.
        patch: sides of a patch in pixels.
        channels: of the images.
        seed: of the first centres.
    """

    centres_Vd: Tensor
    known: Tensor

    def __init__(self, codes: int, patch: tuple[int, int], channels: int = 3, seed: int = 0) -> None:
        super().__init__()
        if codes < 2 or min(patch) < 1 or channels < 1 or seed < 0:
            raise UserError(
                f"PatchCodes: codes={codes} must be at least 2, patch={list(patch)} and channels={channels} above 0, "
                f"and seed={seed} at least 0"
            )
        self.codes, self.patch, self.seed = codes, tuple(patch), seed
        register_replicated(self, "centres_Vd", torch.zeros(codes, patch[0] * patch[1] * channels))
        register_replicated(self, "known", torch.zeros((), dtype=torch.bool))
        self._asked = False  # whether the state has been read since it may have been loaded

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._asked = False

    @torch.no_grad()
    def forward(self, image_BChw: Tensor) -> Tensor:
        """Raises: UserError for images of other channels."""
        patches_BTd = wide(patchify(image_BChw, self.patch))
        if patches_BTd.shape[2] != self.centres_Vd.shape[1]:
            raise UserError(
                f"PatchCodes were made for patches of {self.centres_Vd.shape[1]} numbers, and these have "
                f"{patches_BTd.shape[2]}; correct patch or channels"
            )
        if not self._asked and has_values(image_BChw):  # the device is asked once, and not in each step
            if not bool(self.known):
                self._learn(patches_BTd)
            self._asked = True
        # |t - c|^2 without |t|^2, which is the same for all centres.
        centres_Vd = self.centres_Vd.to(patches_BTd.dtype)
        return (centres_Vd.square().sum(dim=1) - 2 * patches_BTd @ centres_Vd.T).argmin(dim=2)

    def _learn(self, patches_BTd: Tensor) -> None:
        rows_Nd = gather_rows(patches_BTd.flatten(0, 1))[0].cpu().numpy()
        means = KMeans(min(self.codes, len(rows_Nd)), n_init=1, random_state=self.seed).fit(rows_Nd)
        self.centres_Vd.copy_(torch.from_numpy(np.resize(means.cluster_centers_, self.centres_Vd.shape)))
        if world_size() > 1:  # sums in another order may move a last digit
            copy_of_first_rank([self.centres_Vd])
        self.known.fill_(True)
