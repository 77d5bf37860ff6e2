"""Masks of patches with exact counts, as functions of seed, step, image and view: ranks, workers and resumed runs draw
the same. `lightspan.nn.masking.block_masks` has those of BEiT and iBOT, `lightspan.nn.masking.multi_block` those of
I-JEPA.

Each sampler has `draw(grid, step, indices, view=0)` -> bool [B grid...], True where a patch is hidden.
Shapes: B images, or other samples; a grid of any number of axes.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lightspan.core.errors import UserError
from lightspan.core.ranges import require_in
from lightspan.nn.sequences.patches import places

MOST_DRAWS = 100


class MaskSampler(ABC):
    """Draws masks; methods that pick patches by place need one count for all images of a batch.

    Attributes:
        seed: >= 0; what else a method draws for an image may depend on it too.
    """

    seed: int

    @abstractmethod
    def draw(self, grid: tuple[int, ...], step: int, indices: Sequence[int], view: int = 0) -> np.ndarray:
        """bool [B grid...], True where a patch is hidden.

        Args:
            indices: the images' numbers in their dataset.
            view: number of the view, each of which has masks of its own.
        """


def visible_count(ratio: float, patches: int, nearest: bool = False) -> int:
    """How many of the patches stay visible: the whole part of (1 - ratio) of them (MAE's), or the nearest whole number
    (SparK's), but one at least.
    """
    share = round((1 - ratio) * patches, 6)  # 0.1 * 100 is a little below 10
    return max(1, round(share) if nearest else int(share))


def seen_and_hidden(masks_B: np.ndarray, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Places of the patches that are not masked and of those that are: int64 [B K] and [B M], on a device.

    Raises: UserError for masks with different counts.
    """
    return torch.from_numpy(places(~masks_B)).to(device), torch.from_numpy(places(masks_B)).to(device)


def require_seen_and_hidden(masks_B: np.ndarray, method: str) -> None:
    """Raises: UserError for masks of a batch that leave nothing to see in any image, or nothing to guess."""
    if masks_B.size and (masks_B.all() or not masks_B.any()):
        what, patches = ("all", "see") if masks_B.all() else ("none", "guess")
        raise UserError(
            f"{method}: masks hide {what} of the {math.prod(masks_B.shape[1:])} patches of each image, which leaves "
            f"nothing to {patches}; set model.init_args.masks to hide a part of them"
        )


def _require(kind: str, ratio: float, seed: int) -> None:
    if not (0 <= ratio < 1 and seed >= 0):
        raise UserError(f"{kind}: ratio={ratio} must lie in [0, 1), and seed={seed} be at least 0")


@dataclass(frozen=True)
class RandomMasks(MaskSampler):
    """Hides patches drawn one by one, without replacement (He et al., "MAE", 2021, arXiv 2111.06377).

    Args:
        ratio: hidden share, in [0, 1); `visible_count` says how many stay.
        seed: >= 0.
        nearest: round the number that stay to the nearest whole number instead of down.
    """

    ratio: float = 0.75
    seed: int = 0
    nearest: bool = False

    def __post_init__(self) -> None:
        _require("RandomMasks", self.ratio, self.seed)

    def draw(self, grid: tuple[int, ...], step: int, indices: Sequence[int], view: int = 0) -> np.ndarray:
        """bool [B grid...], see `MaskSampler`."""
        patches = math.prod(grid)
        hidden = np.ones((len(indices), patches), dtype=bool)
        for row, index in zip(hidden, indices, strict=True):
            generator = np.random.default_rng((self.seed, step, index, view))
            row[generator.permutation(patches)[: visible_count(self.ratio, patches, self.nearest)]] = False
        return hidden.reshape(len(indices), *grid)


@dataclass(frozen=True)
class CoarseMasks(MaskSampler):
    """Hides whole blocks of patches: those that another sampler hides on the grid of blocks (Irshad et al., "NeRF-MAE",
    2024, arXiv 2404.01300, with blocks of 4^3). Blocks that a side does not fill are cut off at its end.

    Args:
        block: sides in patches, one for each axis of the grid, each at least 1.
        blocks: draws them; its counts are exact of the patches too where blocks fill the grid.
    """

    block: tuple[int, ...] = (4, 4, 4)
    blocks: MaskSampler = RandomMasks()

    def __post_init__(self) -> None:
        require_in("[1, inf)", block=self.block)

    @property
    def seed(self) -> int:  # type: ignore[override]
        return self.blocks.seed

    def draw(self, grid: tuple[int, ...], step: int, indices: Sequence[int], view: int = 0) -> np.ndarray:
        """bool [B grid...], see `MaskSampler`. Raises: UserError for a grid of another number of axes."""
        if len(grid) != len(self.block):
            raise UserError(
                f"CoarseMasks block={[*self.block]} has {len(self.block)} sides, and the grid is "
                f"{' x '.join(map(str, grid))}; give a side for each axis"
            )
        coarse = tuple(-(-length // side) for length, side in zip(grid, self.block, strict=True))
        masks = self.blocks.draw(coarse, step, indices, view)
        for axis, side in enumerate(self.block, start=1):
            masks = masks.repeat(side, axis=axis)
        return masks[(slice(None), *(slice(length) for length in grid))]


@dataclass(frozen=True)
class TubeMasks(MaskSampler):
    """Hides the same patches in every frame of a clip, whose first axis is time (Tong et al., "VideoMAE", 2022, arXiv
    2203.12602).

    Args:
        ratio, seed: as in `RandomMasks`, of each frame.
    """

    ratio: float = 0.9
    seed: int = 0

    def __post_init__(self) -> None:
        _require("TubeMasks", self.ratio, self.seed)

    def draw(self, grid: tuple[int, ...], step: int, indices: Sequence[int], view: int = 0) -> np.ndarray:
        """bool [B grid...], see `MaskSampler`. Raises: UserError for a grid of one axis, which has no frames."""
        if len(grid) < 2:
            raise UserError(f"TubeMasks need a grid of time and at least one axis of space, and this is {list(grid)}")
        frame = RandomMasks(self.ratio, self.seed).draw(grid[1:], step, indices, view)
        return np.broadcast_to(frame[:, None], (len(indices), *grid)).copy()


@dataclass(frozen=True)
class DirichletMasks(MaskSampler):
    """Hides patches of registered modalities, the first axis of the grid, which share what stays visible by a draw from
    a symmetric Dirichlet distribution (Bachmann et al., "MultiMAE", 2022, arXiv 2204.01678, which BM-MAE, arXiv
    2505.00568, follows).

    A draw that gives a modality more than it has is repeated, `MOST_DRAWS` times at most; that one is cut off. What
    rounding, or that, leaves over or lacks is taken at random from all modalities, so that counts are exact.

    Args:
        ratio, seed: as in `RandomMasks`, of all modalities together.
        concentration: above 0; 1 is uniform over all shares, less favours single modalities, more equal shares.
    """

    ratio: float = 0.75
    concentration: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        _require("DirichletMasks", self.ratio, self.seed)
        require_in("(0, inf)", concentration=self.concentration)

    def draw(self, grid: tuple[int, ...], step: int, indices: Sequence[int], view: int = 0) -> np.ndarray:
        """bool [B grid...], see `MaskSampler`. Raises: UserError for a grid of one axis, which has no modalities."""
        if len(grid) < 2:
            raise UserError(f"DirichletMasks need a grid of modalities and places, and this is {list(grid)}")
        modalities, count = grid[0], math.prod(grid[1:])
        keep = visible_count(self.ratio, modalities * count)
        hidden = np.ones((len(indices), modalities * count), dtype=bool)
        for row, index in zip(hidden, indices, strict=True):
            generator = np.random.default_rng((self.seed, step, index, view))
            kept_M = np.rint(keep * self._shares(modalities, count / keep, generator))
            # A random order of each modality's places, of which the first are seen before all others.
            order_MN = generator.random((modalities, count)).argsort(axis=1).argsort(axis=1)
            late_MN = (order_MN >= kept_M[:, None]) + generator.random((modalities, count))
            row[late_MN.ravel().argsort()[:keep]] = False
        return hidden.reshape(len(indices), *grid)

    def _shares(self, modalities: int, most: float, generator: np.random.Generator) -> np.ndarray:
        """[M], which sum to 1 unless they had to be cut off."""
        for _ in range(MOST_DRAWS):
            shares_M = generator.dirichlet(np.full(modalities, self.concentration))
            if (shares_M <= most).all():
                break
        return np.minimum(shares_M, most)


@dataclass(frozen=True)
class SpanMasks(MaskSampler):
    """Hides runs of neighbours in a sequence: their lengths are drawn at random until exactly as many are hidden.

    Source: Joshi et al., "SpanBERT", 2019, arXiv 1907.10529: geometric lengths, cut off at `longest`, at uniform
    starts. Spans may meet or overlap; the last is shortened to fit the count.

    Args:
        ratio, seed: as in `RandomMasks`.
        mean: length of a span before it is cut off, >= 1.
        longest: >= 1.
    """

    ratio: float = 0.15
    mean: float = 5.0
    longest: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        _require("SpanMasks", self.ratio, self.seed)
        if not (1 <= self.mean < math.inf and self.longest >= 1):
            raise UserError(f"SpanMasks: mean={self.mean} and longest={self.longest} must be at least 1, and finite")

    def draw(self, grid: tuple[int, ...], step: int, indices: Sequence[int], view: int = 0) -> np.ndarray:
        """bool [B grid...], see `MaskSampler`; patches of more than one axis follow each other row by row."""
        patches = math.prod(grid)
        hidden = np.zeros((len(indices), patches), dtype=bool)
        for row, index in zip(hidden, indices, strict=True):
            generator = np.random.default_rng((self.seed, step, index, view))
            left = patches - visible_count(self.ratio, patches)
            while left:
                length = min(int(generator.geometric(1 / self.mean)), self.longest)
                # A span starts at a place that is not hidden, so that each adds to the count.
                start = generator.choice(np.flatnonzero(~row))
                span = row[start : start + length]
                span[np.flatnonzero(~span)[:left]] = True
                left = patches - visible_count(self.ratio, patches) - int(row.sum())
        return hidden.reshape(len(indices), *grid)
