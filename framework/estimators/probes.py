"""How much frozen features tell about classes."""

import math
from dataclasses import dataclass

from lightspan.analysis.knn import knn_accuracy
from lightspan.analysis.linear_probe import fit_linear_probe, linear_accuracy
from lightspan.errors import UserError
from lightspan.estimators.estimator import Estimator
from lightspan.features.features import Features
from lightspan.results import Figure, Result


@dataclass(frozen=True)
class Accuracy(Result):
    """Share of the query that was classified right, and what it was measured on."""

    accuracy: float
    bank_rows: int
    query_rows: int

    def figures(self) -> tuple[Figure, ...]:
        return (
            Figure("accuracy", 100 * self.accuracy, "%"),
            Figure("rows of bank", self.bank_rows),
            Figure("rows of query", self.query_rows),
        )


class KNN(Estimator):
    """Nearest-neighbour classification by cosine, by `lightspan.analysis.knn`.

    Args:
        k: neighbours, from 1 to the number of rows of the bank.
        temperature: of the votes, above 0; None for equal votes.
    """

    def __init__(self, k: int = 20, temperature: float | None = 0.07) -> None:
        if k < 1:
            raise UserError(f"KNN k={k} must be at least 1")
        if temperature is not None and not 0 < temperature < math.inf:
            raise UserError(f"KNN temperature={temperature} must be finite and above 0, or null for equal votes")
        self.k, self.temperature = k, temperature

    def fit(self, bank: Features, query: Features) -> Accuracy:
        """Raises: UserError as `knn_accuracy`, and for features of different width."""
        _require_pair(bank, query)
        sides = (bank.rows(), bank.classes(), query.rows(), query.classes())
        return Accuracy(knn_accuracy(*sides, k=self.k, temperature=self.temperature), len(bank), len(query))


class LinearProbe(Estimator):
    """Multinomial logistic regression by `lightspan.analysis.linear_probe`; the result keeps its weights.

    Args:
        l2: penalty, finite and above 0.
        max_iterations: of L-BFGS, at least 1.
    """

    def __init__(self, l2: float = 1.0, max_iterations: int = 100) -> None:
        if not 0 < l2 < math.inf:
            raise UserError(f"LinearProbe l2={l2} must be above 0 and finite: separable features need a penalty")
        if max_iterations < 1:
            raise UserError(f"LinearProbe max_iterations={max_iterations} must be at least 1")
        self.l2, self.max_iterations = l2, max_iterations

    def fit(self, bank: Features, query: Features) -> Accuracy:
        """Raises: UserError as `fit_linear_probe`, and for a query without rows or features of different width."""
        _require_pair(bank, query)
        weight_DC, bias_C = fit_linear_probe(bank.rows(), bank.classes(), self.l2, self.max_iterations)
        accuracy = linear_accuracy(weight_DC, bias_C, query.rows(), query.classes())
        return Accuracy(accuracy, len(bank), len(query), tensors={"weight": weight_DC, "bias": bias_C})


def _require_pair(bank: Features, query: Features) -> None:
    if bank.rows().shape[1] != query.rows().shape[1]:
        raise UserError(
            f"{bank.rows().shape[1]} features in bank and {query.rows().shape[1]} in query; take both from one encoder"
        )
