"""`lightspan fit RECIPE --graphs FOLDER`: the layer that gives a recipe the user's own graphs or molecules
(`user_data`).

It replaces the data, keeps their kinds and batch size, and changes what depends on them: the number of classes.
"""

from functools import partial
from typing import Any

from lightspan.cli.config.resolve import Resolved
from lightspan.cli.config.user_data import Layer, fitted
from lightspan.cli.config.user_folders import fewer, fitting, watching_callbacks, with_folder, without_labels
from lightspan.core.files.atomic import expanded

DATA = "lightspan.datamodules.graph.folder.GraphFolder"
KEPT = ("node_kinds", "edge_kinds", "batch_size", "seed")


def _model_layer(resolved: Resolved) -> Layer:
    # numpy, which other commands do without
    from lightspan.datamodules.graph.reading import GRAPHS, is_of_molecules
    from lightspan.datamodules.image.picture_files import find_labelled

    given = resolved.config["data"]["init_args"]
    training = expanded(given["folder"], "data.init_args.folder")
    found = find_labelled(training, GRAPHS, given.get("links", "skip"), given.get("labels", "auto"))
    model, count = resolved.config["model"], len(found.names)
    if "num_classes" in (model.get("init_args") or {}) and not found.classes:
        raise without_labels(resolved, training, "sort the files into a folder for each class")
    notes = [f"--graphs: {count:,} files in {training}"]
    wanted = fitting(None, len(found.classes) or None)
    layer: dict[str, Any] = {"model": {"init_args": fitted(model, wanted, notes)}}
    of_one = not any(map(is_of_molecules, (training / name for name in found.names[:1])))
    if of_one and (batch := fewer(given.get("batch_size"), count, "files", notes)) != given.get("batch_size"):
        layer["data"] = {"init_args": {"batch_size": batch}}
    layer["trainer"] = {"callbacks": watching_callbacks(resolved, bool(found.classes), count, notes, maps=False)}
    return layer, notes


with_graphs = partial(with_folder, "graph", DATA, KEPT, _model_layer)
"""See `with_folder`."""
