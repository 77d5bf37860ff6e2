"""Two encoders that were never trained together, aligned by a few hundred pairs: what both share, and maps into it.

Source: Hadgi, Moschella, Santilli, Gomez, Huang, Rodolà, Melzi, Ovsjanikov, "Escaping Plato's Cave: Towards the
Alignment of 3D and Text Latent Spaces", CVPR 2025, arXiv 2503.05283. Canonical correlation analysis of the pairs
(`lightspan.subspaces.canonical`) gives each encoder a subspace of k directions. Inside them, and for comparison in all
features, rows are matched by a linear map about the pairs' means and the cosine, or by local CKA
(`lightspan.evaluation.alignment.local_cka`). The authors' code was not seen; of what the paper leaves open, the ridge,
how it and k are chosen, and groups of equal captions are assumed.
Shapes: N pairs to learn from, M pairs to ask for, Q and G rows to compare, D and E features, K directions.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lightspan.core.drawing import COLOURS
from lightspan.core.errors import UserError
from lightspan.core.results import Figure, Result
from lightspan.evaluation.alignment.local_cka import local_cka
from lightspan.evaluation.alignment.matching import cosines, matching_accuracy, numbered_rows, ranks
from lightspan.evaluation.estimator import Estimator
from lightspan.evaluation.features.features import Features
from lightspan.evaluation.geometry.convergence import standardised
from lightspan.evaluation.geometry.similarity import linear_cka, require_same_samples
from lightspan.evaluation.labels import WHOLE
from lightspan.evaluation.rows import spaced_rows
from lightspan.evaluation.scale import scaled
from lightspan.subspaces.canonical import (
    CanonicalPair,
    Principal,
    canonical_pair,
    linear_map,
    mean_of,
    orthogonal_map,
    principal,
)

MAP, MAP_ALL, CKA_INSIDE, CKA_ALL = "map in the subspace", "map of all features", "CKA in the subspace", "CKA of all"
"""The ways in which rows are matched."""


@dataclass(frozen=True)
class PairedRows:
    """Rows of both encoders, row by row of the same samples; rows of one group are the same thing."""

    x_ND: Tensor
    y_NE: Tensor
    group_N: Tensor

    def __len__(self) -> int:
        return len(self.x_ND)

    def of(self, rows: Tensor) -> "PairedRows":
        return PairedRows(self.x_ND[rows], self.y_NE[rows], self.group_N[rows])

    @cached_property
    def first(self) -> Principal:
        return principal(self.x_ND)

    @cached_property
    def second(self) -> Principal:
        return principal(self.y_NE)

    def shared(self, ridge: float) -> CanonicalPair:
        """The directions that both encoders share, the most alike first."""
        return canonical_pair(self.first.whitened(ridge), self.second.whitened(ridge))

    def inside(self, pair: CanonicalPair) -> "PairedRows":
        return PairedRows(pair.first(self.x_ND), pair.second(self.y_NE), self.group_N)

    def onto(self, orthogonal: bool, ridge: float = 0.0) -> Tensor:
        """The map [D E] of rows of the first encoder, less their mean, onto those of the second."""
        if orthogonal:
            return orthogonal_map(self.x_ND, self.y_NE)
        return linear_map(self.first.whitened(ridge), self.y_NE)

    def cosines(self, asked: "PairedRows", orthogonal: bool, ridge: float = 0.0) -> Tensor:
        """Of mapped rows of the first encoder with rows of the second, about these pairs' means."""
        x_QD, y_GE = asked.x_ND - mean_of(self.x_ND), asked.y_NE - mean_of(self.y_NE)
        return cosines(x_QD @ self.onto(orthogonal, ridge), y_GE)

    def ranks(self, scores_NN: Tensor) -> Tensor:
        """Of the pairs' own groups, for each row of the first encoder."""
        return ranks(scores_NN, self.group_N, self.group_N)


@dataclass(frozen=True)
class PairAlignment(Result):
    """How often rows of one encoder find what belongs to them among rows of the other; shares are in [0, 1].

    Attributes:
        arms: for each way of matching, in both directions: the share of right ones in the best assignment, those found
            first and among the first `top`, the median place and the mean of 1 / place.
        chance: the same shares of an order by chance.
        control: among the first `top` by the map in the subspace, had the pairs been joined by chance.
        components, ridge, ridge_all: what was chosen, k and the ridge inside, and the ridge of all features.
        correlations: of the k pairs of directions, over the pairs that were learned from, whatever the ridge.
        cka, cka_inside: debiased CKA of the pairs that are asked for, before and after the projection; None where rows
            hardly differ.
        held_out: mean of 1 / place of pairs that a fit did not see, by components and ridge; components 0 are all
            features.
        repeated: pairs that are asked for and were learned from, row for row.
    """

    arms: tuple[dict[str, Any], ...]
    chance: dict[str, float]
    control: float
    components: int
    ridge: float
    ridge_all: float
    correlations: tuple[float, ...]
    cka: float | None
    cka_inside: float | None
    held_out: tuple[dict[str, float], ...]
    top: int
    pairs: int
    groups: int
    asked: int
    asked_groups: int
    repeated: int

    def share(self, arm: str, name: str) -> float:
        """One number of one of the arms."""
        return float(next(row for row in self.arms if row["arm"] == arm)[name])

    def figures(self) -> tuple[Figure, ...]:
        among = f"among the first {self.top}"
        found = [Figure(f"{among}, {row['arm']}", 100 * row["top"], "%") for row in self.arms]
        found += [Figure(f"assigned right, {row['arm']}", 100 * row["assigned"], "%") for row in self.arms]
        found += [
            Figure(f"{among}, by chance", 100 * self.chance["top"], "%"),
            Figure(f"{among}, pairs joined by chance", 100 * self.control, "%"),
            Figure("directions of the subspace", self.components),
            Figure("ridge", self.ridge),
            Figure("largest canonical correlation", max(self.correlations)),
        ]
        found += [
            Figure(name, value)
            for name, value in (("CKA", self.cka), ("CKA in the subspace", self.cka_inside))
            if value is not None
        ]
        found += [Figure("pairs learned from", self.pairs), Figure("pairs asked for", self.asked)]
        if self.repeated:
            found.append(Figure("asked for and learned from", self.repeated))
        return tuple(found)

    def table(self) -> tuple[dict[str, Any], ...]:
        return self.arms

    def draw(self, axes: Any) -> None:
        """The figure by which k was chosen."""
        inside = [row for row in self.held_out if row["components"]]
        for number, ridge in enumerate(sorted({row["ridge"] for row in inside})):
            line = sorted((row["components"], row["reciprocal_rank"]) for row in inside if row["ridge"] == ridge)
            colour = COLOURS[number % len(COLOURS)]
            axes.plot(*zip(*line, strict=True), marker="o", markersize=3, color=colour, label=f"ridge {ridge:g}")
        whole = max(row["reciprocal_rank"] for row in self.held_out if not row["components"])
        axes.axhline(whole, linestyle="--", linewidth=0.8, color="grey", label="all features")
        axes.axvline(self.components, linewidth=0.8, color="grey")
        axes.set_xscale("log", base=2)
        axes.set(xlabel="directions of the subspace", ylabel="1 / place, pairs held out")
        axes.legend(frameon=False, fontsize=8)


class AlignPairs(Estimator):
    """Learns from pairs what two encoders share, and how well rows of one then find their partners in the other.

    Partners that are asked for must be of other objects than those learned from. The number of directions and the ridge
    are chosen on pairs that are held out of those learned from. Rows of the second encoder that are equal, such as
    captions that several objects share, are one group: any of its rows is right, and it is on one side of each split.

    `result.safetensors` has `first.weight` [K D], `first.bias` [K], `second.weight` and `second.bias`: linear maps into
    the common space, where pairs have a large cosine. `lightspan.backbones.dual_encoder.aligned_encoders` puts them
    behind the two encoders.

    Args:
        components: numbers of directions to choose from, at least 1; those beyond what the rows span are all of them.
        ridges: to choose from, at least 0, of the mean variance of a feature (`lightspan.subspaces.canonical`). With
            fewer pairs than features there has to be one above 0: without, every direction correlates perfectly. A best
            one at an end of either list is warned of.
        orthogonal: of the map, a rotation in place of least squares. Inside the subspace it is nearly the identity.
        folds: into which pairs are divided to choose, at least 2.
        top: how many places count as found, at least 1.
        most: rows that are asked for at once at most, evenly spaced, also of a fold; the time of an assignment grows
            with the third power.
        group: a field of both sets of the second encoder, whole numbers [N], in place of equal rows.
        seed: of the folds and of pairs that are joined by chance.
    """

    def __init__(
        self,
        components: Sequence[int] = (1, 2, 4, 8, 16, 32, 64, 128),
        ridges: Sequence[float] = (0.0, 0.01, 0.1, 1.0, 10.0),
        orthogonal: bool = False,
        folds: int = 5,
        top: int = 5,
        most: int = 2000,
        group: str | None = None,
        seed: int = 0,
    ) -> None:
        for name, value, least in (("folds", folds, 2), ("top", top, 1), ("most", most, 4), ("seed", seed, 0)):
            if value < least:
                raise UserError(f"AlignPairs {name}={value} must be at least {least}")
        if not components or min(components) < 1:
            raise UserError(f"AlignPairs components={list(components)} must be one or more numbers, each at least 1")
        if not ridges or not all(0 <= ridge < float("inf") for ridge in ridges):
            raise UserError(f"AlignPairs ridges={list(ridges)} must be one or more finite numbers, each at least 0")
        self.components, self.ridges = sorted({*components}), sorted({*ridges})
        self.orthogonal, self.folds, self.top, self.most = orthogonal, folds, top, most
        self.group, self.seed = group, seed

    def fit(self, first: Features, second: Features, first_query: Features, second_query: Features) -> PairAlignment:
        """Args: first, second: pairs to learn from; first_query, second_query: pairs to ask for, of other objects.

        Raises: UserError for rows that are not of the same samples, of other widths, not finite or all equal, for fewer
            than 4 groups of pairs to learn from or 2 to ask for, and without the field `group`.
        """
        require_same_samples("AlignPairs", first, second)
        require_same_samples("AlignPairs, of the queries", first_query, second_query)
        (scale_x, x_ND, x_MD), (scale_y, y_NE, y_ME) = (
            self._rows(name, *sets)
            for name, sets in (("first", (first, first_query)), ("second", (second, second_query)))
        )
        pairs = PairedRows(x_ND, y_NE, self._groups("second", second, y_NE))
        asked = PairedRows(x_MD, y_ME, self._groups("second_query", second_query, y_ME))
        asked = asked.of(spaced_rows(torch.arange(len(asked)), self.most))
        for name, given, least in (("first and second", pairs, 4), ("first_query and second_query", asked, 2)):
            if (groups := len(given.group_N.unique())) < least:
                raise UserError(
                    f"AlignPairs: {name} have {len(given)} pairs of {groups} groups, and needs {least}; rows of "
                    "second that are equal are one group"
                )
        pair, ridge, ridge_all, held_out = self._shared(pairs)
        self._warn_of_edges(len(pair.correlation_K), ridge, ridge_all)
        inside, asked_inside = pairs.inside(pair), asked.inside(pair)
        scores = {
            MAP: inside.cosines(asked_inside, self.orthogonal),
            MAP_ALL: pairs.cosines(asked, self.orthogonal, ridge_all),
            CKA_INSIDE: local_cka(inside.x_ND, inside.y_NE, asked_inside.x_ND, asked_inside.y_NE),
            CKA_ALL: local_cka(pairs.x_ND, pairs.y_NE, asked.x_ND, asked.y_NE),
        }
        return PairAlignment(
            arms=tuple({"arm": arm, **self._judged(scores_MM, asked.group_N)} for arm, scores_MM in scores.items()),
            chance=self._chance(asked.group_N),
            control=self._control(pairs, asked),
            components=len(pair.correlation_K),
            ridge=ridge,
            ridge_all=ridge_all,
            correlations=tuple(_correlations(inside).tolist()),
            cka=_cka(asked),
            cka_inside=_cka(asked_inside),
            held_out=tuple(
                {"components": components, "ridge": ridge, "reciprocal_rank": value}
                for (components, ridge), value in held_out.items()
            ),
            top=self.top,
            pairs=len(pairs),
            groups=len(pairs.group_N.unique()),
            asked=len(asked),
            asked_groups=len(asked.group_N.unique()),
            repeated=_repeated(pairs, asked),
            tensors=self._maps(pair, inside, scale_x, scale_y),
        )

    def _rows(self, name: str, learned: Features, asked: Features) -> tuple[float, Tensor, Tensor]:
        """The scale by which both sets are divided, and what is left, near 1."""
        x_ND, x_MD = learned.rows(), asked.rows()
        if x_ND.shape[1] != x_MD.shape[1] or not x_ND.shape[1]:
            raise UserError(
                f"AlignPairs: {name} has {x_ND.shape[1]} features and {name}_query {x_MD.shape[1]}; take both from one "
                "encoder, with at least one feature"
            )
        if not x_ND.isfinite().all() or not x_MD.isfinite().all():
            raise UserError(f"AlignPairs: {name} has features that are NaN or infinite; the model has diverged")
        scale, (x_ND, x_MD) = scaled(x_ND, x_MD)
        if not len(x_ND) or bool((x_ND == x_ND[:1]).all()):
            raise UserError(f"AlignPairs: the features of {name} do not differ between pairs, so nothing can be found")
        return scale, x_ND, x_MD

    def _groups(self, name: str, features: Features, rows_ND: Tensor) -> Tensor:
        if self.group is None:
            return numbered_rows(rows_ND)
        column = features.fields.get(self.group)
        if column is None or column.ndim != 1 or column.dtype not in WHOLE:
            got = "nothing" if column is None else f"{column.dtype} {list(column.shape)}"
            raise UserError(f"AlignPairs group={self.group!r} must be whole numbers [N] in {name}, which has {got}")
        return column.long()

    def _held_out(self, pairs: PairedRows) -> Mapping[tuple[int, float], float]:
        """Mean of 1 / place over all pairs while their fold was left out, by (k, ridge); k is 0 for all features.

        Of equals the first is taken: of fewest directions, and of the largest ridge.
        """
        generator = torch.Generator().manual_seed(self.seed)
        own, group_N = pairs.group_N.unique(return_inverse=True)
        folds = min(self.folds, len(own))
        fold_N = (torch.randperm(len(own), generator=generator) % folds)[group_N]
        found: dict[tuple[int, float], list[Tensor]] = {
            (components, ridge): [] for components in (0, *self.components) for ridge in reversed(self.ridges)
        }
        for fold in range(folds):
            rest = pairs.of(fold_N != fold)
            asked = pairs.of(spaced_rows((fold_N == fold).nonzero()[:, 0], self.most))
            for ridge in self.ridges:
                found[0, ridge].append(1 / asked.ranks(rest.cosines(asked, self.orthogonal, ridge)))
                pair = rest.shared(ridge)
                for components in self.components:
                    part = pair.leading(components)
                    scores = rest.inside(part).cosines(asked.inside(part), self.orthogonal)
                    found[components, ridge].append(1 / asked.ranks(scores))
        return {key: float(torch.cat(places).double().mean()) for key, places in found.items()}

    def _shared(self, pairs: PairedRows) -> tuple[CanonicalPair, float, float, Mapping[tuple[int, float], float]]:
        """The subspace, its ridge, that of all features, and the figures by which they were chosen."""
        held_out = self._held_out(pairs)
        components, ridge = max((key for key in held_out if key[0]), key=held_out.__getitem__)
        _, ridge_all = max((key for key in held_out if not key[0]), key=held_out.__getitem__)
        return pairs.shared(ridge).leading(components), ridge, ridge_all, held_out

    def _warn_of_edges(self, components: int, ridge: float, ridge_all: float) -> None:
        """Of choices beyond which a better one may lie. One direction, no ridge and all directions are bounds."""
        said = [f"components={components}, the most"] if components == self.components[-1] > 1 else []
        for name, chosen in (("ridge", ridge), ("ridge of all features", ridge_all)):
            if chosen and len(self.ridges) > 1 and chosen in (self.ridges[0], self.ridges[-1]):
                said.append(f"{name} {chosen:g}, the {'largest' if chosen == self.ridges[-1] else 'smallest'}")
        if said:
            warnings.warn(
                f"AlignPairs chose {' and '.join(said)} of those given, and a better one may lie beyond; extend "
                "components or ridges",
                stacklevel=3,
            )

    def _control(self, pairs: PairedRows, asked: PairedRows) -> float:
        """The share that is found among the first, once the rows of the second encoder have been dealt out anew."""
        order_N = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(self.seed + 1))
        dealt = PairedRows(pairs.x_ND, pairs.y_NE[order_N], pairs.group_N[order_N])
        pair = self._shared(dealt)[0]
        scores_MM = dealt.inside(pair).cosines(asked.inside(pair), self.orthogonal)
        return float((asked.ranks(scores_MM) <= self.top).double().mean())

    def _judged(self, scores_MM: Tensor, group_M: Tensor) -> dict[str, float]:
        there, back = (ranks(scores, group_M, group_M) for scores in (scores_MM, scores_MM.T))
        found = {"assigned": matching_accuracy(scores_MM, group_M)}
        for end, place_M in (("", there), (" back", back)):
            found |= {
                f"first{end}": float((place_M == 1).double().mean()),
                f"top{end}": float((place_M <= self.top).double().mean()),
                f"median place{end}": float(place_M.median()),
                f"reciprocal rank{end}": float((1 / place_M.double()).mean()),
            }
        return found

    def _chance(self, group_M: Tensor) -> dict[str, float]:
        count_C = group_M.unique(return_counts=True)[1].double()
        return {
            "assigned": float(count_C.square().sum() / len(group_M) ** 2),
            "first": 1 / len(count_C),
            "top": min(1.0, self.top / len(count_C)),
        }

    def _maps(self, pair: CanonicalPair, inside: PairedRows, scale_x: float, scale_y: float) -> dict[str, Tensor]:
        """Weights and biases of both linear maps, of rows as they come; the first one's goes on into the second's."""
        sides = (
            ("first", pair.first_DK @ inside.onto(self.orthogonal), pair.first_mean_D, scale_x),
            ("second", pair.second_EK, pair.second_mean_E, scale_y),
        )
        return {
            f"{side}.{name}": value.contiguous()
            for side, map_DK, mean_D, scale in sides
            for name, value in (("weight", map_DK.T / scale), ("bias", -(mean_D @ map_DK)))
        }


def _correlations(rows: PairedRows) -> Tensor:
    """Of the two columns of each direction, [K] in [-1, 1]; what `CanonicalPair` has is shrunk by a ridge."""
    return (standardised(rows.x_ND) * standardised(rows.y_NE)).mean(dim=0).clamp(-1, 1)


def _cka(pairs: PairedRows) -> float | None:
    try:
        return linear_cka(pairs.x_ND, pairs.y_NE)
    except UserError:  # of too few pairs, or such that hardly differ, there is none
        return None


def _repeated(pairs: PairedRows, asked: PairedRows) -> int:
    both_NF, both_MF = (torch.cat([one.x_ND, one.y_NE], dim=1) for one in (pairs, asked))
    number = numbered_rows(torch.cat([both_NF, both_MF]))
    return int(torch.isin(number[len(both_NF) :], number[: len(both_NF)]).sum())
