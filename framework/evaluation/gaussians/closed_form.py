"""Classifiers in closed form, from counts, means and scatter of classes: nearest mean, Gaussian discriminant analysis.

All of them are linear, score_c(x) = w_c . x + b_c, and know only the classes of which there are rows. Statistics of
batches, tasks and ranks add up (`lightspan.evaluation.geometry.moments`), so a classifier does not depend on their
order.
Sources: Janson et al., "A Simple Baseline that Questions the Use of Pretrained-Models in Continual Learning" (NMC),
2022, arXiv 2210.04428; Wang et al., "A Hard-to-Beat Baseline for Training-free CLIP-based Adaptation" (GDA), ICLR 2024,
arXiv 2402.04087. Computed in float64. Shapes: N rows, B rows of a batch, D features, C classes with rows.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightspan.core.drawing import COLOURS
from lightspan.core.errors import UserError
from lightspan.core.results import Figure, Result
from lightspan.evaluation.estimator import Estimator
from lightspan.evaluation.features.features import Features
from lightspan.evaluation.features.stream import FeatureStream
from lightspan.evaluation.geometry.moments import Moments
from lightspan.evaluation.labels import require_labels
from lightspan.evaluation.probes.probes import ProbeScores
from lightspan.evaluation.rows import unit_rows


@dataclass(frozen=True)
class LinearHead:
    """score = x W + b for each class, the largest wins.

    Attributes:
        weight_DC, bias_C: float64.
        class_C: the labels of the columns, ascending.
    """

    weight_DC: Tensor
    bias_C: Tensor
    class_C: Tensor

    def scores(self, x_BD: Tensor) -> Tensor:
        """[B C]. Raises: UserError for another width, or rows that are not finite."""
        if x_BD.shape[1] != len(self.weight_DC):
            raise UserError(
                f"rows of {x_BD.shape[1]} features do not fit a head of {len(self.weight_DC)}; take both from one "
                "encoder"
            )
        if not x_BD.isfinite().all():
            raise UserError("features contain NaN or infinite values, which belong to no class; the model has diverged")
        return x_BD.to(self.weight_DC) @ self.weight_DC + self.bias_C

    def correct(self, x_BD: Tensor, label_B: Tensor) -> int:
        """Rows that are classified right; those of a class that the head does not know are not."""
        require_labels("a head", x_BD, label_B)
        return int((self.class_C[self.scores(x_BD).argmax(dim=1)] == label_B.to(self.class_C)).sum())


class HeadRule(ABC):
    """Makes a head from the statistics of classes."""

    def head(self, moments: Moments) -> LinearHead:
        """Raises: UserError without rows, or where float64 does not hold the result."""
        there_C = moments.count_C > 0
        if not there_C.any() or not moments.mean_CD.shape[1]:
            raise UserError("a classifier needs a row with a feature; there is none")
        weight_CD, bias_C = self.parameters(moments.mean_CD[there_C], moments)
        if not (weight_CD.isfinite().all() and bias_C.isfinite().all()):
            raise UserError("features are so large or small that float64 does not hold their products; scale them")
        return LinearHead(weight_CD.T, bias_C, there_C.nonzero()[:, 0])

    @abstractmethod
    def parameters(self, mean_CD: Tensor, moments: Moments) -> tuple[Tensor, Tensor]:
        """(weights [C D], biases [C]) of the classes with these means."""


@dataclass(frozen=True)
class NearestMean(HeadRule):
    """The class whose mean is nearest: argmin_c |x - m_c|, as w_c = m_c, b_c = -|m_c|^2 / 2.

    With cosine, that of the largest cosine, w_c = m_c / |m_c|, b_c = 0. Otherwise means are not scaled to length 1, so
    the two differ, even for rows of length 1.
    """

    cosine: bool = False

    def parameters(self, mean_CD: Tensor, moments: Moments) -> tuple[Tensor, Tensor]:
        if self.cosine:
            return unit_rows(mean_CD), mean_CD.new_zeros(len(mean_CD))
        return mean_CD, -mean_CD.square().sum(dim=1) / 2


class Precision(ABC):
    """An estimate of the inverse covariance within classes, shared by all."""

    @abstractmethod
    def matrix(self, moments: Moments) -> Tensor:
        """[D D], symmetric and positive semidefinite."""


@dataclass(frozen=True)
class EmpiricalBayes(Precision):
    """P = D ((N - 1) S + tr(S) I)^-1, the ridge of Kubokawa and Srivastava (2008), as GDA's paper has it; S is the
    covariance of rows around the means of their classes.

    Rows that are all equal to their class mean, such as one row a class, have S = 0 and no such P: it is I then, and
    the nearest mean wins.
    """

    def matrix(self, moments: Moments) -> Tensor:
        width = len(moments.within_DD)
        identity_DD = torch.eye(width).to(moments.within_DD)
        trace = moments.within_DD.trace() / max(moments.count - 1, 1)
        # Rounding of equal rows counts as nothing.
        if trace <= width * (1e-14 * moments.mean_CD.abs().amax()) ** 2:
            return identity_DD
        # In units of the trace, which may be far from 1.
        return width / trace * torch.linalg.inv(moments.within_DD / trace + identity_DD)


@dataclass(frozen=True)
class PseudoInverse(Precision):
    """S^+ without shrinkage: linear discriminant analysis, and nearly arbitrary with fewer rows than features."""

    def matrix(self, moments: Moments) -> Tensor:
        return torch.linalg.pinv(moments.within_DD / max(moments.count - 1, 1), hermitian=True)


@dataclass(frozen=True)
class Discriminant(HeadRule):
    """w_c = P m_c, b_c = -log(C) - m_c^T P m_c / 2: Gaussians with one covariance, and all classes equally likely."""

    precision: Precision = EmpiricalBayes()

    def parameters(self, mean_CD: Tensor, moments: Moments) -> tuple[Tensor, Tensor]:
        return _gaussian(mean_CD, self.precision.matrix(moments))


def _gaussian(mean_CD: Tensor, precision_DD: Tensor) -> tuple[Tensor, Tensor]:
    """(weights [C D], biases [C]) of Gaussians with these means, one precision and the same share of the rows."""
    weight_CD = mean_CD @ precision_DD
    uniform = mean_CD.new_tensor(float(len(mean_CD))).log()
    return weight_CD, -uniform - (weight_CD * mean_CD).sum(dim=1) / 2


def new_class_head(
    bank_ND: Tensor,
    text_CD: Tensor,
    class_C: Tensor,
    neighbours: int = 64,
    copies: int = 16,
    precision: Precision = EmpiricalBayes(),
) -> LinearHead:
    """Discriminant analysis of classes without images, from a text of each and images of other classes (2402.04087,
    section on base-to-new generalisation).

    The images nearest to a class's text w stand for its own: its mean is that of these and of `copies` of w, and its
    covariance is theirs around w. The precision is the mean of those of all these classes.

    Args:
        bank_ND, text_CD: rows of length 1 of one encoder, N >= 1; all N count where `neighbours` are more.
        class_C: labels of the texts.
    """
    bank_ND, text_CD = bank_ND.double(), text_CD.double()
    near_CK = (text_CD @ bank_ND.T).topk(min(neighbours, len(bank_ND)), dim=1).indices
    near_CKD, total_DD = bank_ND[near_CK], bank_ND.new_zeros(bank_ND.shape[1], bank_ND.shape[1])
    mean_CD = (near_CKD.sum(dim=1) + copies * text_CD) / (near_CK.shape[1] + copies)
    for near_KD, text_D in zip(near_CKD, text_CD, strict=True):
        apart_KD = near_KD - text_D
        count_1 = apart_KD.new_tensor([len(apart_KD)])
        total_DD = total_DD + precision.matrix(Moments(count_1, text_D[None], apart_KD.T @ apart_KD))
    weight_CD, bias_C = _gaussian(mean_CD, total_DD / len(text_CD))
    return LinearHead(weight_CD.T, bias_C, class_C)


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
        precision: None is the paper's, `lightspan.evaluation.gaussians.closed_form.EmpiricalBayes`.
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
        both = combined_head(self.scale, zero_shot, alpha, images)
        return EnsembleAccuracy(
            accuracy=share_right(both, query, True),
            text_accuracy=share_right(zero_shot, query, True),
            image_accuracy=share_right(images, query, True),
            alpha=alpha,
            bank_rows=len(bank),
            query_rows=len(query),
            tensors=_tensors(both),
        )


def combined_head(scale: float, text: LinearHead, alpha: float, images: LinearHead) -> LinearHead:
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
    found = [share_right(combined_head(scale, text, alpha, images), val, True) for alpha in DECADES]
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
        rule: makes the head; None is `lightspan.evaluation.gaussians.closed_form.NearestMean`, the learner of arXiv
        2210.04428.
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
