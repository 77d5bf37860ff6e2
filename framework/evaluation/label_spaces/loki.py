"""Loki: predict the label that is nearest to all classes a classifier knows, weighed by their probabilities.

Source: Roberts, Li, Adila, Cromp, Huang, Zhao, Sala, "Geometry-Aware Adaptation for Pretrained Models", NeurIPS 2023,
arXiv 2307.12226, and the authors' code. The weighted Frechet mean of the label metric takes the place of argmax:

    y = argmin over all N labels of sum_k P_k D(y, observed_k)^2

so that labels which were never trained on are predicted too, and the expected squared distance falls. With distances of
1 between all labels it is argmax. Of equal labels the first one wins. A common factor of P or of D changes nothing, so
probabilities need not sum to 1; but where each class has a scale of its own, the inflated ones win.

The locus of the observed labels are those that some P predicts: in a tree whose nodes are all labels the paths between
them, in general those for which a linear program has a solution. A set covers the labels if its locus has all of them.
Shapes: B rows, K observed labels, N labels of the metric.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.optimize import linprog
from torch import Tensor

from lightspan.core.drawing import COLOURS, SOFT, canvas, png
from lightspan.core.errors import UserError
from lightspan.core.results import Figure, Result
from lightspan.evaluation.estimator import Estimator
from lightspan.evaluation.features.features import Features
from lightspan.evaluation.gaussians.closed_form import HeadRule, LinearHead
from lightspan.evaluation.label_spaces.label_metrics import BLOCK, GraphMetric, LabelMetric
from lightspan.evaluation.label_spaces.layout import plane_layout
from lightspan.evaluation.probes.linear_probe import fit_linear_probe
from lightspan.evaluation.rows import unit_rows

MOST = 300
"""Labels for each of which a linear program is solved."""


def frechet_labels(p_BK: Tensor, observed_K: Tensor, metric: LabelMetric) -> Tensor:
    """The label of each row, int64 [B]; never more than a block of P @ D^2 is held.

    Args:
        p_BK: weights of the observed labels, at least 0.
        observed_K: their numbers in the metric.
    Raises: UserError without an observed label, for another number of them, numbers outside the metric, or weights that
        are negative or not finite.
    """
    require_observed(observed_K, metric)
    if p_BK.ndim != 2 or p_BK.shape[1] != len(observed_K):
        raise UserError(
            f"probabilities {list(p_BK.shape)} do not fit {len(observed_K)} observed labels; give one for each"
        )
    if not (p_BK.isfinite() & (p_BK >= 0)).all():
        raise UserError("probabilities of labels must be finite and at least 0; the model has diverged, or gave logits")
    p_BK = p_BK.detach().double().cpu()
    least_B = torch.full((len(p_BK),), math.inf, dtype=torch.float64)
    label_B, start = torch.zeros(len(p_BK), dtype=torch.int64), 0
    for block_Kn in metric.squared_blocks(observed_K.cpu()):
        rows = max(1, BLOCK // block_Kn.shape[1])
        for p_bK, least_b, label_b in zip(p_BK.split(rows), least_B.split(rows), label_B.split(rows), strict=True):
            cost_b, place_b = (p_bK @ block_Kn).min(dim=1)
            better_b = cost_b < least_b
            least_b[better_b], label_b[better_b] = cost_b[better_b], place_b[better_b] + start
        start += block_Kn.shape[1]
    return label_B


def locus(observed_K: Tensor, metric: LabelMetric) -> Tensor:
    """bool [N]: the labels that some probabilities of the observed ones predict; where labels tie, all of them.

    Raises: UserError for labels outside the metric, or more than `MOST` that form no tree.
    """
    require_observed(observed_K, metric)
    if isinstance(metric, GraphMetric) and metric.is_tree:
        return metric.paths(observed_K.cpu())
    if len(metric) > MOST:
        raise UserError(
            f"which of {len(metric)} labels can be predicted takes a linear program for each, of at most {MOST}; a "
            "tree whose nodes are all labels needs none"
        )
    squared_KN = metric.squared(observed_K.cpu()).numpy()
    squared_KN = squared_KN / max(squared_KN.max(), np.finfo(np.float64).tiny)
    reached_N = torch.zeros(len(metric), dtype=torch.bool)
    reached_N[observed_K] = True
    for label in (~reached_N).nonzero()[:, 0].tolist():
        reached_N[label] = _advantage(squared_KN, label) >= -1e-9
    return reached_N


def _advantage(squared_KN: np.ndarray, label: int) -> float:
    """The most by which a label can be nearer than any other, over all P: below 0 if it never is the nearest."""
    others = np.delete(squared_KN, label, axis=1)
    rows = np.concatenate([squared_KN[:, [label]] - others, np.ones((1, others.shape[1]))]).T  # of (P, advantage)
    classes = len(squared_KN)
    solved = linprog(
        np.append(np.zeros(classes), -1.0),
        A_ub=rows,
        b_ub=np.zeros(len(rows)),
        A_eq=np.append(np.ones(classes), 0.0)[None],
        b_eq=[1.0],
        bounds=[(0, 1)] * classes + [(-1, 1)],
    )
    return -float(solved.fun) if solved.success else -1.0


def next_label(observed_K: Tensor, metric: LabelMetric) -> int | None:
    """The label that is farthest from the locus, which to observe next; None if the observed ones cover all. Of equal
    ones the first. Errors are those of `locus`.
    """
    reached_N = locus(observed_K, metric)
    if reached_N.all():
        return None
    inside = reached_N.nonzero()[:, 0]
    if isinstance(metric, GraphMetric):
        return int(metric.distance_to_set(inside).argmax())
    nearest = [block_Kn.amin(dim=0) for block_Kn in metric.squared_blocks(inside)]
    # A label at distance 0 of the locus is another name of one in it, and is not farther than those.
    apart_N = torch.cat(nearest).masked_fill(reached_N, -1)
    return int(apart_N.argmax())


def require_observed(observed_K: Tensor, metric: LabelMetric) -> None:
    """Raises: UserError without an observed label, for one that occurs twice, or one outside the metric."""
    if not len(observed_K):
        raise UserError("Loki needs at least one observed label, whose probability a classifier gives")
    metric.require_numbers(observed_K, "the classifier")
    if len(observed_K.unique()) < len(observed_K):
        raise UserError(
            "an observed label occurs twice; each column of the probabilities must be of a label of its own"
        )


TEMPERATURES = tuple(2.0**power for power in range(-4, 7))
FOLDS = 5
"""Parts of the observed labels that are left out in turn where a temperature is chosen."""
INNER = "#cfd5dc"
SHOWN = 80
"""Labels in a picture, those that samples have or get first."""
KINDS = ("observed", "reachable", "not reachable", "no label")
DIRECTIONS = ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, 1), (1, -1), (-1, -1))
"""In which names are written beside their points, from left to right and from below to above."""


@dataclass(frozen=True)
class LokiScores(Result):
    """Loki beside argmax on the rows of the query, and what is known of the labels. Accuracies are in [0, 1].

    Attributes:
        squared_distance, squared_distance_argmax: mean squared distance of the predicted label to the right one.
        accuracy, accuracy_argmax: of all rows.
        unseen_accuracy: of rows whose label is not observed, where argmax has 0; None without any.
        seen_accuracy, seen_accuracy_argmax: of the other rows; None without any.
        reachable: labels that some probabilities predict; None for many labels that form no tree.
        next_label: the one to observe next, farthest from the reachable ones; None if these are all, or not known.
        places: labels of the picture: name, x, y and kind.
        edges: pairs of places that an edge joins.
        moved: where rows of labels that are not observed went: pairs of places, and the share of the label's rows.
    `tensors` has `prediction` and `prediction_argmax`, int64 [N].
    """

    squared_distance: float
    squared_distance_argmax: float
    accuracy: float
    accuracy_argmax: float
    unseen_accuracy: float | None
    seen_accuracy: float | None
    seen_accuracy_argmax: float | None
    labels: int
    observed: int
    reachable: int | None
    next_label: str | None
    temperature: float
    query_rows: int
    places: tuple[dict[str, Any], ...] = ()
    edges: tuple[tuple[int, int], ...] = ()
    moved: tuple[tuple[int, int, float], ...] = ()

    def figures(self) -> tuple[Figure, ...]:
        shares = (
            ("accuracy", self.accuracy),
            ("accuracy of argmax", self.accuracy_argmax),
            ("accuracy on unseen labels", self.unseen_accuracy),
            ("accuracy on observed labels", self.seen_accuracy),
            ("accuracy of argmax on observed labels", self.seen_accuracy_argmax),
        )
        return (
            Figure("mean squared distance", self.squared_distance),
            Figure("mean squared distance of argmax", self.squared_distance_argmax),
            *(Figure(name, 100 * share, "%") for name, share in shares if share is not None),
            Figure("labels", self.labels),
            Figure("observed labels", self.observed),
            *([] if self.reachable is None else [Figure("reachable labels", self.reachable)]),
            Figure("temperature", self.temperature),
            Figure("rows of query", self.query_rows),
        )

    def table(self) -> tuple[dict[str, Any], ...]:
        return tuple(
            {"label": self.places[one]["name"], "predicted": self.places[other]["name"], "share": share}
            for one, other, share in self.moved
        )

    def picture(self, title: str) -> bytes | None:
        """The plane of the labels, larger than the picture of other results."""
        figure, ((axes,),) = canvas(title, size=(7.2, 5.6))
        self.draw(axes)
        return png(figure)

    def draw(self, axes: Any) -> None:
        x, y = ([place[side] for place in self.places] for side in "xy")
        axes.set_axis_off()
        axes.set_aspect("equal", adjustable="datalim")
        axes.margins(0.12)
        for one, other in self.edges:
            axes.plot([x[one], x[other]], [y[one], y[other]], color=INNER, linewidth=1.0, zorder=1)
        looks = (COLOURS[0], COLOURS[0], 48), (COLOURS[2], COLOURS[2], 26), ("white", SOFT, 26), (INNER, INNER, 8)
        for kind, (face, edge, size) in zip(KINDS, looks, strict=True):
            of_kind = [number for number, place in enumerate(self.places) if place["kind"] == kind]
            if of_kind:
                axes.scatter(
                    *([side[number] for number in of_kind] for side in (x, y)),
                    s=size,
                    facecolor=face,
                    edgecolor=edge,
                    linewidth=1.2,
                    zorder=3,
                    label=f"{kind} ({len(of_kind)})" if kind != KINDS[3] else None,
                )
        for one, other, share in self.moved:
            if one != other:
                style = {
                    "arrowstyle": "-|>",
                    "color": COLOURS[1],
                    "linewidth": 0.6 + 2 * share,
                    "alpha": 0.25 + 0.6 * share,
                }
                bent = {"connectionstyle": "arc3,rad=0.18", "shrinkA": 4, "shrinkB": 5, "mutation_scale": 9}
                axes.annotate("", (x[other], y[other]), (x[one], y[one]), arrowprops=style | bent, zorder=2)
        if any(one != other for one, other, _ in self.moved):
            axes.plot([], [], color=COLOURS[1], linewidth=1.4, label="unseen, to what is predicted instead")
        axes.legend(
            frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, 0.0), ncols=4, handletextpad=0.3
        )
        self._name(axes, x, y)

    def _name(self, axes: Any, x: list[float], y: list[float]) -> None:
        """Writes names where none covers another or a point, those of labels that samples have first."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg

        figure = axes.figure
        renderer, size = FigureCanvasAgg(figure).get_renderer(), figure.dpi / 72
        figure.draw_without_rendering()  # places in pixels are known only then
        points = axes.transData.transform([*zip(x, y, strict=True)]) if x else []
        taken = [(px - 3 * size, py - 3 * size, px + 3 * size, py + 3 * size) for px, py in points]
        frame = axes.get_window_extent(renderer)
        busy = {end for one, other, _ in self.moved for end in (one, other)}
        first = sorted(range(len(x)), key=lambda i: (i not in busy, KINDS.index(self.places[i]["kind"]), i))
        for number in first:
            for reach in (5, 9):
                if (box := self._written(axes, number, x, y, reach, taken, frame, renderer)) is not None:
                    taken.append(box)
                    break

    def _written(
        self,
        axes: Any,
        number: int,
        x: list[float],
        y: list[float],
        reach: float,
        taken: list[Any],
        frame: Any,
        renderer: Any,
    ) -> tuple[float, float, float, float] | None:
        """The place of a name, in pixels, if one of the directions has room for it."""
        from matplotlib.patheffects import withStroke

        name, stroke = self.places[number]["name"], [withStroke(linewidth=2, foreground="white")]
        # Away from the middle first, where others are less in the way.
        for across, up in sorted(
            DIRECTIONS, key=lambda way: -(way[0] * x[number] + way[1] * y[number]) / math.hypot(*way)
        ):
            text = axes.annotate(
                name if len(name) <= 24 else name[:23] + "…",
                (x[number], y[number]),
                (reach * across, reach * up),
                textcoords="offset points",
                ha=("right", "center", "left")[across + 1],
                va=("top", "center", "bottom")[up + 1],
                fontsize=7.5,
                color=SOFT if self.places[number]["kind"] == KINDS[3] else "black",
                path_effects=stroke,
                parse_math=False,
                zorder=4,
            )
            text.set_in_layout(False)
            box = text.get_window_extent(renderer)
            left, low, right, high = box.x0 - 1, box.y0, box.x1 + 1, box.y1
            inside = frame.x0 <= left and right <= frame.x1 and frame.y0 <= low and high <= frame.y1
            if inside and not any(left < b[2] and right > b[0] and low < b[3] and high > b[1] for b in taken):
                return left, low, right, high
            text.remove()
        return None


class Loki(Estimator):
    """Classifies the query by a classifier of the bank's classes, the observed labels, and by the metric of all labels.

    Labels are numbers in the metric: those of the query may be ones that the bank does not have.

    Args:
        rule: makes the classifier; None is logistic regression, as the paper has it for frozen features. With
            `lightspan.evaluation.gaussians.closed_form.NearestMean` and cosines, a bank of texts of the observed
            classes makes the classifier of CLIP.
        scale: of the scores of a `rule`, above 0; CLIP's cosines have 100.
        l2: penalty of the logistic regression, above 0 and finite, see `lightspan.evaluation.probes.linear_probe`.
        temperature: of the softmax, above 0 and finite; 1 takes probabilities as they are, as the paper does. Near 0
            Loki is argmax, and a large one gives the centre of the metric. None chooses it on observed labels, of which
            each fifth is left out of the classifier in turn, on their rows in `val` or else on a fifth of the bank's
            rows. That tells little with few labels, or evenly spaced ones, each of which lies in the middle of its
            neighbours at any temperature. With one or two observed labels it is 1. The likelihood of held-out rows
            would not do: it makes separable classes infinitely overconfident, which turns Loki into argmax.
        observed: labels of the bank that the classifier learns; rows of others are left out. None takes all.
    """

    def __init__(
        self,
        rule: HeadRule | None = None,
        scale: float = 1.0,
        l2: float = 1.0,
        temperature: float | None = 1.0,
        observed: Sequence[int] | None = None,
    ) -> None:
        for name, value in (("scale", scale), ("l2", l2), ("temperature", temperature)):
            if value is not None and not 0 < value < math.inf:
                raise UserError(f"Loki {name}={value} must be above 0 and finite")
        if observed is not None and not observed:
            raise UserError("Loki observed=[] leaves no label that the classifier knows; name at least one")
        self.rule, self.scale, self.l2, self.temperature = rule, scale, l2, temperature
        self.observed = None if observed is None else list(observed)

    def fit(self, bank: Features, query: Features, metric: LabelMetric, val: Features | None = None) -> LokiScores:
        """Raises: UserError for sets without rows, of different width or that are not finite, for labels that the
        metric does not have, and `observed` ones that the bank does not have.
        """
        if self.observed is not None:
            if lacking := sorted(set(self.observed) - set(bank.classes().tolist())):
                raise UserError(f"Loki observed={lacking}: the bank has no row of these labels; leave them out")
            bank = bank.of_classes(self.observed)
        for name, features in (("bank", bank), ("query", query)):
            metric.require_numbers(features.classes(), name)
            if not len(features):
                raise UserError(f"Loki got no row in its {name}; give it at least one")
        head = self._head(bank)
        temperature = self._temperature(bank, metric, val) if self.temperature is None else self.temperature
        logits_NK = self._logits(head, query)
        observed_K, truth_N = head.class_C.cpu(), query.classes().cpu()
        found_N = frechet_labels((logits_NK / temperature).softmax(dim=1), observed_K, metric)
        argmax_N = observed_K[logits_NK.argmax(dim=1).cpu()]
        seen_N = torch.isin(truth_N, observed_K)
        small = (isinstance(metric, GraphMetric) and metric.is_tree) or len(metric) <= MOST
        reached_L = locus(observed_K, metric) if small else None
        following = next_label(observed_K, metric) if small else None
        return LokiScores(
            squared_distance=float(metric.squared_pairs(found_N, truth_N).mean()),
            squared_distance_argmax=float(metric.squared_pairs(argmax_N, truth_N).mean()),
            accuracy=_share(found_N == truth_N) or 0.0,
            accuracy_argmax=_share(argmax_N == truth_N) or 0.0,
            unseen_accuracy=_share((found_N == truth_N)[~seen_N]),
            seen_accuracy=_share((found_N == truth_N)[seen_N]),
            seen_accuracy_argmax=_share((argmax_N == truth_N)[seen_N]),
            labels=len(metric),
            observed=len(observed_K),
            reachable=None if reached_L is None else int(reached_L.sum()),
            next_label=None if following is None else metric.names[following],
            temperature=temperature,
            query_rows=len(query),
            **_pictured(metric, observed_K, reached_L, truth_N, found_N, seen_N),
            tensors={"prediction": found_N, "prediction_argmax": argmax_N},
        )

    def _head(self, bank: Features) -> LinearHead:
        if self.rule is not None:
            return self.rule.head(bank.moments(by_class=True, unit=True))
        class_C, place_N = bank.classes().unique(return_inverse=True)
        return LinearHead(*fit_linear_probe(bank.rows(), place_N, self.l2), class_C)

    def _logits(self, head: LinearHead, features: Features) -> Tensor:
        rows_ND = features.rows()
        return head.scores(rows_ND) if self.rule is None else self.scale * head.scores(unit_rows(rows_ND))

    def _temperature(self, bank: Features, metric: LabelMetric, val: Features | None) -> float:
        """The one of `TEMPERATURES` with the least squared distance, of equals the one nearest to 1, where some of the
        observed classes play labels that are not. Their rows count by the share of labels that are not observed,
        those of the others by that of the observed ones: as if all labels were alike.
        """
        class_C = bank.classes().unique()
        if val is None:
            held_N = torch.zeros(len(bank), dtype=torch.bool)
            held_N[torch.randperm(len(bank), generator=torch.Generator().manual_seed(0))[: len(bank) // 5]] = True
            bank, val = (Features(bank.rows()[rows], bank.classes()[rows]) for rows in (~held_N, held_N))
        asked = val.of_classes(class_C.tolist())
        folds = min(FOLDS, len(class_C))
        unseen = 1 - len(class_C) / len(metric)
        cost_T = torch.zeros(len(TEMPERATURES), dtype=torch.float64)
        for fold in range(folds):
            kept = [label for place, label in enumerate(class_C.tolist()) if place % folds != fold]
            part, is_kept_N = bank.of_classes(kept), torch.isin(asked.classes(), torch.tensor(kept))
            if len(kept) < 2 or not len(part) or is_kept_N.all() or not is_kept_N.any():
                continue
            head = self._head(part)
            logits_NK = self._logits(head, asked)
            for number, temperature in enumerate(TEMPERATURES):
                found_N = frechet_labels((logits_NK / temperature).softmax(dim=1), head.class_C, metric)
                squared_N = metric.squared_pairs(found_N, asked.classes())
                cost_T[number] += (1 - unseen) * squared_N[is_kept_N].mean() + unseen * squared_N[~is_kept_N].mean()
        return min(zip(cost_T.tolist(), TEMPERATURES, strict=True), key=lambda one: (one[0], abs(math.log(one[1]))))[1]


def _share(right_N: Tensor) -> float | None:
    return float(right_N.double().mean()) if len(right_N) else None


def _pictured(
    metric: LabelMetric,
    observed_K: Tensor,
    reached_L: Tensor | None,
    truth_N: Tensor,
    found_N: Tensor,
    seen_N: Tensor,
) -> dict[str, Any]:
    """The fields of the picture; of each label that is not observed the prediction that most of its rows get."""
    pairs_P2, count_P = torch.stack([truth_N, found_N], dim=1)[~seen_N].unique(dim=0, return_counts=True)
    most: dict[int, tuple[int, int]] = {}
    for (truth, found), count in zip(pairs_P2.tolist(), count_P.tolist(), strict=True):
        most[truth] = max(most.get(truth, (-1, 0)), (count, found), key=lambda one: one[0])
    rows = {truth: int((truth_N == truth).sum()) for truth in most}
    whole = metric.of_all_nodes() if isinstance(metric, GraphMetric) else metric
    wanted = [*most, *(found for _, found in most.values()), *observed_K.tolist(), *truth_N.unique().tolist()]
    wanted += range(len(metric)) if len(metric) <= SHOWN else ()
    wanted += range(len(whole)) if len(whole) <= SHOWN else ()
    shown = list(dict.fromkeys(wanted))[:SHOWN]
    place_of = {label: place for place, label in enumerate(shown)}
    shown_S = torch.tensor(shown, dtype=torch.int64)
    squared = whole.squared_pairs(shown_S.repeat_interleave(len(shown_S)), shown_S.repeat(len(shown_S)))
    at_S2 = plane_layout(squared.sqrt().view(len(shown_S), -1))
    observed = set(observed_K.tolist())

    def kind(label: int) -> str:
        if label in observed:
            return KINDS[0]
        if label >= len(metric):
            return KINDS[3]
        return KINDS[1] if reached_L is None or bool(reached_L[label]) else KINDS[2]

    edges = whole.edges.tolist() if isinstance(whole, GraphMetric) else []
    return {
        "places": tuple(
            {"name": whole.names[label], "x": x, "y": y, "kind": kind(label)}
            for label, (x, y) in zip(shown, at_S2.tolist(), strict=True)
        ),
        "edges": tuple((place_of[a], place_of[b]) for a, b in edges if a in place_of and b in place_of),
        "moved": tuple(
            (place_of[truth], place_of[found], count / rows[truth])
            for truth, (count, found) in most.items()
            if truth in place_of and found in place_of
        ),
    }
