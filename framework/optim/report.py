"""A printed account of what an optimiser does with each kind of parameter, before the first step."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch import Tensor
from torch.optim import Optimizer

from lightspan.optim.low_rank import LowRank, canonical


@dataclass(frozen=True)
class Treatment:
    """What one parameter gets. `state_numbers` counts what the optimiser keeps; AdamW would keep twice the
    parameter.
    """

    group: str
    shape: tuple[int, ...]
    rate: float
    how: str
    state_numbers: int


def treatment(optimizer: LowRank, parameter: Tensor, group: dict[str, Any]) -> Treatment:
    """How `LowRank` treats a parameter, and why."""
    numbers = 2 * parameter.numel()
    if optimizer.projected(parameter, group):
        rows, size = canonical(parameter).shape
        rank = group["rank"]
        how = f"rank {rank} of {size}"
        numbers = 2 * rows * rank + rank + 1 + optimizer.basis.state_numbers(size, rank)
    elif parameter.ndim < 2:
        how = "AdamW: a vector"
    elif not optimizer.allowed(parameter, group):
        how = "AdamW: not to be projected"
    else:
        how = f"AdamW: rank {group['rank']} is not below its shorter side"
    return Treatment(group.get("name", "parameters"), tuple(parameter.shape), group["lr"], how, numbers)


@rank_zero_only
def print_report(optimizer: Optimizer) -> None:
    """Prints one line per kind of parameter, and the state saved against AdamW. Does nothing for optimisers that
    project nothing.
    """
    if not isinstance(optimizer, LowRank):
        return
    from rich.console import Console
    from rich.table import Table

    treatments = [treatment(optimizer, p, group) for group in optimizer.param_groups for p in group["params"]]
    table = Table(title="LowRank: what each parameter gets", title_justify="left")
    for column in ("count", "group", "shape", "lr", "treatment", "state", "AdamW's"):
        table.add_column(column, justify="left" if column in ("group", "shape", "treatment") else "right")
    for kind, count in Counter(treatments).items():
        numel = count
        for side in kind.shape:
            numel *= side
        shape, own = " x ".join(map(str, kind.shape)), count * kind.state_numbers
        table.add_row(str(count), kind.group, shape, f"{kind.rate:g}", kind.how, _mib(own), _mib(2 * numel))
    own = sum(t.state_numbers for t in treatments)
    full = sum(2 * p.numel() for group in optimizer.param_groups for p in group["params"])
    table.caption = (
        f"optimiser state {_mib(own)} MiB instead of {_mib(full)} MiB in float32: {own / full:.0%} of AdamW's"
    )
    Console().print(table)


def _mib(numbers: int) -> str:
    return f"{numbers * 4 / 2**20:.2f}"
