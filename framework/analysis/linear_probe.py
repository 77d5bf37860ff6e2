"""Multinomial logistic regression on frozen features: how much of the classes a linear map can read.

Shapes: N training rows, M test rows, D features, C classes.
"""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from lightspan.analysis.labels import require_few_classes, require_labels
from lightspan.errors import UserError


def linear_probe_accuracy(
    train_ND: Tensor,
    train_labels_N: Tensor,
    test_MD: Tensor,
    test_labels_M: Tensor,
    l2: float = 1.0,
    max_iterations: int = 100,
) -> float:
    """Accuracy on the test rows, in [0, 1], of the model that `fit_linear_probe` finds on the training rows.

    Raises: UserError as `fit_linear_probe`, and for no test row.
    """
    _require_rows(test_MD)
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
    train_ND: Tensor, labels_N: Tensor, l2: float = 1.0, max_iterations: int = 100
) -> tuple[Tensor, Tensor]:
    """Weights [D C] and bias [C] on raw features that minimise, over features standardised by their training moments,

        sum_n cross_entropy(x_n W + b, label_n) + l2 / 2 * |W|^2

    with the bias free, like scikit-learn's LogisticRegression(C=1/l2) after StandardScaler. The problem is convex: the
    result depends on no seed, and `max_iterations` of L-BFGS bound the work. Computed in float64; features that are
    constant in training get weight zero.

    Args:
        labels_N: int64 in [0, C), C being the largest label + 1.
        l2: > 0.
    Raises: UserError if l2 <= 0, for no training row, labels that are not one whole number from 0 for each row, a C
        above both N and `labels.MOST_CLASSES`, or features that are not finite.
    """
    if l2 <= 0:
        raise UserError(f"linear probe l2={l2} must be above 0: without it separable features have no best weights")
    if not len(train_ND):
        raise UserError("linear probe needs at least one training row")
    require_labels("linear probe", train_ND, labels_N)
    require_few_classes("linear probe", labels_N)
    # Lightning's evaluation loops run in inference mode, whose tensors no gradient can pass: leave it, with copies.
    with torch.inference_mode(False), torch.enable_grad():
        return _fit(train_ND.detach().to(torch.float64, copy=True), labels_N.clone(), l2, max_iterations)


def _fit(x_ND: Tensor, labels_N: Tensor, l2: float, max_iterations: int) -> tuple[Tensor, Tensor]:
    _require_finite(x_ND)
    mean_D = x_ND.mean(dim=0)
    std_D = (x_ND - mean_D).square().mean(dim=0).sqrt()
    # A constant feature has a deviation of rounding errors, not zero: dividing by it would turn noise into signal.
    scale_D = torch.where(std_D > 1e-7 * x_ND.abs().amax(dim=0).clamp_min(1e-30), 1 / std_D, torch.zeros_like(std_D))
    x_ND = (x_ND - mean_D) * scale_D
    classes = 1 + int(labels_N.max())
    weight_DC = x_ND.new_zeros(x_ND.shape[1], classes).requires_grad_()
    bias_C = x_ND.new_zeros(classes).requires_grad_()
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
        # The mean over rows, so that L-BFGS's stopping rule means the same for any N.
        loss = cross_entropy(x_ND @ weight_DC + bias_C, labels_N) + l2 / (2 * len(x_ND)) * weight_DC.square().sum()
        loss.backward()
        return loss

    optimizer.step(objective)
    weight_DC = weight_DC.detach() * scale_D[:, None]
    return weight_DC, bias_C.detach() - mean_D @ weight_DC


def _require_rows(test_MD: Tensor) -> None:
    if not len(test_MD):
        raise UserError("linear probe got no test row; give it at least one validation sample")


def _require_finite(x_ND: Tensor) -> None:
    if not x_ND.isfinite().all():
        raise UserError("features contain NaN or infinite values, so no linear probe fits them; the model has diverged")
