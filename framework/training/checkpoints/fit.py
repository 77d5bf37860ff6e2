"""Whether the weights of a checkpoint are those of a model: names, shapes, and kinds of numbers."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightspan.core.distributed import rank
from lightspan.core.errors import UserError, printable

FLOATS = {torch.float16, torch.bfloat16, torch.float32, torch.float64}
"""Precisions of one kind of number: a run may load weights of another precision, rounded, and says so."""


def check_fits(
    state_dict: Mapping[str, Any],
    module: torch.nn.Module,
    origin: str,
    written_by: str | None = None,
    strict: bool = True,
    way_out: str = "load it with the recipe and settings that wrote it, or start without it",
) -> None:
    """Raise a UserError if `state_dict` belongs to another model than `module`; print a line if it is rounded.

    Weights load into another floating-point precision (float16, bfloat16, float32, float64), since evaluating and
    exporting in another precision than in training is common; they do not load into another kind of number.

    Args:
        origin: path of the checkpoint, for the message.
        written_by: class that wrote it, when known.
        strict: if False, missing and unexpected names are allowed and only shapes and dtypes count.
        way_out: what to do about it, for the message.
    """
    wanted = module.state_dict()
    missing = [name for name in wanted if name not in state_dict] if strict else []
    unexpected = [name for name in state_dict if name not in wanted] if strict else []
    both = [
        (name, state_dict[name], tensor)
        for name, tensor in wanted.items()
        if isinstance(tensor, Tensor) and isinstance(state_dict.get(name), Tensor)
    ]
    reshaped = [f"{name} {list(a.shape)} there, {list(b.shape)} here" for name, a, b in both if a.shape != b.shape]
    relaid = [f"{name} {a.layout} there, {b.layout} here" for name, a, b in both if a.layout != b.layout]
    recast = [(name, a.dtype, b.dtype) for name, a, b in both if a.dtype != b.dtype]
    foreign = [f"{name} {_word(a)} there, {_word(b)} here" for name, a, b in recast if not {a, b} <= FLOATS]
    groups = {
        "missing in it": missing,
        "only in it": unexpected,
        "of another shape": reshaped,
        "of another kind of number": foreign,
        "of another layout": relaid,
    }
    if differences := "; ".join(f"{what}: {_first(names)}" for what, names in groups.items() if names):
        author = f" (written by {written_by})" if written_by else ""
        raise UserError(
            f"checkpoint {origin}{author} belongs to another model than {class_path(module)}: {differences}; {way_out}"
        )
    if recast and rank() == 0:
        changes = sorted({f"from {_word(a)} to {_word(b)}" for _, a, b in recast})
        print(printable(f"lightspan: {len(recast)} tensors of {origin} are cast {', '.join(changes)}"), flush=True)


def class_path(instance: object) -> str:
    """Full import path of the class of `instance`."""
    return f"{type(instance).__module__}.{type(instance).__qualname__}"


def _first(names: Sequence[str], shown: int = 3) -> str:
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
