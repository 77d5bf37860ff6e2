"""Who is who in noisy tracklets: pictures that show another person than the rest, and tracklets of the same person.

Source: Zuo et al., "Cross-video Identity Correlating for Person Re-identification Pre-training" (CION), NeurIPS 2024,
arXiv 2409.18569, section 3.2. Theirs has no public code, and its thresholds could not be looked up: the three stages
are the paper's, their details are assumed.

    in a tracklet     the picture farthest from the centre is left out, as long as it is too far, again and again
    in a video        near tracklets that are similar are one, and a picture nearer to another centre moves there
    across videos     similar groups within a range of the sequence are linked, and all that is linked is one person

People whose pictures stay scattered, compared with the distance to the nearest other person, are left out at last.
Closeness is the cosine with a centre, the mean of unit rows at unit length. A group of -1 is left out.
Shapes: N pictures, T groups (tracklets or people), D features.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from lightspan.core.errors import UserError
from lightspan.core.results import Figure, Result
from lightspan.evaluation.estimator import Estimator
from lightspan.evaluation.features.features import Features
from lightspan.evaluation.labels import WHOLE
from lightspan.evaluation.rows import unit_rows
from lightspan.subspaces.canonical import whitened

CHUNK = 1 << 22
"""Cosines that are held at once."""


def numbered(group_N: Tensor) -> Tensor:
    """The same groups with numbers from 0 without gaps, in the order of the old ones; -1 stays."""
    kept_N = group_N >= 0
    return torch.full_like(group_N, -1).masked_scatter_(kept_N, group_N[kept_N].unique(return_inverse=True)[1])


def centres(x_ND: Tensor, group_N: Tensor) -> Tensor:
    """Of groups that are numbered from 0 without gaps, [T D] at unit length; a zero vector where rows cancel out.

    Args:
        x_ND: at unit length.
    """
    kept_N = group_N >= 0
    total_TD = x_ND.new_zeros(int(group_N.max()) + 1 if len(group_N) else 0, x_ND.shape[1])
    return unit_rows(total_TD.index_add_(0, group_N[kept_N], x_ND[kept_N]))


def closeness_to_own(x_ND: Tensor, group_N: Tensor) -> Tensor:
    """Cosine of each picture with the centre of its group, [N]; of one that is left out 1."""
    if not bool((group_N >= 0).any()):
        return x_ND.new_ones(len(x_ND))
    cosine_N = (x_ND * centres(x_ND, group_N)[group_N.clamp_min(0)]).sum(dim=1)
    return torch.where(group_N >= 0, cosine_N, 1)


def without_far_pictures(x_ND: Tensor, group_N: Tensor, least: float) -> Tensor:
    """The groups without the pictures that are farther than `least` from the centre of what stays. Of each group the
    farthest one goes first, then the centre is found again; one picture always stays.
    """
    group_N = group_N.clone()
    while True:
        cosine_N = closeness_to_own(x_ND, group_N)
        kept = (group_N >= 0).nonzero()[:, 0]
        # Sorted by group, then the farthest first: the first row of each group is its candidate.
        order = kept[cosine_N[kept].argsort(stable=True)]
        order = order[group_N[order].argsort(stable=True)]
        of_T = group_N[order].unique_consecutive(return_counts=True)[1]
        candidate_T = order[of_T.cumsum(0) - of_T]
        gone = candidate_T[(of_T > 1) & (cosine_N[candidate_T] < least)]
        if not len(gone):
            return group_N
        group_N[gone] = -1


def linked(centre_TD: Tensor, least: float, reach: int, video_T: Tensor | None = None) -> Tensor:
    """Which groups of a sequence are one: numbers from 0, [T]. A group is linked to the `reach` ones behind it whose
    centres are at least so close, in the same video if these are given, and what is linked over others is one too.
    """
    edges = [torch.zeros(2, 0, dtype=torch.int64)]
    for step in range(1, min(reach, len(centre_TD) - 1) + 1):
        close = (centre_TD[:-step] * centre_TD[step:]).sum(dim=1) >= least
        if video_T is not None:
            close &= video_T[:-step] == video_T[step:]
        first = close.nonzero()[:, 0].cpu()
        edges.append(torch.stack([first, first + step]))
    first, second = torch.cat(edges, dim=1).numpy()
    graph = coo_matrix((torch.ones(len(first)).numpy(), (first, second)), shape=(len(centre_TD), len(centre_TD)))
    label_T = connected_components(graph, directed=False)[1] if len(centre_TD) else []
    return torch.as_tensor(label_T, dtype=torch.int64, device=centre_TD.device)


def moved_to_nearest(x_ND: Tensor, group_N: Tensor, video_N: Tensor) -> Tensor:
    """The groups after each picture has moved to the nearest centre of its video."""
    group_N, centre_TD = group_N.clone(), centres(x_ND, group_N)
    for video in video_N.unique():
        rows = ((video_N == video) & (group_N >= 0)).nonzero()[:, 0]
        here_G = group_N[rows].unique()
        for part in rows.split(max(1, CHUNK // max(1, len(here_G)))):
            group_N[part] = here_G[(x_ND[part] @ centre_TD[here_G].T).argmax(dim=1)]
    return group_N


def noise(x_ND: Tensor, group_N: Tensor) -> Tensor:
    """Of each person the mean distance of pictures to the centre, over that of the nearest other centre, [T]; distances
    are 1 - cosine. 0 without another person, or without spread; infinite where another one has the same centre.
    """
    centre_TD, kept_N = centres(x_ND, group_N), group_N >= 0
    far_N = (1 - closeness_to_own(x_ND, group_N)).clamp_min(0)
    spread_T = x_ND.new_zeros(len(centre_TD)).index_add_(0, group_N[kept_N], far_N[kept_N])
    if not len(centre_TD):
        return spread_T
    spread_T /= group_N[kept_N].bincount(minlength=len(centre_TD))
    nearest = []
    for part in torch.arange(len(centre_TD), device=x_ND.device).split(max(1, CHUNK // max(1, len(centre_TD)))):
        cosine_PT = centre_TD[part] @ centre_TD.T
        cosine_PT[torch.arange(len(part)), part] = -torch.inf
        nearest.append((1 - cosine_PT.amax(dim=1)).clamp_min(0))
    return torch.where(spread_T > 0, spread_T / torch.cat(nearest), 0)


def pairwise_scores(label_N: Tensor, truth_N: Tensor) -> tuple[float, float, float]:
    """(precision, recall, F1) of pairs of pictures that are said to show the same person; a label of -1 is in no pair.
    Precision is 1 where no pair is claimed, recall where there is none.
    """
    known_N = label_N >= 0

    def pairs(*columns: Tensor) -> float:
        counts = torch.stack(columns, dim=1).unique(dim=0, return_counts=True)[1].double()
        return float((counts * (counts - 1) / 2).sum())

    right = pairs(label_N[known_N], truth_N[known_N])
    claimed, there = pairs(label_N[known_N]), pairs(truth_N)
    precision, recall = (right / of if of else 1.0 for of in (claimed, there))
    return precision, recall, 2 * precision * recall / (precision + recall) if precision + recall else 0.0


@dataclass(frozen=True)
class MinedIdentities(Result):
    """Whom each picture shows: `tensors["label"]`, int64 [N], people from 0, -1 for a picture that is left out.

    Attributes:
        stages: one mapping a stage: stage, groups, pictures that are kept; with a truth precision, recall and f1 of
            pairs of pictures, in [0, 1].
    """

    stages: tuple[dict[str, Any], ...]

    def figures(self) -> tuple[Figure, ...]:
        first, last = self.stages[0], self.stages[-1]
        found = [
            Figure("people", last["groups"]),
            Figure("tracklets", first["groups"]),
            Figure("pictures left out", first["pictures"] - last["pictures"]),
        ]
        if "f1" in last:
            found += [Figure("pairwise F1", 100 * last["f1"], "%"), Figure("of tracklets", 100 * first["f1"], "%")]
        return tuple(found)

    def table(self) -> tuple[dict[str, Any], ...]:
        return self.stages


class MineIdentities(Estimator):
    """Progressive denoising: cleans tracklets, joins those of a video, then those of all, and drops noisy people.

    Tracklets are numbered in the order in which they were filmed. The mean of all pictures is taken off. Thresholds
    depend on the features: choose them on tracklets whose people are known. In features of few strong directions a
    chain of similar tracklets joins everybody: set `whiten`, for which there must be more pictures than features.

    Args:
        core: least cosine of a picture with the centre of its tracklet, in [-1, 1].
        within, across: least cosine of centres that are joined in a video and across videos, in [-1, 1].
        near, far: how many groups behind it in the sequence each is compared with, in a video and across, at least 0.
        noisy: the most spread of a person over the distance to the nearest other, above 0.
        tracklet, video: fields of the batches, whole numbers [B] from 0.
        truth: field with the person, for figures alone, -1 where nobody knows; None if nobody knows anything.
        whiten: compare pictures in features that are uncorrelated and of one variance (not of the paper).
    """

    def __init__(
        self,
        core: float = 0.5,
        within: float = 0.8,
        across: float = 0.7,
        near: int = 10,
        far: int = 1000,
        noisy: float = 1.0,
        tracklet: str = "tracklet",
        video: str = "camera",
        truth: str | None = None,
        whiten: bool = False,
    ) -> None:
        for name, value in (("core", core), ("within", within), ("across", across)):
            if not -1 <= value <= 1:
                raise UserError(f"MineIdentities {name}={value} is a cosine and must be in [-1, 1]")
        for name, value in (("near", near), ("far", far)):
            if value < 0:
                raise UserError(f"MineIdentities {name}={value} must be at least 0")
        if not noisy > 0 or math.isinf(noisy):
            raise UserError(f"MineIdentities noisy={noisy} must be above 0 and finite")
        self.core, self.within, self.across, self.near, self.far = core, within, across, near, far
        self.noisy, self.tracklet, self.video, self.truth, self.whiten = noisy, tracklet, video, truth, whiten

    def fit(self, features: Features) -> MinedIdentities:
        """Raises: UserError for features without a picture, that are not finite, or without these fields."""
        rows_ND = features.rows().double()
        if not len(rows_ND):
            raise UserError("MineIdentities looks for people on pictures, and there is none; give at least one")
        if not rows_ND.isfinite().all():
            raise UserError(
                "features contain NaN or infinite values, so nobody can be identified by them; the model has diverged"
            )
        if self.whiten:
            rows_ND = whitened(rows_ND).rows_NR
        # What all pictures have in common would make all of them close.
        x_ND, video_N = unit_rows(rows_ND - rows_ND.mean(dim=0)), self._field(features, self.video)
        group_N = numbered(self._field(features, self.tracklet))
        stages = [self._stage("tracklets", features, group_N)]
        group_N = without_far_pictures(x_ND, group_N, self.core)
        stages.append(self._stage("in a tracklet", features, group_N))
        group_N = self._joined(x_ND, group_N, self.within, self.near, video_N)
        group_N = numbered(moved_to_nearest(x_ND, group_N, video_N))
        stages.append(self._stage("in a video", features, group_N))
        group_N = self._joined(x_ND, group_N, self.across, self.far)
        stages.append(self._stage("across videos", features, group_N))
        keep_T = noise(x_ND, group_N) <= self.noisy
        group_N = numbered(group_N.where((group_N >= 0) & keep_T[group_N.clamp_min(0)], -1))
        stages.append(self._stage("without noisy people", features, group_N))
        return MinedIdentities(tuple(stages), tensors={"label": group_N})

    def _joined(self, x_ND: Tensor, group_N: Tensor, least: float, reach: int, video_N: Tensor | None = None) -> Tensor:
        centre_TD, video_T = centres(x_ND, group_N), None
        if video_N is not None:
            kept_N = group_N >= 0  # a tracklet is of one video; the first one, should its fields name several
            video_T = video_N.new_zeros(len(centre_TD))
            video_T.scatter_reduce_(0, group_N[kept_N], video_N[kept_N], "amin", include_self=False)
        label_T = linked(centre_TD, least, reach, video_T)
        return label_T[group_N.clamp_min(0)].where(group_N >= 0, -1)

    def _field(self, features: Features, name: str, least: int = 0) -> Tensor:
        column = features.fields.get(name)
        if column is None or column.ndim != 1 or column.dtype not in WHOLE or bool((column < least).any()):
            got = "nothing" if column is None else f"{column.dtype} {list(column.shape)}"
            if column is not None and column.dtype in WHOLE and column.numel():
                got += f" from {int(column.min())}"
            raise UserError(
                f"MineIdentities reads {name!r} of the batches, whole numbers [B] from {least}, but got {got}; set "
                "tracklet, video and truth to what the data give"
            )
        return column.long()

    def _stage(self, name: str, features: Features, group_N: Tensor) -> dict[str, Any]:
        found: dict[str, Any] = {"stage": name, "groups": len(group_N[group_N >= 0].unique())}
        found["pictures"] = int((group_N >= 0).sum())
        if self.truth is not None:
            truth_N = self._field(features, self.truth, least=-1)
            scores = pairwise_scores(group_N[truth_N >= 0], truth_N[truth_N >= 0])
            found |= dict(zip(("precision", "recall", "f1"), scores, strict=True))
        return found
