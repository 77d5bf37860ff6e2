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
from lightspan.core.devices import wide
from lightspan.core.distributed import gather_rows
from lightspan.objectives import (
    actions,
    asymmetric,
    barlow,
    chamfer,
    classes,
    coding_rate,
    dice,
    diffusion,
    distillation,
    edm,
    entropy,
    gram,
    info_nce,
    koleo,
    language,
    letters,
    margin,
    masked,
    mmd,
    overlaps,
    prediction,
    prototypes,
    pseudo_labels,
    sigreg,
    singular,
    soft_contrast,
    spectral,
    supcon,
    supremix,
    text_pairs,
    vicreg,
)


@dataclass(frozen=True)
class Case:
    """One objective.

    Attributes:
        loss: of rows, a weight, labels among the current classes, and a permutation of the rows.
        collectives: of its forward pass on several ranks; 0 only where the rows have no say.
    """

    loss: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    collectives: int = 1


def asymmetric_loss(x: Tensor, weight: Tensor, label_B: Tensor, mixed_B: Tensor) -> Tensor:
    """Ranks differ in how much is known."""
    return asymmetric.asymmetric_loss(x @ weight, x.sin() > 0, (label_B % 2 == 0)[:, None] & (x.cos() > 0))


def overlap_similarities(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Shares of two crops of each volume in two base crops, and how alike they are."""
    crops, bases = (torch.stack([rows @ weight, rows.cos() @ weight], dim=1) for rows in (x, x.tanh() + 1))
    return (x.sin().relu() / 2).unflatten(1, (2, 2)), overlaps.positive_cosines(crops, bases)


def overlap_loss(x: Tensor, weight: Tensor, label_B: Tensor, mixed_B: Tensor) -> Tensor:
    return overlaps.overlap_loss(*overlap_similarities(x, weight))


def split_overlap_loss(x: Tensor, weight: Tensor, label_B: Tensor, mixed_B: Tensor) -> Tensor:
    return overlaps.split_overlap_loss(*overlap_similarities(x, weight))


def barlow_twins_loss(x: Tensor, weight: Tensor, label_B: Tensor, mixed_B: Tensor) -> Tensor:
    z1, z2 = barlow.standardise(x @ weight), barlow.standardise(x.tanh() @ weight)
    return barlow.barlow_twins_loss(z1, z2, 0.1)


def mixed_regulariser(x: Tensor, weight: Tensor, label_B: Tensor, mixed_B: Tensor) -> Tensor:
    z1, z2, zm = (barlow.standardise(view @ weight) for view in (x, x.tanh(), x.sin()))
    return barlow.mixed_regulariser(zm, z1, z2, torch.tensor(0.3).to(x), mixed_B)


def feature_distillation(x: Tensor, weight: Tensor, label_B: Tensor, mixed_B: Tensor) -> Tensor:
    return distillation.feature_distillation([x @ weight, (x @ weight).tanh()], [x.sin(), x.cos()])


def attention_divergence(x: Tensor, weight: Tensor, label_B: Tensor, mixed_B: Tensor) -> Tensor:
    """Of maps of two heads, one query and two keys."""
    student, teacher = ((rows.unflatten(1, (2, 2))[:, :, None]) for rows in (x @ weight, x.sin()))
    return distillation.attention_divergence(student, teacher)


def variance_loss(x: Tensor, weight: Tensor, label_B: Tensor, mixed_B: Tensor) -> Tensor:
    """At levels of which one is the last that is stepped back from."""
    kept_T = diffusion.linear_kept(10)
    ends_2B, kept_B = (table[..., label_B].to(wide(x).dtype) for table in (diffusion.variance_ends(kept_T), kept_T))
    return diffusion.variance_loss(x.cos(), x @ weight, x.sin(), x.tanh(), kept_B, ends_2B, label_B == 1)


def class_pair_loss(x: Tensor, weight: Tensor, label_B: Tensor, mixed_B: Tensor) -> Tensor:
    return info_nce.class_pair_loss(x @ weight, label_B, label_B[mixed_B], (x.cos() @ weight).sigmoid(), 0.5)


def multi_positive_info_nce(x: Tensor, weight: Tensor, label_B: Tensor, mixed_B: Tensor) -> Tensor:
    key_ND, label_N = gather_rows(x @ weight)[0], gather_rows(label_B)[0]
    masks = info_nce.class_pair_masks(label_B, label_B, label_N)
    return info_nce.multi_positive_info_nce(info_nce.gated_cosine(x.sin() @ weight, key_ND) / 0.5, *masks)


def temperature_of(weight: Tensor) -> Tensor:
    """One that is trained."""
    return weight.float().mean().exp() if weight.itemsize < 4 else weight.mean().exp()


def nt_xent(x: Tensor, weight: Tensor, label_B: Tensor, mixed_B: Tensor) -> Tensor:
    return info_nce.nt_xent(x @ weight, x.tanh() @ weight, temperature_of(weight))


def paired_info_nce(x: Tensor, weight: Tensor, label_B: Tensor, mixed_B: Tensor) -> Tensor:
    """Of all pairs, and of those that are known, of which ranks have several numbers."""
    rows = x @ weight, x.tanh() @ weight, temperature_of(weight)
    return info_nce.paired_info_nce(*rows) + info_nce.paired_info_nce(*rows, known_B=label_B % 2 == 0)


def crossed_info_nce(x: Tensor, weight: Tensor, label_B: Tensor, mixed_B: Tensor) -> Tensor:
    return info_nce.crossed_info_nce([x @ weight, x.sin() @ weight], [x.tanh(), x.cos()], temperature_of(weight))


def permuted_letter_loss(x: Tensor, weight: Tensor, label_B: Tensor, mixed_B: Tensor) -> Tensor:
    word_BT = 1 + torch.stack([label_B % 3, (label_B + 1) % 3], dim=1)
    word_BT[:, 1] *= label_B % 2  # words of one letter and of two
    logits = torch.stack([(number * x).sin() @ weight for number in range(1, 10)]).view(3, 3, len(x), 4).transpose(1, 2)
    return letters.permuted_letter_loss(logits, word_BT)


def seen_group_regression(x: Tensor, weight: Tensor, label_B: Tensor, mixed_B: Tensor) -> Tensor:
    """Of two groups, of which one of three tokens is hidden in each row."""
    guess, seen = (x @ weight)[:, None], (x > -0.5)[:, None]
    parts = [[part[..., :2], part[..., 2:].expand(-1, 1, 2)] for part in (guess, x.sin()[:, None], seen)]
    hidden_BGL = torch.stack([label_B % 2 == 0, label_B % 2 == 1], dim=1)[:, :, None]
    return masked.seen_group_regression(*parts, hidden_BGL)


def regression_by_modality(x: Tensor, weight: Tensor, label_B: Tensor, mixed_B: Tensor) -> Tensor:
    """Of two modalities, to one of which each row's two patches belong; of some rows neither is known."""
    guess_BHn, patches_BHn = (part.unflatten(1, (2, 2)) for part in (x @ weight, x.sin()))
    modality_BH = (label_B % 2)[:, None].expand(-1, 2)
    return masked.regression_by_modality(guess_BHn, patches_BHn, modality_BH, x[:, :2] > -0.5, 2).sum()


def hidden_absolute_error(x: Tensor, weight: Tensor, label_B: Tensor, mixed_B: Tensor) -> Tensor:
    """Ranks differ in how much is hidden."""
    return masked.hidden_absolute_error(x @ weight, x.sin(), (label_B % 2 == 0)[:, None])


def soft_info_nce(x: Tensor, weight: Tensor, label_B: Tensor, mixed_B: Tensor) -> Tensor:
    """Shares by the cosines of keys that have no gradient."""
    key_ND = gather_rows(x.sin())[0]
    target_BN = (info_nce.gated_cosine(x, key_ND) / 0.5).softmax(dim=1)
    return info_nce.soft_info_nce(info_nce.gated_cosine(x @ weight, gather_rows(x @ weight)[0]) / 0.5, target_BN)


def queued_info_nce(x: Tensor, weight: Tensor, label_B: Tensor, mixed_B: Tensor) -> Tensor:
    queue_KD = torch.arange(20, dtype=torch.float64).sin().view(5, 4).to(x.dtype)
    return info_nce.queued_info_nce(x @ weight, x.tanh() @ weight, queue_KD, temperature_of(weight))


def sigreg_loss(x: Tensor, weight: Tensor, label_B: Tensor, mixed_B: Tensor) -> Tensor:
    return sigreg.sigreg(torch.stack([x @ weight, x.tanh() @ weight]), seed=0, step=3, directions=5)


def cross_view_loss(x: Tensor, weight: Tensor, label_B: Tensor, mixed_B: Tensor) -> Tensor:
    targets = torch.stack([prototypes.centred_softmax(view, torch.ones(4), 0.5) for view in (x, x.cos())])
    return prototypes.cross_view_loss(targets, torch.stack([x @ weight, x.tanh() @ weight, x.sin() @ weight]), 0.5)


def class_and_patch_losses(x: Tensor, weight: Tensor, label_B: Tensor, mixed_B: Tensor) -> Tensor:
    """Of two masked patches of some images, and of none of others."""
    some = label_B % 2 == 0
    patch, of_patch = torch.cat([x.sin()[some], x.cos()[some]]), x.new_full((2 * int(some.sum()),), 0.5)
    targets = [(torch.stack([view.softmax(dim=1) for view in (x, x.cos())]), patch.softmax(dim=1))] * 2
    z, z_patch = x @ weight, patch @ weight
    scores = [(torch.stack([z, z.tanh(), z.sin()]), z_patch.cos()), (torch.stack([z.sin(), z, z]), z_patch)]
    losses = prototypes.class_and_patch_losses(targets, scores, 0.5, of_patch, len(x))
    return torch.cat(losses).mean()


def supremix_loss(x: Tensor, weight: Tensor, label_B: Tensor, mixed_B: Tensor) -> Tensor:
    return supremix.supremix(x @ weight, label_B, torch.full((len(x),), 0.2), 4.0, 1.0, 0.5)


def document_ranking_loss(x: Tensor, weight: Tensor, label_B: Tensor, mixed_B: Tensor) -> Tensor:
    """By cosines of two documents a query, and by dot products of one."""
    documents = torch.stack([x.tanh() @ weight, x.cos() @ weight], dim=1)
    by_products = text_pairs.document_ranking_loss(x @ weight, documents[:, :1], 2.0, cosine=False)
    return text_pairs.document_ranking_loss(x @ weight, documents, 0.5) + by_products


def score_divergence(x: Tensor, weight: Tensor, label_B: Tensor, mixed_B: Tensor) -> Tensor:
    rows = ((x @ weight, x.tanh()[:, None] @ weight), (x.sin(), x.cos()[:, None]))
    return text_pairs.score_divergence(*(text_pairs.pair_scores(*pair, cosine=False)[0] for pair in rows))


def cluster_coding_rate(x: Tensor, weight: Tensor, label_B: Tensor, mixed_B: Tensor) -> Tensor:
    return coding_rate.cluster_coding_rate(F.normalize(x @ weight, dim=1), (x.sin() @ weight).softmax(dim=1), 0.5)


def pairwise_coding_rate(x: Tensor, weight: Tensor, label_B: Tensor, mixed_B: Tensor) -> Tensor:
    membership_BN = coding_rate.pairwise_membership(x.sin() @ weight, 0.5, iterations=2)
    return coding_rate.pairwise_coding_rate(F.normalize(x @ weight, dim=1), membership_BN, 0.5)


CASES = {
    "chamfer.chamfer_loss": Case(
        lambda x, weight, label_B, mixed_B: chamfer.chamfer_loss(
            (x @ weight).unflatten(1, (2, 2)), x.unflatten(1, (2, 2)), x[:, 0] > 0
        ),
        1,
    ),
    "classes.label_cross_entropy": Case(
        lambda x, weight, label_B, mixed_B: classes.label_cross_entropy(x @ weight, label_B % 4)
    ),
    "classes.known_cross_entropy": Case(
        lambda x, weight, label_B, mixed_B: classes.known_cross_entropy(x @ weight, label_B % 4, x[:, 0] > 0), 1
    ),
    "asymmetric.asymmetric_loss": Case(asymmetric_loss, 1),
    "overlaps.overlap_loss": Case(overlap_loss),
    "overlaps.split_overlap_loss": Case(split_overlap_loss),
    "barlow.barlow_twins_loss": Case(barlow_twins_loss, 2 + 2 + 1),
    "barlow.mixed_regulariser": Case(mixed_regulariser, 2 + 2 + 2 + 1),
    "prediction.prediction_distance": Case(
        lambda x, weight, label_B, mixed_B: prediction.prediction_distance(x @ weight, x.sin() @ weight)
    ),
    "diffusion.prediction_loss": Case(
        lambda x, weight, label_B, mixed_B: diffusion.prediction_loss(x @ weight, x.sin())
    ),
    "diffusion.variance_loss": Case(variance_loss),
    "edm.denoising_loss": Case(
        lambda x, weight, label_B, mixed_B: edm.denoising_loss(x @ weight, x.sin(), x.cos(), 0.5 + label_B)
    ),
    "distillation.mean_squared": Case(
        lambda x, weight, label_B, mixed_B: distillation.mean_squared(x @ weight, x.sin())
    ),
    "distillation.attention_divergence": Case(attention_divergence),
    "distillation.feature_distillation": Case(feature_distillation, 2),
    "distillation.weight_perturbation": Case(
        lambda x, weight, label_B, mixed_B: distillation.weight_perturbation([weight], [weight.detach().round()], 0.01),
        collectives=0,
    ),
    "info_nce.class_pair_loss": Case(class_pair_loss, 2 + 2 + 1),
    "info_nce.multi_positive_info_nce": Case(multi_positive_info_nce, 2 + 2 + 1),
    "info_nce.soft_info_nce": Case(soft_info_nce, 2 + 2 + 1),
    "info_nce.nt_xent": Case(nt_xent, 2 + 1),
    "info_nce.paired_info_nce": Case(paired_info_nce, 2 + 1 + 2 + 2 + 1),
    "info_nce.crossed_info_nce": Case(crossed_info_nce, 2 * (2 + 1)),
    "info_nce.queued_info_nce": Case(queued_info_nce, 1),
    "sigreg.sigreg": Case(sigreg_loss, 1),
    "singular.leading_singular_share": Case(
        lambda x, weight, label_B, mixed_B: singular.leading_singular_share(x @ weight, leading=2), 2
    ),
    "spectral.spectral_contrastive": Case(
        lambda x, weight, label_B, mixed_B: spectral.spectral_contrastive(x @ weight, x.tanh() @ weight), 1
    ),
    "vicreg.vicreg_loss": Case(
        lambda x, weight, label_B, mixed_B: vicreg.vicreg_loss(x @ weight, x.tanh() @ weight), 2
    ),
    "vicreg.invariance": Case(lambda x, weight, label_B, mixed_B: vicreg.invariance(x @ weight, x.tanh() @ weight), 1),
    "vicreg.covariance": Case(lambda x, weight, label_B, mixed_B: vicreg.covariance(x @ weight), 2),
    "vicreg.variance": Case(lambda x, weight, label_B, mixed_B: vicreg.variance(0.3 * x @ weight), 2),
    "soft_contrast.soft_contrast": Case(
        lambda x, weight, label_B, mixed_B: sum(
            soft_contrast.soft_contrast(x @ weight, x.tanh() @ weight, F.one_hot(label_B % 4, 4) > 0, 0.5)
        ),
        2 + 2 + 1 + 1,
    ),
    "supremix.supremix": Case(supremix_loss, 2 + 2 + 1),
    "supcon.supcon": Case(lambda x, weight, label_B, mixed_B: supcon.supcon(x @ weight, label_B, 0.5), 2 + 2 + 1),
    "entropy.prediction_entropy": Case(lambda x, weight, label_B, mixed_B: entropy.prediction_entropy(x @ weight)),
    "pseudo_labels.pseudo_label_loss": Case(
        lambda x, weight, label_B, mixed_B: pseudo_labels.pseudo_label_loss(x @ weight, x.sin(), label_B % 4)
    ),
    "pseudo_labels.pixel_cross_entropy": Case(
        lambda x, weight, label_B, mixed_B: pseudo_labels.pixel_cross_entropy(
            (x @ weight)[..., None, None], (label_B % 4)[:, None, None]
        )
    ),
    "coding_rate.coding_rate": Case(
        lambda x, weight, label_B, mixed_B: coding_rate.coding_rate(F.normalize(x @ weight, dim=1), 0.5), 1
    ),
    "coding_rate.cluster_coding_rate": Case(cluster_coding_rate, 1),
    "coding_rate.pairwise_coding_rate": Case(pairwise_coding_rate, 2 + 2 * 2 + 2 + 1),
    "coding_rate.total_coding_rate_loss": Case(
        lambda x, weight, label_B, mixed_B: coding_rate.total_coding_rate_loss(x @ weight, x.sin() @ weight, 0.5, 3.0),
        1 + 1,
    ),
    "mmd.mmd": Case(
        lambda x, weight, label_B, mixed_B: (
            mmd.mmd(x @ weight, x.tanh()) + mmd.mmd(x @ weight, x.sin(), unbiased=False)
        ),
        2 * (2 + 2),
    ),
    "text_pairs.document_ranking_loss": Case(document_ranking_loss, 2 * (2 + 1)),
    "text_pairs.cosent_loss": Case(
        lambda x, weight, label_B, mixed_B: text_pairs.cosent_loss(x @ weight, x.tanh(), label_B.to(x.dtype), 0.5),
        2 + 2,
    ),
    "text_pairs.score_divergence": Case(score_divergence, 2 + 2 + 1),
    "text_pairs.coordinate_divergence": Case(
        lambda x, weight, label_B, mixed_B: text_pairs.coordinate_divergence(x @ weight, x.sin())
    ),
    "dice.dice_loss": Case(
        lambda x, weight, label_B, mixed_B: dice.dice_loss((x @ weight)[..., None], (label_B % 4)[:, None])
    ),
    "gram.gram_loss": Case(
        lambda x, weight, label_B, mixed_B: gram.gram_loss(
            (x @ weight).unflatten(1, (2, 2)), x.sin().unflatten(1, (2, 2))
        )
    ),
    "koleo.koleo": Case(lambda x, weight, label_B, mixed_B: koleo.koleo(x @ weight), 3),
    "language.next_token_loss": Case(
        lambda x, weight, label_B, mixed_B: language.next_token_loss((x @ weight)[:, None], label_B[:, None] % 4)
    ),
    "margin.ranking_loss": Case(
        lambda x, weight, label_B, mixed_B: margin.ranking_loss((x @ weight)[:, 0], x.sin()[:, 0], 0.5)
    ),
    "margin.margin_loss": Case(
        lambda x, weight, label_B, mixed_B: margin.margin_loss(
            F.normalize(x @ weight, dim=1), label_B % 2, label_B // 4, boundary=1.0, margin=0.5
        ),
        2 + 2 + 1,
    ),
    "letters.permuted_letter_loss": Case(permuted_letter_loss, 1),
    "masked.hidden_absolute_error": Case(hidden_absolute_error, 1),
    "masked.patch_regression": Case(
        lambda x, weight, label_B, mixed_B: masked.patch_regression((x @ weight)[:, None], x.sin()[:, None])
    ),
    "masked.feature_regression": Case(
        lambda x, weight, label_B, mixed_B: masked.feature_regression((x @ weight)[:, None], x.sin()[:, None])
    ),
    "actions.action_figures": Case(
        lambda x, weight, label_B, mixed_B: actions.action_figures(x @ weight, x.sin())["loss"]
    ),
    "masked.feature_absolute_error": Case(
        lambda x, weight, label_B, mixed_B: masked.feature_absolute_error((x @ weight)[:, None], x.sin()[:, None])
    ),
    "masked.seen_patch_regression": Case(
        lambda x, weight, label_B, mixed_B: masked.seen_patch_regression(
            (x @ weight)[:, None], x.sin()[:, None], (x > -0.5)[:, None]
        )
    ),
    "masked.seen_absolute_error": Case(
        lambda x, weight, label_B, mixed_B: masked.seen_absolute_error(x @ weight, x.sin(), x > -0.5)
    ),
    "masked.regression_by_modality": Case(regression_by_modality),
    "masked.seen_group_regression": Case(seen_group_regression),
    "prototypes.class_and_patch_losses": Case(class_and_patch_losses, 4),
    "prototypes.cross_view_loss": Case(cross_view_loss),
    "prototypes.prototype_cross_entropy": Case(
        lambda x, weight, label_B, mixed_B: prototypes.prototype_cross_entropy(x.softmax(dim=1), x @ weight, 0.5)
    ),
}
PARTS = {
    "chamfer.chamfer_squared",
    "similarity.structural_similarity",
    "soft_contrast.tag_similarity",
    *("coding_rate.require_distortion", "coding_rate.pairwise_membership"),
    *("asymmetric.require_asymmetry", "mmd.require_widths"),
    *("barlow.standardise", "barlow.cross_correlation"),
    *("overlaps.positive_cosines", "overlaps.surprise", "overlaps.base_similarities"),
    *("diffusion.linear_kept", "diffusion.cosine_kept", "diffusion.add_noise", "diffusion.velocity"),
    *("diffusion.noise_of_velocity", "diffusion.step_back", "diffusion.scaled_linear_kept", "diffusion.variance_ends"),
    *("diffusion.log_variance", "diffusion.log_pixel_probability"),
    *("edm.scales", "edm.with_noise", "edm.denoised", "edm.target", "edm.level_weight", "edm.falling_sigmas"),
    "edm.euler_step",
    *("supremix.mixed_pairs", "text_pairs.pair_scores"),
    *("info_nce.gated_cosine", "info_nce.row_cosine", "info_nce.class_pair_masks", "info_nce.own_rows"),
    *("info_nce.unit", "means.sum_over_rows", "vicreg.vicreg_terms", "sigreg.random_directions", "sigreg.epps_pulley"),
    *(
        "masked.normalised_patches",
        "masked.denormalised_patches",
        "classes.share_right",
        "letters.reading_scores",
        "means.mean",
        "means.mean_of",
        "means.own_mean",
        "means.known_mean",
        "means.squared_error",
        "means.squared_error_at",
        "means.weighted_sum",
        "prototypes.identity_shares",
        "prototypes.mixed_targets",
        "prototypes.sinkhorn",
        "prototypes.column_potentials",
        "prototypes.centred_softmax",
        "prototypes.target_distribution",
        "pseudo_labels.pixel_labels",
        "pseudo_labels.trusted_labels",
    ),
}
"""What is no loss: parts of losses, and what makes their inputs."""


def public_functions() -> set[str]:
    """All public functions of the modules in `lightspan.objectives`, as `module.function`."""
    found = set()
    names = [f"lightspan.objectives.{info.name}" for info in pkgutil.iter_modules(objectives.__path__)]
    for module in map(importlib.import_module, names):
        found |= {
            f"{module.__name__.rpartition('.')[2]}.{name}"
            for name, value in vars(module).items()
            if inspect.isfunction(value) and value.__module__ == module.__name__ and not name.startswith("_")
        }
    return found
