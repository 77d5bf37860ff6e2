"""Batches made of samples, and taken apart again, as their declared type says.

Shapes: B samples, N rows of all samples together.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map
from torch.utils.data import default_collate

from lightspan.core.batches import Field, described, fields_of, rows_in
from lightspan.core.errors import UserError


def collated(samples: Sequence[Any], batch_type: type | None = None) -> Any:
    """A batch of samples: rows stacked, packed rows joined and cut by offsets, which samples need not have.

    Numbers of rows count from 0 in each sample, and on through the batch.

    Raises: UserError for samples that do not fit into one batch, which names the field.
    """
    if not isinstance(samples[0], Mapping):
        return _stacked("a sample", list(samples))
    fields = fields_of(batch_type)
    packed = {name: field for name, field in fields.items() if field.packed is not None and name in samples[0]}
    cut = {name: field.cuts for name, field in fields.items() if field.cuts is not None}
    stacked = [name for name in samples[0] if name not in packed and name not in cut]
    batch: dict[str, Any] = {name: _stacked(name, _column(name, samples)) for name in stacked}
    lengths = _lengths(samples, packed)
    for name, field in packed.items():
        parts = [torch.as_tensor(value) for value in _column(name, samples)]
        if field.points_to is not None:
            firsts = [0, *lengths[field.points_to].cumsum(0).tolist()]
            parts = [part + first for part, first in zip(parts, firsts, strict=False)]
        try:
            batch[name] = torch.cat(parts, field.packed)  # type: ignore[arg-type]
        except RuntimeError as error:
            shapes = ", ".join(str(list(part.shape)) for part in parts[:4])
            raise UserError(
                f"samples do not fit into one batch: {name}, {field}, has the shapes {shapes}; give all samples the "
                "same columns"
            ) from error
    for name, axis in cut.items():
        batch[name] = torch.cat([torch.zeros(1, dtype=torch.int64), lengths[axis].cumsum(0)])
    return {name: batch[name] for name in (*(name for name in fields if name in batch), *batch)}


def _lengths(samples: Sequence[Mapping[str, Any]], packed: Mapping[str, Field]) -> dict[str, Tensor]:
    """Rows of each sample along each packed axis, int64 [B]."""
    lengths = dict[str, Tensor]()
    for name, field in packed.items():
        if (axis := _packed_axis(field)) not in lengths:
            shapes = (torch.as_tensor(value).shape for value in _column(name, samples))
            lengths[axis] = torch.tensor([shape[field.packed or 0] for shape in shapes], dtype=torch.int64)
    return lengths


def _column(name: str, samples: Sequence[Mapping[str, Any]]) -> list[Any]:
    if any(name not in sample for sample in samples):
        raise UserError(f"samples do not fit into one batch: some have no {name}; give it to all, or to none")
    return [sample[name] for sample in samples]


def _stacked(name: str, values: list[Any]) -> Any:
    try:
        return default_collate(values)
    except (RuntimeError, TypeError, KeyError, ValueError) as error:
        raise UserError(
            f"samples do not fit into one batch: {name} is {', '.join(sorted(set(map(described, values)))[:4])}; set "
            "data.init_args.image_size for images of several sizes, leave fields of several shapes out of "
            "data.init_args.fields, or declare rows of several lengths as packed in the batch_type of the data"
        ) from error


def separated(batch: Mapping[str, Any], batch_type: type) -> list[dict[str, Any]]:
    """The samples of a batch, of its declared fields alone: what `collated` makes a batch of."""
    fields = {name: field for name, field in fields_of(batch_type).items() if name in batch}
    lengths = {field.cuts: batch[name].diff() for name, field in fields.items() if field.cuts is not None}
    # What numbers the rows of another axis, such as edges, belongs to the sample of the first row that it names.
    for name, field in fields.items():
        if field.points_to is not None:
            cut = lengths[field.points_to]
            named = batch[name].movedim(field.packed or 0, 0).flatten(1)[:, 0]
            owner = torch.bucketize(named, cut.cumsum(0), right=True)
            lengths[_packed_axis(field)] = owner.bincount(minlength=len(cut))
    columns = {name: _by_sample(batch[name], field, lengths) for name, field in fields.items() if field.cuts is None}
    return [dict(zip(columns, rows, strict=True)) for rows in zip(*columns.values(), strict=True)]


def _by_sample(value: Any, field: Field, lengths: Mapping[str, Tensor]) -> list[Any]:
    """What each sample has of a field; rows that are numbered count from 0 in each sample again."""
    if isinstance(value, list | tuple):
        return [list(row) for row in zip(*value, strict=True)]
    if field.packed is None:
        return [*value.unbind(0)]
    parts = value.split(lengths[_packed_axis(field)].tolist(), field.packed)
    if field.points_to is None:
        return [*parts]
    ends = lengths[field.points_to].cumsum(0)
    return [part - first for part, first in zip(parts, (ends - lengths[field.points_to]).tolist(), strict=True)]


def taken(batch: Any, places: Sequence[int], batch_type: type | None = None) -> Any:
    """Some samples of a batch, by their places; of undeclared fields, rows of each tensor and entries of each list."""
    fields = fields_of(batch_type)
    if batch_type is not None and any(field.packed is not None and name in batch for name, field in fields.items()):
        samples = separated(batch, batch_type)
        return collated([samples[place] for place in places], batch_type)
    if isinstance(batch, Tensor):
        return batch[list(places)]
    if isinstance(batch, dict):
        return {name: taken(value, places) for name, value in batch.items()}
    if isinstance(batch, list | tuple):
        tensors = all(isinstance(value, Tensor) for value in batch)
        return [taken(value, places) for value in batch] if tensors else [batch[place] for place in places]
    return batch


def resized(batch: Any, rows: int, batch_type: type | None = None) -> Any:
    """A batch of the same layout and `rows` samples of zeros, with as many packed rows a sample; what has no axis of
    samples is kept.
    """
    old = rows_in(batch, batch_type)
    fields = fields_of(batch_type) if isinstance(batch, Mapping) else {}

    def grown(leaf: Any, axis: int) -> Tensor:
        shape = list(leaf.shape)
        shape[axis] = rows * shape[axis] // max(old, 1)
        return torch.zeros(shape, dtype=leaf.dtype)

    def resize(leaf: Any) -> Any:
        return grown(leaf, 0) if isinstance(leaf, Tensor) and leaf.ndim and leaf.shape[0] == old else leaf

    def of_field(name: str, value: Any) -> Any:
        field = fields.get(name)
        if field is None or not isinstance(value, Tensor):
            return tree_map(resize, value)
        if field.cuts is not None:
            # By the shape of what they cut: a plan on fake tensors reads no numbers.
            cut = (batch[other].shape[each.packed] for other, each in fields.items()
                   if other in batch and each.packed is not None and _packed_axis(each) == field.cuts)  # fmt: skip
            return torch.arange(rows + 1) * (rows * next(cut, 0) // max(old, 1)) // max(rows, 1)
        return resize(value) if field.packed is None else grown(value, field.packed)

    if not fields:
        return tree_map(resize, batch)
    return {name: of_field(name, value) for name, value in batch.items()}


def _packed_axis(field: Field) -> str:
    assert field.packed is not None
    return field.sizes[field.packed][0]
