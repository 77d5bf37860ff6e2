"""Codes of patches: what a patch shows, as one of a few numbers, for methods that predict such codes.

Shapes: B images, T patches, N patches of all images, d numbers of a patch, V codes.
"""

import math
from typing import Any

import numpy as np
import torch
from sklearn.cluster import KMeans
from torch import Tensor, nn

from lightspan.core.devices import has_values, wide
from lightspan.core.distributed import broadcast_first_rank, gather_rows, register_replicated, world_size
from lightspan.core.errors import UserError
from lightspan.core.ranges import require_in
from lightspan.nn.sequences.patches import patchify


class PatchCodes(nn.Module):
    """The nearest of V centres of each patch: [B C h w] -> int64 [B T].

    Centres are those of k-means over the patches of the first batch, of all ranks, and are kept from then on; they are
    part of the state. They take the place of a trained tokenizer of images, whose weights are not always at hand. Where
    the batch has fewer patches than there are codes, the last codes are copies of the first ones, and are never given.

    Args:
        codes: V, at least 2.
        patch: sides of a patch in pixels, one for each axis.
        channels: of the images. None leaves these to the method, which calls `set_patch_shape`.
        seed: of the first centres.
    """

    centres_Vd: Tensor
    known: Tensor

    def __init__(
        self, codes: int, patch: tuple[int, ...] | None = None, channels: int | None = None, seed: int = 0
    ) -> None:
        super().__init__()
        require_in("[2, inf)", codes=codes)
        require_in("[1, inf)", patch=patch, channels=channels)
        require_in("[0, inf)", seed=seed)
        self.codes, self.patch, self.channels, self.seed = codes, patch and tuple(patch), channels, seed
        register_replicated(self, "centres_Vd", torch.zeros(codes, 0))
        register_replicated(self, "known", torch.zeros((), dtype=torch.bool))
        self._asked = False  # whether the state has been read since it may have been loaded
        if patch is not None and channels is not None:
            self.set_patch_shape((*patch, channels))

    def set_patch_shape(self, patch_shape: tuple[int, ...]) -> None:
        """Takes the sides and channels of a backbone's patches where they were left open.

        Raises: UserError for others than were given: there would not be one code for each patch of the backbone.
        """
        *patch, channels = patch_shape
        if self.patch not in (None, tuple(patch)) or self.channels not in (None, channels):
            raise UserError(
                f"PatchCodes are made for patches of sides and channels {[*(self.patch or ()), self.channels]}, and "
                f"those of the backbone have {[*patch_shape]}; leave patch and channels out"
            )
        self.patch, self.channels = tuple(patch), channels
        if not self.centres_Vd.shape[1]:  # what was learned stays
            self.centres_Vd = self.centres_Vd.new_zeros(self.codes, math.prod(patch_shape))

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._asked = False

    @torch.no_grad()
    def forward(self, image_BChw: Tensor) -> Tensor:
        """Raises: UserError for images of other channels, and before the shape of a patch is settled."""
        if self.patch is None or not self.centres_Vd.shape[1]:
            raise UserError("PatchCodes do not know the shape of a patch; set patch and channels")
        patches_BTd = wide(patchify(image_BChw, self.patch))
        if patches_BTd.shape[2] != self.centres_Vd.shape[1]:
            raise UserError(
                f"PatchCodes were made for patches of {self.centres_Vd.shape[1]} numbers, and these have "
                f"{patches_BTd.shape[2]}; correct patch or channels"
            )
        if not self._asked and has_values(image_BChw):  # the device is asked once, and not in each step
            if not bool(self.known):
                self._learn(patches_BTd)
            self._asked = bool(self.known)
        # |t - c|^2 without |t|^2, which is the same for all centres.
        centres_Vd = self.centres_Vd.to(patches_BTd.dtype)
        return (centres_Vd.square().sum(dim=1) - 2 * patches_BTd @ centres_Vd.T).argmin(dim=2)

    def patches_of(self, codes_BT: Tensor) -> Tensor:
        """What codes stand for, the pixels of their centres: [B T] -> [B T d]. Zeros before the first batch."""
        return self.centres_Vd[codes_BT]

    @torch.compiler.disable  # scikit-learn's k-means is no part of a graph
    def _learn(self, patches_BTd: Tensor) -> None:
        rows_Nd = gather_rows(patches_BTd.flatten(0, 1))[0].cpu().numpy()
        if not len(rows_Nd):
            return  # no rank has an image: the next batch tells
        means = KMeans(min(self.codes, len(rows_Nd)), n_init=1, random_state=self.seed).fit(rows_Nd)
        self.centres_Vd.copy_(torch.from_numpy(np.resize(means.cluster_centers_, self.centres_Vd.shape)))
        if world_size() > 1:  # sums in another order may move a last digit
            broadcast_first_rank([self.centres_Vd])
        self.known.fill_(True)
