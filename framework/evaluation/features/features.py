"""Features of a set of samples.

Shapes: N samples, D features, T positions.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightspan.core.distributed import rank, world_size
from lightspan.core.errors import UserError
from lightspan.evaluation.geometry.moments import Moments
from lightspan.evaluation.labels import WHOLE
from lightspan.evaluation.rows import unit_rows


@dataclass(frozen=True)
class Features:
    """One row per sample, in the order of the samples' index; those from a store stay on disk until they are read.

    Attributes:
        x: [N D], or [N T D] and the like if positions were kept; any float dtype.
        label_N: the samples' labels, of a kind that `lightspan.evaluation.labels.kind_of` knows; classes become int64
            [N]. None if they have none.
        index_N: int64 [N], ascending: positions in the data set.
        key: what they are features of, as in the store's manifest; empty if they come from elsewhere.
        grid: places along each axis if the last of T positions, as many as its product, form a map, row by row; None
            if they do not.
        fields: what else a data set knows of each sample, [N ...] by name: masks, depth, a camera.
    Raises: UserError if rows, labels, indices and fields differ in number.
    """

    x: Tensor
    label_N: Tensor | None = None
    index_N: Tensor | None = None
    key: str = ""
    grid: tuple[int, ...] | None = None
    fields: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, column in (("labels", self.label_N), ("indices", self.index_N), *self.fields.items()):
            if column is not None and len(column) != len(self.x):
                raise UserError(f"features of {len(self.x)} rows have {len(column)} {name}; give one for each row")
        if self.label_N is not None and self.label_N.dtype in WHOLE and self.label_N.ndim == 1:
            object.__setattr__(self, "label_N", self.label_N.long())

    def __len__(self) -> int:
        return len(self.x)

    def rows(self) -> Tensor:
        """[N D]. Raises: UserError for features that keep positions."""
        if self.x.ndim != 2:
            raise UserError(f"this needs one vector per sample [N, D], but features are {list(self.x.shape)}; set pool")
        return self.x

    def classes(self) -> Tensor:
        """int64 [N], counted from 0. Raises: UserError if the samples have no labels, or other ones."""
        label = self.label_N
        if label is None or label.ndim != 1 or label.dtype != torch.int64:
            what = "none" if label is None else f"{label.dtype} {list(label.shape)}"
            raise UserError(f"this needs the class of each sample as a whole number from 0, but the labels are {what}")
        if len(label) and (least := int(label.min())) < 0:
            raise UserError(
                f"this needs the class of each sample as a whole number from 0, but one label is {least}; leave "
                "samples without a class out"
            )
        return label

    def of_classes(self, classes: Sequence[int]) -> "Features":
        """Those of the samples of these classes. Raises: UserError as `classes`."""
        label_N = self.classes()
        rows = torch.isin(label_N, torch.tensor(classes, dtype=torch.int64)).nonzero()[:, 0]
        index_N = None if self.index_N is None else self.index_N[rows]
        fields = {name: column[rows] for name, column in self.fields.items()}
        return Features(self.x[rows], label_N[rows], index_N, grid=self.grid, fields=fields)

    def share(self) -> range:
        """This rank's share of the rows; all ranks together get each row once."""
        share = -(-len(self) // world_size())
        return range(len(self))[rank() * share : (rank() + 1) * share]

    def batches(self, size: int = 4096) -> Iterator[tuple[Tensor, Tensor | None]]:
        """This rank's share of the rows, (x, label) of `size` at a time."""
        share = self.share()
        for at in share[::size]:
            stop = min(at + size, share.stop)
            yield self.x[at:stop], None if self.label_N is None else self.label_N[at:stop]

    def moments(self, by_class: bool = False, unit: bool = False) -> Moments:
        """`Moments` of all rows, in one pass over this rank's share and a sum over ranks.

        Args:
            unit: of the rows scaled to length 1.
        """
        x = self.rows()
        if by_class:
            self.classes()
        sums = Moments.of(x[:0])
        for x_BD, label_B in self.batches():
            sums += Moments.of(unit_rows(x_BD) if unit else x_BD, label_B if by_class else None)
        return sums.over_ranks()
