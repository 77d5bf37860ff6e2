"""Whether two networks learned the same: units, groups of units and the span of all, each beside its floor.

`lightspan.evaluation.geometry.convergence` has source and equations. The floor of a figure is the same one of features
whose samples no longer belong together: those of the second network in a random order.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightspan.core.drawing import COLOURS, SOFT
from lightspan.core.errors import UserError
from lightspan.core.results import Figure, Result
from lightspan.evaluation.estimator import Estimator
from lightspan.evaluation.features.features import Features
from lightspan.evaluation.geometry.convergence import (
    correlations,
    explained,
    half_square,
    joint_clusters,
    matched,
    require_penalties,
    semi_matched,
    shared_clusters,
    sparse_map,
    standardised,
)
from lightspan.evaluation.geometry.moments import Moments
from lightspan.evaluation.geometry.similarity import linear_cka, require_same_samples
from lightspan.evaluation.geometry.spectra import centred
from lightspan.evaluation.probes.probe_scores import rows_to_choose_by
from lightspan.evaluation.rows import spaced_rows
from lightspan.evaluation.scale import scaled
from lightspan.subspaces.grassmann import principal_angles
from lightspan.subspaces.svd import thin_svd

FEWEST = 10
"""Rows: on a fifth of them maps are scored."""
ROWS_AT_A_TIME = 4096


@dataclass(frozen=True)
class Convergence(Result):
    """How far units and subspaces of two networks correspond. Figures by name, floors under the same names.

    Attributes:
        found: `matched`, mean correlation of units matched one to one; `semi_matched`, that of each unit with its best
            partner; `random`, that of a random matching; `matched_squared`, mean square of the first; `linear`,
            held-out R^2 of the second's units by all of the first's; `shared`, share of units in clusters with units
            of both networks; `within_shared`, R^2 of the second's units in such a cluster by the first's, mean over
            them; `cka`, debiased; `span`, mean squared cosine of the principal angles between leading directions.
        floors: of the same, except `random`.
        contested: partners that several units share as their best, over those that are the best of any.
        units: for each unit of the first network that changes: unit, partner and correlation (-1 and 0 without one),
            best and best_correlation, cluster; floor and best_floor, both correlations with the second network's
            samples in a random order.
        maps: for each penalty: penalty, left (held-out half square a unit; 0.5 is predicting the mean), weights (mean
            number a unit that are not 0).
        widths, dead: units of each network, and of these the ones that never change.
        chance: correlations of units matched by chance, for the picture, in descending order.
    """

    found: dict[str, float]
    floors: dict[str, float]
    contested: float
    units: tuple[dict[str, Any], ...]
    maps: tuple[dict[str, float], ...]
    widths: tuple[int, ...]
    dead: tuple[int, ...]
    rows: int
    chance: tuple[float, ...]

    def figures(self) -> tuple[Figure, ...]:
        names = {
            "matched": "correlation of matched units",
            "semi_matched": "correlation with the best partner",
            "matched_squared": "squared correlation of matched units",
            "linear": "R2 of the second's units by all of the first's, held out",
            "shared": "share of units in clusters of both networks",
            "within_shared": "R2 within clusters of both networks, held out",
            "cka": "CKA, debiased",
            "span": "squared cosine of leading directions",
        }
        return (
            *(
                figure
                for key, name in names.items()
                for figure in (Figure(name, self.found[key]), Figure(f"its floor: {name}", self.floors[key]))
            ),
            Figure("correlation of a random matching", self.found["random"]),
            Figure("best partners that several units share", 100 * self.contested, "%"),
            *(
                figure
                for one in self.maps
                for figure in (
                    Figure(f"left of a half by a map with penalty {one['penalty']:g}", one["left"]),
                    Figure(f"weights a unit of a map with penalty {one['penalty']:g}", one["weights"]),
                )
            ),
            *(
                Figure(f"{what} of the {which}", number)
                for what, numbers in (("units", self.widths), ("units that never change", self.dead))
                for which, number in zip(("first", "second"), numbers, strict=True)
            ),
            Figure("rows", self.rows),
        )

    def table(self) -> tuple[dict[str, Any], ...]:
        return tuple(dict(row) for row in self.units)

    def draw(self, axes: Any) -> None:
        one_to_one = sorted((row["correlation"] for row in self.units if row["partner"] >= 0), reverse=True)
        best = sorted((row["best_correlation"] for row in self.units), reverse=True)
        for values, name, colour in (
            (best, "with the best partner", COLOURS[1]),
            (one_to_one, "matched one to one", COLOURS[0]),
            (self.chance, "floor: samples in a random order", SOFT),
        ):
            axes.plot(range(1, len(values) + 1), values, color=colour, linewidth=1.5, label=name)
        axes.set(xlabel="units of the first network, the most alike first", ylabel="correlation")
        axes.set_ylim(top=1.05)
        axes.legend(frameon=False)


class ConvergentLearning(Estimator):
    """Units of two networks matched one to one and one to many, mapped sparsely, and clustered together.

    Features that keep positions count each position as a sample, of which `most` are taken, evenly spaced.

    Args:
        penalties: of the sparse maps, at least 0, which explain `mapped` units of the second network, evenly spaced;
            the paper's go from 0 to 0.1.
        clusters: of the units of both networks, at least 1; as many as there are units, if those are fewer.
        directions: leading ones of each network whose span is compared, at least 1.
        mapped: at least 1.
        most: largest number of samples, at least 10.
        seed: of the order without correspondence, and of the clusters.
    """

    def __init__(
        self,
        penalties: Sequence[float] = (0.0, 1e-3, 1e-2, 1e-1),
        clusters: int = 10,
        directions: int = 10,
        mapped: int = 64,
        most: int = 10_000,
        seed: int = 0,
    ) -> None:
        require_penalties(penalties)
        for name, value, least in (
            ("clusters", clusters, 1), ("directions", directions, 1), ("mapped", mapped, 1), ("most", most, FEWEST),
            ("seed", seed, 0),
        ):  # fmt: skip
            if value < least:
                raise UserError(f"ConvergentLearning {name}={value} must be at least {least}")
        self.penalties, self.clusters, self.directions = tuple(penalties), clusters, directions
        self.mapped, self.most, self.seed = mapped, most, seed

    def fit(self, first: Features, second: Features) -> Convergence:
        """Raises: UserError for fewer than 10 samples, other samples or positions in second, features that are not
        finite, or a network of which no unit changes.
        """
        require_same_samples("ConvergentLearning", first, second)
        x_NS, y_NT = self._rows(first), self._rows(second)
        if len(x_NS) != len(y_NT):
            raise UserError(
                f"ConvergentLearning: first keeps {list(first.x.shape[1:-1])} positions and second "
                f"{list(second.x.shape[1:-1])}; take layers with the same, or pool them"
            )
        if len(x_NS) < FEWEST:
            raise UserError(f"ConvergentLearning got {len(x_NS)} samples, but needs {FEWEST}")
        (x_NS, live_S), (y_NT, live_T) = _live("first", x_NS), _live("second", y_NT)
        order_N = torch.randperm(len(y_NT), generator=torch.Generator().manual_seed(self.seed))
        found, between_ST, partners, groups = self._compared(x_NS, y_NT)
        floors, by_chance_ST, chance, _ = self._compared(x_NS, y_NT[order_N])
        best_S = semi_matched(between_ST)
        taken = best_S.bincount()
        partner_of, chance_of = (
            dict(zip(*(column.tolist() for column in pairs), strict=True)) for pairs in (partners, chance)
        )
        numbers_T = live_T.nonzero()[:, 0].tolist()
        units = tuple(
            {
                "unit": unit,
                "partner": numbers_T[partner_of[i]] if i in partner_of else -1,
                "correlation": float(between_ST[i, partner_of[i]]) if i in partner_of else 0.0,
                "best": numbers_T[int(best_S[i])],
                "best_correlation": float(between_ST[i, best_S[i]]),
                "cluster": int(groups[0][i]),
                "floor": float(by_chance_ST[i, chance_of[i]]) if i in chance_of else 0.0,
                "best_floor": float(by_chance_ST[i].max()),
            }
            for i, unit in enumerate(live_S.nonzero()[:, 0].tolist())
        )
        return Convergence(
            found=found,
            floors={name: value for name, value in floors.items() if name != "random"},
            contested=float((taken > 1).sum() / (taken > 0).sum()),
            units=units,
            maps=self._maps(x_NS, y_NT),
            widths=(len(live_S), len(live_T)),
            dead=(int((~live_S).sum()), int((~live_T).sum())),
            rows=len(x_NS),
            chance=tuple(sorted(by_chance_ST[chance].tolist(), reverse=True)),
        )

    def _rows(self, features: Features) -> Tensor:
        """[N S] in float64, near 1."""
        if features.x.ndim < 2 or not features.x.shape[-1]:
            raise UserError(f"ConvergentLearning got samples without units: {list(features.x.shape)}")
        x = spaced_rows(features.x.flatten(0, -2), self.most)
        if not x.isfinite().all():
            raise UserError("ConvergentLearning got features that are NaN or infinite; the model has diverged")
        return scaled(x)[1][0].cpu()

    def _compared(
        self, x_NS: Tensor, y_NT: Tensor
    ) -> tuple[dict[str, float], Tensor, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """(figures, correlations, matching, clusters) of units that all change."""
        width = x_NS.shape[1]
        sums = Moments.of(torch.cat([x_NS[:0], y_NT[:0]], dim=1))
        for parts in zip(x_NS.split(ROWS_AT_A_TIME), y_NT.split(ROWS_AT_A_TIME), strict=True):
            sums += Moments.of(torch.cat(parts, dim=1))
        within_SS, between_ST, within_TT = correlations(sums, width)
        pairs = matched(between_ST)
        clusters = min(self.clusters, sum(between_ST.shape))
        groups = joint_clusters(within_SS, between_ST, within_TT, clusters, self.seed)
        both = shared_clusters(*groups)
        fit, held = self._parts(x_NS, y_NT)
        members = [((groups[0] == k).nonzero()[:, 0], (groups[1] == k).nonzero()[:, 0]) for k in both]
        inside = [(explained(*(_of(part, *of) for part in (fit, held))), len(of[1])) for of in members]
        of_pairs = between_ST[pairs]
        figures = {
            "matched": float(of_pairs.mean()),
            "semi_matched": float(between_ST.amax(dim=1).mean()),
            "random": float(between_ST.mean()),
            "matched_squared": float(of_pairs.square().mean()),
            "linear": explained(fit, held),
            "shared": sum(len(s) + len(t) for s, t in members) / sum(between_ST.shape),
            "within_shared": sum(r2 * n for r2, n in inside) / max(1, sum(n for _, n in inside)),
            "cka": linear_cka(x_NS, y_NT),
            "span": self._span(x_NS, y_NT),
        }
        return figures, between_ST, pairs, groups

    def _parts(self, x_NS: Tensor, y_NT: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """(rows that a map learns from, held-out rows), each of both networks. All rows standardise them: by the former
        alone, a unit that first fires in the latter would outweigh all others.
        """
        held_N = rows_to_choose_by(len(x_NS))
        x_NS, y_NT = standardised(x_NS), standardised(y_NT)
        return (x_NS[~held_N], y_NT[~held_N]), (x_NS[held_N], y_NT[held_N])

    def _maps(self, x_NS: Tensor, y_NT: Tensor) -> tuple[dict[str, float], ...]:
        y_NT = spaced_rows(y_NT.T, self.mapped).T
        fit, held = self._parts(x_NS, y_NT)
        rows, before = [], None
        for penalty in sorted(self.penalties, reverse=True):  # each begins at the sparser one
            before = sparse_map(*fit, penalty, before)
            weights = float((before != 0).sum() / before.shape[1])
            rows.append({"penalty": penalty, "left": half_square(held[0], before, held[1]), "weights": weights})
        return tuple(reversed(rows))

    def _span(self, x_NS: Tensor, y_NT: Tensor) -> float:
        """Mean squared cosine between spans, in the space of samples, of as many directions as both have."""
        frames = [thin_svd(centred(rows)) for rows in (x_NS, y_NT)]
        rank = min(self.directions, *(int((values > 1e-9 * values[0]).sum()) for _, values, _ in frames))
        angles = principal_angles(*(left[None, :, :rank] for left, _, _ in frames))
        return float(angles.cos().square().mean())


def _of(part: tuple[Tensor, Tensor], first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    return part[0][:, first], part[1][:, second]


def _live(which: str, x_NS: Tensor) -> tuple[Tensor, Tensor]:
    """(the units that change, bool [S] which ones do)."""
    live_S = (x_NS != x_NS[:1]).any(dim=0)
    if not bool(live_S.any()):
        raise UserError(f"ConvergentLearning: no unit of the {which} network changes between samples; is it trained?")
    return x_NS[:, live_S], live_S
