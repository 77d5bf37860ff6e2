"""`lightspan fit RECIPE --volumes FOLDER`: the layer that gives a recipe the user's own volumes (`user_data`).

It replaces the data, keeps their crops, augmentation and batch size, and changes what depends on the volumes: the
channels of the network's first layer, and the number of classes.
"""

from functools import partial
from typing import Any

from lightspan.cli.config.resolve import Resolved
from lightspan.cli.config.signatures import Signature, signature
from lightspan.cli.config.user_data import Layer, fitted
from lightspan.cli.config.user_folders import fewer, fitting, watching_callbacks, with_folder, without_labels
from lightspan.core.files.atomic import expanded

DATA = "lightspan.datamodules.volume.folder.VolumeFolder"
KEPT = ("size", "batch_size", "crops", "augment", "bases", "slices", "seed")


def _model_layer(resolved: Resolved) -> Layer:
    from lightspan.datamodules.volume.subjects import ALL, find_subjects  # numpy, which other commands do without

    given = resolved.config["data"]["init_args"]
    training, modalities = expanded(given["folder"], "data.init_args.folder"), given.get("modalities") or ALL
    segmentation = given.get("segmentation")
    found = find_subjects(training, modalities, segmentation, given.get("links", "skip"))
    model, count = resolved.config["model"], len(found.subjects)
    takes = signature(model["class_path"])
    of_voxels = isinstance(takes, Signature) and "field" in takes.parameters  # which names the labels in a batch
    if of_voxels and segmentation is None:
        way_out = """name their files, as data.init_args.segmentation="'{subject}_labels'\""""
        raise without_labels(resolved, training, way_out)
    if "num_classes" in (model.get("init_args") or {}) and not found.classes and segmentation is None:
        way_out = "name where they are, as data.init_args.modalities={volume: '{class}/**'}"
        raise without_labels(resolved, training, way_out)

    kinds = "one modality" if len(modalities) == 1 else f"{len(modalities)} modalities"
    notes = [f"--volumes: {count:,} subject{'' if count == 1 else 's'} in {training}, of {kinds}"]
    wanted = fitting(len(modalities), None if of_voxels else len(found.classes) or None)
    layer: dict[str, Any] = {"model": {"init_args": fitted(model, wanted, notes)}}
    if (batch := fewer(given.get("batch_size"), count, "volumes", notes)) != given.get("batch_size"):
        layer["data"] = {"init_args": {"batch_size": batch}}
    layer["trainer"] = {"callbacks": watching_callbacks(resolved, bool(found.classes), count, notes, maps=False)}
    return layer, notes


with_volumes = partial(with_folder, "--volumes", "volume", DATA, KEPT, _model_layer)
"""See `with_folder`."""
