"""A PEFT adapter as the checkpoint that it makes of its base, and checkpoints of which some are adapters."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import torch
from torch import Tensor

from lightspan.adapters.peft import WEIGHTS, StoredChange
from lightspan.core.errors import UserError
from lightspan.core.files.places import PathUse
from lightspan.core.files.tensors import Form
from lightspan.merging.merger import Merger
from lightspan.merging.weights import Weights, is_adapter, open_weights, place_of, sha256_of


class AdaptedWeights(Weights):
    """The base's tensors, those that a PEFT LoRA changes computed in float64 when they are read.

    Layers go by their names in the model that PEFT was given. A base whose names begin further out, as with the
    `backbone.` of a run, is met where one beginning fits all of them.

    Raises: UserError for an adapter that changes what the base does not have, or has in other sizes.
    """

    def __init__(self, folder: Annotated[Path, PathUse.READ], base: Weights) -> None:
        self._change, self._base = StoredChange(folder), base
        names = [f"{layer}.weight" for layer in self._change.layers] + list(self._change.replaced)
        prefix = _beginning(names, base, folder)
        self._layers = {f"{prefix}{layer}.weight": layer for layer in self._change.layers}
        self._replaced = {f"{prefix}{name}": tensor for name, tensor in self._change.replaced.items()}
        shapes = {layer: base.forms[name].shape for name, layer in self._layers.items()}
        self._transposed = self._change.transposes(shapes)
        for name in self._layers:
            if not base.forms[name].dtype.is_floating_point:
                raise UserError(
                    f"{folder} adds to {name}, which is {base.forms[name].dtype} in its base {base.origin['path']}; "
                    "name a base of real weights that are not quantised"
                )
        for name, tensor in self._replaced.items():
            form = base.forms[name]
            if tensor.dtype != form.dtype and not (tensor.is_floating_point() and form.dtype.is_floating_point):
                raise UserError(f"{folder} replaces {name}, {form.dtype} in its base, by numbers of {tensor.dtype}")
            if tuple(tensor.shape) != form.shape:
                raise UserError(
                    f"{folder} replaces {name} by {list(tensor.shape)}, and that of its base {base.origin['path']} is "
                    f"{list(form.shape)}; it belongs to another model"
                )
        changed = self._layers.keys() | self._replaced.keys()
        self.aliases = {name: kept for name, kept in base.aliases.items() if not {name, kept} & changed}
        self.forms, self.home = base.forms, base.home
        for name in self._layers:
            self._change.factors(*self._place(name))  # refused before anything is written, if of other sizes
        digest = sha256_of(folder / WEIGHTS)
        self.origin = {"path": str(folder), "sha256": digest, "base": base.origin["path"]}

    def read(self, name: str) -> Tensor:
        if name in self._replaced:
            return self._replaced[name]
        base = self._base.read(name)
        return base.double() + self._change.delta(*self._place(name)) if name in self._layers else base

    def _place(self, name: str) -> tuple[str, tuple[int, ...], bool]:
        """(layer, shape of its weight, whether that is stored as [I O]): a matrix that is not square shows how it lies,
        of square ones the folder's others tell.
        """
        layer, shape = self._layers[name], self._base.forms[name].shape
        rows, columns = (*shape, 0, 0)[:2]
        return layer, shape, self._transposed if rows == columns else self._change.transposes({layer: shape})


class AdapterChange(Weights):
    """What a PEFT LoRA adds to the layers of whatever model it belongs to, computed in float64 when it is read.

    Without a model a matrix lies as [O I]. What trained as a whole (`modules_to_save`) is no change and is left out.

    Raises: UserError for an adapter that changes no layer, or whose factors do not fit one another.
    """

    def __init__(self, folder: Annotated[Path, PathUse.READ]) -> None:
        self._change = StoredChange(folder)
        self.left_out = sorted(self._change.replaced)
        self.forms = {
            f"{layer}.weight": Form(self._change.shape(layer), torch.float64) for layer in self._change.layers
        }
        if not self.forms:
            raise UserError(f"{folder} adds to no layer; save the adapter again from PEFT")
        self.aliases, self.home = {}, folder
        self.origin = {"path": str(folder), "sha256": sha256_of(folder / WEIGHTS)}
        for layer in self._change.layers:
            self._change.factors(layer, self._change.shape(layer))

    def read(self, name: str) -> Tensor:
        layer = name.removesuffix(".weight")
        return self._change.delta(layer, self._change.shape(layer))


def open_checkpoints(merger: Merger, paths: Mapping[str, str], base: str | None = None) -> dict[str, Weights]:
    """The checkpoints by name.

    Args:
        base: path of what adapters belong to; None is the checkpoint that leads.
    Raises: UserError for what is no checkpoint, and for an adapter that is to lead or belongs to another model.
    """
    leading = merger.leading(list(paths))
    own = base is None
    under = open_weights(paths[leading] if base is None else base)
    places = {name: place_of(path) for name, path in paths.items()}

    def opened(name: str, place: Path) -> Weights:
        if own and name == leading:
            return under
        return AdaptedWeights(place, under) if is_adapter(place) else open_weights(place)

    return {name: opened(name, place) for name, place in places.items()}


def _beginning(names: list[str], base: Weights, folder: Path) -> str:
    first = names[0] if names else ""
    candidates = {known.removesuffix(first) for known in base.forms if f".{known}".endswith(f".{first}")} | {""}
    fitting = sorted((p for p in candidates if all(p + name in base.forms for name in names)), key=len)
    if not fitting:
        missing = next((name for name in names if name not in base.forms), "nothing")
        raise UserError(
            f"{folder} changes {missing}, which its base {base.origin['path']} does not have; it belongs to another "
            "model"
        )
    return fitting[0]
