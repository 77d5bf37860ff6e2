"""The results of a computation: a few numbers for JSON, figures to print, perhaps a picture and tensors."""

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Self

from torch import Tensor

from lightspan.core.drawing import canvas, png, tidy
from lightspan.core.errors import UserError


@dataclass(frozen=True)
class Figure:
    """One number of a result, as a table or a report shows it. `unit` is empty for counts and shares."""

    name: str
    value: int | float
    unit: str = ""


@dataclass(frozen=True)
class Result(ABC):
    """The small outcome of an estimator or a merger. A subclass is a frozen dataclass with its own fields.

    Fields are numbers, text, true or false, None, tuples, and mappings from text to these: what JSON can store and
    restore. Numbers are finite, which is checked here, so that an estimator need not check it.

    Attributes:
        tensors: what is too large for JSON, such as the weights of a head: written beside it as safetensors, and not
            compared.
    Raises: UserError for a number that is not finite; TypeError for a field of another kind.
    """

    tensors: Mapping[str, Tensor] = field(default_factory=dict, compare=False, repr=False, kw_only=True)

    def __post_init__(self) -> None:
        for name, value in self._plain().items():
            _require_plain(value, f"{type(self).__name__}.{name}")

    @abstractmethod
    def figures(self) -> tuple[Figure, ...]:
        """What is worth printing, the most important one first."""

    def draw(self, axes: Any) -> None:  # noqa: B027 - optional
        """Draws the result on matplotlib axes. A subclass without a picture does not override this."""

    def table(self) -> tuple[dict[str, Any], ...]:
        """Rows that a spreadsheet shows, of equal keys, values numbers or text. A subclass without any leaves it."""
        return ()

    def metadata(self) -> dict[str, str]:
        """What the file of `tensors` says of them, text by name. A subclass whose file is read by itself gives it."""
        return {}

    def to_json(self) -> str:
        """The fields as text; `from_json` of the same class gives an equal result."""
        return json.dumps(self._plain(), indent=1, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Raises: UserError for text that is not a result of this class."""
        try:
            return cls(**{name: _frozen(value) for name, value in json.loads(text).items()})
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f"this is not {cls.__name__} as JSON: {error}") from error

    def document(self) -> dict[str, Any]:
        """The content of result.json: class, figures and fields, all plain data."""
        return {
            "result": f"{type(self).__module__}.{type(self).__qualname__}",
            "figures": [vars(figure) for figure in self.figures()],
            "fields": json.loads(self.to_json()),
        }

    def picture(self, title: str) -> bytes | None:
        """PNG bytes of what `draw` draws; None for a result without a picture."""
        if type(self).draw is Result.draw:
            return None
        figure, ((axes,),) = canvas(title)
        self.draw(axes)
        tidy(axes)
        return png(figure)

    def _plain(self) -> dict[str, Any]:
        return {one.name: getattr(self, one.name) for one in fields(self) if one.name != "tensors"}


def _require_plain(value: Any, where: str) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(
            f"{where} is {value}: these data give no finite result; check the rows from which it was computed"
        )
    if isinstance(value, tuple):
        for child in value:
            _require_plain(child, where)
    elif isinstance(value, dict) and all(isinstance(key, str) for key in value):
        for key, child in value.items():
            _require_plain(child, f"{where}[{key!r}]")
    elif value is not None and not isinstance(value, bool | int | float | str):
        raise TypeError(f"{where} is a {type(value).__name__}, which JSON cannot restore; see Result")


def _frozen(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_frozen(child) for child in value)
    return {key: _frozen(child) for key, child in value.items()} if isinstance(value, dict) else value
