"""A smaller network inside a larger one: the first entries of every parameter, so that both share their weights.

Source: Zhang et al., "POA: Pre-training Once for Models of All Sizes", ECCV 2024, arXiv 2408.01031, section 3.2, and
the "order" mode of the authors' code. A linear layer of a narrow network is y = W[:o, :i] (I / i) x + b[:o], where I is
the input width of the large one: without the factor, sums over fewer inputs come out smaller and narrow networks
collapse. The factor belongs to the weight here, so what runs inside the large network is what can be cut out of it.
Layers of other kinds (norms, tokens, position tables, convolutions) take their first entries as they are.
Shapes: O outputs and I inputs of the large layer, o and i of the small one.
"""

from collections.abc import Callable, Sequence

from torch import Tensor, nn
from torch.nn import functional as F

GROUPS = {"qkv": 3}
"""Linear layers whose outputs lie in equal groups, by the last part of their name: each group is cut by itself."""


def first(x: Tensor, shape: Sequence[int]) -> Tensor:
    """The first entries along every axis; `x` itself where it has that shape."""
    return x if x.shape == tuple(shape) else x[tuple(slice(size) for size in shape)]


def first_of_groups(x: Tensor, shape: Sequence[int], groups: int) -> Tensor:
    """`first` within each of the groups along the first axis; `shape` is that of the result."""
    if x.shape == tuple(shape):
        return x
    return first(x.unflatten(0, (groups, -1)), (groups, shape[0] // groups, *shape[1:])).flatten(0, 1)


def linear_weight(weight_OI: Tensor, shape: Sequence[int], groups: int = 1) -> Tensor:
    """The weight [o i] of a narrow linear layer, scaled by I / i; `weight_OI` itself where it has that shape."""
    cut_oi, inputs = first_of_groups(weight_OI, shape, groups), weight_OI.shape[1]
    return cut_oi if shape[1] == inputs else cut_oi * (inputs / shape[1])


def sub_weights(large: nn.Module, small: nn.Module, source: Callable[[str], str] = str) -> dict[str, Tensor]:
    """Parameters for `small` out of `large`, with gradients into the large ones; nothing outside the slice has one.

    Args:
        small: a network of the same parts, each at most as large; only its shapes are read, so it may be on "meta".
        source: the name in `large` of a module of `small`.
    """
    found: dict[str, Tensor] = {}
    for path, part in small.named_modules():
        groups = GROUPS.get(path.rpartition(".")[2], 1) if isinstance(part, nn.Linear) else 1
        for name, parameter in part.named_parameters(recurse=False):
            whole = large.get_submodule(source(path)).get_parameter(name)
            linear = isinstance(part, nn.Linear) and name == "weight"
            cut = linear_weight if linear else first_of_groups
            found[f"{path}.{name}" if path else name] = cut(whole, parameter.shape, groups)
    return found


def widened(x: Tensor, width: int) -> Tensor:
    """Features [..., w] of a narrow network as input [..., width] of a layer that knows the whole width only.

    Scaled by width / w and filled up with zeros, so that a linear layer behind it acts as `linear_weight` of it would.
    """
    narrow = x.shape[-1]
    return x if narrow == width else F.pad(x * (width / narrow), (0, width - narrow))
