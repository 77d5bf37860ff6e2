"""Networks for images of another number of bands than they were made for."""

import copy

import torch
from torch import nn


def inflated(network: nn.Module, bands: int) -> nn.Module:
    """The network itself, or a copy whose first convolution takes `bands` bands: its input weights repeated in turn,
    times old / new number, so that equal bands give what they gave (as timm does, and arXiv 2305.13456).

    A network that says that it takes `any_bands`, and one that does not begin with a convolution, stays as it is.
    """
    first = next(((name, part) for name, part in network.named_modules() if isinstance(part, nn.Conv2d)), None)
    if getattr(network, "any_bands", False) or first is None:
        return network
    name, old = first
    if old.in_channels == bands or old.groups != 1:
        return network
    repeated = old.weight.detach().repeat(1, -(-bands // old.in_channels), 1, 1)[:, :bands]
    if old.padding_mode != "zeros":
        raise NotImplementedError(f"a first convolution of padding {old.padding_mode}")
    new = nn.Conv2d(
        bands,
        old.out_channels,
        old.kernel_size,  # type: ignore[arg-type]
        old.stride,  # type: ignore[arg-type]
        old.padding,  # type: ignore[arg-type]
        old.dilation,  # type: ignore[arg-type]
        bias=old.bias is not None,
    )
    with torch.no_grad():
        new.weight.copy_(repeated * (old.in_channels / bands))
        if old.bias is not None and new.bias is not None:
            new.bias.copy_(old.bias)
    grown = copy.deepcopy(network)
    if not name:
        return new
    grown.set_submodule(name, new)
    return grown
