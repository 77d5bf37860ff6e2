"""A printed account of what an optimiser does with each kind or group of parameters, before the first step."""

from collections import Counter

from lightning.pytorch.utilities.rank_zero import rank_zero_only
from rich.table import Table
from torch.optim import Optimizer

from lightspan.core.console import SafeConsole
from lightspan.core.distributed import world_size
from lightspan.optim.matrices.matrix_optimizer import MatrixOptimizer
from lightspan.optim.parameter_summary import ParameterSummary, parameter_summary


@rank_zero_only
def print_report(optimizer: Optimizer) -> None:
    """Prints one line per kind of parameter, and the state saved compared with AdamW. Does nothing for optimisers that
    project nothing. Where heads are to be taken by themselves but no group names any, it says so.
    """
    if not isinstance(optimizer, MatrixOptimizer):
        return
    treatments = [parameter_summary(optimizer, p, group) for group in optimizer.param_groups for p in group["params"]]
    # Without lines between columns, typical rows fit into 80 characters.
    table = Table(
        title=f"{type(optimizer).__name__}: what each parameter gets (n of a kind), and its state in MiB",
        title_justify="left",
        box=None,
        padding=(0, 2, 0, 0),
        pad_edge=False,
    )
    for column in ("n", "group", "shape", "lr", "treatment", "state", "AdamW's"):
        table.add_column(column, justify="left" if column in ("group", "shape", "treatment") else "right")
    for kind, count in Counter(treatments).items():
        shape, own, full = " x ".join(map(str, kind.shape)), count * kind.state_bytes, count * kind.adamw_bytes
        table.add_row(str(count), kind.group, shape, _rate(kind), kind.how, _mib(own), _mib(full))
    own, full = (sum(getattr(t, which) for t in treatments) for which in ("state_bytes", "adamw_bytes"))
    table.caption = (
        f"optimiser state {_mib(own)} MiB instead of {_mib(full)} MiB in float32: {own / full:.0%} of AdamW's"
    )
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if optimizer.owners and (ranks := world_size()) > 1:
        owners, sizes = optimizer.divided(ranks), [0] * ranks
        for parameter, treatment in zip(parameters, treatments, strict=True):
            for number in [owners.of[parameter]] if parameter in owners.of else range(ranks):
                sizes[number] += treatment.state_bytes
        table.caption += f"\nowners=True divides it among {ranks} ranks: at most {_mib(max(sizes))} MiB on each"
    if optimizer.by_heads and not any(map(optimizer.heads_of, parameters)):
        table.caption += "\nby_heads=True, but no group names attention heads: matrices are taken whole"
    SafeConsole().print(table)


@rank_zero_only
def print_groups(optimizer: Optimizer) -> None:
    """Prints one line per group of parameters of any optimiser: name, tensors, numbers, rate and decay.

    Rates are those that the optimiser was built with, before a schedule changes them.
    """
    table = Table(
        title=f"{type(optimizer).__name__}: which parameters train together",
        title_justify="left",
        box=None,
        padding=(0, 2, 0, 0),
        pad_edge=False,
    )
    for column in ("group", "tensors", "numbers", "lr", "weight decay"):
        table.add_column(column, justify="left" if column == "group" else "right")
    for number, group in enumerate(optimizer.param_groups):
        rate, decay = group.get("initial_lr", group.get("lr")), group.get("weight_decay")
        table.add_row(
            str(group.get("name", number)),
            str(len(group["params"])),
            f"{sum(parameter.numel() for parameter in group['params']):,}",
            *("" if value is None else f"{float(value):g}" for value in (rate, decay)),
        )
    SafeConsole().print(table)


def _rate(kind: ParameterSummary) -> str:
    return f"{kind.rate:g}" if kind.scale == 1 else f"{kind.rate:g} x {kind.scale:g}"


def _mib(size: int) -> str:
    return f"{size / 2**20:.2f}"
