"""How far an augmentation lets samples be told apart, before anything is trained: its complexity kappa^2, estimated.

Source: Zhai et al., "Understanding Augmentation-based Self-Supervised Representation Learning via RKHS Approximation
and Regression", ICLR 2024, arXiv 2306.00788. K_X(x, x) = E_{a ~ p(. | x)}[p(a | x) / p(a)], with p(a) the mean of
p(a | x_j) over N samples: this is at most N, so that a weak augmentation looks stronger than it is. What is limited by
N is said so, and 1 / K is followed to infinite N along a straight line in 1 / N.
Shapes: N samples, P points, M augmented samples, D values.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightspan.core.drawing import COLOURS, SOFT
from lightspan.core.errors import UserError
from lightspan.core.results import Figure, Result
from lightspan.evaluation.augmentations.densities import Density, GaussianNoise, RandomMask
from lightspan.evaluation.estimator import Estimator
from lightspan.evaluation.features.features import Features
from lightspan.evaluation.rows import spaced_rows

FLOOR = 1
"""The complexity of an augmentation that says nothing of its sample."""
FEWEST = 4
"""Samples: a quarter of them is still one."""
SATURATED = 0.5
"""Share of N above which an estimate says more of N than of the augmentation."""
BEYOND = 4
ROUNDING = 1e-9
"""Share by which equal estimates may differ."""
QUANTILES = {"median": 0.5, "upper": 0.9, "largest": 1.0}


def sample_complexities(
    density: Density, x_ND: Tensor, at: Tensor, sizes: Sequence[int], draws: int, generator: torch.Generator
) -> Tensor:
    """Estimates of K_X(x, x), [sizes P], in [0, N] each, at the samples of these numbers.

    Args:
        x_ND: float64, finite.
        at: numbers of samples, [P], below the least of the sizes.
        sizes: numbers N of samples, counted from the first, that stand for the distribution.
        draws: M of each point, the same for all sizes.
    """
    found = []
    for point in at.tolist():
        log_MN = density.log_density(density.draw(x_ND[point], draws, generator), x_ND)
        log_p = [log_MN[:, :size].logsumexp(dim=1) - math.log(size) for size in sizes]
        found.append(torch.stack([(log_MN[:, point] - each).exp().mean() for each in log_p]))
    return torch.stack(found, dim=1)


def followed(sizes: tuple[int, int], before: Sequence[float], after: Sequence[float]) -> list[float | None]:
    """What ascending quantiles become with infinitely many samples, if 1 / K of each is a straight line in 1 / N.

    None where the samples cannot tell: beyond `BEYOND` times their number; of a quantile that falls with more samples,
    since the line is for what too few of them hold down; and of one that would end below a smaller quantile.

    Args:
        before, after: the quantiles with either number of samples.
    """
    n1, n2 = sizes
    found, least = list[float | None](), 0.0
    for k1, k2 in zip(before, after, strict=True):
        intercept = (n2 / k2 - n1 / k1) / (n2 - n1)
        end = 1 / intercept if intercept > 1 / (BEYOND * n2) else math.inf
        falls = k2 < k1 * (1 - ROUNDING)
        found.append(None if falls or end == math.inf or end < least * (1 - ROUNDING) else max(end, least))
        least = least if falls else max(least, end)
    return found


@dataclass(frozen=True)
class Complexities(Result):
    """Estimates for each augmentation and number of samples.

    Attributes:
        rows: mappings with augmentation, samples N, median, upper (the 90 % quantile) and largest of K_X(x, x) over
            points, saturated (the largest is above half of N).
        infinite: for each augmentation: augmentation, and median, upper, largest for infinite N, None where they could
            not be extrapolated; see `followed`.
        points: how many K_X(x, x) was estimated at.
    """

    rows: tuple[dict[str, Any], ...]
    infinite: tuple[dict[str, Any], ...]
    points: int

    def figures(self) -> tuple[Figure, ...]:
        most = max(row["samples"] for row in self.rows)
        last = {row["augmentation"]: row for row in self.rows if row["samples"] == most}
        found = []
        for one in self.infinite:
            name, row = one["augmentation"], last[one["augmentation"]]
            said = ", limited by the number of samples" if row["saturated"] else ""
            for key in reversed(QUANTILES):
                end = "" if one[key] else ", could not be extrapolated"
                found.append(Figure(f"{key} complexity, {name}{said}{end}", row[key]))
            found += [
                Figure(f"{key} for infinitely many samples, {name}", one[key])
                for key in reversed(QUANTILES)
                if one[key]
            ]
        floor, ceiling = Figure("floor: complexity without information", FLOOR), Figure("ceiling: samples", most)
        return (*found, floor, ceiling, Figure("points", self.points))

    def table(self) -> tuple[dict[str, Any], ...]:
        return tuple({**row, "floor": FLOOR} for row in self.rows)

    def draw(self, axes: Any) -> None:
        for name, colour in zip((one["augmentation"] for one in self.infinite), COLOURS * 9, strict=False):
            own = [row for row in self.rows if row["augmentation"] == name]
            n, middle = ([row[key] for row in own] for key in ("samples", "median"))
            axes.plot(n, [row["largest"] for row in own], "-o", color=colour, markersize=3, label=name)
            axes.plot(n, middle, ":", color=colour, linewidth=1)
        sizes = sorted({row["samples"] for row in self.rows})
        axes.plot(sizes, sizes, color=SOFT, linewidth=1, label="ceiling: as many as samples")
        axes.axhline(FLOOR, color=SOFT, linewidth=1, linestyle="--", label="floor: no information")
        axes.set(xlabel="samples", ylabel="largest complexity; dotted: median", xscale="log", yscale="log")
        axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
        axes.minorticks_off()
        axes.legend(frameon=False, fontsize=8, ncols=2, loc="lower left", bbox_to_anchor=(0, 0.03))


class AugmentationComplexity(Estimator):
    """Complexities of augmentations whose density is known, of raw samples: an encoder is not needed.

    Args:
        augmentations: by name; None is random masks of a half and nine tenths of the values, and noise of deviation
            one.
        draws: augmented samples of each point, at least 1.
        points: at which complexities are estimated, at least 1; evenly spaced among the first quarter of samples, which
            all numbers of samples have.
        most: largest number of samples, at least 4, evenly spaced.
        seed: of the draws, and of the order in which samples are added.
    """

    def __init__(
        self,
        augmentations: Mapping[str, Density] | None = None,
        draws: int = 32,
        points: int = 100,
        most: int = 2000,
        seed: int = 0,
    ) -> None:
        given = {"masks .5": RandomMask(0.5), "masks .9": RandomMask(0.9), "noise": GaussianNoise(1.0)}
        if augmentations is not None and not augmentations:
            raise UserError("AugmentationComplexity augmentations is empty; give at least one")
        for name, value, least in (
            ("draws", draws, 1),
            ("points", points, 1),
            ("most", most, FEWEST),
            ("seed", seed, 0),
        ):
            if value < least:
                raise UserError(f"AugmentationComplexity {name}={value} must be at least {least}")
        self.augmentations = dict(given if augmentations is None else augmentations)
        self.draws, self.points, self.most, self.seed = draws, points, most, seed

    def fit(self, features: Features) -> Complexities:
        """Raises: UserError for fewer than 4 samples, none of whose values, or not finite ones."""
        x_ND = spaced_rows(features.x.flatten(1) if features.x.ndim > 1 else features.x[:, None], self.most)
        if len(x_ND) < FEWEST or not x_ND.shape[1]:
            raise UserError(f"AugmentationComplexity got {list(x_ND.shape)}, but needs {FEWEST} samples with values")
        if not x_ND.isfinite().all():
            raise UserError("AugmentationComplexity got samples that are NaN or infinite; leave them out")
        x_ND = x_ND.cpu().double()
        generator = torch.Generator().manual_seed(self.seed)
        x_ND = x_ND[torch.randperm(len(x_ND), generator=generator)]
        sizes = [len(x_ND) // 4, len(x_ND) // 2, len(x_ND)]
        at = spaced_rows(torch.arange(sizes[0]), self.points)
        rows, infinite = [], []
        for name, density in self.augmentations.items():
            own: list[dict[str, Any]] = []
            drawn = torch.Generator().manual_seed(self.seed)
            for size, found_P in zip(
                sizes, sample_complexities(density, x_ND, at, sizes, self.draws, drawn), strict=True
            ):
                values = {key: float(found_P.quantile(q)) for key, q in QUANTILES.items()}
                saturated = values["largest"] > SATURATED * size
                own.append({"augmentation": name, "samples": size, **values, "saturated": saturated})
            rows += own
            ends = followed((sizes[1], sizes[2]), *([row[key] for key in QUANTILES] for row in own[1:]))
            infinite.append({"augmentation": name, **dict(zip(QUANTILES, ends, strict=True))})
        return Complexities(tuple(rows), tuple(infinite), len(at))
