"""Networks for images of another number of bands than they were made for: what their first convolution becomes."""

import copy

import torch
from torch import nn

from lightspan.core.errors import UserError


def first_convolution(network: nn.Module) -> tuple[str, nn.Conv2d] | None:
    """Its name, "" if it is the network itself, and the convolution; None for a network without one."""
    return next(((name, part) for name, part in network.named_modules() if isinstance(part, nn.Conv2d)), None)


def of_bands(old: nn.Conv2d, bands: int, owner: str) -> nn.Conv2d:
    """A convolution like this one for `bands` channels, with random weights, and the bias, which belongs to the
    filters' outputs and not to the bands.

    Args:
        owner: what asks for it, in errors.
    Raises: UserError for no band, or a convolution that keeps its channels apart in groups.
    """
    if bands < 1:
        raise UserError(f"{owner} bands={bands} must be at least 1")
    if old.groups != 1:
        raise UserError(
            f"{owner} cannot replace a first convolution that keeps its {old.in_channels} channels apart in "
            f"{old.groups} groups; make the network with as many channels as there are bands"
        )
    new = nn.Conv2d(
        bands, old.out_channels, old.kernel_size, old.stride, old.padding, old.dilation,  # type: ignore[arg-type]
        bias=old.bias is not None, padding_mode=old.padding_mode,
    ).to(old.weight)  # fmt: skip
    if old.bias is not None and new.bias is not None:
        new.bias.data.copy_(old.bias.data)
    return new


def inflated(network: nn.Module, bands: int) -> nn.Module:
    """The network itself, or a copy whose first convolution takes `bands` bands: its input weights repeated in turn,
    times old / new number, as timm does, and arXiv 2305.13456. Equal bands then give what they gave, exactly where the
    new number is a multiple of the old one, and nearly elsewhere.

    A network that says that it takes `any_bands`, and one without a convolution, stays as it is.

    Raises: UserError as `of_bands`.
    """
    first = first_convolution(network)
    if getattr(network, "any_bands", False) or first is None:
        return network
    name, old = first
    if old.in_channels == bands:
        return network
    new = of_bands(old, bands, f"inflated {type(network).__name__}")
    repeated = old.weight.detach().repeat(1, -(-bands // old.in_channels), 1, 1)[:, :bands]
    with torch.no_grad():
        new.weight.copy_(repeated * (old.in_channels / bands))
    if not name:
        return new
    grown = copy.deepcopy(network)
    grown.set_submodule(name, new)
    return grown
