"""Classifiers of frozen features that need no training: nearest class mean, discriminant analysis, and with text.

Shapes: N rows, D features, C classes.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightspan.analysis.closed_form import Discriminant, EmpiricalBayes, HeadRule, LinearHead, NearestMean, Precision
from lightspan.analysis.rows import unit_rows
from lightspan.drawing import COLOURS
from lightspan.errors import UserError
from lightspan.estimators.estimator import Estimator
from lightspan.estimators.probes import ProbeScores
from lightspan.features.features import Features
from lightspan.features.stream import FeatureStream
from lightspan.results import Figure, Result

DECADES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 1e1, 1e2)


class NMC(Estimator):
    """Nearest class mean (arXiv 2210.04428). The result keeps weights, biases and labels of the classes.

    Args:
        cosine: the largest cosine wins, and not the smallest distance.
        normalise: scale rows to length 1 before means are taken, as the paper does.
    """

    def __init__(self, cosine: bool = False, normalise: bool = True) -> None:
        self.cosine, self.normalise = cosine, normalise

    def fit(self, bank: Features, query: Features) -> ProbeScores:
        """Raises: UserError for sets without rows or classes, of different width, or that are not finite."""
        return _classified(NearestMean(self.cosine), bank, query, self.normalise)


class GDA(Estimator):
    """Gaussian discriminant analysis with one covariance (arXiv 2402.04087). The result keeps weights, biases, labels.

    Args:
        precision: None is the paper's, `lightspan.analysis.closed_form.EmpiricalBayes`.
        normalise: scale rows to length 1 first, as the paper does.
    """

    def __init__(self, precision: Precision | None = None, normalise: bool = True) -> None:
        self.precision, self.normalise = precision or EmpiricalBayes(), normalise

    def fit(self, bank: Features, query: Features) -> ProbeScores:
        """Raises: UserError as `NMC`."""
        return _classified(Discriminant(self.precision), bank, query, self.normalise)


@dataclass(frozen=True)
class EnsembleAccuracy(Result):
    """Shares of the query that are classified right by the text alone, by the images alone, and by both together."""

    accuracy: float
    text_accuracy: float
    image_accuracy: float
    alpha: float
    bank_rows: int
    query_rows: int

    def figures(self) -> tuple[Figure, ...]:
        return (
            Figure("accuracy", 100 * self.accuracy, "%"),
            Figure("accuracy of the text head", 100 * self.text_accuracy, "%"),
            Figure("accuracy of discriminant analysis", 100 * self.image_accuracy, "%"),
            Figure("alpha", self.alpha),
            Figure("rows of bank", self.bank_rows),
            Figure("rows of query", self.query_rows),
        )


class GDAWithText(Estimator):
    """GDA-CLIP (arXiv 2402.04087): scores `scale` * x T + alpha (x W + b), of rows at length 1.

    T has a column for each class, the mean of its texts' features, each at length 1, scaled to length 1. Alpha is the
    one of a few decades that classifies `val` best, the smallest of equals; `val` has rows of its own, since those of
    `query` would flatter the result. All are features of one encoder of images and texts.

    Args:
        scale: inverse temperature of the encoder, > 0; CLIP's is 100.
        precision: as in `GDA`.
    """

    def __init__(self, scale: float = 100.0, precision: Precision | None = None) -> None:
        if not 0 < scale < math.inf:
            raise UserError(f"GDAWithText scale={scale} must be finite and above 0")
        self.scale, self.precision = scale, precision or EmpiricalBayes()

    def fit(self, bank: Features, val: Features, query: Features, text: Features) -> EnsembleAccuracy:
        """Raises: UserError as `NMC`, and for classes of the bank without a text or the other way round."""
        images = Discriminant(self.precision).head(bank.moments(by_class=True, unit=True))
        zero_shot = NearestMean(cosine=True).head(text.moments(by_class=True, unit=True))
        alpha = chosen_alpha(self.scale, zero_shot, images, val)
        both = together(self.scale, zero_shot, alpha, images)
        return EnsembleAccuracy(
            accuracy=share_right(both, query, True),
            text_accuracy=share_right(zero_shot, query, True),
            image_accuracy=share_right(images, query, True),
            alpha=alpha,
            bank_rows=len(bank),
            query_rows=len(query),
            tensors=_tensors(both),
        )


def together(scale: float, text: LinearHead, alpha: float, images: LinearHead) -> LinearHead:
    """scale * text + alpha * images. Raises: UserError for heads of different classes."""
    if not torch.equal(images.class_C, text.class_C):
        raise UserError(
            f"the bank has {len(images.class_C)} classes and the texts describe {len(text.class_C)}, not the same "
            "ones; give each class an image and a text"
        )
    weight_DC = scale * text.weight_DC + alpha * images.weight_DC
    return LinearHead(weight_DC, scale * text.bias_C + alpha * images.bias_C, images.class_C)


def chosen_alpha(scale: float, text: LinearHead, images: LinearHead, val: Features) -> float:
    """The one of `DECADES` whose ensemble classifies `val` best, the smallest of equals."""
    found = [share_right(together(scale, text, alpha, images), val, True) for alpha in DECADES]
    return DECADES[found.index(max(found))]


@dataclass(frozen=True)
class IncrementalAccuracy(Result):
    """What a learner of one task after the other knew, task by task.

    Attributes:
        correct: for each task k that has been learned, the test rows of tasks 0 to k that were classified right then.
        rows: test rows of each task.
    """

    correct: tuple[tuple[int, ...], ...]
    rows: tuple[int, ...]

    def after_task(self) -> list[float]:
        """A_k, the share of right answers on all classes seen until task k."""
        return [sum(right) / sum(self.rows[: len(right)]) for right in self.correct]

    def forgetting(self) -> float:
        """Mean over all tasks but the last of the best share ever minus that at the end; 0 for one task."""
        lost = [
            (max(right[task] for right in self.correct[task:]) - self.correct[-1][task]) / self.rows[task]
            for task in range(len(self.rows) - 1)
        ]
        return sum(lost) / len(lost) if lost else 0.0

    def figures(self) -> tuple[Figure, ...]:
        accuracies = self.after_task()
        return (
            Figure("accuracy after the last task", 100 * accuracies[-1], "%"),
            Figure("average incremental accuracy", 100 * sum(accuracies) / len(accuracies), "%"),
            Figure("forgetting", 100 * self.forgetting(), "points"),
            Figure("tasks", len(self.rows)),
        )

    def table(self) -> tuple[dict[str, Any], ...]:
        return tuple(
            {"after task": k, "on task": task, "accuracy": right[task] / self.rows[task]}
            for k, right in enumerate(self.correct)
            for task in range(len(right))
        )

    def draw(self, axes: Any) -> None:
        """A line for each task from where it was learned, and one for all classes seen."""
        accuracies, learned = self.after_task(), len(self.correct)
        for task in range(learned):
            shares = [100 * right[task] / self.rows[task] for right in self.correct[task:]]
            colour = COLOURS[1 + task % (len(COLOURS) - 1)]
            axes.plot(range(task + 1, learned + 1), shares, color=colour, linewidth=1.0, marker=".", alpha=0.8)
            axes.annotate(f" {task + 1}", (learned, shares[-1]), color=colour, fontsize=7, va="center")
        axes.plot(range(1, learned + 1), [100 * a for a in accuracies], color=COLOURS[0], linewidth=2.5, marker="o")
        axes.set_xticks(range(1, learned + 1))
        axes.set_xlabel("tasks learned (thick: all classes seen; thin: each task)")
        axes.set_ylabel("accuracy, %")


class ClassIncremental(Estimator):
    """Learns task by task from statistics of classes alone, which only ever add up, and is tested after each task on
    the test samples of all tasks so far. Tasks bring new classes, or the same ones in another domain.

    Args:
        rule: makes the head; None is `lightspan.analysis.closed_form.NearestMean`, the learner of arXiv 2210.04428.
        normalise: scale rows to length 1 first.
    """

    def __init__(self, rule: HeadRule | None = None, normalise: bool = True) -> None:
        self.rule, self.normalise = rule or NearestMean(), normalise

    def fit(self, stream: FeatureStream) -> IncrementalAccuracy:
        """Raises: UserError for a task without training or test rows, and as `NMC`."""
        sizes = [(len(bank), len(query)) for bank, query in zip(stream.banks, stream.queries, strict=True)]
        if not sizes or not all(map(all, sizes)):
            raise UserError(f"each task needs training and test samples; those of the tasks number {sizes}")
        moments, correct = None, []
        for task, bank in enumerate(stream.banks):
            own = bank.moments(by_class=True, unit=self.normalise)
            moments = own if moments is None else moments + own
            head = self.rule.head(moments)
            correct.append(tuple(_correct(head, query, self.normalise) for query in stream.queries[: task + 1]))
        return IncrementalAccuracy(tuple(correct), tuple(map(len, stream.queries)))


def _classified(rule: HeadRule, bank: Features, query: Features, normalise: bool) -> ProbeScores:
    head = rule.head(bank.moments(by_class=True, unit=normalise))
    scores = {"accuracy": share_right(head, query, normalise)}
    return ProbeScores(scores, len(bank), len(query), tensors=_tensors(head))


def _tensors(head: LinearHead) -> dict[str, Tensor]:
    return {"weight": head.weight_DC, "bias": head.bias_C, "classes": head.class_C}


def share_right(head: LinearHead, features: Features, normalise: bool) -> float:
    """Share of the rows, scaled to length 1 or not, that a head classifies right. Raises: UserError without rows."""
    if not len(features):
        raise UserError("a classifier got no rows to classify; give at least one")
    return _correct(head, features, normalise) / len(features)


def _correct(head: LinearHead, features: Features, normalise: bool) -> int:
    x_ND = features.rows()
    return head.correct(unit_rows(x_ND) if normalise else x_ND, features.classes())
