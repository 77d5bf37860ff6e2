"""ModelNet40 as it is published: 12,311 surfaces of 40 classes in OFF files.

Source: Wu et al., "3D ShapeNets: A Deep Representation for Volumetric Shapes", 2015, arXiv 1406.5670.
"""

from typing import Any

import numpy as np

from lightspan.core.errors import UserError
from lightspan.core.files.places import ReadPath
from lightspan.datamodules.points.folder import PointFolder

SPLITS = ("train", "test")


class ModelNet40(PointFolder):
    """The files CLASS/train/NAME and CLASS/test/NAME below a folder; those of `test` validate. z points up.

    Args:
        folder: such as ModelNet40 of the published archive.
        settings: those of `PointFolder`.
    Raises: UserError at setup for files that lie elsewhere, and what `PointFolder` raises.
    """

    def __init__(self, folder: ReadPath, **settings: Any) -> None:
        super().__init__(folder, labels="folders", **settings)

    def validating(self, names: list[str], labels: np.ndarray) -> np.ndarray:
        parts = [name.split("/")[1] for name in names]
        if strange := [name for name, part in zip(names, parts, strict=True) if part not in SPLITS]:
            raise UserError(
                f"{self.folder / strange[0]} is in no folder of CLASS/train or CLASS/test, as the files of ModelNet40 "
                "are; for other folders take lightspan.datamodules.points.folder.PointFolder"
            )
        return np.array([part == "test" for part in parts], bool)
