"""Names chosen by shell-style patterns, the one way in which users of this project select parts of a module."""

from collections.abc import Callable, Iterable, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from lightspan.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor, nn


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether a dotted name matches any shell-style pattern (`*` crosses dots)."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def any_matches(names: Iterable[str], patterns: Sequence[str]) -> bool:
    """Whether any of the names matches any pattern: of a tied parameter, which has several."""
    return any(matches(name, patterns) for name in names)


def every_name(module: "nn.Module") -> dict[str, list[str]]:
    """{name of a parameter, as `named_parameters` gives it: all its names}, the others being those of tied ones."""
    names: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {name: names[id(parameter)] for name, parameter in module.named_parameters()}


def require_ties(module: "nn.Module", read: "Callable[[str], Tensor]", source: str) -> None:
    """Raises: UserError where `source` has different tensors under the names of one tied parameter, of which loading
    would keep the last. `read` gives the tensor of a name in the module, of the parameter's shape.
    """
    for first, *others in every_name(module).values():
        for other in others:
            if (read(first) != read(other)).any():
                raise UserError(
                    f"{first} and {other} are tied in {type(module).__name__}, and two different tensors in {source}; "
                    "make the network untied, as that file's was (tied=false of lightspan.backbones.language.t5)"
                )


def require_matches(patterns: Sequence[str], names: Sequence[str], what: str) -> None:
    """Raises: UserError for a pattern that matches none of `names`, with the most similar of them. `what` says what
    they name, such as "trained parameter of CausalLM".
    """
    for pattern in patterns:
        if not any(matches(name, [pattern]) for name in names):
            close = get_close_matches(pattern.strip("*."), names, n=3, cutoff=0.4) or names[:3]
            raise UserError(f"pattern {pattern!r} matches no {what}; names look like {', '.join(close) or '(none)'}")
