"""How far features spread over directions, which label noise in pre-training raises.

Source: Chen et al., "Understanding and Mitigating the Label Noise in Pre-training on Downstream Tasks", ICLR 2024,
arXiv 2309.17002, section 2.3; measures in `lightspan.evaluation.geometry.spectra`. There SVE grows with the noise in
pre-training, and LSVR goes with what is lost on data of another kind.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch

from lightspan.core.drawing import COLOURS
from lightspan.core.errors import UserError
from lightspan.core.results import Figure, Result
from lightspan.evaluation.estimator import Estimator
from lightspan.evaluation.features.features import Features
from lightspan.evaluation.geometry.spectra import centred, largest_value_ratio, singular_value_entropy, singular_values
from lightspan.evaluation.rows import unit_rows


@dataclass(frozen=True)
class FeatureSpread(Result):
    """Entropies in nats, and the singular values as shares of their sum, descending."""

    sve: float
    lsvr: float
    shares: tuple[float, ...]
    rows: int

    def figures(self) -> tuple[Figure, ...]:
        return (
            Figure("singular value entropy", self.sve, "nats"),
            Figure("largest singular value ratio", self.lsvr, "nats"),
            Figure("singular values", len(self.shares)),
            Figure("rows", self.rows),
        )

    def table(self) -> tuple[dict[str, Any], ...]:
        return tuple({"singular value": number, "share": share} for number, share in enumerate(self.shares, 1))

    def draw(self, axes: Any) -> None:
        there = [share for share in self.shares if share > 0]
        axes.semilogy(range(1, len(there) + 1), there, color=COLOURS[0], linewidth=1.5)
        axes.set(xlabel="singular value", ylabel="share of the sum")


class SpectrumSpread(Estimator):
    """Singular value entropy (SVE) and largest singular value ratio (LSVR) of rows at length 1.

    Args:
        centre: what is taken off the rows. "features" is the mean over the features of each row, as the authors' script
            has it; "rows" the mean of all rows, as one would expect; "none" nothing, which is what NMTune itself sees.
            With a mean of all rows that is far from 0 the first and the last mostly tell of that mean.
    """

    def __init__(self, centre: Literal["features", "rows", "none"] = "features") -> None:
        if centre not in ("features", "rows", "none"):
            raise UserError(f"SpectrumSpread centre={centre!r} must be features, rows or none")
        self.centre = centre

    def fit(self, features: Features) -> FeatureSpread:
        """Raises: UserError for features without a row, or that are not finite."""
        x_ND = features.rows()
        if not x_ND.numel() or not x_ND.isfinite().all():
            raise UserError(f"SpectrumSpread needs finite features of at least one row, but got {list(x_ND.shape)}")
        x_ND = unit_rows(x_ND.to(torch.float64))
        if self.centre == "features":
            x_ND = x_ND - x_ND.mean(dim=1, keepdim=True)
        elif self.centre == "rows":
            x_ND = centred(x_ND)
        values_S = singular_values(x_ND)
        shares_S = values_S / values_S.sum().clamp_min(torch.finfo(torch.float64).tiny)
        return FeatureSpread(
            float(singular_value_entropy(values_S)),
            float(largest_value_ratio(values_S)),
            tuple(shares_S.tolist()),
            len(features),
        )
