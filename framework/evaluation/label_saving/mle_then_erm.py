"""How many labels pre-training saves in a world like mine: fit a latent-variable model without labels, freeze it, fit a
head with few.

Source: Ge, Tang, Fan, Jin, "On the Provable Advantage of Unsupervised Pretraining", ICLR 2024, arXiv 2303.01566:
maximum likelihood on M samples, then empirical risk on N labelled ones, has an excess of order sqrt(C / M) +
sqrt(R / N) in place of sqrt(D / N). These are bounds: under the squared loss and a model that is right excesses fall
like 1 / N, and what can be checked is the order of methods, not a slope of -1/2.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from lightspan.core.drawing import COLOURS, SOFT
from lightspan.core.errors import UserError
from lightspan.core.results import Figure, Result
from lightspan.evaluation.estimator import Estimator
from lightspan.evaluation.label_saving.curves import labels_for
from lightspan.evaluation.label_saving.factor_world import FactorWorld, Truth, least_squares
from lightspan.evaluation.scaling_laws import Interval, log_slope
from lightspan.nn.latent_models import fitted_factors, posterior_map

RIDGES = tuple(10.0**k for k in range(-2, 5))
DIRECT, RIDGE = "direct", "best ridge"


@dataclass(frozen=True)
class ExcessRisks(Result):
    """Excess risks over the best predictor, by method, number of labels N and of samples without labels M.

    Attributes:
        rows: mappings with method (`direct`, least squares on x; `best ridge`, that with the penalty of the least true
            risk, which nobody can know; `pretrained`), unlabelled (0 if none), labels, excess (mean over seeds), error
            (its standard error), control (mean excess where the labels tell nothing of the factors).
        saving: labels of least squares on x, over labels on pretrained features of the largest M, for the excess that
            these have with the fewest labels; and what bounds it: "", or "at least" where all labels do not suffice.
        label_slopes, sample_slope: of log excess in log N by method, and in log M at the most labels; with the ends of
            their 95 % intervals, None with one seed.
        floor: the risk of the best predictor, which is no excess.
    """

    rows: tuple[dict[str, Any], ...]
    saving: float
    saving_bound: str
    label_slopes: dict[str, dict[str, float | None]]
    sample_slope: dict[str, float | None]
    floor: float
    seeds: int

    def figures(self) -> tuple[Figure, ...]:
        most = max(row["labels"] for row in self.rows)
        largest = max(row["unlabelled"] for row in self.rows)
        shown = [row for row in self.rows if row["unlabelled"] in (0, largest)]
        found = [
            Figure(f"labels saved, a factor{self.saving_bound and ' of '}{self.saving_bound}", self.saving),
            *(
                Figure(f"{name} with {row['labels']} labels, {_method(row)}", row[key])
                for key, name in (("excess", "excess risk"), ("control", "control, excess risk"))
                for row in shown
                if row["labels"] == most
            ),
            Figure("floor: risk of the best predictor", self.floor),
        ]
        slopes = {f"slope in labels, {name}": self.label_slopes[name] for name in dict.fromkeys(map(_method, shown))}
        for name, slope in (slopes | {"slope in samples without labels": self.sample_slope}).items():
            found += [Figure(name + end, value) for key, end in ENDS if (value := slope[key]) is not None]
        return (*found, Figure("seeds", self.seeds))

    def table(self) -> tuple[dict[str, Any], ...]:
        return tuple(dict(row) for row in self.rows)

    def draw(self, axes: Any) -> None:
        names = list(dict.fromkeys(map(_method, self.rows)))
        for name, colour in zip(names, (SOFT, *COLOURS[1:], *COLOURS), strict=False):
            own = [row for row in self.rows if _method(row) == name]
            x, y, error = ([row[key] for row in own] for key in ("labels", "excess", "error"))
            axes.errorbar(x, y, yerr=error, fmt="-o", color=colour, markersize=3, capsize=2, label=name)
        axes.set(xlabel="labels", ylabel="excess risk", xscale="log", yscale="log")
        axes.legend(frameon=False, fontsize=8)


ENDS = (("value", ""), ("low", ", low end of 95 %"), ("high", ", high end of 95 %"))


def _method(row: dict[str, Any]) -> str:
    return f"pretrained on {row['unlabelled']}" if row["unlabelled"] else str(row["method"])


class MLEThenERM(Estimator):
    """Exact risks of two stages and of one, in worlds drawn from seeds; each seed has its own and nested samples.

    Args:
        unlabelled: numbers M of samples without labels, ascending, each at least 2.
        labels: numbers N of labelled samples, ascending, each at least 2, and two of them.
        rank: factors that the model has, at least 1; None takes as many as the world. To choose them by the labelled
            risk would leak labels into the first stage.
        seeds: at least 1; from 2 on there are intervals.
    """

    def __init__(
        self,
        unlabelled: Sequence[int] = (100, 1000, 10_000),
        labels: Sequence[int] = (60, 100, 200, 800),
        rank: int | None = None,
        seeds: int = 20,
    ) -> None:
        for name, numbers in (("unlabelled", unlabelled), ("labels", labels)):
            if not numbers or min(numbers) < 2 or sorted(set(numbers)) != [*numbers]:
                raise UserError(f"MLEThenERM {name}={[*numbers]} must be ascending numbers of at least 2")
        if len(labels) < 2:
            raise UserError(f"MLEThenERM labels={[*labels]} must be at least two numbers, for a curve")
        for name, value in (("rank", rank), ("seeds", seeds)):
            if value is not None and value < 1:
                raise UserError(f"MLEThenERM {name}={value} must be at least 1")
        self.unlabelled, self.labels, self.rank, self.seeds = tuple(unlabelled), tuple(labels), rank, seeds

    def fit(self, world: FactorWorld) -> ExcessRisks:
        """Raises: UserError for a rank above the world's dimensions."""
        rank = world.factors if self.rank is None else self.rank
        if rank > world.dimensions:
            raise UserError(f"MLEThenERM rank={rank} must be at most {world.dimensions}, the world's dimensions")
        methods = [(DIRECT, 0), (RIDGE, 0), *(("pretrained", count) for count in self.unlabelled)]
        curves = {
            control: np.stack([self._seed(world, rank, seed, control) for seed in range(self.seeds)])  # [S methods K]
            for control in (False, True)
        }
        excess, spread = curves[False].mean(axis=0), curves[False].std(axis=0) / self.seeds**0.5
        rows = tuple(
            {
                "method": method,
                "unlabelled": count,
                "labels": labels,
                "excess": float(excess[m, k]),
                "error": float(spread[m, k]),
                "control": float(curves[True][:, m, k].mean()),
            }
            for m, (method, count) in enumerate(methods)
            for k, labels in enumerate(self.labels)
        )
        saving, bound = labels_for(self.labels, excess[0], float(excess[-1, 0]))
        by_method = {
            _method({"method": method, "unlabelled": count}): log_slope(self.labels, curves[False][:, m])
            for m, (method, count) in enumerate(methods)
        }
        slope = (
            log_slope(self.unlabelled, curves[False][:, 2:, -1]) if len(self.unlabelled) > 1 else Interval(0.0)
        ).record()
        return ExcessRisks(
            rows=rows,
            saving=saving / self.labels[0],
            saving_bound=bound,
            label_slopes={name: each.record() for name, each in by_method.items()},
            sample_slope=slope,
            floor=float(np.mean([self._truth(world, seed, False)[0].floor for seed in range(self.seeds)])),
            seeds=self.seeds,
        )

    def _truth(self, world: FactorWorld, seed: int, control: bool) -> tuple[Truth, torch.Generator]:
        generator = torch.Generator().manual_seed(seed)
        return world.drawn(generator, control), generator

    def _seed(self, world: FactorWorld, rank: int, seed: int, control: bool) -> np.ndarray:
        """Excesses [methods K] of one world."""
        truth, generator = self._truth(world, seed, control)
        x_ND, y_N = truth.samples(self.labels[-1], generator)
        u_MD, _ = truth.samples(self.unlabelled[-1], generator)
        maps = [posterior_map(*fitted_factors(u_MD[:m].T @ u_MD[:m] / m, rank, 1.0)) for m in self.unlabelled]
        found = []
        for n in self.labels:
            x_nD, y_n = x_ND[:n], y_N[:n]
            ridges = [truth.excess(least_squares(x_nD, y_n, penalty)) for penalty in RIDGES]
            # The head sees posterior means; its weights on x are the map times its own.
            heads = [truth.excess(map_DR @ least_squares(x_nD @ map_DR, y_n)) for map_DR in maps]
            found.append([truth.excess(least_squares(x_nD, y_n)), min(ridges), *heads])
        return np.array(found).T
