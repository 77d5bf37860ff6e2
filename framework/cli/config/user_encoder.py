"""`lightspan run RECIPE --encoder PLACE --images FOLDER`: layers that give the inputs of an estimator an encoder and
pictures of the user's own. They lie above overlays and below flags.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lightspan.cli.config.flags import flag_layer
from lightspan.cli.config.resolve import Resolved, recorded, resolve, with_layers
from lightspan.cli.config.signatures import Signature, signature
from lightspan.cli.config.tree import wrap
from lightspan.cli.config.user_data import fitted
from lightspan.cli.config.user_folders import fewer, split_folders, workers
from lightspan.cli.config.user_images import BATCH, DATA, UserImages
from lightspan.core.errors import UserError
from lightspan.core.files.runs import MODEL, RESOLVED

ESTIMATORS = ("estimator",)
NETWORKS = ("encoder", "floor")  # settings of an input: what is asked about, and the same with random weights
WITH_WEIGHTS = "lightspan.backbones.weights.with_weights"
BUILDER = "lightspan.backbones.vision.timm_backbone"
PUBLISHED = "lightspan.backbones.published.timm_published"
FOLDER = "lightspan.backbones.published.timm_folder"
KEPT = ("views", "mean", "std", "seed")
"""Settings of the recipe's own data that hold for pictures as well."""
Spec = dict[str, Any]


def with_encoder(
    recipe: str,
    overlays: Sequence[str],
    encoder: Path | None,
    folder: Path | None,
    size: int,
    flags: Sequence[str],
    allow_modules: Sequence[str] = (),
) -> Resolved:
    """The recipe with its overlays, then the pictures, the encoder and the flags.

    Args:
        encoder: a run folder, a folder for timm, or a name that timm has; None keeps the recipe's.
        folder: of pictures, or with `train` and `val`; None keeps the recipe's data.
        size: at which they are read.
    Raises: UserError for a recipe without an input of this kind, a folder without pictures or without classes, a place
        that is no encoder, and as `resolve`.
    """
    resolved, notes = resolve(recipe, overlays, (), allow_modules, ESTIMATORS), list[str]()
    layers = []
    if folder is not None:
        layers.append(wrap({"inputs": _pictures(resolved, folder, size, encoder is None, notes)}, "--images"))
    if encoder is not None:
        taking = _inputs_with(resolved, "encoder", "--encoder")
        own, drawn, standardised = _networks(encoder, notes)
        emptied, given = Spec(), Spec()
        for name, takes in taking:
            settings = {"encoder": own, "floor": drawn, "standardised": standardised}
            settings = {key: value for key, value in settings.items() if key in takes.parameters}
            # A mapping is merged into another one, and nothing of the recipe's network is to stay.
            emptied[name] = {"init_args": {key: None for key in settings if key in NETWORKS}}
            given[name] = {"init_args": settings}
        layers += [wrap({"inputs": each}, "--encoder") for each in (emptied, given)]
    flagged = [flag_layer(list(flags))] if flags else []
    resolved.notes.extend(notes)
    return with_layers(resolved, [*layers, *flagged])


def _inputs_with(resolved: Resolved, setting: str, option: str) -> Iterator[tuple[str, Signature]]:
    """(name, signature) of the inputs whose class has this setting; at least one."""
    found = []
    for name, spec in (resolved.config.get("inputs") or {}).items():
        takes = signature(spec["class_path"])
        if isinstance(takes, Signature) and setting in takes.parameters:
            found.append((name, takes))
    if not found:
        raise UserError(f"{option}: no input of {resolved.name} has a setting {setting}, which it would replace")
    return iter(found)


def _pictures(resolved: Resolved, folder: Path, size: int, fit: bool, notes: list[str]) -> Spec:
    """The layer of `inputs` with pictures as their data; `fit` also changes what a network has to know of them."""
    if size < 1:
        raise UserError(f"--image-size {size} must be at least 1 pixel")
    training, validation = split_folders(folder.absolute())
    from lightspan.datamodules.image.picture_files import find_pictures  # numpy, which other commands can do without

    found = find_pictures(training)
    if not found.classes:
        raise UserError(
            f"{resolved.name} learns from labels, but {training} has none; put the pictures of each class into a "
            "sub-folder of its name"
        )
    notes.append(f"--images: {len(found.names):,} picture files in {training}, read at {size} x {size} pixels")
    wanted, layer = UserImages(size, len(found.classes), {}).wanted, Spec()
    for name, _ in _inputs_with(resolved, "data", "--images"):
        given = resolved.config["inputs"][name].get("init_args") or {}
        before = (given.get("data") or {}).get("init_args") or {}
        data = {"folder": str(training), "val_folder": None if validation is None else str(validation), "size": size}
        data |= {"num_workers": workers()} | {key: before[key] for key in KEPT if key in before}
        if isinstance(views := data.get("views"), dict) and (views.get("init_args") or {}).get("size"):
            data["views"] = {**views, "init_args": {**views["init_args"], "size": size}}
        data["batch_size"] = fewer(before.get("batch_size", BATCH), len(found.names), "pictures", notes)
        settings = {"data": {"class_path": DATA, "init_args": data}}
        for key in NETWORKS if fit else ():
            if isinstance(given.get(key), dict):
                changed = fitted(given[key], wanted, notes, f"inputs.{name}.init_args.{key}")
                settings |= {key: {"init_args": changed}} if changed else {}
        layer[name] = {"init_args": settings}
    return layer


def _networks(encoder: Path, notes: list[str]) -> tuple[Spec, Spec, str]:
    """(the encoder, the same network with random weights, what its images are standardised by)."""
    if (encoder / RESOLVED).is_file():
        return *_of_run(encoder, notes), "data"
    if (encoder / "config.json").is_file():
        settings = {"folder": str(encoder.absolute())}
        drawn = {"class_path": FOLDER, "init_args": settings | {"weights": False}}
        return {"class_path": FOLDER, "init_args": settings}, drawn, "timm"
    if encoder.exists() or len(encoder.parts) > 1:
        raise UserError(
            f"--encoder {encoder} is no run folder and no folder with config.json and {MODEL}; for a file of weights, "
            f"name its network in a recipe, with {WITH_WEIGHTS}"
        )
    published = {"class_path": PUBLISHED, "init_args": {"name": str(encoder), "outputs": 0}}
    return published, {"class_path": BUILDER, "init_args": {"name": str(encoder)}}, "timm"


def _of_run(run: Path, notes: list[str]) -> tuple[Spec, Spec]:
    backbone = ((recorded(run).get("model") or {}).get("init_args") or {}).get("backbone")
    if not isinstance(backbone, dict) or "class_path" not in backbone:
        raise UserError(
            f"--encoder {run}: its {RESOLVED} names no model.init_args.backbone, whose weights are the encoder"
        )
    file = run.absolute() / "export" / "safetensors" / MODEL
    if not file.is_file():
        raise UserError(
            f"--encoder {run} has no exported weights; `lightspan export {run} --to safetensors` writes them"
        )
    notes.append(f"--encoder: backbone.* of {file}; of a teacher set encoder.init_args.prefix=teacher.module.backbone.")
    drawn = _without_weights(backbone)
    return {"class_path": WITH_WEIGHTS, "init_args": {"path": str(file), "module": drawn}}, drawn


def _without_weights(network: Spec) -> Spec:
    """The network from which a run started, as it is before weights are loaded."""
    settings = network.get("init_args") or {}
    if network["class_path"] == WITH_WEIGHTS:
        return _without_weights(settings["module"])
    if network["class_path"] == PUBLISHED:
        return {"class_path": BUILDER, "init_args": {"name": settings.get("name")}}
    return {**network, "init_args": settings | {"pretrained": False}} if settings.get("pretrained") else network
