"""How much frozen tokens tell of where things are: masks, objects, depth, and objects that move; and whether features
know somebody again.

Each reads a field of the batches by name beside the features, so that any data with such maps will do. Figures are sums
over ranks, each of which scores its share of the rows. What a set does not define, such as an IoU where there is no
object, is left out of the scores.
Shapes: N or M samples, P patches of a grid H W, D features, h w pixels of a map, C classes, S thresholds. Letters are
those of images: h w and H W stand for as many axes as samples have, three for volumes.
"""

import math
import warnings
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex

from lightspan.core.errors import UserError
from lightspan.evaluation.dense.depth_order import depth_of_patches, order_agreement
from lightspan.evaluation.dense.label_propagation import contour_accuracy, propagated_labels
from lightspan.evaluation.dense.patches import at_pixels, fitted, majority_of_patches
from lightspan.evaluation.dense.prompt_masks import BACKGROUND, candidate_thresholds, iou, prompt_ious
from lightspan.evaluation.dense.retrieval import across_cameras, retrieved
from lightspan.evaluation.features.features import Features
from lightspan.evaluation.labels import WHOLE, require_few_classes
from lightspan.evaluation.probes.linear_probe import fit_linear_probe
from lightspan.evaluation.probes.probe_scores import rows_to_choose_by
from lightspan.evaluation.probes.probes import Probe, ProbeScores, best_of, settings_of
from lightspan.evaluation.rows import spaced_rows

LEFT_OUT = -1
"""The class of a patch or pixel that does not count."""
PIXEL_SCORES = 1 << 24
"""Numbers that enlarged scores hold at once."""

Map = tuple[Tensor, Tensor]
"""Weights [D C] and bias [C]."""


class PatchProbe(Probe):
    """A probe of patches that reads one map of pixels a sample, [h w], of any size and of as many axes as the grid.

    Patches are the last tokens, as many as the grid has; class tokens and registers take no part.

    Args:
        field: of the batches, [B h w].
    """

    reads_tokens = True

    def __init__(self, field: str) -> None:
        self.field, self.reads = field, (field,)

    def require(self, features: Features) -> None:
        name = type(self).__name__
        if features.x.ndim != 3 or features.grid is None or math.prod(features.grid) > features.x.shape[1]:
            raise UserError(
                f"{name} reads patches on a grid, but features are {list(features.x.shape)} with the grid "
                f"{features.grid}; probe a layer whose tokens form a map (lightspan.nn.tokens)"
            )
        maps = features.fields.get(self.field)
        if maps is None or maps.ndim != 1 + len(features.grid):
            got = "nothing" if maps is None else f"{maps.dtype} {list(maps.shape)}"
            raise UserError(
                f"{name} reads {self.field!r} of the batches, a map of each sample with the {len(features.grid)} axes "
                f"of the grid {features.grid}, but got {got}; set field to what the data give"
            )

    def _read(self, bank: Features, query: Features) -> tuple[Tensor, Tensor, tuple[int, ...]]:
        """Patches [N P D] and [M P D] and their grid. Raises: UserError as `require`, or for a set without a row."""
        for features in (bank, query):
            if not len(features):
                raise UserError(f"{type(self).__name__} got no sample; give bank and query at least one each")
            self.require(features)
        assert bank.grid is not None
        if bank.grid != query.grid or bank.x.shape[2] != query.x.shape[2]:
            raise UserError(
                f"patches are {bank.x.shape[2]} wide on {bank.grid} in bank, and {query.x.shape[2]} on {query.grid} in "
                "query; take both from one encoder"
            )
        patches = [features.x[:, -math.prod(bank.grid) :] for features in (bank, query)]
        if not all(x.isfinite().all() for x in patches):
            raise UserError("features contain NaN or infinite values, so no probe reads them; the model has diverged")
        return patches[0], patches[1], bank.grid


class _LinearMap(PatchProbe):
    """A linear map from a patch to what its pixels show, fitted as `LinearProbe` fits.

    Args:
        field: as in `PatchProbe`.
        l2: penalty, finite and above 0; of several, the best one on a fifth of the bank's samples.
        most_patches: of the bank, evenly spaced, from which to learn; at least 1. They are kept in float64.
        max_iterations: of L-BFGS, at least 1, where the map is not solved for.
    """

    def __init__(self, field: str, l2: float | Sequence[float], most_patches: int, max_iterations: int = 100) -> None:
        super().__init__(field)
        self.l2 = settings_of(f"{type(self).__name__} l2", l2)
        for name, value in (("most_patches", most_patches), ("max_iterations", max_iterations)):
            if value < 1:
                raise UserError(f"{type(self).__name__} {name}={value} must be at least 1")
        self.most_patches, self.max_iterations = most_patches, max_iterations

    def fit(self, bank: Features, query: Features) -> ProbeScores:
        bank_NPD, query_MPD, grid = self._read(bank, query)
        maps_Nhw, maps_Mhw = self._maps(bank), self._maps(query)
        target_NP = self._of_patches(maps_Nhw, grid)
        known_NP = self._known(target_NP)

        def fitted_to(rows_N: Tensor, l2: float) -> Map:
            at = spaced_rows((known_NP & rows_N[:, None]).nonzero(), self.most_patches).unbind(1)
            if not len(at[0]):
                raise UserError(
                    f"{type(self).__name__} learns from patches of the bank whose {self.field!r} is known, and there "
                    "is none; give more samples, or ones with such maps"
                )
            return fit_linear_probe(bank_NPD[at], target_NP[at], l2, self.max_iterations)

        choice, chosen, every = 0, {}, torch.ones(len(bank), dtype=torch.bool, device=bank_NPD.device)
        if len(self.l2) > 1:
            held = rows_to_choose_by(len(bank)).to(bank_NPD.device)
            part = Features(bank_NPD[held])
            choice = best_of([self._scores(fitted_to(~held, l2), part, maps_Nhw[held], grid) for l2 in self.l2])
            chosen = {"l2": self.l2[choice]}
        weight_DC, bias_C = fitted_to(every, self.l2[choice])
        scores = self._scores((weight_DC, bias_C), Features(query_MPD), maps_Mhw, grid)
        return ProbeScores(scores, len(bank), len(query), chosen, tensors={"weight": weight_DC, "bias": bias_C})

    def _maps(self, features: Features) -> Tensor:
        """The field, [N h w], checked."""
        return features.fields[self.field]

    @abstractmethod
    def _of_patches(self, maps_Nhw: Tensor, grid: tuple[int, ...]) -> Tensor:
        """What the map is to give, [N P]."""

    @abstractmethod
    def _known(self, target_NP: Tensor) -> Tensor:
        """From which patches it learns, bool [N P]."""

    @abstractmethod
    def _scores(self, map_: Map, patches: Features, maps_Mhw: Tensor, grid: tuple[int, ...]) -> dict[str, float]:
        """The one by which settings are chosen first."""


class LinearSegmentation(_LinearMap):
    """Semantic segmentation by a linear map from each patch to classes.

    It learns from patches of which more than half of the pixels have one class. On the query its scores are enlarged to
    the pixels of the map, linear along each axis, and the largest is the class. `mean_iou` is the mean over classes of
    intersection over union, of the pixels of all samples together, as VOC, ADE20K and Cityscapes report it; a class
    that neither the query nor any prediction has is left out, and one that the bank lacks counts 0. `pixel_accuracy` is
    the share of pixels. torchmetrics' `MeanIoU` is another measure: it takes the mean over the samples' own figures.

    Args:
        field: of the batches, whole numbers [B h w]: classes from 0.
        l2, most_patches: penalty, and patches to learn from; see `LinearProbe`. Of several values of l2, the best one
            by mean IoU on a fifth of the bank's samples.
        ignore_label: pixels of this number do not count, nor do those below 0; >= 0.
        max_iterations: of L-BFGS, at least 1.
    """

    def __init__(
        self,
        field: str = "segmentation",
        l2: float | Sequence[float] = 1.0,
        most_patches: int = 50_000,
        ignore_label: int = 255,
        max_iterations: int = 100,
    ) -> None:
        super().__init__(field, l2, most_patches, max_iterations)
        self.ignore_label = _ignorable(self, ignore_label)

    def require(self, features: Features) -> None:
        super().require(features)
        _require_whole(self, features.fields[self.field])

    def _maps(self, features: Features) -> Tensor:
        maps = super()._maps(features).long()
        maps = torch.where((maps == self.ignore_label) | (maps < 0), LEFT_OUT, maps)
        require_few_classes(type(self).__name__, maps.amax().view(1))
        return maps

    def _of_patches(self, maps_Nhw: Tensor, grid: tuple[int, ...]) -> Tensor:
        return majority_of_patches(fitted(maps_Nhw, grid), grid, LEFT_OUT)

    def _known(self, target_NP: Tensor) -> Tensor:
        return target_NP >= 0

    def _scores(self, map_: Map, patches: Features, maps_Mhw: Tensor, grid: tuple[int, ...]) -> dict[str, float]:
        weight_DC, bias_C = map_
        # torchmetrics knows no single class: an unused one beside it changes nothing.
        classes = max(2, len(bias_C), 1 + int(maps_Mhw.max()))
        settings: dict[str, Any] = {"num_classes": classes, "ignore_index": LEFT_OUT, "validate_args": False}
        metrics = {
            "mean_iou": MulticlassJaccardIndex(average="macro", **settings),
            "pixel_accuracy": MulticlassAccuracy(average="micro", **settings),
        }
        share = torch.tensor(patches.share(), dtype=torch.int64, device=maps_Mhw.device)
        size = max(1, PIXEL_SCORES // max(1, len(bias_C) * maps_Mhw[0].numel()))
        for rows in share.split(size):  # one empty part of a rank without rows
            scores_RPC = patches.x[rows].to(weight_DC.dtype) @ weight_DC + bias_C
            maps_RCHW = scores_RPC.transpose(1, 2).unflatten(2, grid)
            if len(rows):
                maps_RCHW = at_pixels(maps_RCHW, tuple(maps_Mhw.shape[1:]))
            else:
                maps_RCHW = maps_RCHW.new_zeros(0, len(bias_C), *maps_Mhw.shape[1:])
            for metric in metrics.values():
                metric.to(maps_Mhw.device).update(maps_RCHW.argmax(dim=1), maps_Mhw[rows])
        found = {name: metric.compute().item() for name, metric in metrics.items()}
        return found if bool((maps_Mhw >= 0).any()) else {}


class DepthOrder(_LinearMap):
    """Which of two patches is nearer, by a linear map from each patch to its depth.

    The map is ridge regression. `order_accuracy` is the share of pairs of patches of one sample, of different depth,
    that it orders as they lie; equal predictions count half, so that a constant has 0.5.

    Args:
        field: of the batches, [B h w]: depth in any unit. A pixel counts where its depth is finite and above 0; a
            patch has the mean of those that count.
        l2, most_patches: as in `LinearSegmentation`; the choice is by order accuracy.
    """

    def __init__(self, field: str = "depth", l2: float | Sequence[float] = 1.0, most_patches: int = 50_000) -> None:
        super().__init__(field, l2, most_patches)

    def _of_patches(self, maps_Nhw: Tensor, grid: tuple[int, ...]) -> Tensor:
        return depth_of_patches(maps_Nhw, grid)

    def _known(self, target_NP: Tensor) -> Tensor:
        return ~target_NP.isnan()

    def _scores(self, map_: Map, patches: Features, maps_Mhw: Tensor, grid: tuple[int, ...]) -> dict[str, float]:
        weight_D1, bias_1 = map_
        rows = torch.tensor(patches.share(), dtype=torch.int64, device=maps_Mhw.device)
        predicted = [(patches.x[part].to(weight_D1.dtype) @ weight_D1 + bias_1)[:, :, 0] for part in rows.split(64)]
        return _means(order_accuracy=order_agreement(torch.cat(predicted), depth_of_patches(maps_Mhw[rows], grid)))


class PromptIoU(PatchProbe):
    """Segmentation by one click: the pixels similar to a patch of an object, against the object's mask.

    `iou` is that of `lightspan.evaluation.dense.prompt_masks.prompt_ious`: the mean over prompts, each patch mostly of
    one object, and then over the samples that have one. Of several thresholds, the best on the bank is taken, with a
    warning if it is the lowest or the highest of three or more, beyond which a better one may lie.

    Args:
        field: of the batches, whole numbers [B h w]: the object of each pixel, 0 for the background.
        thresholds: of the cosine, in [-1, 1); None takes those that tell the bank's similarities apart, see
            `lightspan.evaluation.dense.prompt_masks.candidate_thresholds`.
        ignore_label: pixels of this number count in neither mask, nor do those below 0; >= 0.
    """

    def __init__(
        self,
        field: str = "objects",
        thresholds: float | Sequence[float] | None = None,
        ignore_label: int = 255,
    ) -> None:
        super().__init__(field)
        listed = [thresholds] if isinstance(thresholds, int | float) else thresholds
        self.thresholds = None if listed is None else tuple(sorted(listed))
        if self.thresholds is not None and not (self.thresholds and all(-1 <= t < 1 for t in self.thresholds)):
            raise UserError(
                f"PromptIoU thresholds={thresholds} must be in [-1, 1), a number or a list of them, or null for those "
                "that suit the bank"
            )
        self.ignore_label = _ignorable(self, ignore_label)

    def require(self, features: Features) -> None:
        super().require(features)
        _require_whole(self, features.fields[self.field])

    def fit(self, bank: Features, query: Features) -> ProbeScores:
        bank_NPD, query_MPD, grid = self._read(bank, query)
        maps_Nhw, maps_Mhw = (self._objects(features) for features in (bank, query))
        thresholds, chosen = self.thresholds, {}
        if thresholds is None:
            thresholds = candidate_thresholds(bank_NPD, maps_Nhw, grid)
        if len(thresholds) > 1:
            of_thresholds = self._scores(bank_NPD, maps_Nhw, grid, thresholds)
            choice = best_of(of_thresholds)
            if of_thresholds[choice] and len(thresholds) > 2 and choice in (0, len(thresholds) - 1):
                warnings.warn(
                    f"PromptIoU chose the threshold {thresholds[choice]:.4g}, the "
                    f"{'highest' if choice else 'lowest'} of {len(thresholds)}, and a better one may lie beyond it; "
                    "set thresholds to a list around it",
                    stacklevel=2,
                )
            thresholds, chosen = (thresholds[choice],), {"threshold": thresholds[choice]}
        (scores,) = self._scores(query_MPD, maps_Mhw, grid, thresholds)
        return ProbeScores(scores, len(bank), len(query), chosen)

    def _objects(self, features: Features) -> Tensor:
        """The field, int64 [N h w]; below 0 where it does not count."""
        maps_Nhw = features.fields[self.field].long()
        return maps_Nhw.masked_fill(maps_Nhw == self.ignore_label, LEFT_OUT)

    def _scores(
        self, patches_NPD: Tensor, maps_Nhw: Tensor, grid: tuple[int, ...], thresholds: Sequence[float]
    ) -> list[dict[str, float]]:
        """Of each threshold."""
        ious = [patches_NPD.new_zeros(0, len(thresholds), dtype=torch.float64)]
        for row in Features(patches_NPD).share():
            (objects_hw,) = fitted(maps_Nhw[row : row + 1], grid)
            counted_hw = objects_hw >= 0
            objects_hw = objects_hw.clamp_min(BACKGROUND)
            ious.append(prompt_ious(patches_NPD[row], objects_hw, grid, thresholds, counted_hw)[None].double())
        iou_RS = torch.cat(ious)
        return [_means(iou=_defined(iou_R)) for iou_R in iou_RS.unbind(1)]


class LabelPropagation(PatchProbe):
    """Objects followed through clips from their masks in the first frame, as in DAVIS 2017; it learns nothing.

    Rows of one clip are its frames, in their order. Labels are carried on as in
    `lightspan.evaluation.dense.label_propagation.propagated_labels`. `j_and_f` is the mean of `region_similarity` (J,
    the IoU) and `contour_accuracy` (F), each the mean over the objects of all clips of its mean over frames, in [0, 1].
    The first frame, which is given, and the last one do not count, as in DAVIS's code; nor do clips of fewer than three
    frames, or what first appears later.

    Args:
        field: of the batches, whole numbers [B h w]: the object of each pixel, 0 for the background. Those of later
            frames are only scored with.
        clip: field of the batches, whole numbers [B]: which clip a frame is of.
        context: last frames from which labels are taken, beside the first; at least 1.
        neighbours: patches of which each patch takes the labels, at least 1.
        radius: in patches, above 0: those that are so far away or farther are no neighbours.
        temperature: of the softmax over similarities, above 0.
        whole_first: whether the radius does not apply to the first frame. The defaults are CropMAE's, with images of
            480 x 880 pixels and patches of 16; figures at other settings are not comparable.
    """

    reads_bank = False

    def __init__(
        self,
        field: str = "objects",
        clip: str = "clip",
        context: int = 20,
        neighbours: int = 7,
        radius: float = 20.0,
        temperature: float = 0.7,
        whole_first: bool = True,
    ) -> None:
        super().__init__(field)
        self.clip, self.reads = clip, (field, clip)
        for name, count in (("context", context), ("neighbours", neighbours)):
            if count < 1:
                raise UserError(f"LabelPropagation {name}={count} must be at least 1")
        for name, value in (("radius", radius), ("temperature", temperature)):
            if not 0 < value < math.inf:
                raise UserError(f"LabelPropagation {name}={value} must be finite and above 0")
        self.context, self.neighbours, self.radius = context, neighbours, radius
        self.temperature, self.whole_first = temperature, whole_first

    def require(self, features: Features) -> None:
        super().require(features)
        if features.grid is None or len(features.grid) != 2:
            raise UserError(
                f"LabelPropagation follows contours through frames, which have two axes, and the grid is "
                f"{features.grid}; give each frame of a clip as a sample of its own"
            )
        _require_whole(self, features.fields[self.field])
        _require_column(self, features, self.clip)

    def fit(self, bank: Features, query: Features) -> ProbeScores:
        patches_MPD, _, grid = self._read(query, query)
        clip_M, maps_Mhw = query.fields[self.clip], query.fields[self.field].long()
        clips = clip_M.unique()
        found = [patches_MPD.new_zeros(2, 0, dtype=torch.float64)]
        for place in Features(clips).share():
            rows = (clip_M == clips[place]).nonzero()[:, 0]
            if len(rows) > 2:
                found.append(self._of_clip(patches_MPD[rows], maps_Mhw[rows], grid))
        region_O, contour_O = torch.cat(found, dim=1)
        ones_O = torch.ones_like(region_O)
        scores = _means(
            j_and_f=((region_O + contour_O) / 2, ones_O),
            region_similarity=(region_O, ones_O),
            contour_accuracy=(contour_O, ones_O),
        )
        return ProbeScores(scores, 0, len(query))

    def _of_clip(self, patches_FPD: Tensor, true_Fhw: Tensor, grid: tuple[int, ...]) -> Tensor:
        """J and F of each object of the first frame, [2 O]."""
        labels_Fhw = propagated_labels(
            *(patches_FPD, true_Fhw[0], grid, self.context, self.neighbours),
            *(self.radius, self.temperature, self.whole_first),
        )
        scored = [
            torch.stack(
                [
                    measure((labels_Fhw == one)[1:-1], (true_Fhw == one)[1:-1]).mean()
                    for measure in (iou, contour_accuracy)
                ]
            )
            for one in true_Fhw[0].unique()
            if one != BACKGROUND
        ]
        return torch.stack(scored, dim=1) if scored else patches_FPD.new_zeros(2, 0, dtype=torch.float64)


class CrossCameraRetrieval(Probe):
    """Knowing somebody again before another camera, as in person re-identification; it learns nothing.

    Each sample of the query is searched for among all others. Those of the same identity before the same camera are
    left out of the list, and so is a sample without identity; who is seen by one camera only is no query, but stays
    in the gallery. `mean_average_precision` and `rank_1` are means over queries, see
    `lightspan.evaluation.dense.retrieval`.

    Args:
        identity: field of the batches, whole numbers [B]; below 0 for none.
        camera: field of the batches, whole numbers [B].
    """

    reads_bank = False

    def __init__(self, identity: str = "identity", camera: str = "camera") -> None:
        self.identity, self.camera, self.reads = identity, camera, (identity, camera)

    def require(self, features: Features) -> None:
        for name in self.reads:
            _require_column(self, features, name)

    def fit(self, bank: Features, query: Features) -> ProbeScores:
        self.require(query)
        x_MD, identity_M, camera_M = query.rows(), query.fields[self.identity], query.fields[self.camera]
        rows = torch.tensor(query.share(), dtype=torch.int64, device=x_MD.device)
        match, junk = across_cameras(identity_M[rows], camera_M[rows], identity_M, camera_M)
        precision_R, first_R = retrieved(x_MD[rows], x_MD, match, junk)
        scores = _means(mean_average_precision=_defined(precision_R), rank_1=_defined(first_R))
        return ProbeScores(scores, 0, len(query))


def _defined(values: Tensor) -> tuple[Tensor, Tensor]:
    """The numbers among values that may be NaN, each with weight 1."""
    numbers = values[~values.isnan()]
    return numbers, torch.ones_like(numbers)


def _means(**values: tuple[Tensor, Tensor]) -> dict[str, float]:
    """Weighted means of (values, weights) of all ranks, by name; without those whose weights are all 0."""
    found = {}
    for name, (value, weight) in values.items():
        metric = _WeightedMean().to(value.device)
        metric.update(value, weight)
        found[name] = metric.compute().item()
    return {name: mean for name, mean in found.items() if not math.isnan(mean)}


class _WeightedMean(Metric):
    """Of all ranks, in float64; torchmetrics' MeanMetric casts what it is given to float32."""

    total: Tensor
    weight: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("total", "weight"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, value: Tensor, weight: Tensor) -> None:
        self.total += (value * weight).sum()
        self.weight += weight.sum()

    def compute(self) -> Tensor:
        """NaN without a weight above 0."""
        return self.total / self.weight


def _ignorable(probe: PatchProbe, label: int) -> int:
    if label < 0:
        raise UserError(f"{type(probe).__name__} ignore_label={label} must be at least 0; what is below 0 never counts")
    return label


def _require_column(probe: Probe, features: Features, name: str) -> None:
    column = features.fields.get(name)
    if column is None or column.ndim != 1 or column.dtype not in WHOLE:
        got = "nothing" if column is None else f"{column.dtype} {list(column.shape)}"
        raise UserError(
            f"{type(probe).__name__} reads {name!r} of the batches, whole numbers [B], but got {got}; set its "
            "fields to what the data give"
        )


def _require_whole(probe: PatchProbe, maps: Tensor) -> None:
    if maps.dtype not in WHOLE:
        raise UserError(
            f"{type(probe).__name__} reads {probe.field!r} of the batches as whole numbers, but they are {maps.dtype}; "
            "give the number of each pixel's class or object"
        )
