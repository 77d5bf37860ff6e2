"""Loading state that an optimiser keeps in its own form: torch casts what it loads to the parameters' dtype."""

import inspect
from collections.abc import Callable, Collection, Iterable
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from lightspan.core.errors import UserError


def load_between_hooks(
    optimizer: Optimizer,
    state_dict: dict[str, Any],
    prepare: Callable[[dict[str, Any]], dict[str, Any]],
    restore: Callable[[dict[str, Any]], None],
) -> None:
    """torch's `load_state_dict` except for the state itself, between the hooks that users have registered.

    Args:
        prepare: gets the result of users' pre-hooks on `state_dict`, and returns what is to be loaded, or raises before
            anything is changed.
        restore: gets the same and sets `optimizer.state`, before users' post-hooks see it.
    """
    prepared: dict[str, Any] = {}

    def before(_: Optimizer, given: dict[str, Any]) -> dict[str, Any]:
        prepared.update(prepare(given))
        return {**prepared, "state": {}}

    handles = [
        optimizer.register_load_state_dict_pre_hook(before),
        optimizer.register_load_state_dict_post_hook(lambda _: restore(prepared), prepend=True),
    ]
    try:
        Optimizer.load_state_dict(optimizer, state_dict)
    finally:
        for handle in handles:
            handle.remove()


def numbered(optimizer: Optimizer, state_dict: dict[str, Any]) -> Iterable[tuple[Tensor, dict[str, Any], Any]]:
    """(parameter, its group in `state_dict`, its number there), in order.

    Raises: UserError if `state_dict` has other groups or other numbers of parameters in them.
    """
    own, saved = optimizer.param_groups, state_dict["param_groups"]
    counts = [[len(group["params"]) for group in groups] for groups in (own, saved)]
    if counts[0] != counts[1]:
        raise UserError(
            f"the saved optimiser state has parameter groups of {counts[1]} parameters, but this "
            f"{type(optimizer).__name__} has groups of {counts[0]}; resume with the optimiser, "
            "model and groups of that run, or load its weights without the optimiser's state"
        )
    return [
        (parameter, theirs, number)
        for ours, theirs in zip(own, saved, strict=True)
        for parameter, number in zip(ours["params"], theirs["params"], strict=True)
    ]


def described(part: object, without: Collection[str] = ()) -> str:
    """`Class(setting=value, ...)`: what the constructor took, as far as the object keeps it under the same name."""
    names = [name for name in inspect.signature(type(part)).parameters if hasattr(part, name) and name not in without]
    return f"{type(part).__name__}({', '.join(f'{name}={_in_words(getattr(part, name))}' for name in names)})"


def _in_words(value: object) -> str:
    """Without an address in memory, which differs from run to run."""
    if inspect.isroutine(value) or inspect.isclass(value):
        return value.__qualname__
    return described(value) if type(value).__repr__ is object.__repr__ else repr(value)


def with_own_groups(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """`state_dict`, with what its groups lack added from those of the optimiser.

    Raises: UserError as `numbered` does, and if a group was stepped by another rule: a group's `rule` says in words
        what about it no loading can change.
    """
    numbered(optimizer, state_dict)
    groups = []
    for own, saved in zip(optimizer.param_groups, state_dict["param_groups"], strict=True):
        theirs = saved.get("rule", {})
        for name, value in own.get("rule", {}).items():
            if theirs.get(name, value) != value:
                raise UserError(
                    f"the saved optimiser state was made with {name}={theirs[name]}, but this "
                    f"{type(optimizer).__name__} has {name}={value}; resume with the {name} of that run, or load its "
                    "weights without the optimiser's state"
                )
        groups.append({**own, **saved})
    return {**state_dict, "param_groups": groups}


def require_same_kind(name: str, known: dict[str, Any], expected: dict[str, Tensor]) -> None:
    """Raises: UserError for saved state of a parameter that has other parts than expected, or parts of other shapes."""
    if known.keys() != expected.keys():
        raise UserError(
            f"the saved optimiser state of {name or 'a parameter'} contains {', '.join(sorted(known))}, but this "
            f"optimiser keeps {', '.join(sorted(expected))}; resume with the optimiser of that run, its "
            "basis, residual, inner rule and moments, or load its weights without the optimiser's state"
        )
    for key, value in known.items():
        if value.shape != expected[key].shape:
            raise UserError(
                f"the saved optimiser state of {name or 'a parameter'} has {key} of shape {tuple(value.shape)}, but "
                f"this optimiser needs {tuple(expected[key].shape)}; resume with the settings it was saved with"
            )
