"""A printed account of what an optimiser does with each kind of parameter, before the first step."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch import Tensor
from torch.optim import Optimizer

from lightspan.optim.low_rank import LowRank
from lightspan.optim.sharding import local


@dataclass(frozen=True)
class Treatment:
    """What one parameter gets. `state_bytes` is what this rank keeps of its state, `adamw_bytes` what AdamW would."""

    group: str
    shape: tuple[int, ...]
    rate: float
    how: str
    state_bytes: int
    adamw_bytes: int


def treatment(optimizer: LowRank, parameter: Tensor, group: dict[str, Any]) -> Treatment:
    """How `LowRank` treats a parameter, and why."""
    if optimizer.projected(parameter, group):
        most = "up to " if optimizer.rank_rule else ""
        how = f"rank {most}{optimizer.rank_of(parameter, group)} of {optimizer.side(parameter, group)}"
        how += f", each of {len(parameter)}" if optimizer.stacked(parameter, group) else ""
    elif parameter.ndim < 2:
        how = "AdamW: a vector"
    elif not optimizer.allowed(parameter, group):
        how = "AdamW: not to be projected"
    elif parameter.is_complex():
        how = "AdamW: complex"
    elif optimizer.stacked(parameter, group):
        how = "AdamW: a stack of matrices, which only whole gradients in one piece and a fixed rank can project"
    else:
        how = f"AdamW: rank {group['rank']} is not below its shorter side"
    state = optimizer.initial_state(parameter, group, torch.device("meta"))
    kept = sum(local(tensor).nbytes for tensor in state.values())
    wide = torch.promote_types(parameter.dtype, torch.float32).itemsize
    name, shape, rate = group.get("name", "parameters"), tuple(parameter.shape), float(group["lr"])
    return Treatment(name, shape, rate, how, kept, 2 * wide * local(parameter).numel())


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
    # Without lines between columns the usual rows fit into 80 characters.
    table = Table(
        title="LowRank: what each parameter gets (n of a kind), and its state in MiB",
        title_justify="left",
        box=None,
        padding=(0, 2, 0, 0),
        pad_edge=False,
    )
    for column in ("n", "group", "shape", "lr", "treatment", "state", "AdamW's"):
        table.add_column(column, justify="left" if column in ("group", "shape", "treatment") else "right")
    for kind, count in Counter(treatments).items():
        shape, own, full = " x ".join(map(str, kind.shape)), count * kind.state_bytes, count * kind.adamw_bytes
        table.add_row(str(count), kind.group, shape, f"{kind.rate:g}", kind.how, _mib(own), _mib(full))
    own, full = (sum(getattr(t, which) for t in treatments) for which in ("state_bytes", "adamw_bytes"))
    table.caption = (
        f"optimiser state {_mib(own)} MiB instead of {_mib(full)} MiB in float32: {own / full:.0%} of AdamW's"
    )
    Console().print(table)


def _mib(size: int) -> str:
    return f"{size / 2**20:.2f}"
