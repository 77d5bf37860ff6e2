"""Turns an Adam-type optimiser into a low-rank one in place of it: same parameters, groups, rates and schedulers."""

from typing import Any

from torch import nn
from torch.optim import Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from lightspan.errors import UserError
from lightspan.optim.low_rank import LowRank
from lightspan.patterns import require_matches


def to_low_rank(optimizer: Optimizer, module: nn.Module, match: list[str], **options: Any) -> LowRank:
    """A `LowRank` with the groups of `optimizer`, projecting the parameters of `module` whose names match.

    Groups keep their order, learning rate, betas, eps and weight decay, so a scheduler made for the old optimiser fits
    the new one.

    Args:
        optimizer: torch's Adam or AdamW before its first step.
        match: shell-style patterns of parameter names.
        options: further arguments of LowRank, such as rank and basis.
    Raises: UserError for another optimiser, for settings that LowRank has no counterpart of, and for patterns that
    match nothing.
    """
    if not isinstance(optimizer, Adam):
        raise UserError(
            f"only Adam and AdamW can be made low-rank, this module's optimiser is {type(optimizer).__name__}; return "
            "torch.optim.AdamW from configure_optimizers"
        )
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    trained = [names[id(p)] for group in optimizer.param_groups for p in group["params"] if id(p) in names]
    require_matches(match, trained, f"trained parameter of {type(module).__name__}")
    groups = []
    for group in optimizer.param_groups:
        for key in ("amsgrad", "maximize"):
            if group[key]:
                raise UserError(f"{key}=True has no low-rank counterpart; switch it off in the module's optimiser")
        if group["weight_decay"] and not (isinstance(optimizer, AdamW) or group.get("decoupled_weight_decay")):
            raise UserError(
                f"Adam with weight_decay={group['weight_decay']} adds the decay to the gradient, which no subspace "
                "can carry; use AdamW"
            )
        kept: dict[str, Any] = {
            key: group[key] for key in ("lr", "initial_lr", "betas", "eps", "weight_decay", "name") if key in group
        }
        groups.append({"params": [(names.get(id(p), ""), p) for p in group["params"]], "project": list(match), **kept})
    return LowRank(groups, **options)


def hand_over(scheduler: Any, optimizer: Optimizer) -> None:
    """Points a learning-rate scheduler, and those chained inside it, at another optimiser with the same groups."""
    rates = [group["lr"] for group in optimizer.param_groups]
    # A throwaway scheduler makes torch track calls of `optimizer.step`, which the first `scheduler.step()` looks for.
    LambdaLR(optimizer, lambda _: 1.0)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    for part in [scheduler, *getattr(scheduler, "_schedulers", [])]:
        part.optimizer = optimizer
