"""The classes and numbers that a batch gives its samples, as methods read them, and what is wrong with them."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightspan.core.batches import described, range_on_host, require_fields, samples_in
from lightspan.core.errors import UserError


def labels_of(batch: Mapping[str, Any], method: str, samples: int | None = None) -> Tensor:
    """`label` of a batch, a whole number for each sample, [B].

    Args:
        method: its name, for messages.
        samples: B; None counts what a network reads of the batch (`lightspan.core.batches`).
    Raises: UserError for a batch without labels or named fields, and for labels of another kind or shape.
    """
    return _of_each_sample(batch, "label", True, method, samples)


def require_labelled(data: Any, who: str, way_out: str) -> None:
    """Raises: UserError for a data module that has found no labels (`labelled` is False): all of its samples then have
    label 0, from which anything learns to be right.

    Args:
        who: what reads labels, for messages.
        way_out: what else to do, for messages.
    """
    if getattr(data, "labelled", None) is False:
        raise UserError(
            f"{who} reads the label of each sample, and {type(data).__name__} has found none; put the samples of each "
            f"class into a sub-folder of its name, or {way_out}"
        )


def targets_of(batch: Mapping[str, Any], method: str, samples: int | None = None) -> Tensor:
    """`target` of a batch, or its `label` where it has none: a number for each sample, [B]. Arguments and errors are
    those of `labels_of`.
    """
    return _of_each_sample(batch, "label" if "target" not in batch else "target", False, method, samples)


def known_rows(batch: Mapping[str, Any], field: str, like_B: Tensor) -> Tensor:
    """A field of 0 and 1, such as `label_known`, as bool [B]: which samples have what another field of the batch gives.
    All, where a batch does not say.

    Args:
        like_B: that other field.
    Raises: UserError for another number of them.
    """
    known_B = batch.get(field)
    if known_B is None:
        return torch.ones(len(like_B), dtype=torch.bool, device=like_B.device)
    if known_B.shape != like_B.shape[:1]:
        raise UserError(
            f"{field} of this batch is {list(known_B.shape)}; it must be one 0 or 1 for each of its samples"
        )
    return known_B.bool()


def require_labels(label_B: Any, num_classes: int, owner: object) -> None:
    """Raises: UserError for labels that are no whole numbers [B], and for one outside [0, num_classes) on the CPU;
    asking an accelerator would wait for it.
    """
    labels_of({"label": label_B}, type(owner).__name__)
    ends = range_on_host(label_B)
    if ends is not None and (ends[0] < 0 or ends[1] >= num_classes):
        least, largest = ends
        raise UserError(
            f"labels from {least} to {largest} do not fit {type(owner).__name__} of {num_classes} classes; "
            f"labels count from 0, so it needs {largest + 1} classes or more"
        )


def require_classes(label: Tensor, classes: int, method: str, field: str = "semantic") -> None:
    """For labels that are still on the host; others pass, since reading them would wait for the device.

    Args:
        label: whole numbers; below 0 they do not count.
        classes: how many there are.
        method: its name, for messages.
        field: the name of the labels in a batch.

    Raises: UserError for a class that is not below `classes`.
    """
    ends = range_on_host(label)
    if ends is None or ends[1] < classes:
        return
    raise UserError(
        f"{field} has the class {ends[1]}, and {method} num_classes={classes} knows those in [0, {classes}); raise "
        "num_classes, or let the data give -1 to pixels that do not count"
    )


def places_labels_of(
    batch: Mapping[str, Any], field: str, shape: Sequence[int], method: str, place: str, source: str
) -> Tensor:
    """The class of each place of the samples, such as of pixels, int64 of the shape of these.

    Args:
        field: its name in the batch.
        shape: of the places.
        method, place, source: for messages: its name, what a place is, and which data have classes.
    Raises: UserError for a batch without the field, or with other than a whole number for each place.
    """
    label = batch.get(field)
    if label is None:
        raise UserError(
            f"{method} needs a class for each {place} as field={field}, and this batch holds "
            f"{', '.join(sorted(batch))}; take data that have them, such as {source}, or set model.init_args.field"
        )
    whole = isinstance(label, Tensor) and not label.is_floating_point() and label.dtype != torch.bool
    if not whole or label.shape != tuple(shape):
        raise UserError(
            f"{method} needs a whole number for each {place}, {[*shape]}, as {field}, and this batch gives "
            f"{described(label)}"
        )
    return label.long()


def _of_each_sample(batch: Mapping[str, Any], field: str, whole: bool, method: str, samples: int | None) -> Tensor:
    require_fields(batch, method)
    given, kind = batch.get(field), "whole number" if whole else "number"
    if samples is None:
        samples = samples_in({name: value for name, value in batch.items() if name != field})
    if given is None:
        raise UserError(
            f"{method} needs a {kind} for each sample as {field}, and this batch holds {', '.join(sorted(batch))}; "
            "take data that have them"
        )
    wrong = not isinstance(given, Tensor) or given.ndim != 1 or given.dtype == torch.bool
    # [B, 1] against [B] would broadcast, and train on a loss that nobody meant.
    if wrong or (whole and given.is_floating_point()) or samples not in (None, len(given)):
        raise UserError(
            f"{method} needs a {kind} for each sample as {field}, a tensor [{samples or 'B'}], and this batch gives "
            f"{described(given)}; let the dataset give each sample one {kind}"
        )
    return given
