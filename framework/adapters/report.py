"""What an adaptation did, layer by layer, and its printed table."""

import re
from collections import Counter
from dataclasses import dataclass

import torch

from lightspan.core.distributed import rank


@dataclass(frozen=True)
class AdaptedLayer:
    """An adapted layer: its dotted name, the shape of its weight, and how many numbers are trained instead."""

    module: str
    shape: tuple[int, ...]
    trainable: int

    @property
    def kind(self) -> tuple[str, str, int]:
        """The name that layers of one kind share; `*` stands for their numbers."""
        name = re.sub(r"(?<=\.)\d+(?=\.)|^\d+(?=\.)", "*", self.module)
        return name, " x ".join(map(str, self.shape)), self.trainable


@dataclass(frozen=True)
class Injection:
    """What `adapt` did.

    Attributes:
        name: of the adapters.
        rows: one for each adapted layer.
        others: other parameters that train, by plain name.
        total: numbers in the model without adapters.
    """

    name: str
    rows: tuple[AdaptedLayer, ...]
    others: dict[str, int]
    total: int

    @property
    def trainable(self) -> int:
        return sum(row.trainable for row in self.rows) + sum(self.others.values())

    def print(self) -> None:
        """One line for each kind of layer, on the first rank."""
        if rank() != 0:
            return
        from rich.table import Table

        from lightspan.core.console import SafeConsole

        table = Table(title=f"adapter {self.name!r}: what is trained", title_justify="left")
        for column in ("count", "module", "shape", "trainable", "share"):
            left = column in ("module", "shape")
            table.add_column(column, justify="left" if left else "right", overflow="fold")  # a name's end tells which
        kinds = Counter(row.kind for row in self.rows)
        for (module, shape, numbers), count in kinds.items():
            size = next(torch.Size(row.shape).numel() for row in self.rows if row.kind == (module, shape, numbers))
            table.add_row(str(count), module, shape, f"{count * numbers:,}", f"{numbers / size:.2%}")
        for other, numbers in self.others.items():
            table.add_row("1", other, "", f"{numbers:,}", "100%")
        share = self.trainable / max(self.total, 1)
        table.caption = f"{self.trainable:,} trained numbers, {share:.3%} of the model's {self.total:,}"
        SafeConsole().print(table)
