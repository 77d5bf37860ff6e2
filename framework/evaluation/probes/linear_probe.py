"""Linear regression on frozen features: how much of classes, tags or numbers a linear map can read.

Shapes: N training rows, M test rows, D features, C classes, tags or numbers.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from lightspan.core.errors import UserError
from lightspan.evaluation.labels import require_labels, require_readable


def linear_probe_accuracy(
    train_ND: Tensor,
    train_labels_N: Tensor,
    test_MD: Tensor,
    test_labels_M: Tensor,
    l2: float = 1.0,
    max_iterations: int = 100,
) -> float:
    """Accuracy on the test rows, in [0, 1], of the model of classes that `fit_linear_probe` finds on the training rows.

    Raises: UserError as `fit_linear_probe`, and for no test row.
    """
    _require_rows(test_MD)
    require_labels("linear probe", train_ND, train_labels_N)
    weight_DC, bias_C = fit_linear_probe(train_ND, train_labels_N, l2, max_iterations)
    return linear_accuracy(weight_DC, bias_C, test_MD, test_labels_M)


def linear_accuracy(weight_DC: Tensor, bias_C: Tensor, test_MD: Tensor, test_labels_M: Tensor) -> float:
    """Share of the rows whose class has the largest score, in [0, 1].

    Raises: UserError for no row, NaN in one, or labels that are not one whole number from 0 for each.
    """
    _require_rows(test_MD)
    require_labels("linear probe", test_MD, test_labels_M)
    _require_finite(test_MD)
    predicted_M = (test_MD.to(weight_DC.dtype) @ weight_DC + bias_C).argmax(dim=1)
    return (predicted_M == test_labels_M).double().mean().item()


def fit_linear_probe(
    train_ND: Tensor, labels: Tensor, l2: float = 1.0, max_iterations: int = 100
) -> tuple[Tensor, Tensor]:
    """Weights [D C] and bias [C] on raw features that minimise, over features standardised by their training moments,

        sum_n loss(x_n W + b, label_n) + l2 / 2 * |W|^2

    with the bias free. The loss is the cross entropy of classes, like scikit-learn's LogisticRegression(C=1/l2) after
    StandardScaler, the sum of binary cross entropies of tags, or half the squared error of numbers, which is ridge
    regression. The problem is convex: the result depends on no seed. Numbers are solved for; else `max_iterations` of
    L-BFGS bound the work. Computed in float64; features that are constant in training get weight zero.

    Args:
        labels: classes, int64 [N] in [0, C), C being the largest + 1; tags, bool [N C]; or numbers, floats [N C], or
            [N] for one. See `labels.kind_of`.
        l2: > 0.
    Raises: UserError if l2 <= 0, for no training row, labels of no known kind or not one for each row, classes below 0
        or above both N and `labels.MOST_CLASSES`, or features or numbers that are not finite.
    """
    if l2 <= 0:
        raise UserError(f"linear probe l2={l2} must be above 0: without it separable features have no best weights")
    if not len(train_ND):
        raise UserError("linear probe needs at least one training row")
    kind = require_readable("linear probe", train_ND, labels)
    # Lightning's evaluation loops run in inference mode, whose tensors no gradient can pass: leave it, with copies.
    with torch.inference_mode(False), torch.enable_grad():
        x_ND, labels = train_ND.detach().to(torch.float64, copy=True), labels.clone()
        mean_D, scale_D = _standardising(x_ND)
        x_ND = (x_ND - mean_D) * scale_D
        if kind == "numbers":
            weight_DC, bias_C = _ridge(x_ND, labels.double().view(len(labels), -1), l2)
        elif kind == "tags":
            tags_NC = labels.double()
            weight_DC, bias_C = _descended(
                x_ND,
                tags_NC.shape[1],
                lambda z_NC: binary_cross_entropy_with_logits(z_NC, tags_NC, reduction="sum") / len(x_ND),
                l2,
                max_iterations,
            )
        else:
            classes = 1 + int(labels.max())
            weight_DC, bias_C = _descended(x_ND, classes, lambda z_NC: cross_entropy(z_NC, labels), l2, max_iterations)
        weight_DC = weight_DC * scale_D[:, None]
        return weight_DC, bias_C - mean_D @ weight_DC


def _standardising(x_ND: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and factor of each feature; the factor of a constant one is zero."""
    _require_finite(x_ND)
    mean_D = x_ND.mean(dim=0)
    std_D = (x_ND - mean_D).square().mean(dim=0).sqrt()
    # A constant feature has a deviation of rounding errors, not zero: dividing by it would turn noise into signal.
    varies_D = std_D > 1e-7 * x_ND.abs().amax(dim=0).clamp_min(1e-30)
    return mean_D, torch.where(varies_D, 1 / std_D, torch.zeros_like(std_D))


def _ridge(x_ND: Tensor, y_NC: Tensor, l2: float) -> tuple[Tensor, Tensor]:
    """Of features whose mean is zero, so that the bias is the mean of the numbers."""
    bias_C = y_NC.mean(dim=0)
    gram_DD = x_ND.T @ x_ND
    gram_DD.diagonal().add_(l2)
    return torch.cholesky_solve(x_ND.T @ (y_NC - bias_C), torch.linalg.cholesky(gram_DD)), bias_C


def _descended(
    x_ND: Tensor, outputs: int, loss: Callable[[Tensor], Tensor], l2: float, max_iterations: int
) -> tuple[Tensor, Tensor]:
    """By L-BFGS from zero.

    Args:
        loss: of the scores [N C], a mean over rows, so that L-BFGS's stopping rule means the same for any N.
    """
    weight_DC = x_ND.new_zeros(x_ND.shape[1], outputs).requires_grad_()
    bias_C = x_ND.new_zeros(outputs).requires_grad_()
    optimizer = torch.optim.LBFGS(
        [weight_DC, bias_C],
        max_iter=max_iterations,
        tolerance_grad=1e-8,
        tolerance_change=1e-14,  # torch's 1e-9 stops well before the optimum of a flat objective
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    def objective() -> Tensor:
        optimizer.zero_grad()
        total = loss(x_ND @ weight_DC + bias_C) + l2 / (2 * len(x_ND)) * weight_DC.square().sum()
        total.backward()
        return total

    optimizer.step(objective)
    return weight_DC.detach(), bias_C.detach()


def _require_rows(test_MD: Tensor) -> None:
    if not len(test_MD):
        raise UserError("linear probe got no test row; give it at least one validation sample")


def _require_finite(x_ND: Tensor) -> None:
    if not x_ND.isfinite().all():
        raise UserError("features contain NaN or infinite values, so no linear probe fits them; the model has diverged")
