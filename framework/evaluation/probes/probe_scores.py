"""How well predictions agree with classes, tags or numbers. Shapes: M rows, C classes, tags or numbers."""

import math

import torch
from sklearn.metrics import average_precision_score, mean_absolute_error, r2_score
from torch import Tensor

from lightspan.core.errors import UserError
from lightspan.evaluation.labels import kind_of, require_labels


def probe_scores(predicted_MC: Tensor, labels: Tensor) -> dict[str, float]:
    """The scores of one kind of labels (`labels.kind_of`), the one by which settings are chosen first.

    - classes: `accuracy`, the share of rows whose class has the largest score; of equal scores the first one wins.
    - tags: `mean_average_precision` over the tags that some row has, in [0, 1].
    - numbers: `r2`, 1 - squared error / variance, the mean over numbers; at most 1, 0 for the mean of these rows; of a
      number that never varies 1 if it is met exactly and else 0. `mae`, the mean absolute error in the numbers' unit.

    Raises: UserError for no row, another number of labels, predictions that are not finite, or tags that no row has.
    """
    kind = kind_of(labels)
    if not len(labels) or len(predicted_MC) != len(labels):
        raise UserError(
            f"a probe got {len(predicted_MC)} rows with {len(labels)} labels; give it at least one validation sample, "
            "and each a label"
        )
    if not predicted_MC.isfinite().all() or not labels.isfinite().all():
        raise UserError("predictions or labels contain NaN or infinite values; the model has diverged")
    if kind == "classes":
        require_labels("probe", predicted_MC, labels)
        return {"accuracy": (predicted_MC.argmax(dim=1) == labels).double().mean().item()}
    predicted, truth = predicted_MC.double().cpu().numpy(), labels.view(len(labels), -1).cpu()
    if predicted.shape != truth.shape:
        raise UserError(
            f"the bank has labels of {predicted.shape[1]} entries and the query of {truth.shape[1]}; give both the same"
        )
    if kind == "tags":
        occurs = truth.any(dim=0).numpy()
        if not occurs.any():
            raise UserError("no validation sample has any tag, so there is nothing to find; give samples with tags")
        return {
            "mean_average_precision": float(average_precision_score(truth.numpy()[:, occurs], predicted[:, occurs]))
        }
    numbers = truth.double().numpy()
    # Of one row scikit-learn gives no R2.
    r2 = float(r2_score(numbers, predicted)) if len(numbers) > 1 else float((numbers == predicted).all())
    return {"r2": r2, "mae": float(mean_absolute_error(numbers, predicted))}


def half_interval(score_M: Tensor) -> float:
    """Half of the 95 % interval of the mean over rows: of what is right, or of differences of two answers to a row."""
    return 1.96 * float(score_M.double().std(correction=0)) / math.sqrt(len(score_M))


def rows_to_choose_by(count: int) -> Tensor:
    """bool [count]: a fifth of the rows at random, always the same, on which a setting is chosen.

    Raises: UserError for fewer than five rows.
    """
    if count < 5:
        raise UserError(f"to choose among settings takes a bank of at least 5 rows, but got {count}; give one setting")
    held = torch.zeros(count, dtype=torch.bool)
    held[torch.randperm(count, generator=torch.Generator().manual_seed(0))[: count // 5]] = True
    return held
