"""Joint 2D/3D clustering (arXiv 2212.01893) on volumes of four solids: against clusters of their slices alone.

A sphere, a cube, a torus or a cylinder in each volume of 16 x 32 x 32 voxels, as large as one another, turned at
random, in texture and noise: how its slices change along it tells which. A network of slices with a transformer of one
block learns from 384 volumes without labels; the same volumes with labels train a linear probe of the solid, and 256
others test it. Arms, with equal steps and rates searched alike: all three losses; slices alone, whose features are the
mean over a volume's slices; random weights.

Floor: random weights; of hidden slices the untrained network. Ceiling: the same network trained on the labels; of
hidden slices the slices themselves. Gate: each arm's own loss on held-out volumes.
"""

import math
from collections.abc import Mapping
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from own_loss import own_loss
from quiet import quiet_trainer
from torch import Tensor

from lightspan.backbones.slices import SlicedVolumes, SliceEmbedding, SliceTransformer, StagedNetwork
from lightspan.core.collate import collated
from lightspan.core.noise import interpolation
from lightspan.datamodules.image.augment.views import RandomViews
from lightspan.datamodules.loading.found_sets import FoundSamples, KeptSamples
from lightspan.datamodules.volume.augment import AlteredVolumes, VolumeAugmentation
from lightspan.datamodules.volume.data import Volume, VolumeSamples, VolumeSets
from lightspan.datamodules.volume.slices import SliceViews
from lightspan.evaluation.probes.linear_probe import linear_probe_accuracy
from lightspan.methods.clustering.joint_2d_3d import Joint2D3D
from lightspan.methods.supervised.classifier import Classifier
from lightspan.nn.heads.projector import Projector
from lightspan.objectives.swapped_prediction import SwappedPrediction
from lightspan.optim.schedules import WarmupCosine

SEEDS, SEARCH = (0, 1, 2), 100
SOLIDS, SIZE, TRAIN, TEST = ("sphere", "cube", "torus", "cylinder"), (16, 32, 32), 384, 256
STEPS, BATCH, WIDTH = 200, 16, 64
RATES = (3e-4, 1e-3, 3e-3)
AUGMENT = VolumeAugmentation(
    flip=(0.5, 0.5, 0.5), turn=0.5, degrees=20, scale=0.1, shift=2, bias=0.1, gain=0.1, gamma=0.2, noise=0.05
)
JOINT, ALONE, RANDOM, LABELS = "joint", "slices alone", "random weights", "true labels"
OFF = {"inter_weight": 0.0, "masked_weight": 0.0}


def solid(kind: int, generator: np.random.Generator) -> np.ndarray:
    """A volume in [0, 1], float16 [1 16 32 32]."""
    axes = [
        np.arange(side) - (side - 1) / 2 - generator.uniform(-room, room)
        for side, room in zip(SIZE, (1, 6, 6), strict=True)
    ]
    turn, _ = np.linalg.qr(generator.normal(size=(3, 3)))
    z, y, x = np.tensordot(turn, np.stack(np.meshgrid(*axes, indexing="ij")), 1)
    voxels = generator.uniform(400, 650)
    ball, cube, ring, drum = ((voxels / of) ** (1 / 3) for of in (4 / 3 * math.pi, 8, 4 * math.pi**2, 2 * math.pi))
    round_ = np.hypot(x, y)
    inside = (
        round_**2 + z**2 < ball**2, np.maximum(np.maximum(abs(x), abs(y)), abs(z)) < cube,
        (round_ - 2 * ring) ** 2 + z**2 < ring**2, np.maximum(round_, abs(z)) < drum,
    )[kind]  # fmt: skip
    texture = generator.normal(size=(2, 5, 5, 5))
    for axis, side in enumerate(SIZE):
        texture = np.moveaxis(np.tensordot(interpolation(side, 5), texture, (1, axis + 1)), 0, axis + 1)
    ground = generator.uniform(0.2, 0.4)
    grey = np.where(inside, ground + generator.uniform(0.25, 0.4) + 0.05 * texture[0], ground + 0.05 * texture[1])
    return np.clip(grey + generator.normal(0, 0.08, SIZE), 0, 1)[None].astype(np.float16)


class Solids(VolumeSets):
    """Those of a seed; the label is the solid."""

    def __init__(self, draw_seed: int, **settings: Any) -> None:
        super().__init__(size=SIZE, batch_size=BATCH, seed=draw_seed, **settings)
        self.draw_seed = draw_seed

    def find(self) -> FoundSamples[Volume]:
        present, affine = np.ones(1, bool), np.eye(4)
        volumes = [
            Volume(
                solid(number % 4, np.random.default_rng((self.draw_seed, number))), present, None, affine, number % 4
            )
            for number in range(TRAIN + TEST)
        ]
        return FoundSamples(
            KeptSamples(volumes, np.array([each.label for each in volumes])),
            np.arange(TRAIN),
            np.arange(TRAIN, TRAIN + TEST),
            SOLIDS,
            str(self.draw_seed),
        )


@cache
def solids(seed: int, pairs: bool) -> Solids:
    views = SliceViews(RandomViews(2, size=24), 4)
    data = Solids(seed, augment=AUGMENT, **({"crops": 2, "slices": views} if pairs else {}))
    data.setup()
    return data


@cache
def shown(seed: int) -> Mapping[str, tuple[Tensor, Tensor]]:
    """Volumes as they are, and their labels."""
    data, found = solids(seed, False), {}
    for name, samples in (("train", data.bank), ("test", data.val)):
        rows = [samples.sample(row, 0) for row in range(len(samples))]
        found[name] = torch.stack([one["volume"] for one in rows]), torch.stack([one["label"] for one in rows])
    return found


@cache
def held_out(seed: int) -> list[dict[str, Any]]:
    """Batches of altered pairs of the test volumes."""
    data = solids(seed, True)
    assert data.train is not None
    held = VolumeSamples(data.train.archive, data.val.numbers, SIZE, True, 2, AUGMENT, slices=data.slices)
    starts = range(0, 64, BATCH)
    return [
        AlteredVolumes(AUGMENT)(collated([held.sample(row, row) for row in range(at, at + BATCH)])) for at in starts
    ]


def backbone() -> SlicedVolumes:
    encoder = StagedNetwork("test_resnet", in_chans=1, stages=3)
    return SlicedVolumes(SliceEmbedding(encoder, WIDTH), SliceTransformer(WIDTH, 1, 4, 72, stride=2, kernel=4))


def built(arm: str, rate: float, seed: int) -> Any:
    torch.manual_seed(seed)
    optimization: dict[str, Any] = {
        "optimizer": partial(torch.optim.AdamW, lr=rate, weight_decay=0.01),
        "lr_scheduler": partial(WarmupCosine, warmup=0.05, final=0.0),
    }
    if arm == LABELS:
        return Classifier(backbone(), len(SOLIDS), **optimization)
    intra = SwappedPrediction(WIDTH, 32, code_temperature=0.03, freeze_prototypes=0.1)
    inter = SwappedPrediction(WIDTH, 16, code_temperature=0.004, freeze_prototypes=0.1)
    projector = Projector(96, [WIDTH], WIDTH)
    return Joint2D3D(backbone(), projector, intra, inter, **(OFF if arm == ALONE else {}), **optimization)


@cache
def trained(arm: str, rate: float, seed: int, steps: int) -> Any:
    method = built(JOINT if arm == RANDOM else arm, rate, seed)
    if arm != RANDOM and steps:
        quiet_trainer(max_steps=steps, gradient_clip_val=2.0).fit(method, datamodule=solids(seed, arm != LABELS))
    return method.eval()


def slice_means(network: SlicedVolumes, volume_B: Tensor) -> Tensor:
    """What the network of slices says of each, before any transformer, mean over slices."""
    of_slices = network.embedding.encoder(volume_B.transpose(1, 2).flatten(0, 1))
    return of_slices.unflatten(0, (len(volume_B), -1)).mean(dim=1)


@torch.no_grad()
def probed(network: Any, seed: int) -> float:
    """Accuracy in per cent."""
    rows = [(torch.cat([network(part) for part in x.split(32)]), y) for x, y in shown(seed).values()]
    return 100 * linear_probe_accuracy(*rows[0], *rows[1])


def score(arm: str, method: Any, seed: int) -> dict[str, float]:
    """Of volumes, and of their middle slices alone."""
    network = method.backbone
    whole = partial(slice_means, network) if arm == ALONE else network
    return {"volumes": probed(whole, seed), "slices": probed(lambda x: slice_means(network, x[:, :, 7:9]), seed)}


@torch.no_grad()
def hidden_error(method: Joint2D3D, seed: int) -> float:
    """Squared error of hidden slices inside a volume, over that of the mean of their two neighbours."""
    volume, numbers = shown(seed)["test"]
    slices_BSw = torch.cat([method.backbone.slices(part) for part in volume.split(32)])
    hidden_BS = method.hidden(SIZE[0], torch.arange(len(numbers)), 1)[0]
    hidden_BS[:, [0, -1]] = False
    guess_BSw = method.guess(slices_BSw, hidden_BS)
    beside_BSw = (slices_BSw.roll(1, 1) + slices_BSw.roll(-1, 1)) / 2
    errors = [(found - slices_BSw)[hidden_BS].square().mean() for found in (guess_BSw, beside_BSw)]
    return float(errors[0] / errors[1])


def compare(evidence: Any, seeds: tuple[int, ...] = SEEDS, steps: int = STEPS) -> None:
    rates = evidence.search(
        {
            arm: partial(lambda arm, rate: score(arm, trained(arm, rate, SEARCH, steps), SEARCH)["volumes"], arm)
            for arm in (JOINT, ALONE, LABELS)
        },
        RATES, seed=SEARCH,
    ) | {RANDOM: 1e-3}  # fmt: skip
    runs = {arm: {s: trained(arm, rates[arm], s, steps) for s in seeds} for arm in rates}
    scores = {arm: {s: score(arm, method, s) for s, method in of_seed.items()} for arm, of_seed in runs.items()}
    for arm, of_seed in scores.items():
        for seed, found in of_seed.items():
            for what, value in found.items():
                evidence.figure(f"probe of {what}, {arm}", value, seed, "%")
    for arm in (JOINT, ALONE):
        losses = [
            {s: own_loss(partial(built, arm, 1e-3, s), weights(s).state_dict(), held_out(s)) for s in seeds}
            for weights in (runs[arm].__getitem__, partial(built, arm, 1e-3))
        ]
        evidence.gate(arm, *losses, by=0.3, lower_is_better=True)
    evidence.gate(RANDOM, {s: found["volumes"] for s, found in scores[RANDOM].items()}, 25.0, by=1.0, unit="points")
    evidence.note(
        f"{TRAIN} volumes to learn from and to probe with, {TEST} to test; {steps} steps of {BATCH} volumes. Rates on "
        f"seed {SEARCH}, whose volumes are others."
    )

    def minus(arm: str, other: str, what: str = "volumes") -> dict[int, float]:
        return {s: scores[arm][s][what] - scores[other][s][what] for s in seeds}

    for other, margin in ((ALONE, 5.0), (RANDOM, 10.0)):
        evidence.claim(
            f"solids told by a linear probe, joint minus {other}", minus(JOINT, other), at_least=margin, unit="points",
            floor=minus(RANDOM, other), ceiling=minus(LABELS, other), arms=(JOINT, other),
        )  # fmt: skip
    evidence.claim(
        "solids told by two slices, joint minus slices alone", minus(JOINT, ALONE, "slices"), at_least=-1.0,
        unit="points", floor=minus(RANDOM, ALONE, "slices"), ceiling=minus(LABELS, ALONE, "slices"),
        arms=(JOINT, ALONE),
    )  # fmt: skip
    evidence.claim(
        "squared error of hidden slices, joint over the mean of their neighbours",
        {s: hidden_error(runs[JOINT][s], s) for s in seeds}, at_most=0.7,
        floor={s: hidden_error(runs[RANDOM][s], s) for s in seeds}, ceiling=dict.fromkeys(seeds, 0.0), arms=(JOINT,),
    )  # fmt: skip


def test_joint_2d_3d(evidence: Any) -> None:
    compare(evidence)
