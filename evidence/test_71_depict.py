"""DEPICT (arXiv 1704.06327) on 8 x 8 digits against k-means of the embedding that it starts from, and of the pixels.

Arms share a small convolutional autoencoder and a first stage. Without balance the targets are squares of the
predictions alone, self-training; DEC's targets are those of the authors' code; without reconstruction the clustering
alone trains after the first stage. Each arm's rate is the best of three by accuracy on 597 digits of their own, where
labels are used; k-means has 40 starts. Figures are of the other 1,200, all of which are clustered; there labels are
used for scores alone.
"""

from functools import partial
from typing import Any

import numpy as np
import torch
from digits import parted
from lightning import Callback
from quiet import quiet_trainer

from lightspan.backbones.conv_autoencoder import ConvAutoencoder
from lightspan.datamodules.image.sets.small import ImageData, Labelled
from lightspan.evaluation.geometry.clustering import agreement, kmeans
from lightspan.methods.clustering.depict import DEPICT, PRETRAINING, STARTS

SEEDS, SEARCH = (0, 1, 2, 3, 4), 100
RATES = (3e-4, 1e-3, 3e-3)
ARMS: dict[str, dict[str, float]] = {
    "DEPICT": {},
    "DEC's targets": {"power": 2.0, "balance": 1.0},
    "no balance": {"power": 2.0, "balance": 0.0},
    "no reconstruction": {"reconstruction": 0.0},
}
EPOCHS, BATCH, CLUSTERS = 80, 100, 10


class Part(ImageData):
    """Digits of the search, or all others."""

    num_classes = CLUSTERS
    image_shape = (1, 8, 8)

    def load(self) -> tuple[Labelled, Labelled]:
        images, labels = parted(self.seed, self.seed == SEARCH)
        data = Labelled(np.rint(images * 255).astype(np.uint8), labels.astype(np.int64))
        return data, data


class Started(Callback):
    """How well the clusters that k-means gave match the classes."""

    accuracy = float("nan")

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if self.accuracy != self.accuracy and pl_module.stage != PRETRAINING:
            known = pl_module.memory.known()
            labels = torch.from_numpy(trainer.datamodule.train.labels())[known]
            self.accuracy = 100 * agreement(pl_module.target_MK[known].argmax(dim=1), labels)["accuracy"]


def run(arm: str, seed: int, rate: float, epochs: int = EPOCHS) -> dict[str, float]:
    torch.manual_seed(seed)
    data = Part(BATCH, seed=seed)
    data.setup()
    network = ConvAutoencoder((1, 8, 8), (16, 16), (4, 3), embed_dim=CLUSTERS, bounded=False)
    images, optimizer = len(data.train), partial(torch.optim.Adam, lr=rate)  # type: ignore[arg-type]
    model, started = DEPICT(network, images, CLUSTERS, seed=seed, optimizer=optimizer, **ARMS[arm]), Started()
    quiet_trainer(max_epochs=epochs, callbacks=[started]).fit(model, data)
    drawn = [data.bank.sample(number, 0) for number in range(images)]
    image, label = (torch.stack([sample[field] for sample in drawn]) for field in ("image", "label"))
    found = model.eval().assignments({"image": image}).argmax(dim=1)
    share = found.bincount(minlength=CLUSTERS) / images
    pixels = kmeans(image.flatten(1), CLUSTERS, seed, STARTS)
    return {
        "accuracy": 100 * agreement(found, label)["accuracy"],
        "k-means of the embedding": started.accuracy,
        "k-means of the pixels": 100 * agreement(pixels, label)["accuracy"],
        "size entropy": float(torch.special.entr(share).sum()),
        "empty clusters": float((share == 0).sum()),
    }


def test_depict(evidence, **settings):
    rates = {arm: max(RATES, key=lambda rate: run(arm, SEARCH, rate, **settings)["accuracy"]) for arm in ARMS}
    evidence.note(f"Rates of {RATES}, chosen on 597 other digits", rates)
    runs = {arm: {seed: run(arm, seed, rates[arm], **settings) for seed in SEEDS} for arm in ARMS}
    for arm, of_seed in runs.items():
        for seed, found in of_seed.items():
            for name, value in found.items():
                if arm == "DEPICT" or "k-means" not in name:
                    unit = "%" if name == "accuracy" or "k-means" in name else "nats" if name == "size entropy" else ""
                    evidence.figure(f"{name}, {arm}", value, seed=seed, unit=unit)

    def apart(figure: str, arm: str = "DEPICT") -> dict[int, float]:
        return {seed: runs["DEPICT"][seed]["accuracy"] - runs[arm][seed][figure] for seed in SEEDS}

    evidence.claim(
        "accuracy, DEPICT minus k-means of the same embedding", apart("k-means of the embedding"), at_least=3.0,
        unit="points",
    )  # fmt: skip
    evidence.claim(
        "accuracy, DEPICT minus k-means of the pixels", apart("k-means of the pixels"), at_least=0.0, unit="points"
    )
    evidence.claim(
        "accuracy, DEPICT minus no reconstruction", apart("accuracy", "no reconstruction"), at_least=0.0, unit="points"
    )
    alone, even = runs["no balance"], runs["DEPICT"]
    uneven = [
        seed
        for seed in SEEDS
        if alone[seed]["empty clusters"] or alone[seed]["size entropy"] < even[seed]["size entropy"]
    ]
    evidence.claim(
        "seeds in which no balance has an empty cluster or less even sizes", float(len(uneven)), at_least=1.0
    )
