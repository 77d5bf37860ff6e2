"""How many labels an encoder saves: linear heads on frozen features, with few labels and many, beside a reference.

Ge, Tang, Fan, Jin, "On the Provable Advantage of Unsupervised Pretraining", ICLR 2024, arXiv 2303.01566: a head on
features that were learned without labels needs fewer of them than one on raw samples. What they assume is that features
tell of the labels. Whether they do is a fact of the task, so there is a control, whose labels are the direction of the
reference's features that the encoder leaves out most: there it has to lose.
Shapes: N rows of the bank, M of the query, D and E features of encoder and reference, R leading directions.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightspan.core.drawing import COLOURS, SOFT
from lightspan.core.errors import UserError
from lightspan.core.results import Figure, Result
from lightspan.evaluation.estimator import Estimator
from lightspan.evaluation.features.compared import ComparedFeatures
from lightspan.evaluation.features.features import Features
from lightspan.evaluation.geometry.spectra import centred
from lightspan.evaluation.label_saving.curves import saving, worth
from lightspan.evaluation.labels import kind_of, require_different
from lightspan.evaluation.probes.linear_probe import fit_linear_probe
from lightspan.evaluation.probes.probe_scores import probe_scores, rows_to_choose_by
from lightspan.evaluation.probes.probes import best_of, settings_of
from lightspan.evaluation.scale import scaled
from lightspan.evaluation.scaling_laws import bootstrapped

DIRECTIONS = 20
"""Leading ones of the reference's features among which the control's labels are sought."""
LEFT_OUT = 0.1
"""Share of a direction that an encoder has to leave out: below, there are no labels of which it tells nothing."""
FEWEST = 10
"""Rows of the bank."""


def left_out(reference_NE: Tensor, encoder_ND: Tensor, l2: float = 1.0) -> tuple[Tensor, float]:
    """(v [E], share): of the combinations of the reference's leading directions, each weighted alike, the one that
    ridge regression on the encoder's features explains least on a fifth of the rows, and how much it leaves of it.

    Features are scaled near 1. v belongs to centred rows, whose x v have variance 1.
    """
    centred_NE = centred(reference_NE)
    _, values_S, right_SE = torch.linalg.svd(centred_NE, full_matrices=False)
    rank = min(DIRECTIONS, int((values_S > 1e-6 * values_S[:1]).sum()))
    if not rank:
        return torch.zeros_like(centred_NE[0]), 0.0
    whiten_ER = right_SE[:rank].T * (len(reference_NE) ** 0.5 / values_S[:rank])
    target_NR = centred_NE @ whiten_ER
    held_N = rows_to_choose_by(len(target_NR))
    weight_DR, bias_R = fit_linear_probe(encoder_ND[~held_N], target_NR[~held_N], l2)
    residual_HR = target_NR[held_N] - encoder_ND[held_N] @ weight_DR - bias_R
    own_HR = target_NR[held_N]
    # The largest share of residual in own variance: a generalised eigenproblem, with a little of the identity, since a
    # fifth of the rows may be fewer than R.
    own_RR, residual_RR = (part.T @ part / len(part) for part in (own_HR, residual_HR))
    lower_RR = torch.linalg.cholesky(own_RR + 0.1 * torch.eye(rank, dtype=own_RR.dtype))
    half_RR = torch.linalg.solve_triangular(lower_RR, residual_RR, upper=False)
    _, vectors_RR = torch.linalg.eigh(torch.linalg.solve_triangular(lower_RR, half_RR.T, upper=False))
    direction_R = torch.linalg.solve_triangular(lower_RR.T, vectors_RR[:, -1:], upper=True)[:, 0]
    direction_R = direction_R / direction_R.norm()
    own = float((own_HR @ direction_R).square().mean())
    share = float((residual_HR @ direction_R).square().mean()) / own if own > 0 else 0.0
    return whiten_ER @ direction_R, min(1.0, share)


@dataclass(frozen=True)
class SavedLabels(Result):
    """What labels buy, encoder by encoder; see `lightspan.evaluation.label_saving.label_saving`.

    Attributes:
        score: what is measured: `accuracy`, `r2` or `mean_average_precision`.
        chance: the score of the best constant, the floor.
        reference: the encoder that the others are compared with.
        savings: for each other encoder: encoder; factor, how many times as many labels the reference needs for the same
            score, at the best one that both have, None where that is not above `chance`; bound, "", or "at least" or
            "at most" where the curves do not tell; low and high, ends of its 95 % interval over draws, None of one draw
            and on the side of the bound; left_out, the share of the control's labels of which the encoder tells
            nothing; control and control_reference, R^2 with all labels of both, None where less than a tenth is left
            out.
        rows: mappings with encoder, labels, score (mean over draws), error (its standard error), worth (labels with
            which the reference has that score, over these; see `lightspan.evaluation.label_saving.curves.worth`) and
            worth_bound.
        bank_rows, query_rows: how many.
    """

    score: str
    chance: float
    reference: str
    savings: tuple[dict[str, Any], ...]
    rows: tuple[dict[str, Any], ...]
    draws: int
    bank_rows: int
    query_rows: int

    def figures(self) -> tuple[Figure, ...]:
        shown, unit = self.score.replace("_", " "), "" if self.score == "r2" else "%"
        factor = 100 if unit else 1
        most = max(row["labels"] for row in self.rows)
        best = {row["encoder"]: row["score"] for row in sorted(self.rows, key=lambda row: row["score"])}
        found = []
        for one in self.savings:
            name = f"{one['encoder']} over {self.reference}"
            if one["factor"] is not None:
                found.append(Figure(f"labels saved, {_bounded(one['bound'])}, {name}", one["factor"]))
            else:
                found += [
                    Figure(f"labels saved cannot be told, best {shown} of {each}", factor * best[each], unit)
                    for each in (one["encoder"], self.reference)
                    if best[each] <= self.chance
                ]
            found += [
                Figure(f"{end} of 95 %, {name}", one[key])
                for key, end in (("low", "low end"), ("high", "high end"))
                if one[key] is not None
            ]
            found.append(Figure(f"left out of the control's labels by {one['encoder']}", 100 * one["left_out"], "%"))
            if one["control"] is not None:
                found += [
                    Figure(f"control: R2 of {who} for what {one['encoder']} leaves out", one[key])
                    for key, who in (("control", one["encoder"]), ("control_reference", self.reference))
                ]
        return (
            *found,
            *(
                Figure(
                    f"labels of {self.reference} that {row['labels']} of {row['encoder']} are worth"
                    f"{row['worth_bound'] and ', '}{row['worth_bound']}",
                    row["worth"] * row["labels"],
                )
                for row in self.rows
                if row["encoder"] != self.reference
            ),
            *(
                Figure(f"{shown} with {most} labels, {row['encoder']}", factor * row["score"], unit)
                for row in self.rows
                if row["labels"] == most
            ),
            Figure(f"floor: {shown} of the best constant", factor * self.chance, unit),
            Figure("draws", self.draws),
            Figure("rows of bank", self.bank_rows),
            Figure("rows of query", self.query_rows),
        )

    def table(self) -> tuple[dict[str, Any], ...]:
        return tuple({**row, "floor": self.chance} for row in self.rows)

    def draw(self, axes: Any) -> None:
        for name, colour in zip(dict.fromkeys(row["encoder"] for row in self.rows), COLOURS * 9, strict=False):
            own = [row for row in self.rows if row["encoder"] == name]
            x, y, error = ([row[key] for row in own] for key in ("labels", "score", "error"))
            axes.errorbar(x, y, yerr=error, fmt="-o", color=colour, markersize=3, capsize=2, label=name)
        axes.axhline(self.chance, color=SOFT, linewidth=1, linestyle=":", label="floor: the best constant")
        axes.set(xlabel="labels", ylabel=self.score.replace("_", " "), xscale="log")
        counts = sorted({row["labels"] for row in self.rows})
        axes.set_xticks(counts, [f"{count:,}" for count in counts], rotation=45, ha="right", fontsize=8)
        axes.minorticks_off()
        axes.legend(frameon=False, fontsize=8)


def _bounded(bound: str) -> str:
    return f"{bound} a factor of".strip()


class LabelSaving(Estimator):
    """The label-saving factor of encoders, with an interval and a negative control.

    Numbers of labels are the first rows of a random order of the bank, so that those with fewer lie inside those with
    more; each draw has another order. All encoders get the same rows. Classes, tags and numbers may be labels.

    Args:
        reference: the name of the encoder that the others are compared with; "" takes the first.
        labels: ascending, at least 2 each; None doubles from 16 up to the bank, which is the last.
        draws: at least 1; from 2 on there are intervals.
        l2: of the heads, as in `lightspan.evaluation.probes.linear_probe`, above 0; of several, the best one on a fifth
            of the labels that a head has.
        max_iterations: of a head of classes, at least 1.
        seed: of the orders, at least 0.
    """

    def __init__(
        self,
        reference: str = "",
        labels: Sequence[int] | None = None,
        draws: int = 5,
        l2: float | Sequence[float] = 1.0,
        max_iterations: int = 50,
        seed: int = 0,
    ) -> None:
        if labels is not None and (not labels or min(labels) < 2 or sorted(set(labels)) != [*labels]):
            raise UserError(f"LabelSaving labels={[*labels]} must be ascending numbers of at least 2")
        for name, value, least in (("draws", draws, 1), ("max_iterations", max_iterations, 1), ("seed", seed, 0)):
            if value < least:
                raise UserError(f"LabelSaving {name}={value} must be at least {least}")
        self.reference, self.labels, self.draws = reference, None if labels is None else tuple(labels), draws
        self.l2, self.max_iterations, self.seed = settings_of("LabelSaving l2", l2), max_iterations, seed

    def fit(self, compared: ComparedFeatures) -> SavedLabels:
        """Raises: UserError for an unknown reference, fewer than 10 rows or fewer than labels are asked for, features
        that are not finite or not vectors, and labels that are missing, all alike or of no known kind.
        """
        names = [*compared.banks]
        reference = self.reference or names[0]
        if reference not in names:
            raise UserError(f"LabelSaving reference={reference} must be one of the encoders {', '.join(names)}")
        banks, queries = self._rows(compared)
        first, query = compared.banks[reference], compared.queries[reference]
        known, asked = _labels("bank", first), _labels("query", query)
        count = len(known)
        if count < FEWEST:
            raise UserError(f"LabelSaving got {count} rows in the bank, but needs {FEWEST}")
        for which, labels in (("bank", known), ("query", asked)):
            require_different(f"LabelSaving, {which}", labels)
        numbers = self._numbers(count)
        orders = [
            torch.randperm(count, generator=torch.Generator().manual_seed(self.seed + i)) for i in range(self.draws)
        ]
        scores = {name: self._curves(banks[name], known, queries[name], asked, numbers, orders) for name in names}
        score = next(iter(probe_scores(_constant(known, asked), asked)))
        chance = probe_scores(_constant(known, asked), asked)[score]
        savings = []
        for name in names:
            if name == reference:
                continue
            both = scores[reference], scores[name]
            savings.append(
                {"encoder": name} | _saved(numbers, *both, chance) | self._control(banks, queries, reference, name)
            )
        risks = {name: _risks(curve_SK.mean(axis=0), chance) for name, curve_SK in scores.items()}
        worths = {name: worth(numbers, risks[reference], risk_K) for name, risk_K in risks.items()}
        rows = tuple(
            {
                "encoder": name,
                "labels": labels,
                "score": float(curve_SK[:, k].mean()),
                "error": float(curve_SK[:, k].std(ddof=1) / self.draws**0.5) if self.draws > 1 else 0.0,
            }
            | dict(zip(("worth", "worth_bound"), worths[name][k], strict=True))
            for name, curve_SK in scores.items()
            for k, labels in enumerate(numbers)
        )
        return SavedLabels(score, chance, reference, tuple(savings), rows, self.draws, count, len(asked))

    def _rows(self, compared: ComparedFeatures) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Rows of bank and query by encoder, in float64, near 1."""
        banks, queries = dict[str, Tensor](), dict[str, Tensor]()
        for name, bank in compared.banks.items():
            query = compared.queries[name]
            for other, own in ((compared.banks, bank), (compared.queries, query)):
                _require_same(name, own, next(iter(other.values())))
            rows = [features.rows() for features in (bank, query)]
            if rows[0].shape[1] != rows[1].shape[1] or not rows[0].shape[1]:
                raise UserError(f"LabelSaving: {name} has {[x.shape[1] for x in rows]} features in bank and query")
            if not all(x.isfinite().all() for x in rows):
                raise UserError(f"LabelSaving: features of {name} are NaN or infinite; the model has diverged")
            banks[name], queries[name] = (x.cpu() for x in scaled(*rows)[1])
        return banks, queries

    def _numbers(self, count: int) -> list[int]:
        if self.labels is not None:
            if self.labels[-1] > count:
                raise UserError(f"LabelSaving labels={[*self.labels]} must be at most {count}, the rows of the bank")
            return [*self.labels]
        doubled = [16 * 2**i for i in range(40) if 16 * 2**i < count]
        return [*(doubled or [count // 2]), count]

    def _curves(
        self, x_ND: Tensor, known: Tensor, query_MD: Tensor, asked: Tensor, numbers: list[int], orders: list[Tensor]
    ) -> np.ndarray:
        """Scores of heads, [draws numbers]."""
        return np.array(
            [[self._score(x_ND[order[:n]], known[order[:n]], query_MD, asked) for n in numbers] for order in orders]
        )

    def _score(self, x_nD: Tensor, known: Tensor, query_MD: Tensor, asked: Tensor) -> float:
        best = 0
        if len(self.l2) > 1 and len(known) >= FEWEST:
            held = rows_to_choose_by(len(known))
            found = [self._head(x_nD[~held], known[~held], l2, x_nD[held]) for l2 in self.l2]
            best = best_of([probe_scores(_wide_enough(each, known[held]), known[held]) for each in found])
        predicted = self._head(x_nD, known, self.l2[best], query_MD)
        return next(iter(probe_scores(_wide_enough(predicted, asked), asked).values()))

    def _head(self, x_nD: Tensor, known: Tensor, l2: float, query_MD: Tensor) -> Tensor:
        weight_DC, bias_C = fit_linear_probe(x_nD, known, l2, self.max_iterations)
        return query_MD @ weight_DC + bias_C

    def _control(
        self, banks: dict[str, Tensor], queries: dict[str, Tensor], reference: str, name: str
    ) -> dict[str, float | None]:
        l2 = self.l2[-1]
        direction_E, share = left_out(banks[reference], banks[name], l2)
        known, asked = banks[reference] @ direction_E, queries[reference] @ direction_E
        found: dict[str, float | None] = {"left_out": share, "control": None, "control_reference": None}
        if share < LEFT_OUT or not float(asked.var(correction=0)) > 0:
            return found
        for key, each in (("control", name), ("control_reference", reference)):
            found[key] = probe_scores(self._head(banks[each], known, l2, queries[each]), asked)["r2"]
        return found


def _risks(score_K: np.ndarray, chance: float) -> np.ndarray:
    """What is missing to 1. A head that is below the best constant has the risk of that, which takes no label."""
    return np.minimum(1 - score_K, 1 - chance)


def _saved(numbers: Sequence[int], reference_SK: np.ndarray, score_SK: np.ndarray, chance: float) -> dict[str, Any]:
    """Factor, bound, and ends of the interval over draws."""
    both = reference_SK, score_SK
    if min(float(curve_SK.mean(axis=0).max()) for curve_SK in both) <= chance:
        return {"factor": None, "bound": "", "low": None, "high": None}

    def factor(share_S: np.ndarray) -> tuple[float, str]:
        return saving(numbers, *(_risks(share_S @ curve_SK, chance) for curve_SK in both))

    draws = len(reference_SK)
    found, bound = factor(np.full(draws, 1 / draws))
    interval = bootstrapped(lambda share_S: math.log(factor(share_S)[0]), draws)
    ends = {"low": interval.low if bound != "at most" else None, "high": interval.high if bound != "at least" else None}
    return {"factor": found, "bound": bound} | {key: None if x is None else math.exp(x) for key, x in ends.items()}


def _wide_enough(predicted: Tensor, asked: Tensor) -> Tensor:
    """Scores of classes that no label has taught are the least of all: with few labels a class may be missing."""
    if asked.dtype != torch.int64 or not len(asked):
        return predicted
    missing = int(asked.max()) + 1 - predicted.shape[1]
    return torch.nn.functional.pad(predicted, (0, max(0, missing)), value=float(predicted.min()) - 1)


def _constant(known: Tensor, asked: Tensor) -> Tensor:
    """What the best constant predicts for each row of the query."""
    if kind_of(known) == "classes":
        shares = known.bincount().double()
    else:
        shares = known.double().view(len(known), -1).mean(dim=0)
    return _wide_enough(shares.expand(len(asked), -1), asked)


def _labels(which: str, features: Features) -> Tensor:
    if features.label_N is None:
        raise UserError(f"LabelSaving needs labels, and the {which} has none; take labelled data")
    kind_of(features.label_N)
    return features.label_N.cpu()


def _require_same(name: str, own: Features, first: Features) -> None:
    index = (own.index_N, first.index_N)
    different = index[0] is not None and index[1] is not None and not torch.equal(*index)  # type: ignore[arg-type]
    if len(own) != len(first) or different:
        raise UserError(f"LabelSaving: {name} has other samples than the first encoder; take all from the same")
