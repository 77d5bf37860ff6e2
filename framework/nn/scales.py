"""Networks that give maps of several scales on their way up, such as `lightspan.backbones.dense.UNet` and
`lightspan.backbones.pct_net.PCTNet`: [B C D H W] -> maps [B F d h w] by `scales`, from the finest on, of the widths
`widths`.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from lightspan.core.errors import UserError


def require_scales(backbone: nn.Module, method: str) -> Sequence[int]:
    """The widths of the maps. Raises: UserError for a network without `scales`.

    Args:
        method: its name, for messages.
    """
    widths: Sequence[int] = getattr(backbone, "widths", ()) if hasattr(backbone, "scales") else ()
    if not widths:
        raise UserError(
            f"{method} reads maps of several scales, and {type(backbone).__name__} has no `scales` with `widths`; use "
            "one such as lightspan.backbones.dense.UNet"
        )
    return widths


def coarsest_mean(backbone: nn.Module, *read: Tensor) -> Tensor:
    """The mean over the coarsest maps, [B F]: what such a network says of a sample as a whole."""
    return backbone.scales(*read)[-1].flatten(2).mean(dim=2)  # type: ignore[operator]
