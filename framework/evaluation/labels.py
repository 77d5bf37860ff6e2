"""Labels that a probe of features may read: classes, tags or numbers."""

from typing import Literal

import torch
from torch import Tensor

from lightspan.core.errors import UserError

WHOLE = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
MOST_CLASSES = 1 << 17  # far above data sets of images, and a row of features for each still fits in memory


def require_labels(what: str, rows_ND: Tensor, labels_N: Tensor) -> None:
    """Raises UserError, beginning with `what`, unless there is one whole number from 0 for each row."""
    if labels_N.ndim != 1 or len(labels_N) != len(rows_ND):
        raise UserError(f"{what} got labels {list(labels_N.shape)} for {len(rows_ND)} rows; give each row one label")
    if labels_N.is_floating_point() or labels_N.is_complex():
        raise UserError(f"{what} got labels of {labels_N.dtype}; they must be whole numbers from 0")
    if len(labels_N) and int(labels_N.min()) < 0:
        raise UserError(
            f"{what} got the label {int(labels_N.min())}; labels must be at least 0, so leave those rows out"
        )


def require_few_classes(what: str, labels_N: Tensor) -> None:
    """Raises UserError, beginning with `what`, for a label so large that a row for each class up to it fills memory."""
    largest = int(labels_N.max()) if len(labels_N) else 0
    if largest >= max(MOST_CLASSES, len(labels_N)):
        raise UserError(
            f"{what} got the label {largest}, which would take {largest + 1} classes for {len(labels_N)} rows; "
            "number the classes that occur from 0"
        )


def require_different(what: str, labels: Tensor) -> None:
    """Raises UserError, beginning with `what`, where all labels are alike."""
    if (labels == labels[:1]).all():
        raise UserError(
            f"{what} needs labels that differ, and all {len(labels):,} are alike, as those of a folder without "
            "classes; take labelled data"
        )


Kind = Literal["classes", "tags", "numbers"]


def kind_of(labels: Tensor) -> Kind:
    """What labels are, by their dtype and shape: whole numbers [N] are classes, bool [N K] says which of K tags a
    sample has, floats [N] and [N K] are numbers.

    Raises: UserError for labels of another form.
    """
    if labels.dtype == torch.bool and labels.ndim == 2:
        return "tags"
    if labels.is_floating_point() and labels.ndim in (1, 2):
        return "numbers"
    if labels.dtype in WHOLE and labels.ndim == 1:
        return "classes"
    raise UserError(
        f"labels {labels.dtype} {list(labels.shape)} are of no known kind; give whole numbers [N] for classes, bool "
        "[N, K] for tags, or floats [N] or [N, K] for numbers"
    )


def require_readable(what: str, rows: Tensor, labels: Tensor) -> Kind:
    """The kind of labels from which a probe may learn.

    Raises: UserError, beginning with `what`, for labels of no known kind or not one for each row, classes below 0 or
        far above the number of rows, or numbers that are not finite.
    """
    kind = kind_of(labels)
    if kind == "classes":
        require_labels(what, rows, labels)
        require_few_classes(what, labels)
    elif len(labels) != len(rows) or not labels.isfinite().all():
        raise UserError(f"{what} got {len(labels)} labels for {len(rows)} rows; give each row finite ones")
    return kind
