"""Ranges, by name, of settings that mean the same everywhere; what else a class refuses, it says itself.

Two rules hold for every value: a number is finite and fits in 64 bits, and a text has no NUL, which no path may have.
"""

import math
from typing import Any

from lightspan.cli.config.tree import KeyPath

_COUNT, _LONG = (1, 2**31 - 1), (0, 2**31 - 1)
RANGES: dict[str, tuple[float, float]] = {
    "batch_size": _COUNT,
    "context": (1, 2**24),
    "density": (0, 1),
    "layer_decay": (0, 1),
    "lr": (0, 1e6),
    "num_workers": (0, 512),  # each is a process, forked before anything can object
    "rank": _LONG,
    "weight_decay": (0, 1e6),
}
TRAINER: dict[str, tuple[float, float]] = {
    "accumulate_grad_batches": _COUNT,
    "check_val_every_n_epoch": _COUNT,
    "devices": (-1, 2**16),
    "limit_predict_batches": _LONG,
    "limit_test_batches": _LONG,
    "limit_train_batches": _LONG,
    "limit_val_batches": _LONG,
    "log_every_n_steps": _LONG,
    "max_epochs": (-1, 2**31 - 1),
    "max_steps": (-1, 2**62),
    "min_epochs": _LONG,
    "min_steps": (0, 2**62),
    "num_nodes": (1, 2**20),
    "num_sanity_val_steps": (-1, 2**31 - 1),
    "overfit_batches": _LONG,
    "reload_dataloaders_every_n_epochs": _LONG,
}
OTHERS: dict[KeyPath, tuple[float, float]] = {
    ("seed_everything",): (0, 2**32 - 1),
    ("model", "init_args", "num_classes"): _COUNT,  # of a method; 0 asks networks for no head
}
POSITIVE = {"gradient_clip_val": "null clips nothing", "val_check_interval": "null validates at the end of an epoch"}
ENDS = ("value", "start", "end")  # of a schedule, which have the range of what it is a schedule of
SECONDS = (0.0, 1e9)  # for every setting that ends in _s: 30 years; the limit of the system's timers is a little higher


def out_of_range(path: KeyPath, value: Any) -> str | None:
    """Why a plain value cannot be right under its key, or None."""
    if isinstance(value, str):
        return f"{value[:80]!r} contains a NUL character, which no text may" if "\0" in value else None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        return f"must fit in 64 bits, got {str(value)[:24]}"
    if not math.isfinite(value):
        return f"must be a finite number, got {value!r}; leave the setting out for no limit"
    of_schedule = len(path) > 2 and path[-2] == "init_args" and path[-1] in ENDS and path[-3] in RANGES
    key = path[-3] if of_schedule else path[-1] if path else ""
    of_trainer = len(path) == 2 and path[0] == "trainer"
    if of_trainer and key in POSITIVE:
        return None if value > 0 else f"must be more than 0, got {value!r}; {POSITIVE[str(key)]}"
    if path == ("trainer", "devices") and value == 0:
        return "must be at least 1, or -1 for all devices, got 0"
    limits = OTHERS.get(path) or (TRAINER if of_trainer else RANGES).get(str(key))
    if limits is None and str(key).endswith("_s"):
        limits = SECONDS
    if limits is None or limits[0] <= value <= limits[1]:
        return None
    return f"must be from {limits[0]:,} to {limits[1]:,}, got {value!r}"
