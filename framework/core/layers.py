"""The list of equal blocks that tells the layers of a network, whichever library it comes from."""

from collections.abc import Callable

from torch import nn

from lightspan.core.errors import UserError


def list_of_blocks(
    network: nn.Module, counts: Callable[[nn.Parameter], bool], way_out: str
) -> tuple[str, nn.ModuleList | nn.Sequential]:
    """(path, list) of the longest nn.ModuleList or nn.Sequential of at least two modules of one type.

    Lists inside one another belong together. Several side by side, as the stages of a convolutional network or two
    towers, tell no order.

    Args:
        counts: lists without such a parameter, such as those of a frozen teacher, are passed over where another list
            has one. It need not be in each block: the lower ones may be frozen.
        way_out: what the user can do where no list tells the layers, for the message.
    Raises: UserError where there is no such list, or where there are several.
    """
    lists = {
        path: part
        for path, part in network.named_modules()
        if isinstance(part, nn.ModuleList | nn.Sequential)
        and len(part) > 1
        and len({type(block) for block in part}) == 1
        and all(any(True for _ in block.parameters()) for block in part)
    }
    lists = {path: part for path, part in lists.items() if any(map(counts, part.parameters()))} or lists
    if not lists:
        raise UserError(
            f"{type(network).__name__} has no list of equal blocks from which to read its layers; {way_out}"
        )
    path = max(lists, key=lambda known: len(lists[known]))
    beside = [other for other in lists if not (_inside(other, path) or _inside(path, other))]
    if beside:
        raise UserError(
            f"{type(network).__name__} has lists of equal blocks side by side ({', '.join([path, *beside][:4])}), "
            f"from which its layers cannot be read; {way_out}"
        )
    return path, lists[path]


def _inside(path: str, other: str) -> bool:
    """Whether `path` is `other` or lies in it."""
    return not other or f"{path}.".startswith(f"{other}.")
