"""Adapters in one safetensors file: their numbers, what was trained beside them, and on which weights.

    save_adapter(model, "digits.safetensors")
    load_adapter(another_copy_of_the_pretrained_model, "digits.safetensors")

The file's metadata names format, adapter, layers with their specs, and the SHA-256 of the frozen layers: an adapter put
on other weights than it was trained on gives numbers without meaning and no error.
"""

import dataclasses
import glob
import importlib
import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from lightspan.adapters.adapter import Adapted, AdapterSpec
from lightspan.adapters.inject import adapt, adapted_layers, digest, plain_tensors
from lightspan.adapters.layers import weight_of, whole
from lightspan.adapters.report import Injection
from lightspan.distributed import rank
from lightspan.errors import UserError
from lightspan.files import atomic_path

FORMAT = "lightspan adapter 1"
_ADAPTER, _TRAINED = "adapter.", "trained."


def save_adapter(model: nn.Module, path: str | Path, name: str = "default") -> None:
    """Writes the adapter of that name from every layer that has it, and all else that trains, on the first rank.

    All ranks of a sharded model have to call it.

    Raises: UserError if no layer has such an adapter, or the file cannot be written.
    """
    layers = _with_adapter(model, name)
    tensors = {
        f"{_ADAPTER}{layer}.{key}": tensor
        for layer, module in layers.items()
        for key, tensor in module.adapters[name].stored().items()
    }
    tensors |= {f"{_TRAINED}{n}": whole(t).detach() for n, t in plain_tensors(model) if t.requires_grad}
    metadata = {
        "format": FORMAT,
        "name": name,
        "specs": json.dumps({layer: _described(module.adapters[name].spec) for layer, module in layers.items()}),
        "base_sha256": _base_hash(layers),
    }
    if rank() != 0:
        return
    # Copies: safetensors refuses tensors that share memory, and an expanded one has none of its own.
    copies = {key: tensor.cpu().contiguous().clone() for key, tensor in tensors.items()}
    with atomic_path(path) as temporary:
        save_file(copies, str(temporary), metadata)


def load_adapter(
    model: nn.Module,
    path: str | Path,
    name: str | None = None,
    specs: tuple[type[AdapterSpec], ...] = (),
    other_weights: bool = False,
    show: bool = True,
) -> Injection:
    """Adapts a model as the file says and fills in what is stored.

    Args:
        model: with the weights that the adapter was trained on, changed in place.
        name: to give the adapter; None is the name it was saved under.
        specs: spec classes of your own that the file may name; lightspan's are known.
        other_weights: whether frozen weights may differ from those that the adapter was trained on.
        show: as of `adapt`.
    Raises: UserError for a file that is no adapter, does not fit the model, or belongs to other frozen weights.
    """
    try:
        with safe_open(str(path), "pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no mapping
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read as a safetensors file: {error}") from error
    if metadata.get("format") != FORMAT:
        raise UserError(f"{path} is no {FORMAT!r} file, its format is {metadata.get('format')!r}")
    name = name or metadata["name"]
    described = json.loads(metadata["specs"])
    known = dict(model.named_modules())
    if missing := [layer for layer in described if layer not in known]:
        raise UserError(f"{path} adapts {missing[0]}, which {type(model).__name__} does not have")
    trained = {key.removeprefix(_TRAINED): t for key, t in tensors.items() if key.startswith(_TRAINED)}
    frozen = {layer: known[layer] for layer in described}
    if not other_weights and _base_hash(frozen) != metadata["base_sha256"]:
        raise UserError(
            f"{path} was trained on other weights than this {type(model).__name__} has (the SHA-256 of the adapted "
            "layers differs); load the same pretrained weights in the same dtype, or pass other_weights=True"
        )
    injections = [
        adapt(model, [glob.escape(n) for n in members], spec, name, [glob.escape(n) for n in trained], show=False)
        for spec, members in _by_spec(described, specs)
    ]
    for layer, module in adapted_layers(model).items():
        if layer in described:
            prefix = f"{_ADAPTER}{layer}."
            own = {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)}
            try:
                module.adapters[name].restore(own)
            except UserError as error:
                raise UserError(f"{path}, {layer}: {error}") from error
    parameters = dict(plain_tensors(model))
    with torch.no_grad():
        for key, tensor in trained.items():
            if parameters[key].shape != tensor.shape:
                raise UserError(f"{path}: {key} is {list(tensor.shape)}, not {list(parameters[key].shape)}")
            parameters[key].copy_(tensor)
    rows = tuple(row for injection in injections for row in injection.rows)
    injection = dataclasses.replace(injections[-1], rows=rows)
    if show:
        injection.print()
    return injection


def _with_adapter(model: nn.Module, name: str) -> dict[str, Adapted]:
    layers = {layer: module for layer, module in adapted_layers(model).items() if name in module.adapters}
    if not layers:
        known = sorted({key for module in adapted_layers(model).values() for key in module.adapters})
        raise UserError(f"no layer has an adapter named {name!r}; there are {', '.join(known) or 'none'}")
    return layers


def _base_hash(layers: dict[str, nn.Module] | dict[str, Adapted]) -> str:
    """Of weights alone: biases may be trained."""
    bases = {layer: module.base if isinstance(module, Adapted) else module for layer, module in layers.items()}
    return digest((layer, weight_of(module)) for layer, module in bases.items())


def _described(spec: AdapterSpec | None) -> dict[str, object]:
    assert dataclasses.is_dataclass(spec)
    assert not isinstance(spec, type)
    kind = type(spec)
    return {"class_path": f"{kind.__module__}.{kind.__qualname__}", "init_args": dataclasses.asdict(spec)}


def _by_spec(
    described: dict[str, dict[str, object]], own: tuple[type[AdapterSpec], ...]
) -> list[tuple[AdapterSpec, list[str]]]:
    groups: dict[str, list[str]] = {}
    for layer, description in described.items():
        groups.setdefault(json.dumps(description), []).append(layer)
    return [(_spec(**json.loads(text), own=own), members) for text, members in groups.items()]


def _spec(class_path: str, init_args: dict[str, object], own: tuple[type[AdapterSpec], ...]) -> AdapterSpec:
    """Raises: UserError for a class that is neither lightspan's nor handed in: importing what a file names runs it."""
    known = {f"{kind.__module__}.{kind.__qualname__}": kind for kind in own}
    module, _, name = class_path.rpartition(".")
    if class_path in known:
        return known[class_path](**init_args)
    found = getattr(importlib.import_module(module), name, None) if module.startswith("lightspan.adapters.") else None
    if not (isinstance(found, type) and issubclass(found, AdapterSpec)):
        raise UserError(f"the file needs the adapter {class_path}; pass its class in specs=")
    return found(**init_args)
