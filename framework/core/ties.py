"""Tied parameters: one tensor under several names of a module."""

from collections.abc import Callable

from torch import Tensor, nn

from lightspan.core.errors import UserError


def every_name(module: nn.Module) -> dict[str, list[str]]:
    """{name of a parameter, as `named_parameters` gives it: all its names}; only tied parameters have several."""
    names: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {name: names[id(parameter)] for name, parameter in module.named_parameters()}


def require_ties(module: nn.Module, read: Callable[[str], Tensor], source: str) -> None:
    """Raises: UserError where `source` has different tensors under the names of one tied parameter, of which loading
    would keep the last. `read` gives the tensor of a name in the module, of the parameter's shape.
    """
    for first, *others in every_name(module).values():
        for other in others:
            one, two = read(first), read(other)
            if ((one != two) & ~(one.isnan() & two.isnan())).any():
                raise UserError(
                    f"{first} and {other} are tied in {type(module).__name__}, and two different tensors in {source}; "
                    "make the network untied, as that file's was (tied=false of lightspan.backbones.language.t5)"
                )
