"""`lightspan fit RECIPE --images FOLDER`: the layer that gives a recipe the user's own pictures (`user_data`).

It replaces the data, keeps their views and batch size, and changes what depends on the pictures' size, channels and
classes: views, the network's first layer, and the number of classes. Keys that mean this have the same name in every
class; what else follows from these, parts take from each other.
"""

import ast
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightspan.cli.config.resolve import TRAINED, Resolved
from lightspan.cli.config.signatures import Signature, member
from lightspan.cli.config.user_data import Layer, UserData, fitted
from lightspan.cli.config.user_folders import fewer, split_folders, watching_callbacks, without_labels, workers
from lightspan.core.errors import UserError
from lightspan.core.source import Definition

DATA = "lightspan.datamodules.image.folder.ImageFolder"
CHANNELS = 3
BATCH = 128
COLOUR = {"saturation": 0.4, "hue": 0.1, "grey": 0.2}  # half of SimCLR's strength, as the small recipes jitter
RANDOM_VIEWS = (
    "lightspan.datamodules.image.augment.views.RandomViews",
    "lightspan.datamodules.image.augment.views.TwoViews",
)
NAMED_PATCH = re.compile(r"_patch(\d{1,3})_")
FITTED = {"folder", "size", "views", "batch_size"}
"""Settings of the data that follow from the command line, or from the pictures and what recipe and overlays say."""


def with_images(
    recipe: str,
    overlays: Sequence[str],
    folder: Path,
    size: int,
    flags: Sequence[str],
    allow_modules: Sequence[str] = (),
    kinds: Sequence[str] = TRAINED,
) -> Resolved:
    """The recipe with its overlays, then the pictures, then the flags. Raises: as `images_layer` and `resolve` do."""
    hint = "name data of yours in an overlay, as docs/own-images.md, 'Data of other kinds', shows"
    pictures = UserData(
        *("--images", "image", hint, DATA, FITTED, "pictures", folder),
        lambda found: images_layer(found, folder, size),
    )
    return pictures.laid_over(recipe, overlays, flags, allow_modules, kinds)


def images_layer(resolved: Resolved, folder: Path, size: int) -> Layer:
    """(the layer, lines on what it changes).

    Args:
        folder: of pictures, or with the folders `train` and `val` (or `validation`, `test`) and nothing else.
        size: height and width in pixels at which pictures are read.
    Raises: UserError for a recipe of several tasks, and a folder without pictures.
    """
    if size < 1:
        raise UserError(f"--image-size {size} must be at least 1 pixel")
    training, validation = split_folders(folder.absolute())
    from lightspan.datamodules.image.picture_files import find_pictures  # numpy, which other commands can do without

    found = find_pictures(training)
    data, model = resolved.config.get("data") or {}, resolved.config["model"]
    before = data.get("init_args") or {}
    if "tasks" in before:
        raise UserError(f"--images gives pictures of one task, but {resolved.name} needs several: data.init_args.tasks")
    channels, side = _shape_before(data, model)
    notes = [f"--images: {len(found.names):,} picture files in {training}, read at {size} x {size} pixels"]
    patches = _patches(model, side, size)
    ordered = {name: before[name] for name in ("groups", "per_class") if before.get(name) is not None}
    if not found.classes and ("num_classes" in (model.get("init_args") or {}) or ordered):
        raise without_labels(resolved, training, "put the pictures of each class into a sub-folder of its name")
    model_layer = {"init_args": fitted(model, UserImages(size, len(found.classes), patches).wanted, notes)}
    places = (model.get("init_args") or {}).get("images")
    if isinstance(places, int) and places < len(found.names):  # of a memory of all pictures
        model_layer["init_args"]["images"] = len(found.names)
        notes.append(f"model.init_args.images={len(found.names)}, the pictures")
    if (views := before.get("views")) is not None:
        views = _views(views, side, size, max(patches.values(), default=_named_patch(model)))
        if channels == 1 and _in_colour(views):
            notes.append("the recipe's pictures were grey: the views also change saturation and hue, and drop colours")
    batch = before.get("batch_size", BATCH)
    batch = fewer(batch, len(found.names), "pictures", notes)
    if isinstance(batch, int) and batch != (whole := _of_classes(batch, ordered, len(found.classes))):
        batch = whole
        notes.append(f"data.init_args.batch_size={batch}, as there are {len(found.classes)} classes to draw it from")
    settings = {"folder": str(training), "size": size, "batch_size": batch, "num_workers": workers()}
    settings |= {"views": views} if views is not None else {}
    settings["val_folder"] = None if validation is None else str(validation)  # a recipe may have its own
    settings |= {"seed": before["seed"]} if "seed" in before else {}
    settings |= ordered
    layer = {
        "data": {"class_path": DATA, "init_args": settings},
        "model": model_layer,
        "trainer": {"callbacks": watching_callbacks(resolved, bool(found.classes), len(found.names), notes)},
    }
    return layer, notes


def _of_classes(batch: int, ordered: dict[str, Any], classes: int) -> int:
    """The most of a batch that divides into whole groups, each of its own class, and at least two of each size."""
    sizes = (ordered.get("groups") or {}).get("sizes") or []
    most = min(batch, min(sizes) * classes) if sizes else batch
    unit = math.lcm(*sizes, ordered.get("per_class") or 1)
    fewest = math.ceil(2 * max(sizes, default=0) / unit) * unit
    return max(unit, fewest, most // unit * unit)


@dataclass(frozen=True)
class UserImages:
    """What a network has to know: side in pixels, number of classes, and what replaces each patch size."""

    size: int
    classes: int
    patches: dict[int, int]

    def wanted(self, settings: dict[str, Any], takes: Any) -> dict[str, Any]:
        """The settings that follow from the pictures, for a class with these settings and this signature."""
        sides = {"img_size": self.size, "image_size": self.size, "in_shape": [CHANNELS, self.size, self.size]}
        own = set(takes.parameters) if isinstance(takes, Signature) else set()
        found = {key: value for key, value in {"in_chans": CHANNELS, **sides}.items() if key in settings or key in own}
        if settings.get("num_classes"):  # 0 is a network of timm without its classifier
            found["num_classes"] = self.classes
        if settings.get("patch_size") in self.patches:
            found["patch_size"] = self.patches[settings["patch_size"]]
        if settings.get("align") in self.patches:  # of masks that hide whole patches
            found["align"] = self.patches[settings["align"]]
        return {key: value for key, value in found.items() if settings.get(key) != value}


def _shape_before(data: dict[str, Any], model: dict[str, Any]) -> tuple[int, int | None]:
    """(channels, side in pixels or None if unknown) of the recipe's own pictures."""
    settings = data.get("init_args") or {}
    shape = _constant(data.get("class_path"), "image_shape")
    sides = [value for key, value in _leaves(model) if key in ("img_size", "image_size") and isinstance(value, int)]
    if not sides:  # only of views is `size` that of a picture; elsewhere it may be how many there are
        sides = [value for key, value in _leaves({"views": settings.get("views")}) if key == "size"]
        sides = [value for value in (settings.get("image_size"), *sides) if isinstance(value, int)]
    if isinstance(shape, tuple) and len(shape) == 3:
        return shape[0], shape[1]
    in_chans = [value for key, value in _leaves(model) if key == "in_chans"]
    return in_chans[0] if in_chans else CHANNELS, max(sides, default=None)


def _constant(class_path: Any, name: str) -> Any:
    """The value of a class's constant, read from its source; None if there is none."""
    found = member(class_path, name) if isinstance(class_path, str) else None
    if found is None or not isinstance(found.node, ast.Tuple):
        return None
    values = [_number(part, found) for part in found.node.elts]
    return tuple(values) if values and all(isinstance(value, int) for value in values) else None


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


def _named_patch(model: dict[str, Any]) -> int:
    """The patch of a network of timm, whose name has it and whose weights fit no other; 1 without one."""
    names = (value for key, value in _leaves(model) if key == "name" and isinstance(value, str))
    return max((int(found[1]) for name in names if (found := NAMED_PATCH.search(name))), default=1)


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
