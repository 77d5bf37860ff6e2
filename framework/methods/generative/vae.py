"""VAE: an encoder and a generator of images are trained together, so that latents are spread like normal numbers.

Source: Kingma and Welling, "Auto-Encoding Variational Bayes", ICLR 2014, arXiv 1312.6114, equation 10 with one draw,
and appendices B and C.2. Of an image x the encoder and one linear layer behind it say a mean m and a log variance v of
each number of a latent; z = m + exp(v / 2) e with normal e, and a pixel is normal around G(z) with deviation s:
L = mean over images of sum_pixels (x - G(z))^2 / (2 s^2) + sum_latent (m^2 + exp(v) - 1 - v) / 2,
which is the bound in nats, but for a constant. It is divided by C H W, so that one rate fits images of all sizes.
Shapes: B images of this rank, L numbers of a latent, F features, C H W image.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from lightspan.core.devices import wide
from lightspan.core.errors import UserError
from lightspan.core.ranges import require_in
from lightspan.datamodules.image.batch import ImageBatch
from lightspan.nn.views import image_of
from lightspan.nn.widths import given_features
from lightspan.objectives.means import mean
from lightspan.training.method import Method


def divergence(mean_BL: Tensor, log_variance_BL: Tensor) -> Tensor:
    """Of N(m, exp v) from N(0, 1), in nats [B], float32 or wider; at least 0."""
    mean_BL, log_variance_BL = wide(mean_BL), wide(log_variance_BL)
    return (mean_BL.square() + log_variance_BL.exp() - 1 - log_variance_BL).sum(dim=1) / 2


class VAE(Method):
    """Trains `backbone` and `generator`; the latter alone draws new images, of normal numbers.

    Args:
        backbone: images -> features [B F], with the attribute `num_features`, F; what probes read.
        generator: latents [B L] -> images [B C H W], standardised as those that it learns from, with the attribute
            `latent_features`, L, such as `lightspan.backbones.generators.ConvGenerator`.
        noise: deviation of a pixel, s, in standardised units, above 0. The larger it is, the less is kept of an image
            and the more latents are like normal numbers.
        optimization: `optimizer`, `lr_scheduler` and `groups`, see `Method`.
    Raises: UserError for a backbone or a generator that does not say its width, and images of other sides than drawn.
    """

    def __init__(self, backbone: nn.Module, generator: nn.Module, noise: float = 0.3, **optimization: Any) -> None:
        super().__init__(**optimization)
        require_in("(0, inf)", noise=noise)
        latent: Any = getattr(generator, "latent_features", None)
        if latent is None:
            raise UserError(
                f"VAE generator={type(generator).__name__} must say in latent_features how many numbers its latents "
                "have, as lightspan.backbones.generators.ConvGenerator does"
            )
        features = given_features(backbone)
        if features is None:
            raise UserError(f"VAE backbone={type(backbone).__name__} must say in num_features how many it gives")
        self.backbone, self.generator, self.noise = backbone, generator, noise
        self.latent_features: int = latent
        self.moments = nn.Linear(features, 2 * latent)

    def latents(self, image_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """(means, log variances), each [B L]."""
        mean_BL, log_variance_BL = self.moments(self.backbone(image_BCHW)).chunk(2, dim=1)
        return mean_BL, log_variance_BL

    def losses(self, image_BCHW: Tensor, normal_BL: Tensor) -> dict[str, Tensor]:
        """`pixels` and `divergence`, in nats, the mean over the images of all ranks."""
        mean_BL, log_variance_BL = self.latents(image_BCHW)
        drawn_BCHW = self.generator(mean_BL + (log_variance_BL / 2).exp() * normal_BL)
        if drawn_BCHW.shape != image_BCHW.shape:
            raise UserError(
                f"VAE generator draws images of {[*drawn_BCHW.shape[1:]]} (channels, height, width), and these are "
                f"{[*image_BCHW.shape[1:]]}; set its in_chans and image_size"
            )
        apart_B = (wide(drawn_BCHW) - wide(image_BCHW)).square().flatten(1).sum(dim=1)
        return {
            "pixels": mean(apart_B / (2 * self.noise**2)),
            "divergence": mean(divergence(mean_BL, log_variance_BL)),
        }

    def training_step(self, batch: ImageBatch, batch_idx: int) -> Tensor:
        image_BCHW = image_of(batch, "VAE")
        # Drawn from torch's CPU generator on every device: a resumed run then draws the same.
        normal_BL = torch.randn(len(image_BCHW), self.latent_features)
        losses = self.losses(image_BCHW, normal_BL.to(image_BCHW))
        loss = (losses["pixels"] + losses["divergence"]) / math.prod(image_BCHW.shape[1:])
        self.log_training({"train/loss": loss}, prog_bar=True)
        self.log_training({f"train/{name}": value for name, value in losses.items()})
        return loss

    def validation_step(self, batch: ImageBatch, batch_idx: int) -> None:
        """With each latent at its mean."""
        image_BCHW = image_of(batch, "VAE")
        normal_BL = image_BCHW.new_zeros(len(image_BCHW), self.latent_features)
        losses = self.losses(image_BCHW, normal_BL)
        self.log_dict(
            {f"val/{name}": value for name, value in losses.items()}, batch_size=len(image_BCHW), sync_dist=True
        )
