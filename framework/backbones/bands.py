"""A network for pictures in colour, made one for images with other bands."""

from torch import nn

from lightspan.errors import UserError

# A recipe may name the function listed here.
__all__ = ["other_bands"]


def other_bands(network: nn.Module, bands: int) -> nn.Module:
    """Gives the network a new first convolution, for `bands` channels, and returns it; all other weights stay.

    The new weights are random, as in continual pre-training on other bands (SoftCon, arXiv 2405.20462): kernels of
    colours are not copied. Give it a network that has its weights already, as from
    `lightspan.backbones.weights.with_weights`.

    Args:
        network: whose first convolution reads the image: those of timm and torchvision, `lightspan.backbones.vit.vit`,
            SmallConvNet; changed in place.
        bands: channels of the images, at least 1.
    Raises: UserError for a network without a convolution, or one that splits its channels into groups.
    """
    if bands < 1:
        raise UserError(f"other_bands bands={bands} must be at least 1")
    found = next(((name, part) for name, part in network.named_modules() if isinstance(part, nn.Conv2d)), None)
    kind = type(network).__name__
    if found is None or not found[0]:
        raise UserError(f"other_bands replaces the first convolution of a network, and {kind} has none")
    name, old = found
    if old.groups != 1:
        raise UserError(
            f"other_bands cannot replace {name} of {kind}, which keeps its {old.in_channels} channels apart in "
            f"{old.groups} groups; make the network with as many channels as there are bands"
        )
    new = nn.Conv2d(
        bands, old.out_channels, old.kernel_size, old.stride, old.padding, old.dilation,  # type: ignore[arg-type]
        bias=old.bias is not None, padding_mode=old.padding_mode,
    ).to(old.weight)  # fmt: skip
    if old.bias is not None and new.bias is not None:
        new.bias.data.copy_(old.bias.data)  # it belongs to the filters' outputs, not to the bands
    owner, _, attribute = name.rpartition(".")
    setattr(network.get_submodule(owner), attribute, new)
    return network
