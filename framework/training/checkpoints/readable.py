"""What may be written into a checkpoint: only what `weights_only=True` reads back, checked when saving, not when
resuming.

Hyper-parameters only describe a run: they are written as plain values. All else must be returned
to its owner unchanged, and so is refused if that is impossible.
"""

import io
import warnings
from argparse import Namespace
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping
from copy import copy
from datetime import date, time
from enum import Enum
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch import Tensor, nn

from lightspan.core.errors import UserError
from lightspan.training.checkpoints.content import expanded

_PLAIN = (type(None), bool, int, float, complex, str, bytes)
_HYPER_PARAMETERS = (LightningModule.CHECKPOINT_HYPER_PARAMS_KEY, LightningDataModule.CHECKPOINT_HYPER_PARAMS_KEY)
_THEIR_CLASS = LightningModule.CHECKPOINT_HYPER_PARAMS_TYPE


def readable(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """`checkpoint` with plain hyper-parameters: paths as text, members of an enum as their values, NumPy's numbers as
    Python's, other mappings and namespaces as dicts, named tuples as tuples, dates as ISO text, arrays as lists of
    such; expanded tensors whole. What has no plain form, such as a module, is left out with a warning.

    Raises: UserError for any other value that could not be read back, by its entry.
    """
    plain = {key: value for key, value in checkpoint.items() if key != _THEIR_CLASS}
    for key in _HYPER_PARAMETERS:
        if key in plain:
            left_out: list[str] = []
            plain[key] = _plain_mapping(plain[key], key, left_out)
            if left_out:
                warnings.warn(
                    f"{', '.join(left_out)} cannot be written as plain values and are not in the checkpoint; give them "
                    "to load_from_checkpoint, and name them in save_hyperparameters(ignore=[...])",
                    stacklevel=2,
                )
    for entry, value in _unreadable(plain, ""):
        raise UserError(
            f"the entry {entry} of the checkpoint is a {type(value).__name__}, which cannot be read back: checkpoints "
            "contain tensors and plain values, so that no code in them can run; keep str(path), float(number), "
            "list(values) or a dict of such in the state, and build the object from it when it is loaded"
        )
    if isinstance(state := plain.get("state_dict"), dict):
        plain["state_dict"] = _whole(state)
    return plain


def _whole(state: dict[str, Any]) -> dict[str, Any]:
    """Expanded tensors with all of their numbers, without which they are refused when they are read."""
    if not (names := [name for name, value in state.items() if expanded(value)]):
        return state
    state = copy(state)  # with the versions of its modules, which torch keeps beside the entries
    state.update({name: state[name].contiguous() for name in names})
    return state


def _plain_mapping(values: Mapping[Any, Any], entry: str, left_out: list[str]) -> dict[Any, Any]:
    plain = {}
    for key in values:
        where = f"{entry}.{key}"
        try:
            plain[_plain(key, where, left_out)] = _plain(values[key], where, left_out)
        except Exception:  # whatever a mapping raises that computes its values
            left_out.append(where)
    return plain


def _plain(value: Any, entry: str, left_out: list[str]) -> Any:
    if isinstance(value, Enum):
        return _plain(value.value, entry, left_out)
    if isinstance(value, np.longdouble | np.clongdouble):  # whose `tolist` returns the same type
        return complex(value) if isinstance(value, np.clongdouble) else float(value)
    if isinstance(value, np.generic | np.ndarray):  # may contain dates, or anything else
        return _plain(value.tolist(), entry, left_out)
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, date | time):
        return value.isoformat()
    if isinstance(value, Namespace):
        value = vars(value)
    if isinstance(value, Mapping):
        return _plain_mapping(value, entry, left_out)
    if isinstance(value, list | tuple) and not isinstance(value, torch.Size):
        items = [_plain(item, f"{entry}[{i}]", left_out) for i, item in enumerate(value)]
        return tuple(items) if isinstance(value, tuple) else items
    for kind in (str, int, float):
        if isinstance(value, kind) and type(value) not in _PLAIN:
            return kind(value)
    if next(_unreadable(value, entry), None):
        raise ValueError(entry)
    return value


def _unreadable(value: Any, entry: str) -> Iterator[tuple[str, Any]]:
    # A tensor of another class, or with its own attributes, is written with more than its numbers.
    if type(value) in _PLAIN or (type(value) in (Tensor, nn.Parameter) and not vars(value)):
        return
    if type(value) in (dict, OrderedDict, Counter):
        for key, child in value.items():
            yield from _unreadable(key, f"{entry} with the key {key!r:.80}")
            yield from _unreadable(child, f"{entry}.{key!s:.80}".lstrip("."))
    elif type(value) in (list, tuple):
        for i, child in enumerate(value):
            yield from _unreadable(child, f"{entry}[{i}]")
    elif not _reads_back(value):
        yield entry, value


def _reads_back(value: Any) -> bool:
    file = io.BytesIO()
    try:
        torch.save(value, file)
        file.seek(0)
        torch.load(file, weights_only=True)
    except Exception:  # whatever pickle and torch raise
        return False
    return True
