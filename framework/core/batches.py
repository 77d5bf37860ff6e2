"""What a batch holds: a typed mapping whose fields declare dtype, axes and role, read by everything that meets one.

A batch is a plain dict. Its type is a TypedDict whose fields are `Annotated[Tensor, Field(...)]`, one module a modality
(`lightspan.datamodules.MODALITY.batch`):

    class VolumeBatch(TypedDict):
        volume: Annotated[Tensor, Field("float32", "B C D H W", read=True)]
        spacing: Annotated[Tensor, Field("float32", "B 3")]
        label: Label
        index: Index

A data module, or its dataset, gives the type as `batch_type`; a method may do so too, for data that do not. Batches
without a declared type are plain dicts of tensors, of which the functions below assume what they say.

Shapes: B samples, N rows of all samples together.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import pairwise
from typing import Annotated, Any, NotRequired, Required, get_args, get_origin, get_type_hints

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from lightspan.core.devices import has_values
from lightspan.core.errors import UserError

SINGLE, VIEWS, OFFSETS = "image", "views", "offsets"
"""Fields with these names are, where nobody declared others: what one of several views is, the views, and what cuts
packed rows.
"""
WHOLE = (torch.int64, torch.int32)
"""Types of numbers that index a table; of smaller ones torch takes some for a mask."""


@dataclass(frozen=True)
class Field:
    """One field of a batch.

    Args:
        dtype: such as "float32"; "any" is every one.
        axes: names and numbers separated by spaces. A capital letter is one size throughout the batch, B the number of
            samples; a small letter is any size, a number that size, and "T+1" one more than T. A field whose first
            letter is not B is packed: the rows of all samples, one after another. A list of tensors has the axis of
            the list first, such as "V B C h w".
        read: whether a method's `backbone` is called with it. Several such fields are its arguments in their order.
        of: of a list of views, the field that a single view is.
        cuts: the packed axis that it divides among the samples: sample i has the rows from its value i up to i + 1.
        points_to: the packed axis whose rows it numbers.
    """

    dtype: str
    axes: str
    read: bool = False
    of: str | None = None
    cuts: str | None = None
    points_to: str | None = None

    @cached_property
    def sizes(self) -> tuple[tuple[str, int], ...]:
        """Name and what is added to it, of each axis."""
        parts = (axis.partition("+") for axis in self.axes.split())
        return tuple((name, int(more or 0)) for name, _, more in parts)

    @cached_property
    def torch_dtype(self) -> torch.dtype | None:
        return None if self.dtype == "any" else getattr(torch, self.dtype)

    @cached_property
    def packed(self) -> int | None:
        """The axis along which rows of all samples are joined; None for a field that has a row for each sample."""
        names = [name for name, _ in self.sizes]
        return None if "B" in names else next(axis for axis, name in enumerate(names) if name.isalpha())

    def is_sound(self) -> bool:
        """Whether torch has the dtype, and one of the axes a name."""
        known = self.dtype == "any" or isinstance(getattr(torch, self.dtype, None), torch.dtype)
        return known and any(name.isalpha() for name, _ in self.sizes)

    def __str__(self) -> str:
        return f"{self.dtype} [{', '.join(self.axes.split())}]"


Label = Annotated[Tensor, Field("int64", "B")]
"""Classes, each in [0, num_classes). A method that learns without labels ignores them."""
Index = Annotated[Tensor, Field("int64", "B")]
"""Positions of the samples in their dataset, the same on every rank and in every epoch."""


@dataclass(frozen=True)
class Schema:
    """The fields of a batch type, by name, and which of them every batch has."""

    name: str
    fields: Mapping[str, Field]
    required: frozenset[str]


@cache
def schema_of(batch_type: type) -> Schema:
    """The declared fields of a TypedDict, inherited ones included.

    Raises: UserError for a type with a field that declares nothing, or a dtype or axes that there are not.
    """
    fields = {name: _declared(hint) for name, hint in get_type_hints(batch_type, include_extras=True).items()}
    if lacking := [name for name, field in fields.items() if field is None or not field.is_sound()]:
        raise UserError(
            f"{batch_type.__name__} does not declare what {', '.join(lacking)} holds; annotate it, such as "
            'Annotated[Tensor, Field("float32", "B C H W")] (lightspan.core.batches)'
        )
    required = getattr(batch_type, "__required_keys__", frozenset(fields))
    return Schema(batch_type.__name__, fields, frozenset(required))  # type: ignore[arg-type]


def _declared(hint: Any) -> Field | None:
    while get_origin(hint) in (NotRequired, Required):
        (hint,) = get_args(hint)
    return next((one for one in getattr(hint, "__metadata__", ()) if isinstance(one, Field)), None)


def batch_type_of(*owners: object) -> type | None:
    """The declared type of batches, of the first that knows: a data module, a dataset, a method."""
    return next((kind for owner in owners if (kind := getattr(owner, "batch_type", None)) is not None), None)


def described(given: Any) -> str:
    """Type and shape of a tensor, or the kind of anything else, for messages."""
    return f"{given.dtype} {list(given.shape)}" if isinstance(given, Tensor) else f"a {type(given).__name__}"


def read_names(batch: Mapping[str, Any], batch_type: type | None = None) -> list[str]:
    """The fields of a batch with which a network is called; none of a batch without such.

    Where a batch has none that is declared, it is assumed to be the `image`, else the `views`, else the tensor with the
    most axes, at least two, floating-point ones first. Packed rows come with their offsets.
    """
    found = dict[str, None]()
    for name, field in fields_of(batch_type).items():
        if field.read and (present := next((each for each in (field.of, name) if each in batch), None)) is not None:
            found[present] = None
    return [*found] or _assumed(batch)


def _assumed(batch: Mapping[str, Any]) -> list[str]:
    for name in (SINGLE, VIEWS):
        if isinstance(value := batch.get(name), Tensor) or (isinstance(value, list | tuple) and value):
            return [name]
    tensors = {name: x for name, x in batch.items() if isinstance(x, Tensor) and x.ndim > 1}
    if not tensors:
        return []
    best = max(tensors, key=lambda name: (tensors[name].is_floating_point(), tensors[name].ndim))
    return [best, OFFSETS] if _cuts(batch.get(OFFSETS)) else [best]


def _cuts(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim == 1 and value.dtype == torch.int64 and len(value) > 0


def fields_of(batch_type: type | None) -> Mapping[str, Field]:
    """The declared fields by name; none of None."""
    return {} if batch_type is None else schema_of(batch_type).fields


def inputs_in(batch: Mapping[str, Any], batch_type: type | None = None) -> tuple[Any, ...]:
    """What a network is called with, see `read_names`: of views the first one."""
    views = views_field(batch_type)
    return tuple(batch[name][0] if name == views else batch[name] for name in read_names(batch, batch_type))


def views_field(batch_type: type | None = None) -> str:
    """The field that has several views of each sample."""
    return next((name for name, field in fields_of(batch_type).items() if field.of is not None), VIEWS)


def single_fields(batch_type: type | None = None) -> list[str]:
    """The fields with which a network is called, where a batch has one view of each sample."""
    return [field.of or name for name, field in fields_of(batch_type).items() if field.read] or [SINGLE]


def single_field(batch_type: type | None = None) -> str:
    """The first of `single_fields`."""
    return single_fields(batch_type)[0]


def samples_in(batch: Any, batch_type: type | None = None) -> int | None:
    """B of a batch: by the first declared field that has it, or by what a network reads. None for a batch of something
    else, such as one that is no mapping.
    """
    if not isinstance(batch, Mapping):
        return None
    for name, field in fields_of(batch_type).items():
        if name in batch and field.packed is None:
            axis, more = next((axis, more) for axis, (letter, more) in enumerate(field.sizes) if letter == "B")
            value = batch[name]
            return (value.shape[axis] if isinstance(value, Tensor) else value[0].shape[axis - 1]) - more
    if _cuts(batch.get(OFFSETS)):
        return len(batch[OFFSETS]) - 1
    return next((len(x) for x in inputs_in(batch) if isinstance(x, Tensor)), None)


def rows_in(batch: Any, batch_type: type | None = None) -> int:
    """`samples_in`, or of a batch without named fields the length of its first tensor that has an axis; 0 if there is
    none.
    """
    known = samples_in(batch, batch_type)
    first = (x.shape[0] for x in tree_leaves(batch) if isinstance(x, Tensor) and x.ndim)
    return next(first, 0) if known is None else known


def require_declared(batch: Mapping[str, Any], batch_type: type, owner: str) -> None:
    """Holds a batch to its type. Fields beyond the declared ones may be anything.

    Args:
        owner: what made the batch, for messages.
    Raises: UserError for a field that is missing or of another dtype or shape, for offsets that do not cut their rows,
        and for numbers of rows that there are not.
    """
    schema = schema_of(batch_type)
    if lacking := [name for name in schema.fields if name in schema.required and name not in batch]:
        raise UserError(
            f"a batch of {owner} has no {lacking[0]}, which {schema.name} declares as {schema.fields[lacking[0]]} (it "
            f"holds {', '.join(sorted(batch))}); let each sample give it, or declare another batch_type"
        )
    fields, sizes = {name: field for name, field in schema.fields.items() if name in batch}, _Sizes()
    for name, field in fields.items():
        if not sizes.fit(name, field, batch[name]):
            parts = batch[name] if isinstance(batch[name], list | tuple) else [batch[name]]
            raise UserError(
                f"{name} in a batch of {owner} is {', '.join(map(described, parts)) or 'an empty list'}, and "
                f"{schema.name} declares {field}{sizes.fixed_before(name)}; let each sample give it so, or declare "
                "another batch_type"
            )
    for name, field in fields.items():
        if field.cuts is not None:
            _require_cuts(batch[name], sizes.known.get(field.cuts), name, owner)
        if field.points_to is not None:
            _require_rows(batch[name], sizes.known.get(field.points_to, 0), name, owner)


class _Sizes:
    """The size of each named axis of a batch, which the first field that has the axis fixes for the others."""

    def __init__(self) -> None:
        self.known, self.by = dict[str, int](), dict[str, str]()

    def fit(self, name: str, field: Field, value: Any) -> bool:
        """Whether a value has the dtype and the axes of its field."""
        if isinstance(value, list | tuple):
            first, *others = field.sizes
            return (
                bool(value)
                and self._bind(name, first, len(value))
                and all(self._fit(name, field, others, x) for x in value)
            )
        return self._fit(name, field, field.sizes, value)

    def fixed_before(self, name: str) -> str:
        """What other fields have fixed, for messages."""
        fixed = ", ".join(f"{axis} = {self.known[axis]} by {by}" for axis, by in self.by.items() if by != name)
        return fixed and f" with {fixed}"

    def _fit(self, name: str, field: Field, axes: Sequence[tuple[str, int]], x: Any) -> bool:
        return (
            isinstance(x, Tensor)
            and field.torch_dtype in (None, x.dtype)
            and x.ndim == len(axes)
            and all(self._bind(name, axis, size) for axis, size in zip(axes, x.shape, strict=True))
        )

    def _bind(self, name: str, axis: tuple[str, int], size: int) -> bool:
        letter, more = axis
        if letter.isdigit():
            return size == int(letter)
        if letter.islower():
            return True
        self.by.setdefault(letter, name)
        return self.known.setdefault(letter, size - more) == size - more


def _require_cuts(offsets: Tensor, rows: int | None, name: str, owner: str) -> None:
    ends = offsets.tolist()
    if not ends or ends[0] != 0 or (rows is not None and ends[-1] != rows) or any(b < a for a, b in pairwise(ends)):
        raise UserError(
            f"{name} in a batch of {owner} must ascend from 0 to the {rows} rows of all samples, and is {ends[:8]}"
            + (" ..." if len(ends) > 8 else "")
        )


def _require_rows(numbers: Tensor, rows: int, name: str, owner: str) -> None:
    least, largest = (int(end) for end in numbers.aminmax()) if numbers.numel() else (0, -1)
    if least < 0 or largest >= rows:
        raise UserError(
            f"{name} in a batch of {owner} numbers rows from {least} to {largest}, and there are {rows}; number the "
            "rows of each sample from 0 up"
        )


def is_packed(name: str, batch: Mapping[str, Any], batch_type: type | None = None) -> bool:
    """Whether a field has the rows of all samples one after another, of any number a sample."""
    field = fields_of(batch_type).get(name)
    return field.packed is not None if field is not None else OFFSETS in read_names(batch, batch_type)


def offsets_in(batch: Mapping[str, Any], batch_type: type | None = None) -> Tensor:
    """What cuts the packed rows of a batch that has some."""
    name = next((name for name, field in fields_of(batch_type).items() if field.cuts is not None), OFFSETS)
    return batch[name]


def range_on_host(numbers: Tensor) -> tuple[int, int] | None:
    """The least and the largest of whole numbers; None without any, and where to read them would wait for a device, or
    there are shapes alone.
    """
    if numbers.device.type != "cpu" or not has_values(numbers) or not numbers.numel():
        return None
    least, largest = torch.aminmax(numbers)
    return int(least), int(largest)


def require_fields(batch: Any, method: str) -> None:
    """Raises: UserError for a batch without named fields, such as the tuples of torchvision's datasets."""
    if not isinstance(batch, Mapping):
        raise UserError(
            f"{method} reads batches by the names of their fields, and this one is a {type(batch).__name__}; let the "
            'dataset give {"image": ..., "label": ..., "index": ...}, or put it into '
            "lightspan.datamodules.image.dataset.PictureDataset"
        )


def require_rows(batch: Mapping[str, Any], field: str, method: str) -> None:
    """Raises: UserError for a field of another number of rows than the batch has samples.

    Args:
        field: a name of the batch's, of a tensor [B ...].
        method: its name, for messages.
    """
    rows, samples = len(batch[field]), samples_in(batch)
    if samples not in (None, rows):
        raise UserError(
            f"{method}: {field} of this batch has {rows} rows, and the batch has {samples} samples; let the dataset "
            "give a row for each"
        )
