"""Recipes built on torch's meta device, where tensors have no numbers: even the largest model then takes a second."""

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

from lightspan.cli.config.build import Built, Resolved, build
from lightspan.core.absent import MissingFile

T = TypeVar("T")


def on_meta_first(resolved: Resolved, judge: Callable[[Built], T], folder: Path | None = None) -> T:
    """What `judge` says of the recipe built on the meta device. Whatever stops there may only lack a number, so then
    the recipe is built with numbers, and what happens to it counts.

    Args:
        folder: of the run, for what is written there.
    Raises: whatever `build` or `judge` raises of the recipe with numbers.
    """
    try:
        with torch.device("meta"):
            built = build(resolved, folder)
        for part in built.model.modules():
            if "_device" in vars(part):  # where Lightning and torchmetrics believe to be, and send batches
                vars(part)["_device"] = torch.device("cpu")
        return judge(built)
    except MissingFile:  # which numbers do not mend
        raise
    except Exception:  # from any library; unless numbers are what it lacked, it is raised again below
        pass
    return judge(build(resolved, folder))
