"""A network for pictures in colour, made one for images with other bands."""

from torch import nn

from lightspan.core.errors import UserError
from lightspan.nn.bands import first_convolution, of_bands

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
    Raises: UserError for a network without a convolution inside, or as `lightspan.nn.bands.of_bands`.
    """
    found, kind = first_convolution(network), type(network).__name__
    if found is None or not found[0]:
        raise UserError(f"other_bands replaces the first convolution inside a network, and {kind} has none inside")
    name, old = found
    network.set_submodule(name, of_bands(old, bands, f"other_bands {kind}"))
    return network
