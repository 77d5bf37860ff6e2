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

import numpy as np
import torch
from scipy.optimize import linprog
from torch import Tensor

from lightspan.analysis.label_metrics import BLOCK, GraphMetric, LabelMetric
from lightspan.errors import UserError

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
    p_BK = p_BK.double().cpu()
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
    """Raises: UserError without an observed label, for one that stands twice, or one outside the metric."""
    if not len(observed_K):
        raise UserError("Loki needs at least one observed label, whose probability a classifier gives")
    metric.require_numbers(observed_K, "the classifier")
    if len(observed_K.unique()) < len(observed_K):
        raise UserError(
            "an observed label stands twice; each column of the probabilities must be of a label of its own"
        )
