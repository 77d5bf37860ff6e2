"""HDA: a generator of images is adapted to several domains at once, from few shots of each and none of their mixture.

Source: Li et al., "Few-shot Hybrid Domain Adaptation of Image Generators", ICLR 2024, arXiv 2310.19378. The authors
have published no code, and the equations here follow the outline of the paper: affine hulls in the space of a frozen
encoder, a distance to them, a direction along the perpendiculars, and latents that a frozen copy of the generator
shares. Assumed are features of unit length, a distance that is not squared, and one cosine for each domain.
The encoder shows features e_T of the generator's images and e_S of those that its frozen source makes of the same
latents. With P_k the nearest point in the affine hull of the features of domain k's shots, as in
`lightspan.subspaces.affine`, and a weight w_k,
L = sum_k w_k (|e_T - P_k(e_T)| + lambda (1 - cos(e_T - e_S, P_k(e_S) - e_S))), the mean over latents, summed over
encoders. What lies inside a hull is not pulled at: shots of a domain differ in it.
Shapes: B shots of this rank, K domains, Z latents of L numbers, D features, C H W image.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightspan.core.devices import has_values, wide
from lightspan.core.distributed import gather_rows
from lightspan.core.errors import UserError
from lightspan.core.ranges import require_in
from lightspan.datamodules.image.batch import ImageBatch
from lightspan.nn.labels import labels_of
from lightspan.nn.teachers.frozen import FixedNetwork, Frozen
from lightspan.nn.views import image_of
from lightspan.objectives.means import mean, weighted_sum
from lightspan.subspaces.affine import AffineHull, affine_hull
from lightspan.training.method import Method


def guarded_cosine(x_ZD: Tensor, y_ZD: Tensor, least_Z: Tensor) -> Tensor:
    """Cosines [Z] of the angles between rows; 0, without gradient, where one of the two is no longer than `least_Z`."""
    length_x, length_y = (torch.linalg.vector_norm(of, dim=1) for of in (x_ZD, y_ZD))
    known_Z = (length_x > least_Z) & (length_y > least_Z)
    # Divided by 1 where nothing is known, so that no gradient there is infinite.
    x_ZD = x_ZD.where(known_Z[:, None], 0) / length_x.where(known_Z, 1)[:, None]
    y_ZD = y_ZD.where(known_Z[:, None], 0) / length_y.where(known_Z, 1)[:, None]
    return (x_ZD * y_ZD).sum(dim=1)


def hull_losses(
    e_ZD: Tensor, source_ZD: Tensor, hulls: Sequence[AffineHull], blend: Sequence[float]
) -> dict[str, Tensor]:
    """`distance` and `direction`, each the sum over the hulls times their blend and the mean over the latents of all
    ranks, scalars in float32 or wider; 0, with gradient 0, without hulls or latents.

    A feature that has not moved by more than rounding has no direction: its cosine counts as 0.
    """
    e_ZD, source_ZD = wide(e_ZD), wide(source_ZD)
    rounding_Z = torch.finfo(e_ZD.dtype).eps * torch.linalg.vector_norm(source_ZD, dim=1)
    distance_Z = direction_Z = e_ZD.sum(dim=1) * 0
    for hull, weight in zip(hulls, blend, strict=True):
        distance_Z = distance_Z + weight * torch.linalg.vector_norm(hull.residual(e_ZD), dim=1)
        cosine_Z = guarded_cosine(e_ZD - source_ZD, -hull.residual(source_ZD), rounding_Z)
        direction_Z = direction_Z + weight * (1 - cosine_Z)
    return {"distance": mean(distance_Z), "direction": mean(direction_Z)}


class HDA(Method):
    """Adapts `generator`; `source` stays what it was.

    Batches are `ImageBatch`, shots whose `label` is their domain. Hulls are those of a batch, on all ranks: a batch
    should hold all shots, as in the paper. A domain of which a batch has no shot pulls at nothing in that step.

    Args:
        generator: latents [Z L] -> images as standardised as the shots, with the attribute `latent_features`, L;
            trained on the source domain.
        encoders: images -> features [B D], frozen. What they do not see cannot be adapted: one that ignores colours is
            blind for a domain of other colours.
        num_classes: K, of domains, at least 1.
        latents: Z, drawn for each batch, on each rank that has shots; at least 1.
        direction: lambda, at least 0.
        blend: w_k, at least 0, one for each domain; None is 1 for all.
        optimization: `optimizer`, `lr_scheduler` and `groups`, see `Method`.
    Raises: UserError for no encoder, a generator without `latent_features`, or a blend of another number of domains.
    """

    features = None  # type: ignore[assignment]  # it learns to draw

    def __init__(
        self,
        generator: nn.Module,
        encoders: list[nn.Module],
        num_classes: int,
        latents: int = 4,
        direction: float = 1.0,
        blend: list[float] | None = None,
        **optimization: Any,
    ) -> None:
        super().__init__(**optimization)
        require_in("[1, inf)", num_classes=num_classes, latents=latents)
        require_in("[0, inf)", direction=direction)
        blend = [1.0] * num_classes if blend is None else blend
        require_in("[0, inf)", blend=blend)
        if len(blend) != num_classes:
            raise UserError(f"HDA blend={blend} must have one number for each of num_classes={num_classes}")
        if not encoders:
            raise UserError("HDA encoders=[] sees nothing of an image; name one network at least")
        width: Any = getattr(generator, "latent_features", None)
        if width is None:
            raise UserError(
                f"HDA generator={type(generator).__name__} must say in latent_features how many numbers its latents "
                "have, as lightspan.backbones.generators.ConvGenerator does"
            )
        self.num_classes, self.latents, self.direction, self.blend = num_classes, latents, direction, tuple(blend)
        self.source = Frozen(copy.deepcopy(generator))
        self.latent_features: int = width
        self.generator = generator
        self.encoders = nn.ModuleList(map(FixedNetwork, encoders))

    def losses(self, z_ZL: Tensor, shots_BCHW: Tensor, domain_B: Tensor) -> dict[str, Tensor]:
        """See `hull_losses`; their sums over the encoders. Every rank must call it."""
        drawn, source = self.generator(z_ZL), self.source(z_ZL)
        domain_R, _ = gather_rows(domain_B)
        # A plan, of shapes alone, lets every shot be one of every domain.
        known = has_values(domain_R)
        there = [k for k in range(len(self.blend)) if not known or bool((domain_R == k).any())]
        found = []
        for encoder in self.encoders:
            e_ZD, source_ZD = _unit(encoder(drawn)), _unit(encoder(source))
            shots_RD, _ = gather_rows(_unit(encoder(shots_BCHW)))
            hulls = [affine_hull(shots_RD[domain_R == k] if known else shots_RD) for k in there]
            found.append(hull_losses(e_ZD, source_ZD, hulls, [self.blend[k] for k in there]))
        return {name: torch.stack([losses[name] for losses in found]).sum() for name in found[0]}

    def training_step(self, batch: ImageBatch, batch_idx: int) -> Tensor:
        shots_BCHW, domain_B = image_of(batch, "HDA"), labels_of(batch, "HDA")
        # Drawn from torch's CPU generator on every device: a resumed run then draws the same.
        z_ZL = torch.randn(self.latents if len(shots_BCHW) else 0, self.latent_features)
        losses = self.losses(z_ZL.to(shots_BCHW), shots_BCHW, domain_B)
        loss = weighted_sum(losses, {"distance": 1.0, "direction": self.direction})
        self.log_training({"train/loss": loss}, prog_bar=True)
        self.log_training({f"train/{name}": value for name, value in losses.items()})
        return loss


def _unit(features_BD: Tensor) -> Tensor:
    """Of length 1, so that the distances of several encoders weigh alike."""
    return F.normalize(wide(features_BD), dim=1)
