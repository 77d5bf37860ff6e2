"""Rows of an evaluation, collected from all ranks and scored as one.

Shapes: B rows of this rank in a batch, N rows of all ranks, D width.
"""

from collections.abc import Callable, Sequence

import torch
from lightning import LightningModule
from torch import Tensor

from lightspan.core.distributed import agreed, gather_rows, raise_on_all_ranks, rank


class EvaluatedRows:
    """Features with their labels and numbers. The first rank scores them, in the order of their numbers: figures are
    the same on any number of ranks."""

    def __init__(self) -> None:
        self._parts: list[tuple[Tensor, Tensor, Tensor]] = []

    def add(self, row_BD: Tensor, label_B: Tensor, index_B: Tensor) -> None:
        self._parts.append((row_BD.detach(), label_B, index_B))

    def clear(self) -> None:
        self._parts.clear()

    def score(self, names: Sequence[str], measure: Callable[[Tensor, Tensor], dict[str, float]]) -> dict[str, Tensor]:
        """These figures of `measure(rows [N D], labels [N])`, float32 on every rank; without rows there are none.

        Raises: what `measure` raises, on all ranks.
        """
        if not self._parts:
            return {}
        row_BD, label_B, index_B = (torch.cat(columns) for columns in zip(*self._parts, strict=True))
        self.clear()
        row_ND, label_N, index_N = (gather_rows(rows)[0] for rows in (row_BD, label_B, index_B))
        figures = torch.zeros(len(names), device=row_ND.device)
        with raise_on_all_ranks("score the rows of this evaluation"):
            if rank() == 0:
                order_N = index_N.sort(stable=True).indices
                found = measure(row_ND[order_N].cpu(), label_N[order_N].cpu())
                figures = torch.tensor([found[name] for name in names], device=row_ND.device)
        return dict(zip(names, agreed(figures).unbind(), strict=True))

    def log(
        self,
        module: LightningModule,
        stage: str,
        names: Sequence[str],
        measure: Callable[[Tensor, Tensor], dict[str, float]],
        prog_bar: bool = False,
    ) -> dict[str, Tensor]:
        """`score` at the end of an epoch, whose figures the module logs as `stage/name`. The rows of a sanity check,
        which are few, are dropped. Arguments, result and errors are those of `score`.
        """
        if module.trainer.sanity_checking:
            self.clear()
        found = self.score(names, measure)
        module.log_dict({f"{stage}/{name}": figure for name, figure in found.items()}, prog_bar=prog_bar)
        return found
