"""Replaces Adam-type optimisers by low-rank ones with the same parameters, groups, rates and schedulers."""

import inspect
from collections.abc import Iterator, Sequence
from glob import escape
from typing import Any

from torch import nn
from torch.optim import Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightspan.core.errors import UserError
from lightspan.core.patterns import require_matches
from lightspan.optim.groups import ParameterGroups
from lightspan.optim.low_rank.optimizer import LowRank
from lightspan.optim.matrices.projected import Selection, setting_applies, stacks_in

REFUSED = ("amsgrad", "maximize", "differentiable")
"""Settings of torch's Adam without a counterpart in LowRank."""
FIXED = ("params", "project", "stacks", "rank")
"""What a group must say when a `LowRank` is built."""
WITHOUT_EFFECT = ("foreach", "fused", "capturable", "decoupled_weight_decay", "param_names", "heads")
"""What a group has that LowRank does not need: how torch's Adam computes what LowRank computes anyway, which would also
move state to other devices when a checkpoint is loaded, the names by which the group was built, and attention heads."""


def to_low_rank(optimizer: Optimizer, module: nn.Module, match: list[str], **options: Any) -> LowRank:
    """A `LowRank` with the groups of `optimizer`, projecting the parameters of `module` whose names match.

    Groups keep their order and all their keys, those of schedulers and the user's own too, so a scheduler made for the
    old optimiser fits the new one. A group that already has a `rank` or a `project` (`lightspan.optim.groups` writes
    the latter) keeps it: `match` chooses among what `project` allows.

    Args:
        optimizer: torch's Adam or AdamW before its first step.
        match: shell-style patterns of parameter names.
        options: further arguments of LowRank, such as rank and basis.
    Raises: UserError for another optimiser, for settings without a counterpart in LowRank, and for patterns that
    match nothing.
    """
    _require_matches(match, [optimizer], module)
    return _converted(optimizer, module, match, options)


def to_low_rank_where_matched(
    optimizers: Sequence[Optimizer], module: nn.Module, match: list[str] | None = None, **options: Any
) -> list[Optimizer]:
    """`to_low_rank` for the optimisers in which something is projected; the others are returned as they are.

    Patterns are matched against the parameters of all optimisers together. None matches the weights that
    `lightspan.optim.groups` counts as matrices.

    Raises: UserError as `to_low_rank`; and if nothing would be projected in any optimiser, LowRank's own.
    """
    if match is None:
        groups = ParameterGroups().build(module)
        match = [escape(name) for group in groups if group["project"] for name, _ in group["params"]]
    _require_matches(match, optimizers, module)
    # If nothing can be projected anywhere, LowRank says why.
    chosen = [o for o in optimizers if _projects(o, module, match, options)] or optimizers
    return [_converted(o, module, match, options) if o in chosen else o for o in optimizers]


def hand_over(scheduler: Any, optimizer: Optimizer) -> None:
    """Points a learning-rate scheduler, and all those inside it, at another optimiser with the same groups."""
    parts = list(_schedulers_on(scheduler.optimizer, scheduler, set()))
    _TracksSteps(optimizer)
    for part in parts:
        part.optimizer = optimizer


class _TracksSteps(LRScheduler):
    """Its construction makes torch track calls of `optimizer.step`, which the first `scheduler.step()` checks."""

    def step(self, epoch: int | None = None) -> None:
        """Leaves all rates unchanged, including tensors."""


def _schedulers_on(optimizer: Optimizer, found: Any, seen: set[int]) -> Iterator[Any]:
    """Everything reachable through attributes and containers that steps the rates of `optimizer`."""
    if id(found) in seen:
        return
    seen.add(id(found))
    inside: list[Any] = []
    if isinstance(found, list | tuple):
        inside = list(found)
    elif isinstance(found, dict):
        inside = list(found.values())
    elif getattr(found, "optimizer", None) is optimizer:
        yield found
        inside = list(vars(found).values())
    for each in inside:
        yield from _schedulers_on(optimizer, each, seen)


def _converted(optimizer: Optimizer, module: nn.Module, match: list[str], options: dict[str, Any]) -> LowRank:
    if not isinstance(optimizer, Adam):
        raise UserError(
            f"only Adam and AdamW can be made low-rank, but this module's optimiser is {type(optimizer).__name__}; "
            "return torch.optim.AdamW from configure_optimizers, or leave its parameters out of match"
        )
    groups = []
    for group in optimizer.param_groups:
        for key in REFUSED:
            if group.get(key):
                raise UserError(f"{key}=True has no low-rank counterpart; switch it off in the module's optimiser")
        if group["weight_decay"] and not (isinstance(optimizer, AdamW) or group.get("decoupled_weight_decay")):
            raise UserError(
                f"Adam with weight_decay={group['weight_decay']} adds the decay to the gradient, which no subspace "
                "can represent; use AdamW"
            )
        own = {key: value for key, value in group.items() if key not in (*REFUSED, *WITHOUT_EFFECT)}
        names = _names_in(group, module)
        named = list(zip(names, group["params"], strict=True))
        groups.append({**own, "params": named, "project": _project(group, match), "stacks": _stacks(group, module)})
    converted = LowRank([{key: group[key] for key in group if key in FIXED} for group in groups], **options)
    for group, own in zip(converted.param_groups, groups, strict=True):
        group.update({key: value for key, value in own.items() if key not in FIXED})  # the user's own are not refused
    return converted


def _project(group: dict[str, Any], match: list[str]) -> bool | list[str]:
    """What may be projected: what `match` says, unless the group itself says it."""
    own = group.get("project", True)
    return list(match) if own is True else own


def _stacks(group: dict[str, Any], module: nn.Module) -> list[str]:
    """The stacks of matrices in a group: those that it names, perhaps as a submodule does, or else the module's."""
    names, found = _names_in(group, module), stacks_in(module)
    if (said := group.get("stacks")) is None:
        return [name for name, p in zip(names, group["params"], strict=True) if id(p) in found]
    return [
        name for name, known in zip(names, group.get("param_names", names), strict=True) if setting_applies(said, known)
    ]


def _projects(optimizer: Optimizer, module: nn.Module, match: list[str], options: dict[str, Any]) -> bool:
    """Whether `LowRank` could project any parameter of this optimiser."""
    asked = inspect.signature(LowRank).bind([], **options)
    asked.apply_defaults()
    rank, backward = asked.arguments["rank"], asked.arguments["backward"]
    for group in optimizer.param_groups:
        own = _project(group, match), _stacks(group, module), group.get("rank", rank), backward
        pairs = zip(group["params"], _names_in(group, module), strict=True)
        if any(Selection(parameter, name, *own).projected for parameter, name in pairs):
            return True
    return False


def _require_matches(match: list[str], optimizers: Sequence[Optimizer], module: nn.Module) -> None:
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    trained = [(name, p) for group in groups for name, p in zip(_names_in(group, module), group["params"], strict=True)]
    sizes = {name: p.numel() for name, p in trained if name and p.ndim > 1}
    names = [name for name, _ in trained if name]
    require_matches(match, names, f"trained parameter of {type(module).__name__}", sizes=sizes)


def _names_in(group: dict[str, Any], module: nn.Module) -> list[str]:
    """The name of each parameter of a group, "" for one that is not in the module."""
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    return [names.get(id(parameter), "") for parameter in group["params"]]
