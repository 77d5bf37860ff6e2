"""What layers that give a recipe a folder of the user's own have in common: pictures, volumes, and other files
(`user_data`).
"""

import ast
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lightspan.cli.config.resolve import TRAINED, Resolved
from lightspan.cli.config.signatures import Signature, member
from lightspan.cli.config.user_data import Layer, UserData
from lightspan.core.errors import UserError
from lightspan.core.files.atomic import refuse_link_out
from lightspan.core.files.splits import TRAINING, VALIDATION
from lightspan.core.source import Definition

PROBES = "lightspan.callbacks.watching.online_probes.OnlineProbes"
NEAREST, LINEAR = "lightspan.evaluation.probes.probes.KNN", "lightspan.evaluation.probes.probes.LinearProbe"
FIRST_BATCH = "lightspan.callbacks.pictures.first_batch.FirstBatch"
FEATURE_PICTURES = "lightspan.callbacks.pictures.feature_pictures.FeaturePictures"
RECONSTRUCTIONS = "lightspan.callbacks.pictures.reconstructions.Reconstructions"
SAMPLES = "lightspan.callbacks.watching.picture_samples.PictureSamples"
KNN, PROBE_EVERY = 20, 10
MOST_WORKERS = 8


def workers() -> int:
    """Half of the processor cores that this process may use, since the other half trains: in [1, 8], 0 of one core."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(MOST_WORKERS, cores // 2)


def split_folders(folder: Path) -> tuple[Path, Path | None]:
    """(training folder, validation folder or None): of a folder with `TRAINING` and perhaps some of `VALIDATION`, and
    nothing else, these. Raises: UserError for one that is a link out of the folder: whoever made the folder chose where
    it leads, so the user has to name that place.
    """
    inside = {path.name for path in folder.iterdir() if not path.name.startswith(".")} if folder.is_dir() else set()
    if TRAINING not in inside or not inside <= {TRAINING, *VALIDATION}:
        return folder, None
    beside = next((name for name in VALIDATION if name in inside), None)
    way_out = f"if you trust it, name {os.path.realpath(folder / TRAINING)} instead of {folder}"
    way_out += "" if beside is None else f", with data.init_args.val_folder={os.path.realpath(folder / beside)}"
    for name in (TRAINING, beside or TRAINING):  # as links inside of them, none is followed unasked
        refuse_link_out(folder / name, folder, "its folder", way_out)
    return folder / TRAINING, None if beside is None else folder / beside


def with_folder(
    option: str,
    modality: str,
    data: str,
    kept: Sequence[str],
    model_layer: Callable[[Resolved], Layer],
    recipe: str,
    overlays: Sequence[str],
    folder: Path,
    flags: Sequence[str],
    allow_modules: Sequence[str] = (),
    kinds: Sequence[str] = TRAINED,
) -> Resolved:
    """The recipe with its overlays, then the folder, then the flags.

    Args:
        option: of the command line, such as "--videos", whose word names the data.
        modality: of recipes for them, such as "video".
        data: class path of the data module.
        kept: settings of the recipe's own data that this one keeps.
        model_layer: see `UserData`.
    Raises: UserError for a recipe of other data, a folder without any, and as `resolve`.
    """
    name = option.removeprefix("--")
    hint = f"`lightspan recipes --modality {modality}` lists those for {name}"
    layers = (lambda found: _data_layer(found, folder, data, kept)), model_layer
    own = UserData(option, modality, hint, data, {"folder", "num_workers", *kept}, name, folder, *layers)
    return own.laid_over(recipe, overlays, flags, allow_modules, kinds)


def _data_layer(resolved: Resolved, folder: Path, data: str, kept: Sequence[str]) -> Layer:
    """The layer that replaces the recipe's data module by that of a folder, and keeps some of its settings."""
    training, validation = split_folders(folder.absolute())
    before = (resolved.config.get("data") or {}).get("init_args") or {}
    settings = {"folder": str(training), "val_folder": None if validation is None else str(validation)}
    settings |= {"num_workers": workers()} | {key: before[key] for key in kept if key in before}
    return {"data": {"class_path": data, "init_args": settings}}, []


def fitting(channels: int | None, classes: int | None) -> Callable[[dict[str, Any], Any], dict[str, Any]]:
    """What `fitted` asks of each class with its settings and signature: those that follow from the data.

    Args:
        channels, classes: None leaves numbers of channels, or of classes, as they are.
    """

    def wanted(settings: dict[str, Any], takes: Any) -> dict[str, Any]:
        own = {*settings, *(takes.parameters if isinstance(takes, Signature) else ())}
        known = {} if channels is None else {"in_chans": channels}
        known |= {"num_classes": classes} if classes is not None and settings.get("num_classes") else {}
        return {key: value for key, value in known.items() if key in own and settings.get(key) != value}

    return wanted


def without_labels(resolved: Resolved, training: Path, way_out: str) -> UserError:
    return UserError(
        f"{resolved.name} learns from labels, but {training} has none; {way_out}, or take a recipe that learns without "
        "labels"
    )


def fewer(batch: Any, count: int, name: str, notes: list[str]) -> Any:
    """A batch size that leaves whole batches of `count` samples, of which some are held out; a line joins `notes`."""
    if not isinstance(batch, int) or batch <= (most := max(1, count * 4 // 5)):
        return batch
    batch = 2 ** (most.bit_length() - 1)
    notes.append(f"data.init_args.batch_size={batch}, since there are few {name}")
    return batch


def watching_callbacks(
    resolved: Resolved, labelled: bool, count: int, notes: list[str], maps: bool = True
) -> dict[str, Any]:
    """Probes if there are labels, and the pictures that are drawn; of features only if the method has any.

    Args:
        count: of all samples.
        notes: a line joins them if the recipe's own probes have to go.
        maps: whether the samples can be drawn beside their neighbours.
    """
    given = (resolved.config.get("trainer") or {}).get("callbacks") or {}
    method = resolved.config["model"]["class_path"]
    has_features = not _is_none(member(method, "features"))
    probes = {name for name, spec in given.items() if spec.get("class_path") == PROBES}
    others = {name for name in probes if _reads_others(given[name])}  # which a folder does not have
    probes -= others
    neighbours = min(KNN, max(1, count // 2))
    if not (labelled and has_features):
        if probes and has_features:
            left_out = ", ".join(f"trainer.callbacks.{name}" for name in sorted(probes))
            notes.append(f"{left_out} left out: probes need classes, and the folder has none")
        callbacks: dict[str, Any] = dict.fromkeys(probes | others)
    else:
        nearest = {"class_path": NEAREST, "init_args": {"k": neighbours}}
        both = {"probes": {"knn": nearest, "linear": {"class_path": LINEAR}}}
        new = {"class_probes": {"class_path": PROBES, "init_args": {"every_n_epochs": PROBE_EVERY, **both}}}
        new = new if others else {"probes": new["class_probes"]}
        callbacks = {name: {"init_args": both} for name in probes if neighbours < KNN} if probes else new
        callbacks |= dict.fromkeys(others)
    samples = [name for name, spec in given.items() if spec.get("class_path") == SAMPLES]
    callbacks |= {name: {"init_args": {"shape": None, "classes": None}} for name in samples}
    drawn = {"first_batch": FIRST_BATCH}
    drawn |= {"feature_pictures": FEATURE_PICTURES} if has_features and maps else {}
    drawn |= {"reconstructions": RECONSTRUCTIONS} if member(method, "reconstruct") is not None else {}
    folder = {"init_args": {"folder": "${run}/pictures"}}
    return callbacks | {name: {"class_path": path, **folder} for name, path in drawn.items()}


def _reads_others(callback: dict[str, Any]) -> bool:
    """Whether probes of a callback read other fields than the class."""
    probes = ((callback.get("init_args") or {}).get("probes") or {}).values()
    return any(
        probe.get("class_path") not in (NEAREST, LINEAR)
        or (probe.get("init_args") or {}).get("field", "label") != "label"
        for probe in probes
        if isinstance(probe, dict)
    )


def _is_none(found: Definition | None) -> bool:
    return found is not None and isinstance(found.node, ast.Constant) and found.node.value is None
