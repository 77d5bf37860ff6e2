"""What labels of classes must be for a measure of features."""

from torch import Tensor

from lightspan.errors import UserError

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
