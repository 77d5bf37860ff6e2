"""Classifiers in closed form, from counts, means and scatter of classes: nearest mean, Gaussian discriminant analysis.

All of them are linear, score_c(x) = w_c . x + b_c, and know only the classes of which there are rows. Statistics of
batches, tasks and ranks add up (`lightspan.analysis.moments`), so a classifier does not depend on their order.
Sources: Janson et al., "A Simple Baseline that Questions the Use of Pretrained-Models in Continual Learning" (NMC),
2022, arXiv 2210.04428; Wang et al., "A Hard-to-Beat Baseline for Training-free CLIP-based Adaptation" (GDA), ICLR 2024,
arXiv 2402.04087. Computed in float64. Shapes: N rows, B rows of a batch, D features, C classes with rows.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from lightspan.analysis.labels import require_labels
from lightspan.analysis.moments import Moments
from lightspan.analysis.rows import unit_rows
from lightspan.errors import UserError


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
