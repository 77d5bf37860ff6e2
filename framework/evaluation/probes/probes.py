"""How much frozen features tell about classes, tags or numbers.

A probe learns from the bank and is scored on the query. Where it is given several settings, it chooses among them on a
fifth of the bank, which then has not trained; the query takes no part in the choice.
"""

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from lightspan.core.errors import UserError
from lightspan.core.results import Figure, Result
from lightspan.evaluation.estimator import Estimator
from lightspan.evaluation.features.features import Features
from lightspan.evaluation.features.preprocessing import preprocessing_of, require_stated
from lightspan.evaluation.labels import kind_of
from lightspan.evaluation.probes.attentive_probe import fit_attentive_heads
from lightspan.evaluation.probes.knn import knn_accuracy, knn_mean
from lightspan.evaluation.probes.linear_probe import fit_linear_probe
from lightspan.evaluation.probes.probe_scores import probe_scores, rows_to_choose_by

PERCENT = ("accuracy", "mean_average_precision")


@dataclass(frozen=True)
class ProbeScores(Result):
    """What a probe reached on the query, and what it was measured on.

    Attributes:
        scores: by name, see `lightspan.evaluation.probes.probe_scores`.
        chosen: settings that were chosen on a part of the bank, by name; empty if there was nothing to choose.
    """

    scores: dict[str, float]
    bank_rows: int
    query_rows: int
    chosen: dict[str, float] = field(default_factory=dict)

    @property
    def accuracy(self) -> float:
        """Of a probe of classes."""
        return self.scores["accuracy"]

    def figures(self) -> tuple[Figure, ...]:
        return (
            *(
                Figure(name.replace("_", " "), 100 * value, "%") if name in PERCENT else Figure(name, value)
                for name, value in self.scores.items()
            ),
            Figure("rows of bank", self.bank_rows),
            Figure("rows of query", self.query_rows),
            *(Figure(f"{name}, chosen on a fifth of the bank", value) for name, value in self.chosen.items()),
        )


class Probe(Estimator):
    """An estimator that learns labels from one set of features and is scored on another.

    Attributes:
        reads: the fields of a batch that it reads besides what is encoded; at least one.
    """

    reads_tokens: ClassVar[bool] = False
    """Whether it takes features with positions, [N T D], instead of a vector for each sample, [N D]."""
    reads_bank: ClassVar[bool] = True
    """Whether it learns or chooses anything from the bank."""
    reads: tuple[str, ...] = ("label",)

    def require(self, features: Features) -> None:
        """Raises: UserError for samples that it cannot read. `OnlineProbes` asks before the first step."""

    @abstractmethod
    def fit(self, bank: Features, query: Features) -> ProbeScores:
        """Raises: UserError for features of different width, without labels or with ones of no known kind, that are
        not finite, or without a row.
        """


class FieldProbe(Probe):
    """A probe of one field of the batches: classes, tags or numbers, by its dtype.

    Args:
        field: its name. Beside the labels this may be any other that says something of a whole sample, such as how the
            camera moved between two views.
    """

    def __init__(self, field: str) -> None:
        self.field, self.reads = field, (field,)

    def require(self, features: Features) -> None:
        if (labels := self._labels_of(features)) is not None:
            kind_of(labels)

    def _labels_of(self, features: Features) -> Tensor | None:
        return features.label_N if self.field == "label" else features.fields.get(self.field)

    def _labels(self, bank: Features, query: Features) -> tuple[Tensor, Tensor]:
        """Labels of both. Raises: UserError for features of different width, or labels that are missing or of two
        kinds.
        """
        if bank.x.shape[2:] != query.x.shape[2:] or bank.x.shape[-1] != query.x.shape[-1]:
            raise UserError(
                f"features are {list(bank.x.shape[1:])} in bank and {list(query.x.shape[1:])} in query; take both from "
                "one encoder"
            )
        prepared = preprocessing_of(bank)
        if prepared is not None and preprocessing_of(query) is not None:
            require_stated("the query", query, prepared)
        known, asked = self._labels_of(bank), self._labels_of(query)
        if known is None or asked is None:
            raise UserError(f"a probe needs a {self.field} for each sample, but the bank or the query has none")
        kinds = kind_of(known), kind_of(asked)
        if kinds[0] != kinds[1]:
            raise UserError(f"{self.field}s are {kinds[0]} in bank and {kinds[1]} in query; give both the same")
        return known, asked


class KNN(FieldProbe):
    """Nearest neighbours by cosine, by `lightspan.evaluation.probes.knn`: they vote for a class, or their tags or
    numbers are averaged.

    Args:
        k: neighbours, from 1 to the number of rows of the bank.
        temperature: of the votes, above 0; None for equal votes.
        field: as in `FieldProbe`.
    """

    def __init__(self, k: int = 20, temperature: float | None = 0.07, field: str = "label") -> None:
        super().__init__(field)
        if k < 1:
            raise UserError(f"KNN k={k} must be at least 1")
        if temperature is not None and not 0 < temperature < math.inf:
            raise UserError(f"KNN temperature={temperature} must be finite and above 0, or null for equal votes")
        self.k, self.temperature = k, temperature

    def fit(self, bank: Features, query: Features) -> ProbeScores:
        known, asked = self._labels(bank, query)
        if kind_of(known) == "classes":
            accuracy = knn_accuracy(bank.rows(), known, query.rows(), asked, k=self.k, temperature=self.temperature)
            scores = {"accuracy": accuracy}
        else:
            values_NE = known.double().view(len(known), -1)
            means_ME = knn_mean(bank.rows(), values_NE, query.rows(), k=self.k, temperature=self.temperature)
            scores = probe_scores(means_ME, asked)
        return ProbeScores(scores, len(bank), len(query))


class LinearProbe(FieldProbe):
    """The regression of `lightspan.evaluation.probes.linear_probe`: logistic for classes and tags, ridge for numbers;
    the result keeps its weights.

    Args:
        l2: penalty, finite and above 0; of several, the best one on a fifth of the bank, with which the whole bank is
            then fitted.
        max_iterations: of L-BFGS, at least 1.
        field: as in `FieldProbe`.
    """

    def __init__(self, l2: float | Sequence[float] = 1.0, max_iterations: int = 100, field: str = "label") -> None:
        super().__init__(field)
        self.l2 = settings_of("LinearProbe l2", l2)
        if max_iterations < 1:
            raise UserError(f"LinearProbe max_iterations={max_iterations} must be at least 1")
        self.max_iterations = max_iterations

    def fit(self, bank: Features, query: Features) -> ProbeScores:
        known, asked = self._labels(bank, query)
        x_ND = bank.rows()

        def fitted(rows: Tensor | slice, l2: float) -> tuple[Tensor, Tensor]:
            return fit_linear_probe(x_ND[rows], known[rows], l2, self.max_iterations)

        best, chosen = 0, {}
        if len(self.l2) > 1:
            held = rows_to_choose_by(len(bank))
            best = best_of([_scored(fitted(~held, l2), x_ND[held], known[held]) for l2 in self.l2])
            chosen = {"l2": self.l2[best]}
        weight_DC, bias_C = fitted(slice(None), self.l2[best])
        scores = _scored((weight_DC, bias_C), query.rows(), asked)
        return ProbeScores(scores, len(bank), len(query), chosen, tensors={"weight": weight_DC, "bias": bias_C})


class AttentiveProbe(FieldProbe):
    """Attention over tokens, then a linear layer, by `lightspan.evaluation.probes.attentive_probe`.

    Args:
        rate: learning rate, finite and above 0; several are trained at once on four fifths of the bank, and the head
            that is best on the rest is scored.
        steps: of training, at least 1.
        batch_size: rows of a step, at least 1.
        weight_decay: at least 0 and finite.
        heads: of the attention, at least 1; see `AttentionPool`.
        seed: of the weights and the order of rows, at least 0.
        field: as in `FieldProbe`.
    """

    reads_tokens = True

    def __init__(
        self,
        rate: float | Sequence[float] = 3e-3,
        steps: int = 200,
        batch_size: int = 128,
        weight_decay: float = 0.01,
        heads: int = 8,
        seed: int = 0,
        field: str = "label",
    ) -> None:
        super().__init__(field)
        self.rate = settings_of("AttentiveProbe rate", rate)
        for name, value, least in (
            ("steps", steps, 1), ("batch_size", batch_size, 1), ("heads", heads, 1), ("seed", seed, 0),
        ):  # fmt: skip
            if value < least:
                raise UserError(f"AttentiveProbe {name}={value} must be at least {least}")
        if not 0 <= weight_decay < math.inf:
            raise UserError(f"AttentiveProbe weight_decay={weight_decay} must be at least 0 and finite")
        self.steps, self.batch_size, self.weight_decay = steps, batch_size, weight_decay
        self.heads, self.seed = heads, seed

    def fit(self, bank: Features, query: Features) -> ProbeScores:
        known, asked = self._labels(bank, query)
        x_NTD, query_MTD = (_tokens(features.x) for features in (bank, query))
        several = len(self.rate) > 1
        held = rows_to_choose_by(len(bank)) if several else torch.zeros(len(bank), dtype=torch.bool)
        heads = fit_attentive_heads(
            x_NTD[~held], known[~held], self.rate, self.steps, self.batch_size, self.weight_decay, self.heads, self.seed
        )

        def scored(head: Callable[[Tensor], Tensor], tokens: Tensor, labels: Tensor) -> dict[str, float]:
            parts = [head(part.float()) for part in tokens.split(1024)]
            return probe_scores(torch.cat(parts) if parts else tokens.flatten(1), labels)

        best = best_of([scored(head, x_NTD[held], known[held]) for head in heads]) if several else 0
        scores, chosen = scored(heads[best], query_MTD, asked), {"rate": self.rate[best]} if several else {}
        return ProbeScores(scores, len(bank), len(query), chosen, tensors=heads[best].state_dict())


def _tokens(x: Tensor) -> Tensor:
    """[N T D]; a vector is one token."""
    return x.unsqueeze(1) if x.ndim == 2 else x.flatten(1, -2)


def _scored(map_: tuple[Tensor, Tensor], x_MD: Tensor, labels: Tensor) -> dict[str, float]:
    weight_DC, bias_C = map_
    return probe_scores(x_MD.to(weight_DC.dtype) @ weight_DC + bias_C, labels)


def best_of(of_settings: Sequence[dict[str, float]]) -> int:
    """The setting with the highest first score; of equal ones the first. One without a score is never better."""
    firsts = [next(iter(scores.values()), -math.inf) for scores in of_settings]
    return firsts.index(max(firsts))


def settings_of(what: str, value: float | Sequence[float]) -> tuple[float, ...]:
    values = (value,) if isinstance(value, int | float) else tuple(value)
    if not values or not all(0 < one < math.inf for one in values):
        raise UserError(f"{what}={value} must be above 0 and finite, a number or a list of them")
    return values
