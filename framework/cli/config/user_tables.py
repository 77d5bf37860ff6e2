"""`lightspan fit RECIPE --table FILE --target COLUMN`: the layer that gives a recipe the user's own rows (`user_data`).

It replaces the data, keeps their views and batch size, and changes what depends on the rows: the width of the network's
first layer, the number of classes, and the mean and deviation of the targets.
"""

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from lightspan.cli.config.resolve import TRAINED, Resolved
from lightspan.cli.config.signatures import Signature, signature
from lightspan.cli.config.user_data import Layer, UserData, fitted
from lightspan.core.errors import UserError

DATA = "lightspan.datamodules.table.file.TableFile"
FITTED = {"path", "target", "target_kind", "views", "batch_size", "seed"}
KEPT = ("views", "batch_size", "seed")


def with_table(
    recipe: str,
    overlays: Sequence[str],
    file: Path,
    target: str | None,
    flags: Sequence[str],
    allow_modules: Sequence[str] = (),
    kinds: Sequence[str] = TRAINED,
) -> Resolved:
    """The recipe with its overlays, then the rows, then the flags. Raises: UserError for a recipe of other data, a file
    that cannot be read, and as `resolve`.
    """
    hint = "`lightspan recipes --modality table` lists those for rows"
    layers = (lambda found: _data_layer(found, file, target)), _model_layer
    rows = UserData("--table", "table", hint, DATA, FITTED, "rows", file, *layers)
    return rows.laid_over(recipe, overlays, flags, allow_modules, kinds)


def _data_layer(resolved: Resolved, file: Path, target: str | None) -> Layer:
    own = signature(resolved.config["model"]["class_path"])
    takes = own.parameters if isinstance(own, Signature) else {}
    before = (resolved.config.get("data") or {}).get("init_args") or {}
    settings = {"path": str(file.absolute()), "target": target}
    if "num_classes" in takes:
        settings["target_kind"] = "class"
    elif "target_mean" in takes:
        settings["target_kind"] = "number"
    if "target_kind" in settings and target is None:
        raise UserError(f"{resolved.name} predicts a column of {file}; name it with --target COLUMN")
    settings |= {key: before[key] for key in KEPT if key in before}
    return {"data": {"class_path": DATA, "init_args": settings}}, []


def _model_layer(resolved: Resolved) -> Layer:
    from lightspan.datamodules.table.own import TableSettings, read_table  # numpy, which other commands do without

    given = resolved.config["data"]["init_args"]
    own = read_table(TableSettings(**{f.name: given[f.name] for f in fields(TableSettings) if f.name in given}))
    parts = own.parts(given.get("val_size"), given.get("leave_out"), given.get("split_seed", 0))
    targets = parts.train.target
    found: dict[str, Any] = {"in_shape": [1, 1, len(own.names)], "num_classes": len(own.classes)}
    if targets.dtype.kind == "f":
        # A column of one number has none, which float32 would round to some, and any unit will do.
        mean, deviation = float(targets.mean(dtype=float)), float(targets.std(dtype=float))
        found |= {"target_mean": mean, "target_deviation": deviation or 1.0}

    def wanted(settings: dict[str, Any], takes: Any) -> dict[str, Any]:
        known = {*settings, *(takes.parameters if isinstance(takes, Signature) else ())}
        return {key: value for key, value in found.items() if key in known and settings.get(key) != value}

    notes = [f"--table: {len(own.target):,} rows of {len(own.names)} columns"]
    layer = {"model": {"init_args": fitted(resolved.config["model"], wanted, notes)}}
    if given.get("batch_size", 0) > len(targets):
        batch = 2 ** (len(targets).bit_length() - 1)
        layer["data"] = {"init_args": {"batch_size": batch}}
        notes.append(f"data.init_args.batch_size={batch}, since there are few rows")
    return layer, notes
