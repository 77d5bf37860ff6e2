"""Every objective as a function of rows x [B 4] and a weight [4 4], so that one suite can hold all of them to what
holds for each. `lightspan.objectives` is searched, and what is found there has to be here.
"""

import importlib
import inspect
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from lightspan import objectives
from lightspan.distributed import gather_rows
from lightspan.experiments import class_text
from lightspan.objectives import (
    barlow,
    diffusion,
    distillation,
    entropy,
    info_nce,
    koleo,
    language,
    prototypes,
    pseudo_labels,
    supcon,
)

CURRENT = torch.tensor([False, True, False, True, True, True])


@dataclass(frozen=True)
class Case:
    """One objective.

    Attributes:
        loss: of rows, a weight, labels among the current classes, and a permutation of the rows.
        collectives: of its forward pass on several ranks; None for a plain mean over a rank's own rows, which is the
            loss of all ranks once they are weighted by their rows.
        of_weights: whether the rows have no say.
    """

    loss: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    collectives: int | None = None
    of_weights: bool = False


def class_text_loss(x: Tensor, weight: Tensor, label_B: Tensor, mixed_B: Tensor) -> Tensor:
    text = F.normalize(torch.eye(6, 4, dtype=x.dtype) @ weight + 0.1, dim=1)
    return class_text.current_class_text_loss(F.normalize(x @ weight, dim=1), text, label_B, CURRENT, 20.0)


def barlow_twins_loss(x: Tensor, weight: Tensor, label_B: Tensor, mixed_B: Tensor) -> Tensor:
    z1, z2 = barlow.standardise(x @ weight), barlow.standardise(x.tanh() @ weight)
    return barlow.barlow_twins_loss(z1, z2, 0.1)


def mixed_regulariser(x: Tensor, weight: Tensor, label_B: Tensor, mixed_B: Tensor) -> Tensor:
    z1, z2, zm = (barlow.standardise(view @ weight) for view in (x, x.tanh(), x.sin()))
    return barlow.mixed_regulariser(zm, z1, z2, torch.tensor(0.3).to(x), mixed_B)


def feature_distillation(x: Tensor, weight: Tensor, label_B: Tensor, mixed_B: Tensor) -> Tensor:
    return distillation.feature_distillation([x @ weight, (x @ weight).tanh()], [x.sin(), x.cos()])


def class_pair_loss(x: Tensor, weight: Tensor, label_B: Tensor, mixed_B: Tensor) -> Tensor:
    return info_nce.class_pair_loss(x @ weight, label_B, label_B[mixed_B], (x.cos() @ weight).sigmoid(), 0.5)


def multi_positive_info_nce(x: Tensor, weight: Tensor, label_B: Tensor, mixed_B: Tensor) -> Tensor:
    key_ND, label_N = gather_rows(x @ weight)[0], gather_rows(label_B)[0]
    masks = info_nce.class_pair_masks(label_B, label_B, label_N)
    return info_nce.multi_positive_info_nce(info_nce.gated_cosine(x.sin() @ weight, key_ND) / 0.5, *masks)


def cross_view_loss(x: Tensor, weight: Tensor, label_B: Tensor, mixed_B: Tensor) -> Tensor:
    targets = torch.stack([prototypes.centred_softmax(view, torch.ones(4), 0.5) for view in (x, x.cos())])
    return prototypes.cross_view_loss(targets, torch.stack([x @ weight, x.tanh() @ weight, x.sin() @ weight]), 0.5)


CASES = {
    "class_text.current_class_text_loss": Case(class_text_loss, 2),
    "barlow.barlow_twins_loss": Case(barlow_twins_loss, 2 + 2 + 1),
    "barlow.mixed_regulariser": Case(mixed_regulariser, 2 + 2 + 2 + 1),
    "diffusion.prediction_loss": Case(
        lambda x, weight, label_B, mixed_B: diffusion.prediction_loss(x @ weight, x.sin())
    ),
    "distillation.mean_squared": Case(
        lambda x, weight, label_B, mixed_B: distillation.mean_squared(x @ weight, x.sin())
    ),
    "distillation.feature_distillation": Case(feature_distillation),
    "distillation.weight_perturbation": Case(
        lambda x, weight, label_B, mixed_B: distillation.weight_perturbation([weight], [weight.detach().round()], 0.01),
        of_weights=True,
    ),
    "info_nce.class_pair_loss": Case(class_pair_loss, 2 + 2 + 1),
    "info_nce.multi_positive_info_nce": Case(multi_positive_info_nce, 2 + 2 + 1),
    "supcon.supcon": Case(lambda x, weight, label_B, mixed_B: supcon.supcon(x @ weight, label_B, 0.5), 2 + 2 + 1),
    "entropy.prediction_entropy": Case(lambda x, weight, label_B, mixed_B: entropy.prediction_entropy(x @ weight)),
    "pseudo_labels.pseudo_label_loss": Case(
        lambda x, weight, label_B, mixed_B: pseudo_labels.pseudo_label_loss(x @ weight, x.sin(), label_B % 4)
    ),
    "koleo.koleo": Case(lambda x, weight, label_B, mixed_B: koleo.koleo(x @ weight), 3),
    "language.next_token_loss": Case(
        lambda x, weight, label_B, mixed_B: language.next_token_loss((x @ weight)[:, None], label_B[:, None] % 4)
    ),
    "prototypes.cross_view_loss": Case(cross_view_loss),
    "prototypes.prototype_cross_entropy": Case(
        lambda x, weight, label_B, mixed_B: prototypes.prototype_cross_entropy(x.softmax(dim=1), x @ weight, 0.5)
    ),
}
PARTS = {
    *("barlow.standardise", "barlow.cross_correlation"),
    *("diffusion.linear_kept", "diffusion.cosine_kept", "diffusion.add_noise", "diffusion.velocity"),
    *("diffusion.noise_of_velocity", "diffusion.step_back"),
    *("info_nce.gated_cosine", "info_nce.class_pair_masks", "info_nce.require_temperature"),
    *(
        "entropy.entropy",
        "means.squared_error",
        "prototypes.sinkhorn",
        "prototypes.centred_softmax",
        "pseudo_labels.trusted_labels",
    ),
}
"""What is no loss: parts of losses, and what makes their inputs."""


def public_functions() -> set[str]:
    """All public functions of the modules in `lightspan.objectives`, and of what waits to join it, as
    `module.function`.
    """
    found = set()
    names = [f"lightspan.objectives.{info.name}" for info in pkgutil.iter_modules(objectives.__path__)]
    for module in (*map(importlib.import_module, names), class_text):
        found |= {
            f"{module.__name__.rpartition('.')[2]}.{name}"
            for name, value in vars(module).items()
            if inspect.isfunction(value) and value.__module__ == module.__name__ and not name.startswith("_")
        }
    return found
