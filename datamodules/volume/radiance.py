"""A folder of radiance fields sampled on grids, one .npz file each, as a data module.

Shapes: W L H4 a grid as files have it, along x, y and z, with r, g, b and a density or alpha; C D H W as batches have
it, along z, y and x.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from torch import Tensor

from lightspan.core.errors import UserError
from lightspan.core.files.arrays import read_arrays
from lightspan.core.files.atomic import atomic_path, expanded
from lightspan.core.files.places import PathUse, ReadPath
from lightspan.datamodules.loading.array_files import array_files
from lightspan.datamodules.loading.damage import unreadable
from lightspan.datamodules.loading.found_sets import FoundSamples, KeptSamples
from lightspan.datamodules.volume.data import Volume, VolumeSamples, VolumeSets

Density = Literal["exp", "relu", "alpha"]
GRID = "rgbsigma"
"""The array of a file, as NeRF-RPN and NeRF-MAE name it."""
STEP = 0.01
"""Length over which a density becomes an opacity, NeRF-MAE's."""


def opaque(density: np.ndarray, kind: Density) -> np.ndarray:
    """1 - exp(-0.01 a(d)), float32 in [0, 1], with a = exp or max(0, .), as the field's own activation of what it
    stores; "alpha" is in [0, 1] already, and is cut to it. NaN is 0.

    Source: Irshad et al., "NeRF-MAE", 2024, arXiv 2404.01300, and its code: exp for fields of instant-ngp (Front3D,
    Hypersim), relu for those of ScanNet.
    """
    density = np.nan_to_num(density.astype(np.float32), posinf=np.inf, neginf=-np.inf)
    if kind == "alpha":
        return np.clip(density, 0, 1)
    with np.errstate(over="ignore"):  # an infinite density is opaque
        positive = np.exp(density) if kind == "exp" else np.maximum(density, 0)
    return -np.expm1(-np.float32(STEP) * positive)


def radiance(grid_WLH4: np.ndarray, kind: Density) -> np.ndarray:
    """Red, green, blue and alpha, float32 [4 D H W] in [0, 1]; bytes are divided by 255, and then hold alpha.

    Raises: ValueError for an array of another shape or type.
    """
    if grid_WLH4.ndim != 4 or grid_WLH4.shape[3] != 4 or grid_WLH4.dtype.kind not in "uf" or not grid_WLH4.size:
        raise ValueError(f"its {GRID} is {grid_WLH4.dtype} {[*grid_WLH4.shape]}, and not floats or bytes [W, L, H, 4]")
    if grid_WLH4.dtype.kind == "u":
        grid_WLH4, kind = grid_WLH4.astype(np.float32) / np.iinfo(grid_WLH4.dtype).max, "alpha"
    colour = np.clip(np.nan_to_num(grid_WLH4[..., :3].astype(np.float32)), 0, 1)
    return np.concatenate([colour, opaque(grid_WLH4[..., 3:], kind)], axis=3).transpose(3, 2, 1, 0)


@dataclass(frozen=True)
class RadianceFiles:
    """Grids that are read anew for each sample."""

    files: Annotated[Sequence[Path], PathUse.READ]
    density: Density
    skips: bool

    @property
    def labels(self) -> np.ndarray:
        return np.zeros(len(self.files), np.int64)

    def read(self, number: int) -> Volume:
        """Raises: UserError for a damaged file, or `Damaged` where these are skipped."""
        file = self.files[number]
        try:
            arrays = read_arrays(file)
            if GRID not in arrays:
                raise ValueError(f"it holds {', '.join(sorted(arrays)) or 'nothing'}, and no {GRID}")
            values = radiance(arrays[GRID], self.density)
        except ValueError as error:
            raise unreadable(file, error, self.skips) from error
        return Volume(values, np.ones(len(values), bool), None, _AFFINE, 0)


_AFFINE = np.zeros((4, 4))
_AFFINE[[2, 1, 0, 3], [0, 1, 2, 3]] = 1


class RadianceFolder(VolumeSets):
    """Radiance fields of scenes, each sampled on a grid and stored as NAME.npz with an array `rgbsigma` [W, L, H, 4]
    along x, y and z, which is up: red, green and blue in [0, 1], and a density. So NeRF-RPN and NeRF-MAE publish theirs
    and `write_grid` writes one. Batches are `VolumeBatch` of whole scenes in the
    middle of a grid of `size`; `inside` says what pads them. Of a larger scene a crop is taken.

    Args:
        folder: whose files are read, not those of folders in it.
        val_folder: scenes for validation; None holds out `val_share` of those of `folder`, by a hash of their names.
        density: what files store: "exp" or "relu", before this activation of the field, or "alpha", an opacity.
        val_share: in (0, 1).
        skip_damaged: True passes over files that cannot be read, when their turn comes; False stops there.
        settings: those of `VolumeSets`.
    Raises: UserError for a folder without such files.
    """

    tells_inside = True

    def __init__(
        self,
        folder: ReadPath,
        val_folder: ReadPath | None = None,
        density: Density = "exp",
        val_share: float = 0.1,
        skip_damaged: bool = False,
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        if not 0 < val_share < 1:
            raise UserError(f"val_share={val_share} must be above 0 and below 1")
        self.folder = expanded(folder, "data.init_args.folder")
        self.val_folder = None if val_folder is None else expanded(val_folder, "data.init_args.val_folder")
        self.density, self.val_share, self.skip_damaged = density, val_share, skip_damaged

    def find(self) -> FoundSamples[Volume]:
        found = array_files(self.folder, self.val_folder, self.val_share, f"scene, with an array {GRID} [W, L, H, 4]")
        archive = RadianceFiles(found.files, self.density, self.skip_damaged)
        return FoundSamples(archive, found.train, found.val, (), found.content(self.density))

    def blank(self) -> VolumeSamples | None:
        """Two scenes of nothing of the size of a crop, where the folder is not here."""
        if self.folder.exists():
            return None
        nothing = Volume(np.zeros((4, *self.size), np.float16), np.ones(4, bool), None, _AFFINE, 0)
        return self.training(KeptSamples([nothing, nothing]), np.arange(2))


def write_grid(grid_4DHW: Tensor, path: str | Path) -> None:
    """A grid as `RadianceFolder` reads it with density="alpha"."""
    values_WLH4 = grid_4DHW.detach().cpu().permute(3, 2, 1, 0).numpy().astype(np.float16)
    with atomic_path(Path(path)) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, rgbsigma=values_WLH4)
