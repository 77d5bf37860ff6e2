"""`lightspan fit RECIPE --videos FOLDER`: the layer that gives a recipe the user's own videos (`user_data`).

It replaces the data, keeps their clips, views and batch size, and changes what depends on the videos: the channels of
the network's first layer, and the number of classes.
"""

from functools import partial
from typing import Any

from lightspan.cli.config.resolve import Resolved
from lightspan.cli.config.user_data import Layer, fitted
from lightspan.cli.config.user_folders import fewer, fitting, watching_callbacks, with_folder, without_labels
from lightspan.core.files.atomic import expanded

DATA = "lightspan.datamodules.video.folder.VideoFolder"
KEPT = ("frames", "fps", "clips", "speeds", "size", "views", "views_on", "batch_size", "seed")
CHANNELS = 3


def _model_layer(resolved: Resolved) -> Layer:
    from lightspan.datamodules.image.picture_files import find_labelled  # numpy, which other commands do without
    from lightspan.datamodules.video.files import VIDEOS

    given = resolved.config["data"]["init_args"]
    training = expanded(given["folder"], "data.init_args.folder")
    found = find_labelled(training, VIDEOS, given.get("links", "skip"), given.get("labels", "auto"))
    model, count, classes = resolved.config["model"], len(found.names), len(found.classes)
    if "num_classes" in (model.get("init_args") or {}) and not classes:
        raise without_labels(resolved, training, "put the videos of each class into a sub-folder of its name")

    notes = [f"--videos: {count:,} video files in {training}"]
    layer: dict[str, Any] = {"model": {"init_args": fitted(model, fitting(CHANNELS, classes), notes)}}
    if given.get("samples") != "shots":  # of which there are more than videos
        batch = fewer(given.get("batch_size"), count, "videos", notes)
        layer |= {"data": {"init_args": {"batch_size": batch}}} if batch != given.get("batch_size") else {}
    layer["trainer"] = {"callbacks": watching_callbacks(resolved, bool(classes), count, notes, maps=False)}
    return layer, notes


with_videos = partial(with_folder, "video", DATA, KEPT, _model_layer)
"""See `with_folder`."""
