"""People found in tracklets: labels for training, from the features of a network that knows somebody again a little.

Source: CION, arXiv 2409.18569, section 3.2; stages and what is assumed of them in `lightspan.analysis.identities`.
Shapes: N pictures.
"""

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lightspan.analysis.identities import (
    centres,
    linked,
    moved_to_nearest,
    noise,
    numbered,
    pairwise_scores,
    whitened,
    without_far_pictures,
)
from lightspan.analysis.labels import WHOLE
from lightspan.analysis.rows import unit_rows
from lightspan.errors import UserError
from lightspan.estimators.estimator import Estimator
from lightspan.features.features import Features
from lightspan.results import Figure, Result


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
                "features contain NaN or infinite values, so nobody is told by them; the model has diverged"
            )
        if self.whiten:
            rows_ND = whitened(rows_ND)
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
