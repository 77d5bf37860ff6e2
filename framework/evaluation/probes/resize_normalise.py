"""How much of a benchmark's figure is the size and the normalisation of its images.

Source: Corley et al., "Revisiting pre-trained remote sensing model benchmarks: resizing and normalization matters",
2023, arXiv 2305.13456: nearest neighbours of frozen features, for each size and normalisation, beside baselines without
training.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightspan.core.errors import UserError
from lightspan.core.results import Figure, Result
from lightspan.evaluation.estimator import Estimator
from lightspan.evaluation.features.preprocessing import require_stated
from lightspan.evaluation.features.preprocessing_grid import Grid, GridCell
from lightspan.evaluation.probes.knn import euclidean_knn_scores
from lightspan.evaluation.probes.probes import LinearProbe


@dataclass(frozen=True)
class GridScores(Result):
    """Scores in [0, 1] of each cell: accuracy, or mean average precision where samples have tags.

    Attributes:
        rows: mappings with `encoder`, `size` (text), `normalisation`, `bands`, `knn`, `knn_scaled` (of features that
            are standardised by the bank) and, if asked for, `linear`.
        score: what they are.
    """

    rows: tuple[Mapping[str, Any], ...]
    score: str

    def figures(self) -> tuple[Figure, ...]:
        return tuple(Figure(f"kNN, {row['encoder']}, {self.setting(row)}", 100 * row["knn"], "%") for row in self.rows)

    def table(self) -> tuple[dict[str, Any], ...]:
        return tuple(dict(row) for row in self.rows)

    def setting(self, row: Mapping[str, Any]) -> str:
        several = len({one["bands"] for one in self.rows}) > 1
        return f"{row['size']}, {row['normalisation']}" + (f", {row['bands']}" if several else "")

    def draw(self, axes: Any) -> None:
        """A row for each encoder, a column for each preprocessing."""
        encoders = list(dict.fromkeys(row["encoder"] for row in self.rows))
        settings = list(dict.fromkeys(self.setting(row) for row in self.rows))
        found = {(row["encoder"], self.setting(row)): 100 * row["knn"] for row in self.rows}
        values = [[found.get((encoder, setting), float("nan")) for setting in settings] for encoder in encoders]
        mesh = axes.pcolormesh(values, cmap="viridis", edgecolors="white", linewidth=1.0)
        for (encoder, setting), value in found.items():
            at = settings.index(setting) + 0.5, encoders.index(encoder) + 0.5
            dark = mesh.norm(value) < 0.6
            axes.text(*at, f"{value:.1f}", ha="center", va="center", fontsize=7, color="white" if dark else "black")
        axes.set_xticks([i + 0.5 for i in range(len(settings))], settings, rotation=30, ha="right", fontsize=7)
        axes.set_yticks([i + 0.5 for i in range(len(encoders))], encoders, fontsize=7)
        axes.invert_yaxis()
        axes.set_xlabel(f"nearest neighbours, {self.score.replace('_', ' ')}, %")


class ResizeNormalise(Estimator):
    """Scores of frozen features for each preprocessing, by nearest neighbours and perhaps a linear probe.

    Neighbours are those by Euclidean distance, with equal votes, as scikit-learn's KNeighborsClassifier has it.
    Features that do not state how their images were prepared, or state something else than their cell, are refused.

    Args:
        k: neighbours, from 1 to the number of rows of the bank.
        l2: penalty of the linear probe, above 0 and finite; None leaves it out.
    """

    def __init__(self, k: int = 5, l2: float | None = None) -> None:
        if k < 1:
            raise UserError(f"ResizeNormalise k={k} must be at least 1")
        self.k, self.probe = k, None if l2 is None else LinearProbe(l2)

    def fit(self, grid: Grid) -> GridScores:
        """Raises: UserError for features without a stated preprocessing, and as `KNN` does."""
        if not grid.cells:
            raise UserError("ResizeNormalise compares preprocessing, and the grid has no cell; give at least one")
        rows, score = [], ""
        for cell in grid.cells:
            for what, features in (("the bank", cell.bank), ("the query", cell.query)):
                require_stated(f"{what} of {cell.encoder}", features, dict(cell.preprocessing))
            found, score = self._scores(cell)
            size = "own size" if cell.size is None else f"{cell.size} px"
            named = {"encoder": cell.encoder, "size": size, "normalisation": cell.normalisation, "bands": cell.bands}
            rows.append(named | found)
        return GridScores(tuple(rows), score)

    def _scores(self, cell: GridCell) -> tuple[dict[str, float], str]:
        known, asked = cell.bank.label_N, cell.query.label_N
        if known is None or asked is None:
            raise UserError("ResizeNormalise needs a label for each sample, but the bank or the query has none")
        bank_ND, query_MD = cell.bank.rows().double(), cell.query.rows().double()
        plain = euclidean_knn_scores(bank_ND, known, query_MD, asked, self.k)
        (score,) = list(plain)[:1]
        scaled = euclidean_knn_scores(*standardised(bank_ND, query_MD, known, asked), k=self.k)
        found = {"knn": plain[score], "knn_scaled": scaled[score]}
        if self.probe is not None:
            found["linear"] = self.probe.fit(cell.bank, cell.query).scores[score]
        return found, score


def standardised(
    bank_ND: Tensor, query_MD: Tensor, known: Tensor, asked: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Both by the mean and deviation of the bank, like StandardScaler; constant features become 0 in the bank."""
    if not bank_ND.isfinite().all():
        return bank_ND, known, query_MD, asked  # refused with the neighbours
    mean_D, std_D = bank_ND.mean(0), bank_ND.std(0, correction=0)
    # Rounding leaves a constant feature a deviation of the order of its last digit.
    std_D = torch.where(std_D > 1e-12 * mean_D.abs(), std_D, 1.0)
    return (bank_ND - mean_D) / std_D, known, (query_MD - mean_D) / std_D, asked
