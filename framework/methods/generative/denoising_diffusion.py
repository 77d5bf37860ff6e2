"""Denoising diffusion: learn to recognise the noise in an image, then draw images by removing it level by level.

Source: Ho et al., "Denoising Diffusion Probabilistic Models", 2020, arXiv 2006.11239, algorithms 1 and 2; Song et al.,
"Denoising Diffusion Implicit Models", 2020, arXiv 2010.02502 (fewer levels when drawing); Ho, Salimans, 2022, arXiv
2207.12598 (guidance by the same network without its class); Salimans, Ho, 2022, arXiv 2202.00512 (velocity); Nichol,
Dhariwal, 2021, arXiv 2102.09672, eq. 16 (the loss of a network that learns its variance). The equations are in
`lightspan.objectives.diffusion`. A level is the literature's timestep, `kept` its alpha_bar, and an image whose class
is hidden from the network belongs to the null class, or is unconditional.
Shapes: B batch of this rank, C H W image, T noise levels.
"""

from collections.abc import Callable, Iterator
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from lightspan.core.devices import wide_type
from lightspan.core.distributed import register_replicated
from lightspan.core.errors import UserError
from lightspan.core.ranges import require_in
from lightspan.datamodules.image.batch import ImageBatch
from lightspan.nn.labels import labels_of
from lightspan.nn.views import image_of
from lightspan.objectives.diffusion import (
    add_noise,
    cosine_kept,
    linear_kept,
    noise_of_velocity,
    prediction_loss,
    scaled_linear_kept,
    step_back,
    variance_ends,
    variance_loss,
    velocity,
)
from lightspan.training.method import Method

KEPT: dict[str, Callable[[int], Tensor]] = {
    "linear": linear_kept,
    "scaled_linear": scaled_linear_kept,
    "cosine": cosine_kept,
}
BOUND_WEIGHT = 0.001  # lambda of eq. 16
VALIDATION_LEVELS, VALIDATION_SEED = 10, 0


class DenoisingDiffusion(Method):
    """Trains `backbone` to predict noise, or velocity.

    Args:
        backbone: noisy [B C H W], level int64 [B], label int64 [B] or None -> what is predicted [B C H W]; with the
            attribute `learned_variance` it says behind that, [B 2C H W], how wide the step back spreads.
        schedule: how noise grows over the levels; linear as in DDPM, scaled_linear as in Stable Diffusion, cosine for
            small images.
        levels: T, >= 2.
        label_dropout: share of training images whose class is hidden from the network, in [0, 1]; 1 trains without
            classes, which batches then need not have. Anything above 0 needs a network that takes `num_classes` as no
            class, as `DiT` does.
        prediction: what the network is trained to predict. An error in the noise is 1 / sqrt(kept) times as large in
            the image that it implies, and at the noisiest levels, where outlines are decided, that is a hundred times.
            An error in the velocity never grows: it draws better with a small network.
        optimization: `optimizer`, `lr_scheduler` and `groups`, see `Method`.
    """

    kept_T: Tensor
    ends_2T: Tensor
    features = None  # type: ignore[assignment]  # its backbone gives noise, not [B, D]

    def __init__(
        self,
        backbone: nn.Module,
        schedule: Literal["linear", "scaled_linear", "cosine"] = "linear",
        levels: int = 1000,
        label_dropout: float = 0.1,
        prediction: Literal["noise", "velocity"] = "noise",
        **optimization: Any,
    ) -> None:
        super().__init__(**optimization)
        require_in("[2, inf)", levels=levels)
        require_in("[0, 1]", label_dropout=label_dropout)
        self.backbone, self.label_dropout, self.prediction = backbone, label_dropout, prediction
        self.num_classes = getattr(backbone, "num_classes", 0) or None
        self.learned_variance = getattr(backbone, "learned_variance", False)
        kept_T = KEPT[schedule](levels)
        register_replicated(self, "kept_T", kept_T.float(), persistent=False)
        register_replicated(self, "ends_2T", variance_ends(kept_T).float(), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        kept_T, ends_2T = self.kept_T, self.ends_2T
        super()._apply(fn, recurse)
        # The tables move with the module and keep their dtype: in half precision the first levels would have no noise.
        self.kept_T, self.ends_2T = kept_T.to(self.kept_T.device), ends_2T.to(self.ends_2T.device)
        return self

    def loss(self, batch: ImageBatch, level_B: Tensor, noise_BCHW: Tensor, told_B: Tensor) -> Tensor:
        """Mean squared error of what is predicted at these levels, and the bound's term where the variance is learned;
        if `told` is false the class is hidden.
        """
        image_BCHW, kept_B = batch["image"], self.kept_T[level_B]
        noisy_BCHW = add_noise(image_BCHW, noise_BCHW, kept_B)
        target_BCHW = noise_BCHW if self.prediction == "noise" else velocity(image_BCHW, noise_BCHW, kept_B)
        if self.label_dropout < 1 and self.num_classes:
            label_B = self.labels(labels_of(batch, "DenoisingDiffusion"), told_B)
        else:
            label_B = self.labels(level_B, torch.zeros_like(told_B))
        predicted_BCHW, share_BCHW = self.predict(noisy_BCHW, level_B, label_B)
        loss = prediction_loss(predicted_BCHW, target_BCHW)
        if share_BCHW is None:
            return loss
        implied_BCHW = self.implied_noise(predicted_BCHW.detach(), noisy_BCHW, kept_B)
        ends_2B = self.ends_2T[:, level_B]
        bits = variance_loss(implied_BCHW, share_BCHW, noise_BCHW, image_BCHW, kept_B, ends_2B, level_B == 0)
        # A step of all is drawn, so that the bound, a sum over steps, is T times as large.
        return loss + BOUND_WEIGHT * len(self.kept_T) * bits

    def predict(self, noisy_BCHW: Tensor, level_B: Tensor, label_B: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """What the network predicts, and if it learns it, the share of its variance, each [B C H W]."""
        output = self.backbone(noisy_BCHW, level_B, label_B)
        if not self.learned_variance:
            return output, None
        predicted_BCHW, share_BCHW = output.chunk(2, dim=1)
        return predicted_BCHW, share_BCHW

    def implied_noise(self, predicted: Tensor, noisy: Tensor, kept_B: Tensor) -> Tensor:
        """The noise, of what is predicted."""
        return noise_of_velocity(predicted, noisy, kept_B) if self.prediction == "velocity" else predicted

    def labels(self, label_B: Tensor, told_B: Tensor) -> Tensor | None:
        """Classes as the network expects them, None if it takes none."""
        return torch.where(told_B, label_B, self.num_classes) if self.num_classes else None

    def training_step(self, batch: ImageBatch, batch_idx: int) -> Tensor:
        image_BCHW = image_of(batch, "DenoisingDiffusion")
        rows, device = len(image_BCHW), image_BCHW.device
        # Drawn from torch's CPU generator on every device: a resumed run then draws the same.
        level_B = torch.randint(len(self.kept_T), (rows,)).to(device)
        noise_BCHW, told_B = torch.randn(image_BCHW.shape).to(image_BCHW), torch.rand(rows) >= self.label_dropout
        loss = self.loss(batch, level_B, noise_BCHW, told_B.to(device))
        self.log_training({"train/loss": loss}, prog_bar=True)
        return loss

    def validation_step(self, batch: ImageBatch, batch_idx: int) -> None:
        self.log(
            "val/loss",
            self.held_out_loss(batch, batch_idx),
            batch_size=len(image_of(batch, "DenoisingDiffusion")),
            sync_dist=True,
        )

    def held_out_loss(self, batch: ImageBatch, batch_idx: int, told: bool = True) -> Tensor:
        """Mean loss at ten levels spread evenly, with noise that is the same in every call for the same `batch_idx`."""
        image_BCHW = image_of(batch, "DenoisingDiffusion")
        generator = torch.Generator().manual_seed(VALIDATION_SEED + batch_idx)
        losses = []
        for level in self.spread(VALIDATION_LEVELS):
            noise_BCHW = torch.randn(image_BCHW.shape, generator=generator).to(image_BCHW)
            level_B = torch.full((len(image_BCHW),), level, device=image_BCHW.device)
            losses.append(self.loss(batch, level_B, noise_BCHW, torch.full_like(level_B, told, dtype=torch.bool)))
        return torch.stack(losses).mean()

    def spread(self, count: int) -> list[int]:
        """The middles of `count` equal parts of all levels, ascending. Neither end is included: at the upper one a
        cosine schedule keeps so little of an image that no prediction of the noise reveals it.
        """
        levels = len(self.kept_T)
        return torch.linspace(0, levels - 1, 2 * count + 1, dtype=torch.float64)[1::2].round().long().tolist()

    def sample(
        self,
        label_B: Tensor,
        shape: tuple[int, int, int],
        steps: int = 50,
        eta: float = 0.0,
        guidance: float = 1.0,
        seed: int = 0,
        clip: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Images [B C H W] of these classes, standardised as the training images were, in float32 or wider: the last of
        `draw`.
        """
        for image_BCHW in self.draw(label_B, shape, steps, eta, guidance, seed, clip):
            last_BCHW = image_BCHW
        return last_BCHW

    @torch.no_grad()
    def draw(
        self,
        label_B: Tensor,
        shape: tuple[int, int, int],
        steps: int = 50,
        eta: float = 0.0,
        guidance: float = 1.0,
        seed: int = 0,
        clip: tuple[Tensor, Tensor] | None = None,
    ) -> Iterator[Tensor]:
        """The images after each step, as they lose their noise; who wants the first steps alone stops there.

        The network sees them in the precision of its weights; between its calls they keep their own.

        Args:
            label_B: int64; for a network without classes only its length counts.
            shape: C H W.
            steps: number of levels visited, as chosen by `spread`, in [1, T].
            eta: 0 for DDIM, 1 for the ancestral sampler of DDPM, as in `step_back`.
            guidance: moves the prediction this many times as far from the one without a class; 1 leaves it, and more
                gives images more typical of their class and less varied.
            seed: seed of all noise, which the CPU draws.
            clip: least and greatest value of a training image, as in `ImageData.bounds`; the clean image that
                is predicted at each level is clipped to them, as in `step_back`. Otherwise a small network, or a guided
                one, drifts to values that no image has.
        Raises: UserError for steps or eta out of range.
        """
        levels, device = len(self.kept_T), label_B.device
        if not 1 <= steps <= levels or not 0 <= eta <= 1:
            raise UserError(f"steps={steps} must be in [1, {levels}] and eta={eta} in [0, 1]")
        generator = torch.Generator().manual_seed(seed)
        told_B = torch.ones_like(label_B, dtype=torch.bool)
        seen = next((p.dtype for p in self.backbone.parameters() if p.is_floating_point()), torch.float32)
        x_BCHW = torch.randn(len(label_B), *shape, generator=generator)
        x_BCHW = x_BCHW.to(device, wide_type(seen))
        visited = self.spread(steps)[::-1]
        kept = [self.kept_T[level] for level in visited] + [torch.ones((), device=device)]
        for i, level in enumerate(visited):
            level_B = torch.full_like(label_B, level)
            here_B, next_B = (k.expand(len(label_B)) for k in kept[i : i + 2])
            output, share_BCHW = self.predict(x_BCHW.to(seen), level_B, self.labels(label_B, told_B))
            predicted_BCHW = output.to(x_BCHW.dtype)
            if guidance != 1:
                without_BCHW, _ = self.predict(x_BCHW.to(seen), level_B, self.labels(label_B, ~told_B))
                predicted_BCHW = without_BCHW + guidance * (predicted_BCHW - without_BCHW)
            predicted_BCHW = self.implied_noise(predicted_BCHW, x_BCHW, here_B)
            fresh_BCHW = torch.randn(x_BCHW.shape, generator=generator).to(x_BCHW)
            x_BCHW = step_back(x_BCHW, predicted_BCHW, here_B, next_B, eta, fresh_BCHW, clip, share_BCHW)
            yield x_BCHW
