"""A small weighted sample of training rows that keeps |A x|_p^p for all x at once: a coreset with its certificate.

Source: Woodruff, Yasuda, "Sharper Bounds for lp Sensitivity Sampling", ICML 2023, arXiv 2306.00732: rows are kept
independently with q_i = min(1, s_i / alpha), and a kept row counts 1 / q_i times. What each score is, see
`lightspan.selection.sensitivities`. A claim about all x is one about the subspace that the columns span: about linear
models on these features, not about the loss of a network that changes them.

Shapes: N rows, D columns, R their rank, n drawn rows.
"""

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

from lightspan.core.errors import UserError
from lightspan.core.ranges import require_in
from lightspan.datamodules.loading.selection import DataSelection
from lightspan.evaluation.estimator import Estimator
from lightspan.evaluation.features.features import Features
from lightspan.selection.design import design_matrix
from lightspan.selection.distortion import distortion, lp_regression
from lightspan.selection.sampling import bernoulli, inclusion
from lightspan.selection.selected import NamedSamples, SelectedData
from lightspan.selection.sensitivities import (
    P_RANGE,
    in_column_space,
    leverage_scores,
    lewis_weights,
    lp_sensitivities,
    root_leverage,
)

Rule = Literal[
    "uniform",
    "leverage",
    "root_leverage",
    "lewis",
    "sensitivity",
    "sensitivity_and_leverage",
    "sensitivity_and_root_leverage",
]


def scores(u_NR: Tensor, rule: Rule, p: float, against: int | None = None, seed: int = 0) -> Tensor:
    """By which rows in their column space are drawn, float64 [N], see `LpSample`."""
    rows: dict[Rule, Callable[[], Tensor]] = {
        "uniform": lambda: u_NR.any(dim=1).double(),
        "leverage": lambda: leverage_scores(u_NR),
        "root_leverage": lambda: root_leverage(u_NR, p),
        "lewis": lambda: lewis_weights(u_NR, p),
        "sensitivity": lambda: _sensitivities(u_NR, p, against, seed),
        "sensitivity_and_leverage": lambda: _sensitivities(u_NR, p, against, seed) + leverage_scores(u_NR),
        "sensitivity_and_root_leverage": lambda: _sensitivities(u_NR, p, against, seed) + root_leverage(u_NR, p),
    }
    return rows[rule]()


def _sensitivities(u_NR: Tensor, p: float, against: int | None, seed: int) -> Tensor:
    """Against a sample by Lewis weights, or root leverage where there are none, if `against` is fewer rows than all."""
    if against is None or against >= int(u_NR.any(dim=1).sum()):
        return lp_sensitivities(u_NR, p)
    chance_N = inclusion(lewis_weights(u_NR, p) if p < 4 else root_leverage(u_NR, p), against)
    drawn_M = bernoulli(chance_N, seed)
    return lp_sensitivities(u_NR, p, u_NR[drawn_M] / chance_N[drawn_M, None].pow(1 / p))


class LpSample(Estimator):
    """Draws rows of features, or of a table, by how much they can matter to linear models.

    The selection has the drawn rows with weights 1 / q, so that an epoch of them stands for an epoch of all rows. Its
    figures are the total of the scores, and the measured distortion of |A x|_p^p beside that of a uniform sample of as
    many rows: where that is not larger, uniform sampling does as well. With a target, also the loss on all rows of the
    regression that the sample gives, over the least one.

    Args:
        rows: expected number of drawn rows, at least 1 and at most those of a score above 0.
        p: of the norm, in [1, 8]: 2 for least squares, 1 for absolute errors.
        rule: what a row is drawn by. "sensitivity_and_leverage" is recommended for p in [1, 2], and above "sensitivity"
            or the paper's "sensitivity_and_root_leverage"; all three take long for many rows of a high rank. "lewis" (p
            below 4) and "root_leverage" never do, and "uniform" is what the others have to beat.
        components: features are reduced to their strongest principal components first; None keeps all.
        constant: whether a column of ones is added, for models with an intercept.
        target: whether the field `target`, or numbers as labels, are a column too, as the guarantee for a regression
            asks for.
        against: rows, drawn by Lewis weights, of which sensitivities take the norm; None is all.
        seed: of the draws.
    """

    def __init__(
        self,
        rows: int,
        p: float = 2.0,
        rule: Rule = "sensitivity_and_leverage",
        components: int | None = None,
        constant: bool = True,
        target: bool = True,
        against: int | None = None,
        seed: int = 0,
    ) -> None:
        require_in("[1, inf)", rows=rows, components=components, against=against)
        require_in(P_RANGE, p=p)
        require_in("[0, inf)", seed=seed)
        if rule not in get_args(Rule):
            raise UserError(f"rule={rule!r} is not one of {', '.join(get_args(Rule))}")
        if rule == "lewis":
            require_in("[1, 4)", p=p)
        self.rows, self.p, self.rule, self.components = rows, p, rule, components
        self.constant, self.target, self.against, self.seed = constant, target, against, seed

    def fit(self, features: Features, samples: NamedSamples) -> SelectedData:
        """Raises: UserError for features that are not of these samples, not finite or all zero, for fewer rows above 0
        than `rows`, and for a draw without any row.
        """
        index_N = samples.places(features)
        x_ND, y_N = self._matrix(features)
        u_NR = in_column_space(x_ND if y_N is None else torch.cat([x_ND, y_N[:, None]], dim=1))
        score_N = scores(u_NR, self.rule, self.p, self.against, self.seed)
        chance_N = inclusion(score_N, self.rows)
        drawn_n = bernoulli(chance_N, self.seed)
        if not len(drawn_n):
            raise UserError(f"rows={self.rows} with seed={self.seed} drew none; raise rows, or take another seed")
        weight_n = 1 / chance_N[drawn_n]
        residual_CN = u_NR.new_zeros(0, len(u_NR))  # of the regression on the sample, and of that on all rows
        if y_N is not None:
            sampled_D = lp_regression(x_ND[drawn_n], y_N[drawn_n], self.p, weight_n)
            whole_D = lp_regression(x_ND, y_N, self.p)
            residual_CN = torch.stack([x_ND @ sampled_D - y_N, x_ND @ whole_D - y_N])
        measured = {
            f"distortion at p = {self.p:g}": distortion(u_NR, drawn_n, weight_n, self.p, residual_CN @ u_NR),
            "distortion of a uniform sample": self._of_uniform(u_NR),
            "total of the scores": float(score_N.sum()),
            "rank": u_NR.shape[1],
        }
        if y_N is not None:
            loss, least = residual_CN.abs().pow(self.p).sum(dim=1).tolist()
            if least > 1e-20 * float(y_N.abs().pow(self.p).sum()):  # below, only rounding is left
                measured["loss over the least"] = loss / least
        rule = f"{self.rule}, p = {self.p:g}, {self.rows} rows expected, seed {self.seed}"
        selection = DataSelection(
            samples.count, samples.name, rule, index_N[drawn_n.numpy()], weight_n.numpy().astype("float64")
        )
        return SelectedData.of(selection, samples, measured)

    def _matrix(self, features: Features) -> tuple[Tensor, Tensor | None]:
        x_ND = design_matrix(features, self.components, self.constant)
        target_N = features.fields.get("target", features.label_N) if self.target else None
        if target_N is None or target_N.ndim != 1 or not target_N.is_floating_point():
            return x_ND, None
        if not target_N.isfinite().all():
            raise UserError("scores of rows need finite targets; set target=false to leave them out")
        return x_ND, target_N.double()

    def _of_uniform(self, u_NR: Tensor) -> float:
        chance_N = inclusion(scores(u_NR, "uniform", self.p), self.rows)
        drawn_n = bernoulli(chance_N, self.seed)
        return distortion(u_NR, drawn_n, 1 / chance_N[drawn_n], self.p) if len(drawn_n) else 1.0
