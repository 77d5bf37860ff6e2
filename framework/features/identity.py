"""What features depend on, as plain data: two equal descriptions give equal features, and any change another one."""

import hashlib
import itertools
import json
from collections.abc import Iterable, Mapping
from importlib import metadata
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

SAMPLES_LOOKED_AT = 32
_OF_RUNS = {"batch_size", "num_workers", "pin_memory", "prepare_data_per_node", "trainer", "training"}
"""Attributes that say how a computation is carried out, not what comes out of it."""


def module_identity(module: nn.Module) -> dict[str, Any]:
    """Class, packages and sha256 of a network: of all its parameters and buffers, saved or not, of the structure of its
    modules, and of the settings that they keep as attributes (a stride, a slope, whether to pool).
    """
    digest = hashlib.sha256()
    packages = set()
    for name, part in module.named_modules():
        packages.add(type(part).__module__.split(".")[0])
        digest.update(json.dumps([name, _class_of(part), part.extra_repr(), settings_of(part)]).encode())
    for name, tensor in itertools.chain(module.named_parameters(), module.named_buffers()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor_bytes(tensor))
    versions = {package: version for package in sorted(packages) if (version := _version(package))}
    return {"class": _class_of(module), "packages": versions, "sha256": digest.hexdigest()}


def data_identity(data: object, loader: Any) -> dict[str, Any]:
    """Class and settings of what makes the samples, their number, and the sha256 of some of them as an encoder gets
    them: preprocessing that changes pixels changes it, wherever it is set.
    """
    dataset: Any = getattr(loader, "dataset", None)
    if hasattr(dataset, "sample") and hasattr(dataset, "__len__") and len(dataset):
        places = np.unique(np.linspace(0, len(dataset) - 1, SAMPLES_LOOKED_AT).round().astype(int)).tolist()
        samples: Iterable[Any] = (dataset.sample(place, 0) for place in places)
        count = len(dataset)
    else:
        samples, count = itertools.islice(loader, 1), len(loader) if hasattr(loader, "__len__") else -1
    digest = hashlib.sha256()
    for sample in samples:
        _digest_value(digest, sample)
    return {"class": _class_of(data), "settings": settings_of(data), "count": count, "sha256": digest.hexdigest()}


def settings_of(thing: object) -> dict[str, str]:
    """The attributes of a thing that are settings: public, and with a text that says what they are."""
    found = {}
    for name, value in sorted(vars(thing).items()):
        if name.startswith("_") or name in _OF_RUNS or isinstance(value, nn.Module):
            continue
        if isinstance(value, Tensor | np.ndarray):
            found[name] = hashlib.sha256(tensor_bytes(torch.as_tensor(value))).hexdigest()
        elif " at 0x" not in (text := repr(value)):  # else it says where a thing lies, which is new in every process
            found[name] = text
    return found


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The numbers of a tensor as they lie in memory."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _digest_value(digest: "hashlib._Hash", value: Any) -> None:
    if isinstance(value, Tensor):
        digest.update(f"{value.dtype} {list(value.shape)}".encode())
        digest.update(tensor_bytes(value))
    elif isinstance(value, Mapping):
        for key in sorted(value, key=str):
            digest.update(str(key).encode())
            _digest_value(digest, value[key])
    elif isinstance(value, list | tuple):
        for child in value:
            _digest_value(digest, child)
    else:
        digest.update(repr(value).encode())


def _class_of(thing: object) -> str:
    return f"{type(thing).__module__}.{type(thing).__qualname__}"


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
