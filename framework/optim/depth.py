"""How deep in its network a parameter is, for layer-wise decay of the learning rate.

Source: Clark et al., "ELECTRA", 2020, arXiv 2003.10555, appendix; Bao et al., "BEiT", 2021, arXiv 2106.08254; timm's
`param_groups_layer_decay`, whose rates this gives for timm networks with a head.

Layers are counted from the input. In a timm network they are those of its own `group_matcher`. In any other
network with one list of equal blocks they are its elements: what is registered before the blocks in the same child of
the module (embeddings, stem) is the layer below them, unless its name is that of a head; all else keeps the full rate.
Several parallel lists, such as the stages of a convolutional network or two towers, do not give an order:
`groups.layers` must.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from typing import Any

from torch import nn

from lightspan.core.layers import list_of_blocks
from lightspan.core.patterns import any_matches, matches
from lightspan.core.ties import every_name

HEADS = ("head", "heads", "head_*", "*_head", "classifier", "fc", "last_linear", "score")
"""Names of what follows the blocks, in timm, torchvision, transformers and here, wherever it is registered. A weight
that is tied to the embeddings belongs to these."""
_SET_LAYERS = (
    "set layers of ParameterGroups (in a recipe model.init_args.groups.layers) to name patterns, one a layer from "
    "input to output, without the head, which keeps the full rate"
)


def layer_decay_factors(module: nn.Module, decay: float, layers: Sequence[str] | None = None) -> dict[str, float]:
    """decay^(L - l) for each parameter of layer l of L, counted from 0, by name; a parameter of no layer is left out.

    Args:
        layers: name patterns, one per layer, instead of the module's own layers.
    Raises: UserError for a module whose layers are unknown.
    """
    if layers is not None:
        found = {
            name: depth
            for name, names in every_name(module).items()
            if (depth := next((i for i, layer in enumerate(layers) if any_matches(names, [layer])), None)) is not None
        }
        return {name: decay ** (len(layers) - depth) for name, depth in found.items()}
    shares: dict[str, float] = {}
    for prefix, network in _timm_networks(module):
        depths, total = _told_by_timm(network)
        shares |= {prefix + name: decay ** (total - depth) for name, depth in depths.items()}
    if shares:
        return shares
    depths, total = _numbered(module)
    return {name: decay ** (total - depth) for name, depth in depths.items()}


def _timm_networks(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """The outermost parts with known layers, with the prefix of their parameters' names."""
    outer: list[str] = []
    for path, part in module.named_modules():
        prefix = f"{path}." if path else ""
        if hasattr(type(part), "group_matcher") and not any(prefix.startswith(known) for known in outer):
            outer.append(prefix)
            yield prefix, part


def _told_by_timm(network: Any) -> tuple[dict[str, int], int]:
    """Layers of a timm network's parameters, and how many there are. What the matcher does not know is the head."""
    from timm.models._manipulate import group_with_matcher

    matcher, nobody = network.group_matcher(coarse=False), "?"
    named = [*network.named_parameters()] + ([(nobody, None)] if isinstance(matcher, dict) else [])
    depths: dict[str, int] = group_with_matcher(named, matcher, reverse=True)
    head = depths.pop(nobody, math.inf)
    depths = {name: depth for name, depth in depths.items() if depth < head}
    return depths, max(depths.values(), default=-1) + 1


def _numbered(module: nn.Module) -> tuple[dict[str, int], int]:
    """Layers by the list of blocks that trains, frozen blocks counted too, and how many there are."""
    path, blocks = list_of_blocks(
        module,
        lambda parameter: parameter.requires_grad,
        _SET_LAYERS,
    )
    inside, child = f"{path}." if path else "", path.split(".")[0] + "." if "." in path else ""
    depths: dict[str, int] = {}
    above = False
    for name, names in every_name(module).items():
        if name.startswith(inside):
            depths[name] = int(name.removeprefix(inside).split(".")[0]) + 1
            above = True
        elif name.startswith(child) and not above and not all(matches(_beside(n, path), HEADS) for n in names):
            depths[name] = 0
    return depths, len(blocks) + 1


def _beside(name: str, path: str) -> str:
    """The part of a parameter's name next to one of the path: `head` of `net.head.weight`, `net.blocks`."""
    for own, other in zip_longest(name.split("."), path.split(".")):
        if own != other:
            return own or ""
    return ""
