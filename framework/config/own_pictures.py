"""`lightspan fit RECIPE --images FOLDER`: the layer that gives a recipe the user's own pictures.

The layer lies above all overlays and below the flags of the command line. It replaces the data, keeps their views and
batch size, and changes what depends on the pictures' size, channels and classes: views, and the network's first layer.
"""

import ast
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lightspan.config.flags import flag_layer
from lightspan.config.resolve import Resolved, with_layer
from lightspan.config.signatures import Signature, signature
from lightspan.config.source import Definition, locate
from lightspan.config.tree import plain
from lightspan.errors import UserError

DATA = "lightspan.datamodules.pictures.folder.ImageFolder"
PROBES = "lightspan.callbacks.watching.online_probes.OnlineProbes"
NEAREST, LINEAR = "lightspan.estimators.probes.KNN", "lightspan.estimators.probes.LinearProbe"
FIRST_BATCH = "lightspan.callbacks.pictures.first_batch.FirstBatch"
FEATURE_PICTURES = "lightspan.callbacks.pictures.feature_pictures.FeaturePictures"
CHANNELS = 3
BATCH = 128
KNN, PROBE_EVERY = 20, 10
VALIDATION = ("val", "valid", "validation", "test")  # folders beside `train`, the first that is there validates
COLOUR = {"saturation": 0.4, "hue": 0.1, "grey": 0.2}  # half of SimCLR's strength, as the small recipes jitter
RANDOM_VIEWS = ("lightspan.datamodules.images.views.RandomViews", "lightspan.datamodules.images.views.TwoViews")
MOST_WORKERS = 8


def with_pictures(resolved: Resolved, folder: Path, size: int, flags: Sequence[str]) -> Resolved:
    """The recipe with its overlays, then the pictures, then the flags. Raises: as `pictures_layer` and `resolve` do."""
    layer, notes = pictures_layer(resolved, folder, size)
    # That the recipe's data go is what --images asks for, so the merge's own notes on it say nothing new.
    found = replace(with_layer(resolved, layer, "--images"), notes=[*resolved.notes, *notes])
    return with_layer(found, plain(flag_layer(list(flags)))) if flags else found


def pictures_layer(resolved: Resolved, folder: Path, size: int) -> tuple[dict[str, Any], list[str]]:
    """(the layer, lines on what it changes).

    Args:
        folder: of pictures, or with the folders `train` and `val` (or `validation`, `test`) and nothing else.
        size: height and width in pixels at which pictures are read.
    Raises: UserError for a recipe of other data, a folder without pictures, and a size that no patch divides.
    """
    modality = resolved.about.get("modality", "image")
    if modality != "image":
        raise UserError(f"--images gives pictures, but {resolved.name} is a recipe for data of modality {modality}")
    if size < 1:
        raise UserError(f"--image-size {size} must be at least 1 pixel")
    training, validation = _folders(folder.absolute())
    from lightspan.datamodules.pictures.files import find_pictures  # numpy, which other commands can do without

    found = find_pictures(training)
    data, model = resolved.config.get("data") or {}, resolved.config["model"]
    before = data.get("init_args") or {}
    channels, side = _shape_before(data, model)
    notes = [f"--images: {len(found.names):,} picture files in {training}, read at {size} x {size} pixels"]
    patches = _patches(model, side, size)

    model_layer = {"init_args": _fitted(model, size, patches, notes, "model")}
    if found.classes and "num_classes" in (model.get("init_args") or {}):
        model_layer["init_args"]["num_classes"] = len(found.classes)
        notes.append(f"model.init_args.num_classes={len(found.classes)}, the sub-folders")
    elif not found.classes and "num_classes" in (model.get("init_args") or {}):
        raise UserError(
            f"{resolved.name} learns from labels, but {training} has none; put the pictures of each class into a "
            "sub-folder of its name, or take a recipe that learns without labels"
        )
    places = (model.get("init_args") or {}).get("images")
    if isinstance(places, int) and places < len(found.names):  # of a memory of all pictures
        model_layer["init_args"]["images"] = len(found.names)
        notes.append(f"model.init_args.images={len(found.names)}, the pictures")
    if (views := before.get("views")) is not None:
        views = _views(views, side, size, max(patches.values(), default=1))
        if channels == 1 and _in_colour(views):
            notes.append("the recipe's pictures were grey: the views also change saturation and hue, and drop colours")
    batch = before.get("batch_size", BATCH)
    if isinstance(batch, int) and batch > (most := max(1, len(found.names) * 4 // 5)):
        batch = 2 ** (most.bit_length() - 1)
        notes.append(f"data.init_args.batch_size={batch}, since there are few pictures")
    settings = {"folder": str(training), "size": size, "batch_size": batch, "num_workers": workers()}
    settings |= {"views": views} if views is not None else {}
    settings |= {"val_folder": str(validation)} if validation is not None else {}
    settings |= {"seed": before["seed"]} if "seed" in before else {}
    layer = {
        "data": {"class_path": DATA, "init_args": settings},
        "model": model_layer,
        "trainer": {"callbacks": _callbacks(resolved, bool(found.classes), len(found.names))},
    }
    return layer, notes


def workers() -> int:
    """Half of the processor cores that this process may use, since the other half trains: in [1, 8], 0 of one core."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(MOST_WORKERS, cores // 2)


def _folders(folder: Path) -> tuple[Path, Path | None]:
    """(training folder, validation folder or None)."""
    inside = {path.name for path in folder.iterdir() if not path.name.startswith(".")} if folder.is_dir() else set()
    if "train" not in inside or not inside <= {"train", *VALIDATION}:
        return folder, None
    beside = next((name for name in VALIDATION if name in inside), None)
    return folder / "train", None if beside is None else folder / beside


def _shape_before(data: dict[str, Any], model: dict[str, Any]) -> tuple[int, int | None]:
    """(channels, side in pixels or None if unknown) of the recipe's own pictures."""
    settings = data.get("init_args") or {}
    shape = _constant(data.get("class_path"), "image_shape")
    sides = [value for key, value in _leaves(model) if key in ("img_size", "image_size") and isinstance(value, int)]
    sides += [value for key, value in _leaves(settings) if key in ("size", "image_size") and isinstance(value, int)]
    if isinstance(shape, tuple) and len(shape) == 3:
        return shape[0], shape[1]
    in_chans = [value for key, value in _leaves(model) if key == "in_chans"]
    return in_chans[0] if in_chans else CHANNELS, max(sides, default=None)


def _constant(class_path: Any, name: str) -> Any:
    """The value of a class's constant, read from its source; None if there is none."""
    definition = locate(class_path) if isinstance(class_path, str) else None
    if not isinstance(definition, Definition) or not isinstance(definition.node, ast.ClassDef):
        return None
    for statement in definition.node.body:
        if isinstance(statement, ast.Assign) and [ast.unparse(target) for target in statement.targets] == [name]:
            parts = statement.value.elts if isinstance(statement.value, ast.Tuple) else []
            values = [_number(part, definition) for part in parts]
            return tuple(values) if values and all(isinstance(value, int) for value in values) else None
    return None


def _number(node: ast.expr, definition: Definition) -> Any:
    """A number written in the source, or a constant of the module that names one."""
    if isinstance(node, ast.Name):
        named = [s.value for s in definition.source.tree.body if isinstance(s, ast.Assign) and _names(s) == [node.id]]
        node = named[0] if named else node
    return node.value if isinstance(node, ast.Constant) else None


def _names(statement: ast.Assign) -> list[str]:
    return [ast.unparse(target) for target in statement.targets]


def _leaves(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, child in value.items():
            if isinstance(child, dict | list):
                yield from _leaves(child)
            else:
                yield str(key), child
    elif isinstance(value, list):
        for child in value:
            yield from _leaves(child)


def _patches(model: dict[str, Any], side: int | None, size: int) -> dict[int, int]:
    """{patch size before: now}: about as many patches as before, and whole ones."""
    patches = {value for key, value in _leaves(model) if key == "patch_size" and isinstance(value, int) and value > 0}
    if side is None or side == size:
        return {}
    divisors = [number for number in range(1, size + 1) if size % number == 0]
    return {patch: min(divisors, key=lambda d: (abs(d - patch * size / side), -d)) for patch in patches}


def _fitted(spec: dict[str, Any], size: int, patches: dict[int, int], notes: list[str], where: str) -> dict[str, Any]:
    """The settings of a class, and of those inside it, that follow from the pictures."""
    settings = spec.get("init_args") or {}
    takes = signature(spec["class_path"])
    own = (
        set(takes.parameters) if isinstance(takes, Signature) and spec["class_path"].startswith("lightspan.") else set()
    )
    wanted = {"in_chans": CHANNELS, "img_size": size, "in_shape": [CHANNELS, size, size]}
    now = {key: value for key, value in wanted.items() if key in settings or key in own}
    if settings.get("patch_size") in patches:
        now["patch_size"] = patches[settings["patch_size"]]
    now = {key: value for key, value in now.items() if settings.get(key) != value}
    notes += [f"{where}.init_args.{key}={value}" for key, value in now.items()]
    for key, child in settings.items():
        inner = _inside(child, size, patches, notes, f"{where}.init_args.{key}")
        if inner is not None:
            now[key] = inner
    return now


def _inside(child: Any, size: int, patches: dict[int, int], notes: list[str], where: str) -> Any:
    if isinstance(child, dict) and "class_path" in child:
        changed = _fitted(child, size, patches, notes, where)
        return {"init_args": changed} if changed else None
    if isinstance(child, list) and any(isinstance(one, dict) and "class_path" in one for one in child):
        # A list is replaced as a whole, so all of its parts are written again.
        count = len(notes)
        merged = [_merged(one, _inside(one, size, patches, notes, where)) for one in child]
        return merged if len(notes) > count else None
    return None


def _merged(spec: Any, layer: Any) -> Any:
    if not (isinstance(spec, dict) and isinstance(layer, dict)):
        return spec if layer is None else layer
    return {**spec, **{key: _merged(spec.get(key), value) for key, value in layer.items()}}


def _views(views: Any, side: int | None, size: int, patch: int) -> Any:
    """The recipe's views, each `size` in proportion, and a multiple of the network's patch."""
    if isinstance(views, list):
        return [_views(one, side, size, patch) for one in views]
    if not isinstance(views, dict):
        return views
    scaled = {}
    for key, value in views.items():
        if key == "size" and isinstance(value, int) and side is not None:
            scaled[key] = max(patch, round(value * size / side / patch) * patch)
        else:
            scaled[key] = _views(value, side, size, patch)
    return scaled


def _in_colour(views: Any) -> bool:
    """Adds changes of colour to every `RandomViews` that has none, in place; whether there were any."""
    added = False
    if isinstance(views, dict) and views.get("class_path") in RANDOM_VIEWS:
        settings = views.setdefault("init_args", {})
        added = not COLOUR.keys() & settings.keys()
        settings |= COLOUR if added else {}
    children = views.values() if isinstance(views, dict) else views if isinstance(views, list) else ()
    for child in children:
        added = _in_colour(child) or added
    return added


def _callbacks(resolved: Resolved, labelled: bool, count: int) -> dict[str, Any]:
    """Probes if there are labels, and the pictures that are drawn at the end."""
    given = (resolved.config.get("trainer") or {}).get("callbacks") or {}
    probes = {name for name, spec in given.items() if spec.get("class_path") == PROBES}
    neighbours = min(KNN, max(1, count // 2))
    if not labelled:
        callbacks: dict[str, Any] = dict.fromkeys(probes)
    else:
        nearest = {"class_path": NEAREST, "init_args": {"k": neighbours}}
        both = {"probes": {"knn": nearest, "linear": {"class_path": LINEAR}}}
        new = {"probes": {"class_path": PROBES, "init_args": {"every_n_epochs": PROBE_EVERY, **both}}}
        callbacks = {name: {"init_args": both} for name in probes if neighbours < KNN} if probes else new
    drawn = {"init_args": {"folder": "${run}/pictures"}}
    return callbacks | {
        "first_batch": {"class_path": FIRST_BATCH, **drawn},
        "feature_pictures": {"class_path": FEATURE_PICTURES, **drawn},
    }
