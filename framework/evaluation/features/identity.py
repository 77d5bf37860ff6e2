"""What features depend on, as plain data: equal descriptions mean equal features, and any change shows."""

import itertools
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightspan.evaluation.features.description import Description, name_of

SAMPLES_LOOKED_AT = 32
_OF_RUNS = {"batch_size", "num_workers", "pin_memory", "prepare_data_per_node", "selection", "trainer"}
"""Attributes of data that affect how a computation is carried out, not its result."""
_PLAIN = (type(None), bool, int, float, complex, str, bytes, Tensor, np.ndarray, np.generic, torch.dtype)


def module_identity(module: nn.Module) -> dict[str, Any]:
    """Class, packages and sha256 of a network: of its code, modules, parameters, buffers, attributes and hooks.

    Raises: UserError for what cannot be described, see `Description`.
    """
    description = Description(name_of(type(module)), module)
    return {
        "class": name_of(type(module)),
        "packages": dict(sorted(description.packages.items())),
        "sha256": description.sha256,
    }


def data_identity(data: object, loader: Any) -> dict[str, Any]:
    """Class and plain settings of what makes the samples, their number, and the sha256 of some samples as an encoder
    gets them: preprocessing that changes pixels changes it, wherever it is set.
    """
    dataset: Any = getattr(loader, "dataset", None)
    if hasattr(dataset, "sample") and hasattr(dataset, "__len__") and len(dataset):
        places = np.unique(np.linspace(0, len(dataset) - 1, SAMPLES_LOOKED_AT).round().astype(int)).tolist()
        samples: Iterable[Any] = (dataset.sample(place, 0) for place in places)
        count = len(dataset)
    else:
        samples, count = itertools.islice(loader, 1), len(loader) if hasattr(loader, "__len__") else -1
    return {
        "class": name_of(type(data)),
        "settings": _settings(data),
        "count": count,
        "sha256": _sha256(list(samples), "a sample"),
    }


def _settings(data: object) -> dict[str, str]:
    """The public attributes that are plain. Others, such as an opened data set, affect the samples."""
    settings = {name: value for name, value in sorted(vars(data).items()) if not name.startswith("_")}
    return {name: _sha256(value, name) for name, value in settings.items() if name not in _OF_RUNS and _is_plain(value)}


def _is_plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(_is_plain(child) for pair in value.items() for child in pair)
    if isinstance(value, list | tuple | set | frozenset):
        return all(map(_is_plain, value))
    return isinstance(value, _PLAIN) and not (isinstance(value, np.ndarray) and value.dtype.hasobject)


def _sha256(value: Any, where: str) -> str:
    return Description(where, value).sha256
