"""A large scene cut into patches, of which those that validate share no pixel with those that train.

Shapes: C bands, H W pixels of the scene, P pixels a side of a patch.
"""

import hashlib
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from lightspan.core.errors import UserError
from lightspan.core.files.atomic import expanded
from lightspan.core.files.places import ReadPath
from lightspan.core.ranges import require_numbers
from lightspan.datamodules.multispectral.bands import Bands
from lightspan.datamodules.multispectral.data import FoundScenes, SpectralSets
from lightspan.datamodules.multispectral.tiffs import read_tiff


@dataclass(frozen=True)
class Patches:
    """Patches of a scene: reflectance [C H W] with its valid pixels, and the upper left corner of each, int64 [N 2]."""

    values: np.ndarray
    valid: np.ndarray
    corners: np.ndarray
    side: int

    def read(self, number: int) -> tuple[np.ndarray, np.ndarray, int]:
        top, left = self.corners[number]
        window = (slice(None), slice(top, top + self.side), slice(left, left + self.side))
        return self.values[window].copy(), self.valid[window].copy(), 0


def corners(sides: tuple[int, int], block: int, patch: int, stride: int) -> list[np.ndarray]:
    """Upper left corners of the patches of each block, int64 [N 2], of blocks that lie wholly in the scene; a patch
    lies wholly in its block.
    """
    steps = np.arange(0, block - patch + 1, stride)
    inside = np.stack(np.meshgrid(steps, steps, indexing="ij"), axis=-1).reshape(-1, 2)
    firsts = [
        (top, left) for top in range(0, sides[0] - block + 1, block) for left in range(0, sides[1] - block + 1, block)
    ]
    return [np.array(first) + inside for first in firsts]


class SceneBlocks(SpectralSets):
    """Patches of one scene: batches of `MultispectralBatch` without labels.

    The scene is divided into square blocks; a patch lies in one of them, and a block trains, validates or tests as a
    whole. So no pixel of one set is in another, though neighbours may lie on both sides of a border.

    Args:
        scene: a TIFF.
        bands: what it stores and what of it is taken.
        patch: P, at least 1.
        block: side of a block in pixels, at least P.
        stride: between patches of a block that train; those of the other sets do not overlap. At least 1.
        held_out: share of the blocks that validate, and of those that test: at least one each, in (0, 0.5).
        split_seed: of which blocks these are.
        settings: those of `SpectralSets`.
    """

    def __init__(
        self,
        scene: ReadPath,
        bands: Bands,
        patch: int = 32,
        block: int = 64,
        stride: int = 8,
        held_out: float = 0.15,
        split_seed: int = 0,
        **settings: Any,
    ) -> None:
        super().__init__(bands, **settings)
        if not 1 <= patch <= block or stride < 1 or not 0 < held_out < 0.5:
            raise UserError(
                f"patch={patch} must be at least 1 and at most block={block}, stride={stride} at least 1, and "
                f"held_out={held_out} in (0, 0.5)"
            )
        require_numbers(len(bands) * patch**2, patch=patch)
        self.scene, self.patch, self.block, self.stride = scene, patch, block, stride
        self.held_out, self.split_seed = held_out, split_seed

    def find(self) -> FoundScenes:
        path = expanded(self.scene, "data.init_args.scene")
        try:
            values, valid = self.bands.reflectance(read_tiff(path, len(self.bands.stored_names)))
        except (ValueError, OSError) as error:
            raise UserError(f"the scene {path} cannot be used: {error}") from error
        height, width = values.shape[1:]
        dense = corners((height, width), self.block, self.patch, self.stride)
        apart = corners((height, width), self.block, self.patch, self.patch)
        if len(dense) < 3:
            raise UserError(
                f"the scene {path} of {height} x {width} pixels has {len(dense)} blocks of block={self.block}, and "
                "training, validation and test need one each; lower data.init_args.block"
            )
        order = np.random.default_rng(self.split_seed).permutation(len(dense))
        each = min(max(1, round(self.held_out * len(dense))), (len(dense) - 1) // 2)
        chosen = (dense, order[2 * each :]), (apart, order[:each]), (apart, order[each : 2 * each])
        sets = [np.concatenate([of[number] for number in sorted(blocks)]) for of, blocks in chosen]
        ends = np.cumsum([0, *map(len, sets)])
        train, val, test = (np.arange(*pair) for pair in pairwise(ends))
        digest = hashlib.sha256(values.tobytes() + valid.tobytes() + sets[0].tobytes()).hexdigest()[:32]
        return FoundScenes(Patches(values, valid, np.concatenate(sets), self.patch), train, val, test, [], digest)
