"""Pretext tasks: a network guesses what was done to an image, from features that should not lose it.

Source: Gidaris et al., "RotNet", 2018, arXiv 1803.07728 (turns); Noroozi, Favaro, "Jigsaw", 2016, arXiv 1603.09246
(tiles); Kinakh et al., "ScatSimCLR", 2021, arXiv 2108.13939, and its code, for both heads.
Shapes: B images of this rank, C H W image, F features, K classes.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightspan.core.distributed import register_replicated
from lightspan.core.errors import UserError
from lightspan.core.ranges import require_shares
from lightspan.nn.image_numbers import image_numbers


class Guess(NamedTuple):
    """logits [R K] and what they should say, int64 [R]; R is a multiple of B."""

    logits_RK: Tensor
    label_R: Tensor


class PretextTask(nn.Module, ABC):
    """A head, and what it asks of a batch.

    Attributes:
        views: how many views of an image it reads; they follow those of the method.
    """

    views: int

    @abstractmethod
    def forward(
        self, backbone: Callable[[Tensor], Tensor], views: Sequence[Tensor], index_B: Tensor, step: int
    ) -> Guess:
        """Features of what it makes of the views [B C H W], and the guess. What is drawn is a function of (seed, step,
        index of the sample).
        """


class QuarterTurn(PretextTask):
    """Which of four views, turned by 0, 90, 180 and 270 degrees in this order, a view is. Two hidden layers with ReLU
    and dropout. `datamodules.image.variants.turns` makes the views.

    Args:
        in_features: F.
        hidden: widths of the hidden layers.
        dropout: behind both hidden layers, in [0, 1].
    """

    views = 4

    def __init__(self, in_features: int, hidden: tuple[int, int] = (512, 128), dropout: float = 0.5) -> None:
        super().__init__()
        require_shares(dropout=dropout)
        self.in_features = in_features
        first, second = hidden
        self.head = nn.Sequential(
            *(nn.Linear(in_features, first), nn.ReLU(), nn.Dropout(dropout)),
            *(nn.Linear(first, second), nn.ReLU(), nn.Dropout(dropout), nn.Linear(second, self.views)),
        )

    def forward(
        self, backbone: Callable[[Tensor], Tensor], views: Sequence[Tensor], index_B: Tensor, step: int
    ) -> Guess:
        if len({view.shape for view in views}) > 1:
            raise UserError(f"turned views have sizes {[[*view.shape[2:]] for view in views]}, and need one size")
        label_R = torch.arange(self.views, device=views[0].device).repeat_interleave(len(views[0]))
        return Guess(self.head(backbone(torch.cat([*views]))), label_R)


class Jigsaw(PretextTask):
    """By which of a fixed table of permutations the nine tiles of an image were shuffled. Each tile is resized to the
    image's own size and goes through the network by itself; rows and columns that nine tiles leave over are cut off.

    Args:
        in_features: F.
        permutations: K, in [2, 5000].
        tile_features: width of each tile's hidden layer.
        hidden: width of the layer over all nine.
        seed: of the table and of the draws.
        dropout: as in `QuarterTurn`.
    """

    views = 1
    SIDE = 3

    permutation_KT: Tensor

    def __init__(
        self,
        in_features: int,
        permutations: int = 35,
        tile_features: int = 512,
        hidden: int = 4096,
        seed: int = 0,
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        require_shares(dropout=dropout)
        if not 2 <= permutations <= 5000:
            raise UserError(f"Jigsaw permutations={permutations} must lie in [2, 5000]; the paper has 35")
        self.in_features, self.seed = in_features, seed
        table = far_permutations(permutations, self.SIDE**2, seed)
        register_replicated(self, "permutation_KT", torch.from_numpy(table))
        self.tile = nn.Sequential(nn.Linear(in_features, tile_features), nn.ReLU(), nn.Dropout(dropout))
        self.head = nn.Sequential(
            *(nn.Linear(self.SIDE**2 * tile_features, hidden), nn.ReLU(), nn.Dropout(dropout)),
            nn.Linear(hidden, permutations),
        )

    def drawn(self, index_B: Tensor, step: int) -> Tensor:
        """Which permutation each sample gets, int64 [B] on the processor."""
        numbers, count = image_numbers(index_B), len(self.permutation_KT)
        drawn = [np.random.default_rng((self.seed, step, number)).integers(count) for number in numbers]
        return torch.tensor(drawn, dtype=torch.int64)

    def forward(
        self, backbone: Callable[[Tensor], Tensor], views: Sequence[Tensor], index_B: Tensor, step: int
    ) -> Guess:
        (x_BCHW,) = views
        label_B = self.drawn(index_B, step).to(x_BCHW.device)
        tiles_BTChw = tiles_of(x_BCHW, self.SIDE)
        order_BT = self.permutation_KT[label_B]
        shuffled = tiles_BTChw[torch.arange(len(x_BCHW), device=x_BCHW.device)[:, None], order_BT].flatten(0, 1)
        resized = F.interpolate(shuffled, size=x_BCHW.shape[2:], mode="bilinear", align_corners=False)
        tile_BTF = self.tile(backbone(resized)).unflatten(0, order_BT.shape)
        return Guess(self.head(tile_BTF.flatten(1)), label_B)


def tiles_of(x_BCHW: Tensor, side: int) -> Tensor:
    """The side x side tiles of images, row after row: [B side^2 C h w] with h = H // side.

    Raises: UserError for smaller images.
    """
    height, width = (size // side for size in x_BCHW.shape[2:])
    if min(height, width) < 1:
        raise UserError(f"images of {list(x_BCHW.shape[2:])} pixels have no {side} x {side} tiles; take larger ones")
    cut = x_BCHW[..., : height * side, : width * side]
    return cut.unflatten(3, (side, width)).unflatten(2, (side, height)).permute(0, 2, 4, 1, 3, 5).flatten(1, 2)


def far_permutations(count: int, length: int, seed: int, candidates: int = 500) -> np.ndarray:
    """Different permutations of `length` things, int64 [count length]: one after the other, that of `candidates` random
    ones which differs from its nearest in the table at the most places.

    Raises: UserError if there are fewer than `count`, or random ones do not reach that many.
    """
    generator = np.random.default_rng(seed)
    table = [generator.permutation(length)]
    while len(table) < count:
        drawn = generator.permuted(np.tile(np.arange(length), (candidates, 1)), axis=1)
        distance = np.min([(drawn != held).sum(axis=1) for held in table], axis=0)
        if not distance.max():
            raise UserError(f"no {count} different permutations of {length} things were found; lower permutations")
        table.append(drawn[distance.argmax()])
    return np.stack(table).astype(np.int64)
