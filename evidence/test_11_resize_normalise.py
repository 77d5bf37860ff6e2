"""Resize and normalise (arXiv 2305.13456): a frozen network whose input is prepared in different ways, and baselines.

Scenes of a sensor with three bands are rendered from grey pictures: the picture, its blur, and its change from left to
right, each in digital numbers with a gain and an offset of its own, as satellites deliver them. A convolutional network
learns five kinds of shapes of 28 pixels, resized to 32 and standardised by the bands of its training scenes. Then
five other kinds, which it has never seen, at 16 and at 8 pixels, are told apart by the 5 nearest neighbours of its
features: as they are and divided by 10,000, as benchmarks did, or at 32 pixels and standardised by the training scenes,
as in training. The rate is the best of a search on seed 100 by accuracy on 500 other scenes of the learned kinds.

Floor: a random network under the matched preprocessing. Ceiling: the network on the same scenes with all their pixels,
28 x 28, matched. Gate: its accuracy on other scenes of the learned kinds. Claims are on shapes: digits of 8 pixels were
seen on seed 100 to gain nothing from resizing, as the network keeps their layout, which tells them apart.
"""

import tempfile
from functools import cache
from typing import Any

import numpy as np
import torch
from lightning import LightningDataModule, seed_everything
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightspan.backbones.image_statistics import ImageStatistics, PatchConvolutions
from lightspan.backbones.vision import SmallConvNet
from lightspan.datamodules.image.sets.shapes import draw
from lightspan.evaluation.features.preprocessing import BandStatistics, Divided, Given, Preprocess, Standardised
from lightspan.evaluation.features.preprocessing_grid import PreprocessingGrid
from lightspan.evaluation.features.store import FeatureStore
from lightspan.evaluation.probes.resize_normalise import ResizeNormalise

SEEDS, SEARCH_SEED = (0, 1, 2, 3, 4), 100
LEARNED, OTHER, SIDES, WHOLE = range(5), range(5, 10), (16, 8), 28
SIZE, EPOCHS, BATCH, TRAINING, BANK, ASKED = 32, 8, 64, 3000, 1200, 600
RATES = (1e-3, 3e-3, 1e-2)
GAIN, OFFSET = torch.tensor([2000.0, 1200.0, 2500.0]), torch.tensor([1000.0, 600.0, 1300.0])
MATCHED, NATIVE, WRONG = f"{SIZE} px, by the training scenes", "own size, divided", f"{SIZE} px, divided"


def scenes(image_BHW: Tensor) -> Tensor:
    """Pictures in [0, 1] as the sensor sees them: digital numbers, [B 3 H W]."""
    x = image_BHW[:, None]
    blurred = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    change = x - F.pad(x, (1, 0, 0, 0), mode="replicate")[..., :-1]
    return torch.cat([x, blurred, change], dim=1) * GAIN[:, None, None] + OFFSET[:, None, None]


def shapes(kinds: range, count: int, seed: int, stream: int) -> tuple[Tensor, Tensor]:
    """(pictures [N 28 28] in [0, 1], kinds)."""
    generator = np.random.default_rng((seed, stream))
    labels = generator.integers(kinds.start, kinds.stop, count)
    return torch.from_numpy(draw(labels, 0.05, generator)).float() / 255, torch.from_numpy(labels)


class Scenes(LightningDataModule):
    """The first 1,200 are those among which neighbours are found, the last 600 are asked for."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        super().__init__()
        self.scenes, self.labels = scenes(images), labels

    def loader(self, start: int, stop: int) -> DataLoader:
        index = torch.arange(start, stop)
        parts = [{"image": self.scenes[i], "label": self.labels[i], "index": i} for i in index.split(200)]
        return DataLoader(parts, batch_size=None)  # type: ignore[arg-type]

    def bank_dataloader(self) -> DataLoader:
        return self.loader(0, BANK)

    def test_dataloader(self) -> DataLoader:
        return self.loader(BANK, BANK + ASKED)


def tasks(seed: int) -> dict[int, Scenes]:
    """Shapes that the network has not seen, their pixels averaged, by side."""
    images, labels = shapes(OTHER, BANK + ASKED, seed, 2)
    return {side: Scenes(F.adaptive_avg_pool2d(images[:, None], side)[:, 0], labels) for side in (WHOLE, *SIDES)}


@cache
def trained(seed: int, rate: float) -> tuple[nn.Module, BandStatistics, float]:
    """The network, the statistics of its training scenes, and its accuracy in per cent on others of the same kinds."""
    seed_everything(seed, verbose=False)
    images, y = shapes(LEARNED, TRAINING, seed, 0)
    x = scenes(images)
    statistics = BandStatistics.of([x])
    prepare = Preprocess(Standardised().affine(statistics), "training", SIZE)
    backbone = SmallConvNet(3, 16, 4)
    network, steps = nn.Sequential(backbone, nn.Linear(128, len(LEARNED))), TRAINING // BATCH
    optimizer = torch.optim.AdamW(network.parameters(), lr=rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS * steps)
    for _ in range(EPOCHS):
        for rows in torch.randperm(TRAINING)[: steps * BATCH].split(BATCH):
            optimizer.zero_grad()
            F.cross_entropy(network(prepare(x[rows])), y[rows]).backward()
            optimizer.step()
            schedule.step()
    network.eval()
    images, y = shapes(LEARNED, 500, seed, 1)
    with torch.no_grad():
        found = network(prepare(scenes(images))).argmax(dim=1)
    return backbone, statistics, 100 * float((found == y).float().mean())


def scored(data: Scenes, encoders: dict[str, Any], statistics: BandStatistics) -> dict[tuple[str, str], float]:
    """Accuracy of each network and preprocessing, in per cent."""
    normalisations = {
        "divided": Divided(10_000.0),
        "by the training scenes": Given(list(statistics.mean), list(statistics.std)),
    }
    with tempfile.TemporaryDirectory() as folder:
        grid = PreprocessingGrid(encoders, data, [None, SIZE], normalisations).load(FeatureStore(folder))
        rows = ResizeNormalise(k=5).fit(grid).rows
    return {(row["encoder"], f"{row['size']}, {row['normalisation']}"): 100 * row["knn"] for row in rows}


def baselines(seed: int) -> dict[str, Any]:
    torch.manual_seed(seed + 1000)
    return {
        "image statistics": ImageStatistics(),
        "patches": PatchConvolutions(128, seed=seed),
        "random network": SmallConvNet(3, 16, 4),
    }


def test_a_frozen_network_is_judged_by_its_preprocessing(evidence) -> None:
    def score(rate: float) -> float:
        return trained(SEARCH_SEED, rate)[2]

    rate = evidence.search({"network": score}, RATES, seed=SEARCH_SEED)["network"]
    found: dict[int, dict[int, dict[tuple[str, str], float]]] = {side: {} for side in (WHOLE, *SIDES)}
    for seed in SEEDS:
        backbone, statistics, accuracy = trained(seed, rate)
        evidence.figure("shapes of the kinds that were learned", accuracy, seed, "%")
        for side, data in tasks(seed).items():
            found[side][seed] = scored(data, {"network": backbone} | baselines(seed), statistics)
            for (encoder, setting), value in found[side][seed].items():
                evidence.figure(f"kNN of shapes of {side} px, {encoder}, {setting}", value, seed, "%")
    evidence.gate("network", {seed: trained(seed, rate)[2] for seed in SEEDS}, 100 / len(LEARNED), by=50, unit="points")
    evidence.note(
        f"{TRAINING:,} training scenes in {EPOCHS} epochs; {BANK:,} scenes in the bank, {ASKED} asked; a scene is 0.17 "
        "points."
    )

    def matched(side: int, encoder: str, over: int, setting: str) -> dict[int, float]:
        return {s: found[side][s][encoder, MATCHED] - found[over][s]["network", setting] for s in SEEDS}

    for side in SIDES:
        for title, setting, margin in (("own size", NATIVE, 10.0), ("wrong statistics", WRONG, 3.0)):
            evidence.claim(
                f"shapes of {side} px, matched preprocessing minus {title}",
                matched(side, "network", side, setting),
                at_least=margin,
                unit="points",
                floor=matched(side, "random network", side, setting),
                ceiling=matched(WHOLE, "network", side, setting),
                arms=("network",),
            )


if __name__ == "__main__":
    for rate in RATES:
        network, of_bands, accuracy = trained(SEARCH_SEED, rate)
        print(f"rate {rate:g}: learned kinds {accuracy:.2f} %", flush=True)
        for side, data in tasks(SEARCH_SEED).items():
            of_all = scored(data, {"network": network} | baselines(SEARCH_SEED), of_bands)
            print(side, {name: round(value, 1) for name, value in of_all.items()}, flush=True)
