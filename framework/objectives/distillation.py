"""What a student learns from its teacher: hidden features, outputs, weights, attention.

Source: Guo, Wang, Kankanhalli, "PELA", 2024, arXiv 2310.10700, section 3.2 (features, perturbation), with the details
of the authors' code: features of all layers have equal weight, and the norm of the perturbation is that of the largest
entry; Zhang et al., "UNIP", 2025, arXiv 2502.02257 (attention: NMI-HAD), with the mean that their code takes. Nothing
here sends a gradient into the teacher.
Shapes: L layers, O outputs and I inputs of one layer; B images, H heads, Q queries, K keys.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from lightspan.core.devices import wide
from lightspan.core.errors import UserError
from lightspan.objectives.means import mean, squared_error


def feature_distillation(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """(1/L) sum_l MSE(f_l^s, f_l^t), a scalar >= 0.

    Args:
        student, teacher: one tensor per layer, of any shape, equal in pairs.
    Raises: UserError for no layer, or for a pair of different shapes.
    """
    shapes = [[[*x.shape] for x in side] for side in (student, teacher)]
    if not student or shapes[0] != shapes[1]:
        raise UserError(
            f"student features {shapes[0]} and teacher features {shapes[1]} must be equal in number and shape"
        )
    return torch.stack([mean_squared(s, t) for s, t in zip(student, teacher, strict=True)]).mean()


def mean_squared(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference over the entries of all ranks, in float32 or wider; logits are distilled with it too."""
    return squared_error(student, teacher.detach())


def weight_perturbation(student: Sequence[Tensor], teacher: Sequence[Tensor], eps: float) -> Tensor:
    """(1/L) sum_l (max_ij |W_l^s - W_l^t| - eps)^2 in float32 or wider: the largest entry of each residual is pulled to
    `eps`.

    Its gradient flows only through that entry. Factors may move as long as their product stays near the weight; a
    residual below `eps` is pulled up to it.

    Args:
        student, teacher: weights [O I], one per layer.
        eps: >= 0, in units of a weight.
    """
    largest = [(wide(s_OI) - wide(t_OI.detach())).abs().max() for s_OI, t_OI in zip(student, teacher, strict=True)]
    return (torch.stack(largest) - eps).square().mean()


def attention_divergence(student_BHQK: Tensor, teacher_BHQK: Tensor) -> Tensor:
    """Mean over the images of all ranks, heads and queries of KL(softmax(t) || softmax(s)) over the keys, a scalar >= 0
    in nats, in float32 or wider. Cross-entropy differs from it by what the student cannot change.

    Args:
        student_BHQK, teacher_BHQK: scaled logits of attention, before the softmax.
    Returns: 0, with gradient 0, where there are no images.
    Raises: UserError for maps of different shapes.
    """
    if student_BHQK.shape != teacher_BHQK.shape:
        raise UserError(
            f"attention of the student {[*student_BHQK.shape]} and of the teacher {[*teacher_BHQK.shape]} must have as "
            "many heads and tokens: give both equal patches and prefix tokens, and the student's layer the teacher's "
            "heads"
        )
    student, teacher = (wide(logits).log_softmax(dim=3) for logits in (student_BHQK, teacher_BHQK.detach()))
    return mean(F.kl_div(student, teacher, reduction="none", log_target=True).sum(dim=3))
