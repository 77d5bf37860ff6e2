"""A layer that gives a recipe the user's own data: pictures of a folder (`--images`) or rows of a file (`--table`).

The layer lies above all overlays and below the flags of the command line. What an overlay says of the user's data (such
as `val_size` or `links`) would be lost with the data that the layer replaces, so it is laid over the layer.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lightspan.cli.config.flags import flag_layer
from lightspan.cli.config.merge import merge_layers
from lightspan.cli.config.resolve import TRAINED, Resolved, checked, merged, overlay_layers, refuse_kind, with_layers
from lightspan.cli.config.signatures import Signature, signature
from lightspan.cli.config.tree import Node, wrap
from lightspan.core.errors import UserError

Layer = tuple[dict[str, Any], list[str]]
"""A layer, and lines on what it changes."""
Wanted = Callable[[dict[str, Any], Any], dict[str, Any]]
"""The settings of a class that follow from the data: its present ones and its signature, None if that is not known ->
the new ones.
"""


@dataclass(frozen=True)
class UserData:
    """What takes the place of a recipe's data.

    Attributes:
        option: of the command line, such as "--images".
        modality: of the data.
        hint: for a recipe of another modality, what to do instead.
        data: class path of the data module.
        fitted: settings of the data that follow from the command line, or from the recipe and the user's data.
        name: what the data are, in the plural.
        place: where they are.
        layer: of a checked recipe, the layer.
        model_layer: of the recipe with layer and flags, what the model takes from the data; None if `layer` has it.
    """

    option: str
    modality: str
    hint: str
    data: str
    fitted: set[str]
    name: str
    place: Path
    layer: Callable[[Resolved], Layer]
    model_layer: Callable[[Resolved], Layer] | None = None

    def laid_over(
        self,
        recipe: str,
        overlays: Sequence[str],
        flags: Sequence[str],
        allow_modules: Sequence[str],
        kinds: Sequence[str],
    ) -> Resolved:
        """The recipe with its overlays, then the layer, then the flags.

        Raises: UserError for a recipe that does not train or is for data of another modality, and as the layers and
            `resolve` do.
        """
        given = overlay_layers(overlays)
        found, tree, notes = merged(recipe, (), ())
        tree, more = merge_layers([tree, *map(self._without_settings_of_data, given)])
        resolved = checked(found, tree, [*notes, *more], allow_modules, kinds)
        self._require_modality(resolved)
        layer, said = self.layer(resolved)
        said += [note for overlay in given for note in self._lost(overlay)]
        # That the recipe's data go is what the option asks for, so the merge's own notes on it say nothing new.
        layers = [wrap(layer, self.option), *filter(None, map(self._settings_of_data, given))]
        flagged = [flag_layer(list(flags))] if flags else []
        if self.model_layer is not None:
            fits, more = self.model_layer(with_layers(resolved, [*layers, *flagged], self.option))
            layers.append(wrap(fits, self.option))
            said += more
        over = with_layers(resolved, layers, self.option)
        own = replace(over, notes=[*resolved.notes, *said], about=self._described(resolved))
        return with_layers(own, flagged) if flagged else own

    def _require_modality(self, resolved: Resolved) -> None:
        refuse_kind(resolved.kind, TRAINED, resolved.name)
        modality = resolved.about.get("modality", self.modality)
        if modality != self.modality:
            raise UserError(
                f"{self.option} gives {self.name}, but {resolved.name} is a recipe for data of modality {modality}; "
                f"{self.hint}"
            )

    def _described(self, resolved: Resolved) -> dict[str, Any]:
        """The recipe's `about`, without what it says of its own data."""
        if not resolved.about:
            return {}
        unknown = dict.fromkeys(resolved.about.keys() & {"expected", "time"}, f"not measured on these {self.name}")
        title = f"{resolved.name} on the {self.name} of {self.place.resolve().name}"
        return resolved.about | {"title": title} | unknown

    def _settings_of_data(self, layer: Node) -> Node | None:
        """What an overlay says of the data that only the user's class reads, as a layer; None if it says nothing."""
        given = layer.at(("data", "init_args"))
        if given is None:
            return None
        kept = {key: given.value[key] for key in self._of_data(given)}
        if not kept:
            return None
        return Node({"data": Node({"init_args": Node(kept, given.where)}, given.where)}, layer.where)

    def _without_settings_of_data(self, layer: Node) -> Node:
        """The overlay without them, whose names the recipe's own data need not know."""
        given = layer.at(("data", "init_args"))
        if given is None or not self._of_data(given):
            return layer
        kept = {key: node for key, node in given.value.items() if key not in self._of_data(given)}
        settings = replace(given, value=kept)
        data = layer.value["data"]
        return replace(layer, value=layer.value | {"data": replace(data, value=data.value | {"init_args": settings})})

    def _of_data(self, settings: Node) -> set[Any]:
        return (settings.value.keys() & self._taken()) - self.fitted if isinstance(settings.value, dict) else set()

    def _lost(self, overlay: Node) -> list[str]:
        """What to say of an overlay's settings that the user's class does not have."""
        given = overlay.at(("data", "init_args"))
        if given is None or not isinstance(given.value, dict):
            return []
        return [
            f"{node.where} data.init_args.{key}: dropped with the recipe's own data; {self.name} of yours have no {key}"
            for key, node in given.value.items()
            if key not in self._taken()
        ]

    def _taken(self) -> set[str]:
        takes = signature(self.data)
        assert isinstance(takes, Signature)
        return {*takes.parameters}


def fitted(spec: dict[str, Any], wanted: Wanted, notes: list[str], where: str = "model") -> dict[str, Any]:
    """The settings of a class, and of those inside it, that follow from the data. A line on each joins `notes`."""
    settings = spec.get("init_args") or {}
    ours = spec["class_path"].startswith("lightspan.")
    now = wanted(settings, signature(spec["class_path"]) if ours else None)
    notes += [f"{where}.init_args.{key}={value}" for key, value in now.items()]
    for key, child in settings.items():
        inner = _inside(child, wanted, notes, f"{where}.init_args.{key}")
        if inner is not None:
            now[key] = inner
    return now


def _inside(child: Any, wanted: Wanted, notes: list[str], where: str) -> Any:
    if isinstance(child, dict) and "class_path" in child:
        changed = fitted(child, wanted, notes, where)
        return {"init_args": changed} if changed else None
    if isinstance(child, list) and any(isinstance(one, dict) and "class_path" in one for one in child):
        # A list is replaced as a whole, so all of its parts are written again.
        count = len(notes)
        written = [_merged(one, _inside(one, wanted, notes, where)) for one in child]
        return written if len(notes) > count else None
    return None


def _merged(spec: Any, layer: Any) -> Any:
    if not (isinstance(spec, dict) and isinstance(layer, dict)):
        return spec if layer is None else layer
    return {**spec, **{key: _merged(spec.get(key), value) for key, value in layer.items()}}
