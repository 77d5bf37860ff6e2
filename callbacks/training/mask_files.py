"""Masks on disk, and what is said of them before and after a run."""

from collections.abc import Mapping
from pathlib import Path

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch import Size, Tensor, nn

from lightspan.callbacks.training.weights_in_use import first_names
from lightspan.core.errors import printable
from lightspan.core.files.atomic import atomic_path
from lightspan.core.files.tensors import Form, write_tensors
from lightspan.subspaces.masks.allocation import Allocation

FILE = "masks.safetensors"


def save_masks(path: Path, module: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Writes masks as a safetensors file of bool, whole or not at all: one for every floating-point tensor of the
    module's state_dict, open where `masks` has none.
    """
    names = first_names(module)
    shapes = {name: value.shape for name, value in module.state_dict().items() if value.is_floating_point()}
    forms = {name: Form(tuple(shape), torch.bool) for name, shape in shapes.items()}
    pieces = (
        (name, masks.get(names.get(name, name), torch.ones(shape, dtype=torch.bool))) for name, shape in shapes.items()
    )
    with atomic_path(path) as temporary:
        write_tensors(temporary, forms, pieces, {"format": "pt", "what": "masks"})


def say_what_stays(shapes: Mapping[str, Size], allocation: Allocation, density: float) -> None:
    """One line with how many entries of these parameters the last density leaves."""
    counts = [count for _, count in allocation.groups(shapes, density)]
    numbers, names = sum(shape.numel() for shape in shapes.values()), list(shapes)
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    print(printable(f"MaskLearning: {sum(counts):,} of {numbers:,} entries will stay of {', '.join(names[:3])}{more}"))


@rank_zero_only
def announce(path: Path, masks: Mapping[str, Tensor]) -> None:
    """A table of what stayed, and where it went."""
    from rich.table import Table

    from lightspan.core.console import SafeConsole

    table = Table(title="MaskLearning: entries that stay", title_justify="left")
    table.add_column("parameter")
    for column in ("open", "of", "density"):
        table.add_column(column, justify="right")
    for name, mask in masks.items():
        count, numbers = int(mask.sum()), mask.numel()
        table.add_row(name, f"{count:,}", f"{numbers:,}", f"{count / max(numbers, 1):.1%}")
    console = SafeConsole()
    console.print(table)
    console.print(f"wrote {path}", markup=False, soft_wrap=True)
