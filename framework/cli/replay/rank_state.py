"""A rank's part of a capture, checked field by field: such files are handed around, and may be damaged."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from lightspan.callbacks.resilience.random_state import random_states, restore_random_states
from lightspan.core.errors import UserError, one_line
from lightspan.training.captures import rank_file, read_rank

PRECISIONS = ("highest", "high", "medium")
_WRONG = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


@dataclass(frozen=True)
class MicroBatch:
    """A batch on its device, and the random states before it, as `random_states` gives them."""

    batch: Any
    random: dict[str, Any]


@dataclass(frozen=True)
class RankState:
    """What a rank knew of a step.

    Attributes:
        path: the file.
        callbacks: state key -> state, of those that alter steps.
        matmul_precision: of float32, one of `PRECISIONS`.
    """

    path: Path
    micro_batches: list[MicroBatch]
    callbacks: dict[str, dict[str, Any]]
    matmul_precision: str

    @staticmethod
    def read(folder: Path, rank: int, may_name: Callable[[str], str | None]) -> "RankState":
        """Raises: UserError as `read_rank`, and for a field that is missing or has no such value."""
        path = rank_file(folder, rank)
        fields = _Fields(path, "", read_rank(folder, rank, may_name))
        parts = [
            _Fields(path, f"micro_batches[{at}]", part) for at, part in enumerate(fields.get("micro_batches", list))
        ]
        if not parts:
            raise fields.wrong("micro_batches", "is empty")
        batches = [MicroBatch(part.get("batch", object), _random(part)) for part in parts]
        callbacks = fields.get("callbacks", dict)
        for key in callbacks:
            if not isinstance(key, str) or not isinstance(callbacks[key], dict):
                raise fields.wrong(f"callbacks.{key}", "is not the state of a callback by its name")
        precision = fields.get("matmul_precision", str)
        if precision not in PRECISIONS:
            raise fields.wrong("matmul_precision", f"must be one of {', '.join(PRECISIONS)}, got {precision!r:.80}")
        return RankState(path, batches, callbacks, precision)

    @contextlib.contextmanager
    def blamed(self, field: str, doing: str) -> Iterator[None]:
        """Errors of the block become a `UserError` that names the field from whose value they come."""
        try:
            yield
        except UserError:
            raise
        except _WRONG as error:
            said = f"{doing}: {type(error).__name__}: {one_line(error)[:400]}"
            raise UserError(f"{self.path}: {field} {said}") from error


class _Fields:
    """A mapping of a file whose fields are taken by name and type."""

    def __init__(self, path: Path, where: str, value: Any) -> None:
        self.path, self.where = path, where
        if not isinstance(value, dict):
            raise UserError(f"{path} is damaged: {where or 'its content'} is a {type(value).__name__}, not a mapping")
        self.value = value

    def get(self, name: str, kind: type) -> Any:
        if name not in self.value:
            raise self.wrong(name, "is missing")
        if not isinstance(found := self.value[name], kind):
            raise self.wrong(name, f"must be a {kind.__name__}, and is a {type(found).__name__}")
        return found

    def wrong(self, name: str, what: str) -> UserError:
        return UserError(f"{self.path} is damaged: {'.'.join(filter(None, [self.where, name]))} {what}")


def _random(part: _Fields) -> dict[str, Any]:
    """The random states before a micro-batch, each of which was tried."""
    given = _Fields(part.path, f"{part.where}.random", part.get("random", dict))
    now = random_states()
    for name in now:
        value = given.get(name, Tensor if name == "torch" else list)
        if name == "cuda" and not all(isinstance(one, Tensor) for one in value):
            raise given.wrong(name, "must be tensors")
        try:
            restore_random_states({**now, name: value})
        except _WRONG as error:
            raise given.wrong(name, f"is no state of a generator: {one_line(error)[:200]}") from error
        finally:
            restore_random_states(now)
    return given.value
