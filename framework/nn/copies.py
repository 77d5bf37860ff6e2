"""Copies of networks, for teachers and originals."""

import copy
from typing import TypeVar

from torch import nn
from torch.nn.parameter import is_lazy

from lightspan.core.errors import UserError, one_line

Network = TypeVar("Network", bound=nn.Module)


def copied(network: Network, owner: str) -> Network:
    """A copy that shares nothing with the network.

    Args:
        owner: what keeps the copy, for messages.
    Raises: UserError for a network of which a part cannot be copied, or has no weights yet.
    """
    lazy = next((name for name, parameter in network.named_parameters() if is_lazy(parameter)), None)
    if lazy is not None:
        raise UserError(
            f"{owner} copies {type(network).__name__}, whose weight {lazy!r} has no shape yet; show the network a "
            "batch first, or give its layers their sizes"
        )
    try:
        return copy.deepcopy(network)
    except Exception as error:  # parts of others may raise anything
        name, part = _uncopied(network)
        place = f"{name or 'the network itself'} ({type(part).__module__}.{type(part).__qualname__})"
        raise UserError(
            f"{owner} needs a copy of {type(network).__name__}, but {place} cannot be copied ({type(error).__name__}: "
            f"{one_line(error)}); hold no computed tensor in it, as old weight_norm does (take that of "
            "torch.nn.utils.parametrizations), and nothing of this process, such as a generator, a lock or an open "
            "file, or give it __deepcopy__"
        ) from error


def _uncopied(network: nn.Module) -> tuple[str, nn.Module]:
    """Name and module of the innermost part that cannot be copied; the network itself has no name."""
    name, part = "", network
    while inner := next((child for child in part.named_children() if not _can_be_copied(child[1])), None):
        name, part = f"{name}.{inner[0]}" if name else inner[0], inner[1]
    return name, part


def _can_be_copied(part: nn.Module) -> bool:
    try:
        copy.deepcopy(part)
    except Exception:
        return False
    return True
