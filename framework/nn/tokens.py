"""Features by layer and by token, read while a network runs.

Layers are counted from the input. They are given by the first of these that a network has:
- `feature_modules`: the list of its modules whose outputs are its layers (this project's own networks);
- timm's `feature_info`: blocks of transformers, stages of convolutional networks;
- its list of equal blocks (`lightspan.core.layers`), as networks of transformers and torchvision's ViT have one.
Shapes: B batch, T tokens (positions of a map, row by row), P prefix tokens (class, registers), D width; a grid has as
many axes as the samples: one for series, two for pictures, three for volumes and clips.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightspan.core.devices import wide
from lightspan.core.errors import UserError
from lightspan.core.layers import list_of_blocks
from lightspan.nn.taps import tapped


@dataclass(frozen=True)
class Tokens:
    """One layer's features.

    Attributes:
        tokens_BTD: a row for each patch, position of a map, or text token; T is 1 if a layer gives vectors.
        grid: tokens along each axis, whose product is T, if they form a map, else None.
        prefix_BPD: tokens without a position, such as the class token; None if there are none, or if the
            network does not say how many (timm's do, by `num_prefix_tokens`; those of transformers do not, so theirs
            are among the others).
        valid_BT: bool, False on the padding of a sequence; None if there is none.
    """

    tokens_BTD: Tensor
    grid: tuple[int, ...] | None = None
    prefix_BPD: Tensor | None = None
    valid_BT: Tensor | None = None

    def pooled(self) -> Tensor:
        """Mean over tokens, prefix and padding left out, in float32 or wider: [B D]."""
        if self.valid_BT is not None:
            return valid_mean(self.tokens_BTD, self.valid_BT)
        return wide(self.tokens_BTD).mean(dim=1)

    def first(self) -> Tensor:
        """The first prefix token, of timm's networks the class token; where no prefix is given, the first token: [B D].

        Raises: UserError where no token stands for the whole: all lie on a grid.
        """
        if self.prefix_BPD is not None:
            return self.prefix_BPD[:, 0]
        if self.grid is not None:
            raise UserError(
                f"there is no first token: all lie on a grid of {' x '.join(map(str, self.grid))}; take the mean"
            )
        return self.tokens_BTD[:, 0]


def valid_mean(tokens_BTD: Tensor, valid_BT: Tensor) -> Tensor:
    """Mean over the tokens that are not padding, in float32 or wider: [B D]; 0 where all are."""
    total_BD = wide(tokens_BTD).masked_fill(~valid_BT[..., None], 0).sum(dim=1)
    return total_BD / valid_BT.sum(dim=1, keepdim=True).clamp_min(1)


def token_features(backbone: nn.Module, forward: Callable[[], Any], layers: Sequence[int] = (-1,)) -> list[Tokens]:
    """The features of these layers, in the requested order.

    Args:
        forward: called once; must call the backbone once.
        layers: from 0, or from the end with -1 as the last.
    Raises: UserError for a layer out of range, a backbone whose layers are unknown, or a layer whose output is not a
        tensor that `arranged` can read.
    """
    modules, chosen = feature_modules(backbone), chosen_layers(backbone, layers)
    distinct = sorted(set(chosen))  # in the order in which they run
    embed = _embedding(backbone)
    with (
        tapped([embed] if isinstance(embed, nn.Module) else []) as embedded,
        tapped([modules[layer] for layer in distinct]) as outputs,
        tapped(modules, keep=_sizes) as sizes,
    ):
        forward()
    if len(outputs) != len(distinct):
        raise UserError(
            f"{type(backbone).__name__} ran {len(outputs)} of the {len(distinct)} requested layers, but each must "
            "run once; name other modules in its feature_modules"
        )
    found = dict(zip(distinct, outputs, strict=True))
    widths, patches = _widths(backbone), _patches(embed, embedded)
    last = _features_last(sizes, widths) if len(sizes) == len(modules) else None
    return [
        arranged(
            backbone,
            found[layer],
            f"layer {layer} ({type(modules[layer]).__name__})",
            widths.get(layer),
            patches,
            last,
        )
        for layer in chosen
    ]


def chosen_layers(backbone: nn.Module, layers: Sequence[int]) -> list[int]:
    """The layers counted from 0. Raises: UserError as `token_features`."""
    count = len(feature_modules(backbone))
    for layer in layers:
        if not -count <= layer < count:
            raise UserError(
                f"layer {layer} is outside the {count} layers of {type(backbone).__name__}; it must be in "
                f"[{-count}, {count - 1}]"
            )
    return [layer % count for layer in layers]


def feature_modules(backbone: nn.Module) -> list[nn.Module]:
    """The modules whose outputs are the layers of a network.

    Raises: UserError for one whose layers are unknown.
    """
    told: Any = getattr(backbone, "feature_modules", None)
    if told is None and hasattr(backbone, "feature_info"):
        found = {info["module"]: _module(backbone, info["module"]) for info in _entries(backbone.feature_info)}
        if missing := [name for name, module in found.items() if module is None]:
            raise UserError(
                f"{type(backbone).__name__} names layers in feature_info that are not among its modules "
                f"({', '.join(missing)}); if it was made with features_only=True, make it without, else give it a "
                "property feature_modules, the list of the modules whose outputs are its layers"
            )
        told = [found[info["module"]] for info in _entries(backbone.feature_info)]
    if told is None:
        _, told = list_of_blocks(
            backbone,
            lambda parameter: True,
            "give it a property feature_modules, the list of the modules whose outputs are its layers",
        )
    return list(told)


def _module(backbone: nn.Module, name: str) -> nn.Module | None:
    """A module by its path, or None; through wrappers such as torch.compile's, which answer for the one inside."""
    try:
        return backbone.get_submodule(name)
    except AttributeError:
        return None


def _entries(info: Any) -> list[dict[str, Any]]:
    return list(getattr(info, "info", info))  # timm's class of this name, or a plain list


def _widths(backbone: Any) -> dict[int, int]:
    """D of each layer that timm's `feature_info` describes; none where the network tells its layers another way."""
    if getattr(backbone, "feature_modules", None) is not None:
        return {}
    entries = _entries(getattr(backbone, "feature_info", None) or [])
    return {layer: info["num_chs"] for layer, info in enumerate(entries) if "num_chs" in info}


def _sizes(output: Any) -> torch.Size | None:
    """The shape of a map, [B . . .]; None for any other output."""
    output = output[0] if isinstance(output, tuple) else output
    return output.shape if isinstance(output, Tensor) and output.ndim > 3 else None


def _features_last(sizes: Sequence[torch.Size | None], widths: Mapping[int, int]) -> bool | None:
    """Whether the maps of a network have their features on the last axis, by the layers whose sizes tell.

    Args:
        sizes: of all layers in one pass; a map with a side as long as it has features tells nothing.
    Returns: None if no layer tells.
    """
    for layer, size in enumerate(sizes):
        width = widths.get(layer)
        if size is not None and width is not None and (size[1] == width) != (size[-1] == width):
            return size[-1] == width
    return None


class PatchGrid(NamedTuple):
    """How many patches a network makes of a sample, and their grid; None for what is not known."""

    number: int | None = None
    grid: tuple[int, ...] | None = None


def _embedding(backbone: Any) -> Any:
    return getattr(backbone, "patch_embed", None)  # timm's name


def _patches(embed: Any, embedded: Sequence[Any] = ()) -> PatchGrid:
    """The patches of a pass by what its embedding gave, or else those of the size that the network was made for.

    The embedding's output is a map, [B D . . .] or [B . . . D] by its `output_fmt`, where it has more than three axes
    or says `flatten = False`; otherwise it is [B T D]. Both names are timm's.
    """
    number, grid = getattr(embed, "num_patches", None), getattr(embed, "grid_size", None)
    first = embedded[0] if embedded else None
    patches = first[0] if isinstance(first, tuple) else first  # XCiT's embedding gives the grid too
    if isinstance(patches, Tensor) and (patches.ndim > 3 or not getattr(embed, "flatten", True)):
        grid = patches.shape[1:-1] if _says_last(embed) else patches.shape[2:]
        number = math.prod(grid)
    elif isinstance(patches, Tensor) and patches.ndim == 3:
        number = patches.shape[1]
    return PatchGrid(number, None if grid is None else tuple(grid))


def arranged(
    backbone: Any,
    output: Any,
    what: str = "the output",
    width: int | None = None,
    patches: PatchGrid | None = None,
    last: bool | None = None,
) -> Tokens:
    """What a network or one of its layers gives, as tokens: [B D], [B P+T D], or a map of two or more axes, [B D H W],
    [B H W D], [B D C H W] and so on. A map of one axis cannot be told from tokens, and is to be [B T D].

    A network may add its prefix tokens after some of its layers, as CaiT and XCiT do: an output with as many tokens as
    there are patches has none.

    Args:
        what: the name of the output, for messages.
        width: D where it is known; it tells the order of a map's axes where these differ.
        patches: those of this pass; None takes what the network was made for.
        last: whether the network's other maps have their features on the last axis; None if nothing is known of them,
            and timm's `output_fmt` tells.
    Raises: UserError for an output that is not such a tensor, or a map neither of whose axes is as wide as told.
    """
    output = output[0] if isinstance(output, tuple) else output  # transformers' blocks may give more than states
    if not isinstance(output, Tensor) or output.ndim < 2:
        kind = f"a tensor of shape {tuple(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
        raise UserError(
            f"{what} of {type(backbone).__name__} is {kind}, but must be a tensor [B D], [B T D], or a map such "
            "as [B D H W] or [B H W D]; choose another layer, or name other modules in its feature_modules"
        )
    if output.ndim > 3:
        map_BHWD = output if _is_last(backbone, output, what, width, last) else output.movedim(1, -1)
        return Tokens(map_BHWD.flatten(1, -2), tuple(map_BHWD.shape[1:-1]))
    if output.ndim == 2:
        return Tokens(output.unsqueeze(1))
    number, grid = patches or _patches(_embedding(backbone))
    prefix = 0 if number == output.shape[1] else getattr(backbone, "num_prefix_tokens", 0)
    tokens_BTD = output[:, prefix:]
    if grid is not None and math.prod(grid) != tokens_BTD.shape[1]:  # tokens were dropped, or the size is variable
        grid = None
    return Tokens(tokens_BTD, grid, output[:, :prefix] if prefix else None)


def _is_last(backbone: Any, map_: Tensor, what: str, width: int | None, told: bool | None) -> bool:
    """Whether the features of a map are its last axis."""
    last = told if told is not None else _says_last(backbone)
    if width is None or map_.shape[-1 if last else 1] == width:
        return last
    if map_.shape[1 if last else -1] != width:
        raise UserError(
            f"{what} of {type(backbone).__name__} has shape {tuple(map_.shape)}, but feature_info tells {width} "
            "features, which is neither its second axis nor its last; name other modules in its feature_modules"
        )
    return not last


def _says_last(module: Any) -> bool:
    return getattr(module, "output_fmt", "NCHW") == "NHWC"  # timm's names, whatever the number of axes
