"""Whether a lower or a higher value of a metric is better, guessed from its name."""

import re
from typing import Literal

from lightspan.core.errors import UserError

Mode = Literal["min", "max"]
Better = Literal["lower", "higher", "neither"]
_LOWER = ("loss", "error", "perplexity", "bits", "nats", "mse", "rmse", "mae", "nll", "fid")
_HIGHER = ("acc", "accuracy", "auc", "auroc", "f1", "recall", "precision", "iou", "r2", "bleu")


def better(metric: str) -> Better:
    """The direction of a metric such as `val/loss_nats` or `probe/knn_acc`; "neither" if its words do not tell."""
    words = re.split(r"[^a-z0-9]+", metric.lower())
    if any(word.endswith(_LOWER[:2]) or word in _LOWER for word in words):
        return "lower"
    return "higher" if any(word in _HIGHER for word in words) else "neither"


def mode_of(metric: str, given: Mode | None, option: str) -> Mode:
    """Which value of a metric is best: the one given, else as its name says.

    Args:
        option: the option that names the metric.
    Raises: UserError if neither says.
    """
    by_name: dict[Better, Mode] = {"lower": "min", "higher": "max"}
    if (mode := given or by_name.get(better(metric))) is None:
        raise UserError(f"{option} {metric}: its name does not tell whether low or high is good; add --mode min or max")
    return mode
