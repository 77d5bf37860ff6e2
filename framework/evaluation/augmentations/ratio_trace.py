"""How much of what an augmentation leaves of its samples an encoder captures, from a few views of each sample.

Source: Zhai et al., "Understanding Augmentation-based Self-Supervised Representation Learning via RKHS Approximation
and Regression", ICLR 2024, arXiv 2306.00788. With z(a) the centred features of a view, F = E_a[z z'] and
G = E_x[E[z | x] E[z | x]'], the eigenvalues of F^-1 G are at most those of the augmentation, and their sum, the ratio
trace, is at most the sum of as many largest ones. G is estimated from products of different, independent views of a
sample: a mean over M views would add the spread within samples over M. F^-1 G is computed among the leading directions
of F. In-sample eigenvalues spread a little more than true ones; their sum has no such bias.
|W E[z | x]|^2 + 1, with W whitening F, is at most K_X(x, x).
Shapes: N samples, V views, D features, R directions, C classes.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightspan.core.drawing import COLOURS, SOFT
from lightspan.core.errors import UserError
from lightspan.core.results import Figure, Result
from lightspan.evaluation.augmentations.encoded_views import ViewFeatures
from lightspan.evaluation.estimator import Estimator
from lightspan.evaluation.features.features import Features
from lightspan.evaluation.labels import kind_of
from lightspan.evaluation.scale import scaled

LEAST_ENERGY = 1e-9
"""Of the strongest direction: one with less is left out."""


def whitened_views(z_NVD: Tensor, most: int) -> Tensor:
    """Views [N V R] in the at most `most` leading directions of F, each with mean 0 and mean square 1."""
    flat = z_NVD.flatten(0, 1) - z_NVD[:1, 0]
    flat = flat - flat.mean(dim=0)
    values_D, vectors_DD = torch.linalg.eigh(flat.T @ flat / len(flat))
    rank = min(most, int((values_D > LEAST_ENERGY * values_D[-1].clamp_min(1e-300)).sum()))
    values_R, vectors_DR = values_D.flip(0)[:rank], vectors_DD.flip(1)[:, :rank]
    return (flat @ (vectors_DR / values_R.sqrt())).unflatten(0, z_NVD.shape[:2])


def between_views(w_NVR: Tensor) -> Tensor:
    """G [R R] from the products of all pairs of different views of a sample, symmetric."""
    views = w_NVR.shape[1]
    total_NR, flat = w_NVR.sum(dim=1), w_NVR.flatten(0, 1)
    return (total_NR.T @ total_NR - flat.T @ flat) / (len(w_NVR) * views * (views - 1))


def between_samples(w_NVR: Tensor, generator: torch.Generator) -> Tensor:
    """The same with views of different samples, which have nothing in common: the floor."""
    order_N = torch.randperm(len(w_NVR), generator=generator)
    other_NVR = w_NVR[order_N].roll(1, 0)[order_N.argsort()]  # the next in a random ring: nobody meets itself
    product_RR = w_NVR[:, 0].T @ other_NVR[:, 1] / len(w_NVR)
    return (product_RR + product_RR.T) / 2


def lower_complexities(w_NVR: Tensor) -> Tensor:
    """An estimate of what K_X(x, x) is at least, for each sample, [N]; right on average, so that it may be below 1."""
    views = w_NVR.shape[1]
    squares_N = w_NVR.sum(dim=1).square().sum(dim=1) - w_NVR.square().sum(dim=(1, 2))
    return 1 + squares_N / (views * (views - 1))


def label_fit(w_NVR: Tensor, target_NC: Tensor, g_RR: Tensor) -> tuple[float, float]:
    """(share, epsilon): how much of the labels' variance the best linear map of a view explains, and how unstable that
    map is between views, E[(g(a) - g(a'))^2] / (2 E[g^2]), in [0, 1] but for chance.
    """
    target_NC = target_NC - target_NC.mean(dim=0)
    map_RC = w_NVR.mean(dim=1).T @ target_NC / len(w_NVR)
    kept, variance = float(map_RC.square().sum()), float(target_NC.square().mean(dim=0).sum())
    if not kept or not variance:
        return 0.0, 1.0
    return kept / variance, 1 - float((map_RC * (g_RR @ map_RC)).sum()) / kept


@dataclass(frozen=True)
class CapturedTraces(Result):
    """What an encoder captures of each augmentation; see `lightspan.evaluation.augmentations.ratio_trace`.

    Attributes:
        rows: mappings with preset; trace; floor, the same of views of different samples; ceiling, the number of
            directions; complexity_median, complexity_upper (90 % quantile over samples), which K_X(x, x) is at least;
            label_share and label_epsilon, of labels that the samples have, else None.
        spectra: for each preset its eigenvalues, descending.
        samples, views: N and V.
    """

    rows: tuple[dict[str, Any], ...]
    spectra: tuple[tuple[float, ...], ...]
    samples: int
    views: int

    def figures(self) -> tuple[Figure, ...]:
        names = {
            "trace": "ratio trace",
            "floor": "its floor, views of different samples",
            "ceiling": "its ceiling, directions",
            "complexity_median": "complexity at least, median",
            "complexity_upper": "complexity at least, 90 % quantile",
            "label_share": "labels explained by a view",
            "label_epsilon": "instability of that between views",
        }
        shown = (Figure(f"{name}, {row['preset']}", row[key]) for row in self.rows for key, name in names.items()
                 if row[key] is not None)  # fmt: skip
        return (*shown, Figure("samples", self.samples), Figure("views of each", self.views))

    def table(self) -> tuple[dict[str, Any], ...]:
        return tuple(dict(row) for row in self.rows)

    def draw(self, axes: Any) -> None:
        for row, values, colour in zip(self.rows, self.spectra, COLOURS * 9, strict=False):
            axes.plot(range(1, len(values) + 1), values, color=colour, linewidth=1.5, label=row["preset"])
        axes.axhline(0, color=SOFT, linewidth=1, linestyle=":", label="floor: nothing in common")
        axes.set(xlabel="direction", ylabel="eigenvalue, as captured", ylim=(-0.1, 1.05))
        axes.legend(frameon=False, fontsize=8)


class CapturedTrace(Estimator):
    """Ratio traces of one encoder under several augmentations.

    Args:
        directions: leading ones of the features, at least 1. Without a limit, many directions of a few samples would
            each have a little of chance.
        seed: of the floor, at least 0.
    """

    def __init__(self, directions: int = 32, seed: int = 0) -> None:
        for name, value, least in (("directions", directions, 1), ("seed", seed, 0)):
            if value < least:
                raise UserError(f"CapturedTrace {name}={value} must be at least {least}")
        self.directions, self.seed = directions, seed

    def fit(self, views: ViewFeatures) -> CapturedTraces:
        """Raises: UserError for fewer than 2 samples or views of each, features that never change or are not finite,
        or presets of different samples.
        """
        rows, spectra = [], []
        for name, features in views.presets.items():
            z_NVD = _views(name, features)
            w_NVR = whitened_views(z_NVD, self.directions)
            if not w_NVR.shape[2]:
                raise UserError(f"CapturedTrace: features of {name} are all equal; the encoder distinguishes nothing")
            g_RR = between_views(w_NVR)
            floor_RR = between_samples(w_NVR, torch.Generator().manual_seed(self.seed))
            bounds_N = lower_complexities(w_NVR)
            share, epsilon = _of_labels(features, w_NVR, g_RR)
            rows.append(
                {
                    "preset": name,
                    "trace": float(g_RR.trace()),
                    "floor": float(floor_RR.trace()),
                    "ceiling": w_NVR.shape[2],
                    "complexity_median": float(bounds_N.quantile(0.5)),
                    "complexity_upper": float(bounds_N.quantile(0.9)),
                    "label_share": share,
                    "label_epsilon": epsilon,
                }
            )
            spectra.append(tuple(torch.linalg.eigvalsh(g_RR).flip(0).tolist()))
        counts = {features.x.shape[:2] for features in views.presets.values()}
        if len(counts) != 1:
            raise UserError(f"CapturedTrace compares presets of the same samples and views, and got {sorted(counts)}")
        return CapturedTraces(tuple(rows), tuple(spectra), *counts.pop())


def _views(name: str, features: Features) -> Tensor:
    """[N V D] in float64, near 1."""
    x = features.x
    if x.ndim != 3 or min(x.shape[:2]) < 2 or not x.shape[2]:
        raise UserError(
            f"CapturedTrace: features of {name} are {list(x.shape)}, and not [N, V, D] of 2 or more samples and views"
        )
    if not x.isfinite().all():
        raise UserError(f"CapturedTrace: features of {name} are NaN or infinite; the model has diverged")
    return scaled(x)[1][0].cpu()


def _of_labels(features: Features, w_NVR: Tensor, g_RR: Tensor) -> tuple[float | None, float | None]:
    label = features.label_N
    if label is None:
        return None, None
    target = label.cpu()
    if kind_of(target) == "classes":
        target = torch.nn.functional.one_hot(features.classes().cpu().unique(return_inverse=True)[1])
    return label_fit(w_NVR, target.double().view(len(w_NVR), -1), g_RR)
