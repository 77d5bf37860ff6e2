"""Adapters in one safetensors file: their numbers, what else was trained, and on which weights.

    save_adapter(model, "digits.safetensors")
    load_adapter(another_copy_of_the_pretrained_model, "digits.safetensors")

The file's metadata names format, adapter, layers with their specs, and the SHA-256 of the frozen layers: an adapter
on other weights than it was trained on would give meaningless numbers and no error.
"""

import dataclasses
import importlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from lightspan.adapters.adapter import Adapted, AdapterSpec
from lightspan.adapters.inject import AdapterPlan, adapted_layers, digest, plain_tensors, plan
from lightspan.adapters.layers import weight_of
from lightspan.adapters.report import Injection
from lightspan.core.distributed import rank
from lightspan.core.errors import UserError
from lightspan.core.files.atomic import write_atomic
from lightspan.core.files.tensors import facts_of, stored_tensors
from lightspan.core.sharded import whole

FORMAT = "lightspan adapter 1"
_ADAPTER, _TRAINED = "adapter.", "trained."


def save_adapter(model: nn.Module, path: str | Path, name: str = "default") -> None:
    """Writes the adapter of that name from every layer that has it, and all else that trains, on the first rank.

    All ranks of a sharded model must call it.

    Raises: UserError if no layer has such an adapter, or the file cannot be written.
    """
    layers = _with_adapter(model, name)
    tensors = {
        f"{_ADAPTER}{layer}.{key}": tensor
        for layer, module in layers.items()
        for key, tensor in module.adapters[name].stored().items()
    }
    # Under every name of a shared tensor, so that a model in which they are separate gets them all.
    trained = {n: t for n, t in plain_tensors(model, every_name=True) if t.requires_grad}
    tensors |= {f"{_TRAINED}{name}": whole(tensor).detach() for name, tensor in trained.items()}
    metadata = {
        "format": FORMAT,
        "name": name,
        "specs": json.dumps({layer: _described(module.adapters[name].spec) for layer, module in layers.items()}),
        "base_sha256": _base_hash(layers),
    }
    if rank() != 0:
        return
    write_tensors(path, tensors, metadata)


def write_tensors(path: str | Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Writes a safetensors file, whole or not at all, with the usual permissions of new files."""
    # Copies: safetensors refuses tensors that share memory, and an expanded one has no memory of its own.
    copies = {key: tensor.cpu().contiguous().clone() for key, tensor in tensors.items()}
    write_atomic(path, save(copies, metadata))  # not its save_file, which lets only the owner read


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
        show: as in `adapt`.
    Raises: UserError for a file that is not an adapter, does not fit the model, or belongs to other frozen weights; the
    model is then unchanged.
    """
    tensors, metadata = stored_tensors(path)
    if metadata.get("format") != FORMAT:
        raise UserError(f"{path} is not a {FORMAT!r} file; its format is {metadata.get('format')!r}")
    facts = facts_of(metadata, path, name=str, specs=dict, base_sha256=str)
    name, described = name or facts["name"], facts["specs"]
    known = dict(model.named_modules())
    if missing := [layer for layer in described if layer not in known]:
        raise UserError(f"{path} adapts {missing[0]}, which {type(model).__name__} does not have")
    trained = {key.removeprefix(_TRAINED): t for key, t in tensors.items() if key.startswith(_TRAINED)}
    frozen = {layer: known[layer] for layer in described}
    if not other_weights and _base_hash(frozen) != facts["base_sha256"]:
        raise UserError(
            f"{path} was trained on other weights than this {type(model).__name__} has (the SHA-256 of the adapted "
            "layers differs); load the same pretrained weights in the same dtype, or pass other_weights=True"
        )
    specs_of = {layer: _spec(description, specs, path) for layer, description in described.items()}
    places = destinations(model, trained, str(path))
    planned = plan(model, specs_of, name, trained_names(model, places))
    for layer, adapter in planned.adapters.items():
        prefix = f"{_ADAPTER}{layer}."
        own = {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)}
        try:
            adapter.restore(own)
        except UserError as error:
            raise UserError(f"{path}, {layer}: {error}") from error
    return carry_out_loaded(planned, trained, places, show)


def destinations(model: nn.Module, tensors: dict[str, Tensor], where: str) -> dict[str, Tensor]:
    """The model's own tensors that those of a file go into, by the file's names.

    Raises: UserError for a name that the model does not have, another shape, and a tensor that the model has under
    several names for which the file has different numbers.
    """
    own = dict(plain_tensors(model, every_name=True))
    kind = type(model).__name__
    if foreign := [key for key in tensors if key not in own]:
        raise UserError(f"{where} contains {foreign[0]}, for which {kind} has no place")
    first: dict[int, str] = {}
    for key, tensor in tensors.items():
        if own[key].shape != tensor.shape:
            raise UserError(f"{where}: {key} is {list(tensor.shape)}, not {list(own[key].shape)}")
        other = first.setdefault(id(own[key]), key)
        if not torch.equal(tensors[other], tensor):
            raise UserError(f"{where} has different numbers for {other} and {key}, one tensor here; {untying(key)}")
    return {key: own[key] for key in tensors}


def untying(name: str) -> str:
    """How to make a shared parameter separate, as the end of a message."""
    module, _, attribute = name.rpartition(".")
    return (
        f"give it its own tensor first: layer = model.get_submodule({module!r}); "
        f"layer.{attribute} = nn.Parameter(layer.{attribute}.detach().clone()), "
        "and model.config.tie_word_embeddings = False if it has one"
    )


def trained_names(model: nn.Module, places: dict[str, Tensor]) -> set[str]:
    """The first names of those of `places` that can train."""
    found = {id(tensor) for tensor in places.values()}
    tensors = plain_tensors(model)
    return {n for n, t in tensors if id(t) in found and isinstance(t, nn.Parameter) and t.is_floating_point()}


@torch.no_grad()
def carry_out_loaded(
    planned: AdapterPlan, tensors: dict[str, Tensor], places: dict[str, Tensor], show: bool
) -> Injection:
    """Inserts restored adapters into the model and copies a file's other tensors to their places.

    The adapters are in the mode of their layer, so that a model in eval mode stays in it.
    """
    for layer, adapter in planned.adapters.items():
        adapter.train(planned.model.get_submodule(layer).training)
    injection = planned.carry_out()
    for key, tensor in tensors.items():
        places[key].copy_(tensor)
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
    """Of weights only: biases may be trained."""
    bases = {layer: module.base if isinstance(module, Adapted) else module for layer, module in layers.items()}
    return digest((layer, weight_of(module)) for layer, module in bases.items())


def _described(spec: AdapterSpec | None) -> dict[str, object]:
    assert dataclasses.is_dataclass(spec)
    assert not isinstance(spec, type)
    kind = type(spec)
    return {"class_path": f"{kind.__module__}.{kind.__qualname__}", "init_args": dataclasses.asdict(spec)}


def _spec(description: Any, own: tuple[type[AdapterSpec], ...], path: str | Path) -> AdapterSpec:
    """Raises: UserError for a class that is neither lightspan's nor passed in, since importing what a file names runs
    it, and for arguments that the class does not take.
    """
    match description:
        case {"class_path": str(class_path), "init_args": dict(init_args)}:
            kind = _kind(class_path, own)
        case _:
            raise UserError(f"{path} describes an adapter without 'class_path' and 'init_args'; it is damaged")
    try:
        return kind(**init_args)
    except (TypeError, UserError) as error:
        raise UserError(f"{path} describes a {class_path} that cannot be built: {error}") from error


def _kind(class_path: str, own: tuple[type[AdapterSpec], ...]) -> type[AdapterSpec]:
    known = {f"{kind.__module__}.{kind.__qualname__}": kind for kind in own}
    module, _, name = class_path.rpartition(".")
    if class_path in known:
        return known[class_path]
    found = getattr(importlib.import_module(module), name, None) if module.startswith("lightspan.adapters.") else None
    if not (isinstance(found, type) and issubclass(found, AdapterSpec)):
        raise UserError(f"the file needs the adapter {class_path}; pass its class in specs=")
    return found
