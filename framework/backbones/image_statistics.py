"""Features of images without any training, as baselines of networks: statistics, and random convolutions.

Source: Corley et al., 2023, arXiv 2305.13456, and for the convolutions Rolf et al., "A generalizable and accessible
approach to machine learning with global satellite imagery" (MOSAIKS), 2021. Each takes images of any number of bands.
Shapes: B images, C bands, H W pixels, K filters, P patches of side S.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightspan.core.errors import UserError


class ImageStatistics(nn.Module):
    """Mean, standard deviation, most and least of each band: [B C H W] -> [B 4C], in this order."""

    any_bands = True

    def forward(self, image_BCHW: Tensor) -> Tensor:
        x_BCN = image_BCHW.flatten(2)
        parts = x_BCN.mean(2), x_BCN.std(2, correction=0), x_BCN.amax(2), x_BCN.amin(2)
        return torch.cat(parts, dim=1)


class RandomConvolutions(nn.Module):
    """Half of the features are the mean over positions of ReLU(conv + bias), half that of ReLU(-(conv + bias)).

    Args:
        filters: K, from N(0, 1), a function of the seed and the number of bands.
        side: of the filters in pixels.
        bias: added to each convolution.
        seed: >= 0.
    Attributes:
        num_features: 2 K; the paper's 512 features come from 256 filters.
    """

    any_bands = True

    def __init__(self, filters: int = 512, side: int = 3, bias: float = -1.0, seed: int = 0) -> None:
        super().__init__()
        if filters < 1 or side < 1 or seed < 0:
            raise UserError(
                f"{type(self).__name__} filters={filters} and side={side} must be at least 1, and seed={seed} at least "
                "0"
            )
        self.filters, self.side, self.bias, self.seed = filters, side, bias, seed
        self.num_features = 2 * filters

    def weight(self, bands: int) -> Tensor:
        """[K C S S]."""
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randn(self.filters, bands, self.side, self.side, generator=generator)

    def forward(self, image_BCHW: Tensor) -> Tensor:
        """Raises: UserError for images that are smaller than a filter."""
        if min(image_BCHW.shape[-2:]) < self.side:
            raise UserError(f"images of {[*image_BCHW.shape[-2:]]} pixels are smaller than filters of side {self.side}")
        weight = self.weight(image_BCHW.shape[1]).to(image_BCHW)
        x_BKhw = F.conv2d(image_BCHW, weight) + self.bias
        return torch.cat([x_BKhw.relu().mean((2, 3)), (-x_BKhw).relu().mean((2, 3))], dim=1)


class PatchConvolutions(RandomConvolutions):
    """`RandomConvolutions` whose filters are patches of the training images (MOSAIKS with ZCA).

    Patches are freed of their mean, scaled to length 1, and whitened: with U D U^T their covariance about their mean
    and W = U (D + epsilon)^(-1/2) U^T, filters are (patch - mean) W W, since patches that meet them should be whitened
    too. `learn` takes the patches, and has to come first.

    Args:
        filters, side, bias, seed: as in `RandomConvolutions`; the seed draws the patches.
        epsilon: of the whitening, > 0.
    """

    learned: Tensor | None

    def __init__(
        self, filters: int = 512, side: int = 3, bias: float = -1.0, seed: int = 0, epsilon: float = 1e-3
    ) -> None:
        super().__init__(filters, side, bias, seed)
        if not 0 < epsilon < float("inf"):
            raise UserError(f"PatchConvolutions epsilon={epsilon} must be above 0 and finite")
        self.epsilon = epsilon
        self.register_buffer("learned", None)

    @torch.no_grad()
    def learn(self, images: Iterable[Tensor]) -> None:
        """Draws a patch from each of K images, or several from each of fewer, and whitens them.

        Args:
            images: batches [B C H W] of the training images, prepared as `forward` will get them.
        Raises: UserError for no image, or ones smaller than a patch.
        """
        kept = torch.cat([*(batch.float().cpu() for batch in images)] or [torch.zeros(0, 1, 1, 1)])
        height, width = kept.shape[-2] - self.side + 1, kept.shape[-1] - self.side + 1
        if not len(kept) or min(height, width) < 1:
            raise UserError(
                f"PatchConvolutions needs images of at least {self.side} pixels, and got {list(kept.shape)}"
            )
        generator = torch.Generator().manual_seed(self.seed)
        order = torch.randperm(len(kept), generator=generator).repeat(-(-self.filters // len(kept)))
        top, left = (torch.randint(most, (self.filters,), generator=generator) for most in (height, width))
        patches = [
            kept[image, :, y : y + self.side, x : x + self.side]
            for image, y, x in zip(order.tolist(), top.tolist(), left.tolist(), strict=False)
        ]
        self.learned = whitened(torch.stack(patches), self.epsilon)

    def weight(self, bands: int) -> Tensor:
        if self.learned is None or self.learned.shape[1] != bands:
            raise UserError(f"PatchConvolutions has no patches of {bands} bands; call learn with the training images")
        return self.learned


def whitened(patch_PCSS: Tensor, epsilon: float) -> Tensor:
    """See `PatchConvolutions`. Computed in float64, returned in float32."""
    x_PN = patch_PCSS.double().flatten(1)
    x_PN = x_PN - x_PN.mean(dim=1, keepdim=True)
    x_PN = x_PN / x_PN.norm(dim=1, keepdim=True).clamp_min(1e-12)  # a flat patch stays 0
    centred_PN = x_PN - x_PN.mean(dim=0)
    values_N, vectors_NN = torch.linalg.eigh(centred_PN.T @ centred_PN / len(x_PN))
    whitening_NN = (vectors_NN * (values_N.clamp_min(0) + epsilon).rsqrt()) @ vectors_NN.T
    return (centred_PN @ whitening_NN @ whitening_NN).float().view_as(patch_PCSS)
