"""ADSL (arXiv 2206.09068) against the best fixed number of subspaces and a cross-entropy network, on shapes x textures.

16 classes of drawn pictures: 4 shapes with 4 textures, each in any of 4 colours, which tell nothing. All arms have one
network with spatial attention, an embedding of 32 coordinates, the same pictures, batches of 4 of each class, and
steps. Fixed numbers of subspaces keep them from the start to the tuning at 5/6 of the run; the cross-entropy network is
read before its classifier. Each arm's rate is the best of three on seed 100, by the mean of NMI and Recall@1 on
validation pictures, and so is the number of subspaces, of 1, 2 and 4. Splits follow the validation pictures of each
seed; in runs of 24 epochs the NMI rises to their end, and nothing is split. Figures are of test pictures that nothing
was chosen on.
"""

from functools import partial
from typing import Any

import numpy as np
import torch
from quiet import quiet_trainer
from torch import Tensor
from torch.nn import functional as F

from lightspan.backbones.attended import Attended
from lightspan.backbones.vision import SmallConvNet
from lightspan.datamodules.image.sets.coloured_shapes import draw_with_masks
from lightspan.datamodules.image.sets.small import ImageData, Labelled
from lightspan.evaluation.geometry.clustering import agreement, kmeans
from lightspan.evaluation.probes.knn import recall_at_one
from lightspan.methods.supervised.adsl import ADSL
from lightspan.methods.supervised.classifier import Classifier
from lightspan.nn.heads.subspace_learners import SubspaceLearners

SEEDS, SEARCH = (0, 1, 2), 100
RATES = (3e-4, 1e-3, 3e-3)
FIXED = {"K=1": 1, "K=2": 2, "K=4": 4}
ARMS = ("ADSL", *FIXED, "cross-entropy")
TRAINED, HELD, TESTED, EPOCHS, BATCH, WIDTH, CLASSES = 1600, 400, 800, 72, 64, 32, 16
NEVER = 10**6


def pictures(count: int, seed: int, stream: int) -> tuple[Labelled, np.ndarray]:
    """Pictures of each pair of shape and texture in turn, and their masks."""
    generator = np.random.default_rng((seed, stream))
    pair = np.arange(count, dtype=np.int64) % CLASSES
    of_64 = pair // 4 * 16 + generator.integers(4, size=count) * 4 + pair % 4
    images, inside = draw_with_masks(of_64, 0.05, generator)
    return Labelled(images, pair), inside


class Pairs(ImageData):
    num_classes = CLASSES
    image_shape = (3, 28, 28)

    def __init__(self, seed: int, trained: int = TRAINED, held: int = HELD, tested: int = TESTED) -> None:
        super().__init__(BATCH, val_size=held, seed=seed, per_class=4)
        self.counts = trained + held, tested

    def load(self) -> tuple[Labelled, Labelled]:
        return pictures(self.counts[0], self.seed, 0)[0], pictures(self.counts[1], self.seed, 1)[0]


def built(arm: str, rate: float, images: int) -> ADSL | Classifier:
    backbone = Attended(SmallConvNet(3, 8, 3))
    optimizer: Any = partial(torch.optim.Adam, lr=rate, weight_decay=1e-4)
    if arm == "cross-entropy":
        return Classifier(backbone, CLASSES, optimizer=optimizer)
    head = SubspaceLearners(backbone.num_features, WIDTH)
    if arm in FIXED:
        head.owner_D.copy_(torch.arange(WIDTH) * FIXED[arm] // WIDTH)
    return ADSL(backbone, head, images, CLASSES, patience=NEVER if arm in FIXED else 3, optimizer=optimizer)


@torch.no_grad()
def measured(model: Any, samples: Any) -> dict[str, float]:
    model.eval()
    drawn = [samples.sample(number, 0) for number in range(len(samples))]
    image, label = (torch.stack([sample[field] for sample in drawn]) for field in ("image", "label"))
    parts = [(model.embeddings if isinstance(model, ADSL) else model.features)({"image": x}) for x in image.split(200)]
    z = F.normalize(torch.cat(parts), dim=1)
    return {"NMI": 100 * agreement(kmeans(z, CLASSES), label)["nmi"], "Recall@1": 100 * recall_at_one(z, label)}


@torch.no_grad()
def attention_inside(model: Any, data: Pairs) -> float:
    """Mean attention inside of the shapes over that outside, on the test pictures."""
    inside = torch.from_numpy(pictures(data.counts[1], data.seed, 1)[1]).float()
    image = torch.stack([data.test.sample(number, 0)["image"] for number in range(len(data.test))])
    maps = torch.cat([model.backbone.maps(x)[1] for x in image.split(200)])
    attention: Tensor = F.interpolate(maps, inside.shape[1:], mode="bilinear")[:, 0]
    outside = 1 - inside
    return float((attention * inside).sum() / inside.sum() / ((attention * outside).sum() / outside.sum()))


def run(arm: str, seed: int, rate: float, epochs: int = EPOCHS, **counts: int) -> dict[str, float]:
    torch.manual_seed(seed)
    data = Pairs(seed, **counts)
    data.setup()
    model = built(arm, rate, len(data.train))  # type: ignore[arg-type]
    validates = {"limit_val_batches": 1.0 if arm == "ADSL" else 0, "num_sanity_val_steps": 0}
    quiet_trainer(max_epochs=epochs, **validates).fit(model, data)
    if seed == SEARCH:
        return measured(model, data.val)
    found = measured(model, data.test) | {"attention": attention_inside(model, data)}
    return found | ({"learners": float(model.head.learners)} if isinstance(model, ADSL) else {})


def chosen(**settings: Any) -> dict[str, float]:
    """The rate of each arm, and under `fixed` the number of subspaces of the best fixed one."""
    scores = {(arm, rate): sum(run(arm, SEARCH, rate, **settings).values()) for arm in ARMS for rate in RATES}
    best = {arm: max(RATES, key=lambda rate: scores[arm, rate]) for arm in ARMS}
    return best | {"fixed": FIXED[max(FIXED, key=lambda arm: scores[arm, best[arm]])]}


def test_adsl(evidence, **settings):
    best = chosen(**settings)
    fixed = f"K={best.pop('fixed'):g}"
    runs = {arm: {seed: run(arm, seed, best[arm], **settings) for seed in SEEDS} for arm in ARMS}
    evidence.note(f"Rates of {RATES}, chosen on seed {SEARCH}", best)
    evidence.note(f"The best fixed number of subspaces on seed {SEARCH}: {fixed}.")
    for arm, of_seed in runs.items():
        for seed, found in of_seed.items():
            for name, value in found.items():
                unit = "%" if name in ("NMI", "Recall@1") else ""
                evidence.figure(f"{name}, {arm}", value, seed=seed, unit=unit)

    def of(figure: str, over: str = "") -> dict[int, float]:
        return {seed: runs["ADSL"][seed][figure] - (runs[over][seed][figure] if over else 0) for seed in SEEDS}

    for figure in ("NMI", "Recall@1"):
        evidence.claim(
            f"{figure}, ADSL minus the best fixed number of subspaces", of(figure, fixed), at_least=-0.5, unit="points"
        )
        evidence.claim(f"{figure}, ADSL minus cross-entropy", of(figure, "cross-entropy"), at_least=3.0, unit="points")
    evidence.claim("learners at the end", of("learners"), at_least=2.0)
    evidence.claim("attention inside of shapes over outside", of("attention"), at_least=1.5)


if __name__ == "__main__":
    print(chosen(), flush=True)
