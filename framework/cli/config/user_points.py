"""`lightspan fit RECIPE --points FOLDER`: the layer that gives a recipe the user's own point clouds (`user_data`).

It replaces the data, keeps their number of points, augmentation and batch size, and changes what depends on them: the
number of classes.
"""

from functools import partial
from typing import Any

from lightspan.cli.config.resolve import Resolved
from lightspan.cli.config.user_data import Layer, fitted
from lightspan.cli.config.user_folders import fewer, fitting, watching_callbacks, with_folder, without_labels
from lightspan.core.files.atomic import expanded

DATA = "lightspan.datamodules.points.folder.PointFolder"
KEPT = ("points", "fields", "normalise", "batch_size", "augment", "seed")
COORDINATES = 3


def _model_layer(resolved: Resolved) -> Layer:
    # numpy, which other commands do without
    from lightspan.datamodules.image.picture_files import find_labelled
    from lightspan.datamodules.points.reading import POINTS

    given = resolved.config["data"]["init_args"]
    training = expanded(given["folder"], "data.init_args.folder")
    found = find_labelled(training, POINTS, given.get("links", "skip"), given.get("labels", "auto"))
    model, count = resolved.config["model"], len(found.names)
    if "num_classes" in (model.get("init_args") or {}) and not found.classes:
        raise without_labels(resolved, training, "sort the files into a folder for each class")
    notes = [f"--points: {count:,} files in {training}"]
    wanted = fitting(COORDINATES, len(found.classes) or None)
    layer: dict[str, Any] = {"model": {"init_args": fitted(model, wanted, notes)}}
    if (batch := fewer(given.get("batch_size"), count, "files", notes)) != given.get("batch_size"):
        layer["data"] = {"init_args": {"batch_size": batch}}
    layer["trainer"] = {"callbacks": watching_callbacks(resolved, bool(found.classes), count, notes, maps=False)}
    return layer, notes


with_points = partial(with_folder, "points", DATA, KEPT, _model_layer)
"""See `with_folder`."""
