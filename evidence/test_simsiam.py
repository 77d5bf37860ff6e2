"""SimSiam without stop-gradient and without predictor, on Fashion-MNIST: what keeps the embeddings apart.

The paper (sections 4.1 and 4.2) has both collapse: every embedding becomes the same, and nothing is left to classify.
Arms have one network, one number of steps and, as in the paper, one rate: on a seed of its own the best by the mean
over arms of 20-nearest-neighbour accuracy of the features on 400 validation pictures, of those rates at which every arm
learns its own task, as the gate has it; each by itself would choose one at which it hardly moves. Claims are measured
on test pictures: by how much more its embeddings differ than without stop-gradient, and by how much its features are
better than without predictor. `spread` is the deviation of unit-length embeddings times the root of their width: near 1
where they lie all around, 0 where they are one point (the paper's figure 2, middle). Pictures are averaged to 14 x 14,
and the views of one differ so much that they cannot be made alike by their content alone: with larger crops and without
grain, embeddings stayed apart without the stop-gradient on the search's seed.

What is no claim: accuracy against no stop-gradient, over which an untrained network is ahead by more than the margin
too where embeddings collapse, and spread against no predictor, whose embeddings did not come together on the search's
seed.

Floor: the untrained network. Ceiling: the same network, steps and views with the true classes; a spread of 1. Gate:
each arm's own loss on fixed views of training pictures, with the statistics of the batch.
"""

import copy
from functools import cache, partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightspan.backbones.vision import SmallConvNet
from lightspan.datamodules.image.sets.small import FashionMNIST
from lightspan.evaluation.probes.knn import knn_accuracy
from lightspan.methods.distillation.simsiam import SimSiam
from lightspan.nn.heads.projector import Projector
from lightspan.optim.schedules import WarmupCosine

SEEDS, SEARCH, STEPS, BATCH, HELD, WIDTH = (10, 11, 12, 13, 14), 100, 350, 128, 400, 8
RATES, GRAIN, LEARNED = (0.01, 0.03, 0.1, 0.3), 0.5, 0.2
ARMS = ("SimSiam", "no stop-gradient", "no predictor")
CEILING = "true classes"
Set = tuple[Tensor, Tensor]


class BothSides(SimSiam):
    """Both sides of a cosine pass the gradient."""

    def target(self, z_BD: Tensor) -> Tensor:
        return z_BD


class Run(NamedTuple):
    """Accuracy in per cent, spread, and the arm's own loss before and after training."""

    knn: float
    spread: float
    loss_before: float
    loss: float


@cache
def pictures() -> tuple[Set, Set, Set]:
    """Pictures [N 1 14 14] and labels of training, validation and testing."""
    sides = []
    for images, labels in FashionMNIST().load():
        x = F.avg_pool2d(torch.from_numpy(images).float()[:, None] / 255, 2)
        sides.append(((x - 0.29) / 0.32, torch.from_numpy(labels).long()))
    (x, label), test = sides
    return (x[HELD:], label[HELD:]), (x[:HELD], label[:HELD]), test


def view(x: Tensor, generator: torch.Generator) -> Tensor:
    """Of each picture a crop of its size, from a tenth of the area on, mirrored or not, another light, and grain."""
    area, across, down, mirror, light = torch.rand(5, len(x), generator=generator).unbind(0)
    size, nothing = (0.1 + 0.9 * area).sqrt(), torch.zeros(len(x))
    turned = torch.where(mirror < 0.5, size, -size)
    places = [turned, nothing, (1 - size) * (2 * across - 1), nothing, size, (1 - size) * (2 * down - 1)]
    grid = F.affine_grid(torch.stack(places, dim=1).view(-1, 2, 3), list(x.shape), align_corners=False)
    crop = F.grid_sample(x, grid, padding_mode="border", align_corners=False)
    grain = GRAIN * torch.randn(x.shape, generator=generator)
    return crop + (2 * light - 1).view(-1, 1, 1, 1) + grain


def made(arm: str) -> SimSiam:
    features = 8 * WIDTH
    predictor = nn.Identity() if arm == "no predictor" else Projector(128, [32], 128)
    return (BothSides if arm == "no stop-gradient" else SimSiam)(
        SmallConvNet(1, width=WIDTH, stages=4),
        Projector(features, [128, 128], 128, bias=False, batch_norm=True),
        predictor,
        optimizer=partial(torch.optim.SGD, lr=1.0),
    )


@torch.no_grad()
def measured(method: SimSiam, asked: Set) -> tuple[float, float]:
    """(accuracy in per cent, spread) on the pictures that are asked for."""
    method.eval()
    bank, _, _ = pictures()
    features = [torch.cat([method.backbone(part) for part in x.split(500)]) for x, _ in (bank, asked)]
    unit_ND = F.normalize(method.projector(features[1]), dim=1)
    spread = float(unit_ND.std(dim=0).mean()) * unit_ND.shape[1] ** 0.5
    return 100 * float(knn_accuracy(features[0], bank[1], features[1], asked[1], k=20)), spread


@cache
def train(arm: str, rate: float, seed: int, steps: int = STEPS) -> Run:
    torch.manual_seed(seed)
    (x, label), validation, test = pictures()
    method, head = made(arm), nn.Linear(8 * WIDTH, 10)
    generator, fixed = (torch.Generator().manual_seed(one) for one in (seed, 1))
    pair = [view(x[:500], fixed) for _ in range(2)]

    def own_loss() -> float:
        with torch.no_grad():
            return float(copy.deepcopy(method).train().loss(pair))

    before = own_loss()
    parameters = [*method.parameters(), *head.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=rate, momentum=0.9, weight_decay=1e-4)
    schedule = WarmupCosine(optimizer, max(steps, 1), warmup=0.0, final=0.0)
    for _ in range(steps):
        rows = torch.randint(len(x), (BATCH,), generator=generator)
        views = [view(x[rows], generator) for _ in range(2)]
        if arm == CEILING:
            loss = torch.stack([F.cross_entropy(head(method.backbone(one)), label[rows]) for one in views]).mean()
        else:
            loss = method.loss(views)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return Run(*measured(method, validation if seed == SEARCH else test), before, own_loss())


def searched(rate: float) -> float:
    """The same for all arms; NaN where one of them does not learn."""
    runs = [train(arm, rate, SEARCH) for arm in ARMS]
    learned = all(run.loss_before - run.loss >= LEARNED for run in runs)
    return sum(run.knn for run in runs) / len(runs) if learned else float("nan")


def test_stop_gradient_and_predictor_keep_embeddings_apart(evidence) -> None:
    rates = evidence.search(dict.fromkeys(ARMS, searched), RATES, seed=SEARCH)
    runs = {arm: {seed: train(arm, rates[arm], seed) for seed in SEEDS} for arm in ARMS}
    runs["untrained"] = {seed: train("SimSiam", rates["SimSiam"], seed, steps=0) for seed in SEEDS}
    runs[CEILING] = {seed: train(CEILING, RATES[2], seed) for seed in SEEDS}
    for arm, of_seed in runs.items():
        for seed, run in of_seed.items():
            evidence.figure(f"kNN accuracy, {arm}", run.knn, seed, "%")
            if arm != CEILING:
                evidence.figure(f"spread of embeddings, {arm}", run.spread, seed)
    for arm in ARMS:
        losses = [{seed: getattr(run, name) for seed, run in runs[arm].items()} for name in ("loss", "loss_before")]
        evidence.gate(arm, *losses, by=LEARNED, lower_is_better=True)
    evidence.note(f"{STEPS} steps of {BATCH} pictures of {len(pictures()[0][1]):,}.")

    def over(name: str, first: str, arm: str) -> dict[int, float]:
        return {seed: getattr(runs[first][seed], name) - getattr(runs[arm][seed], name) for seed in SEEDS}

    alone, same = ARMS[1:]
    evidence.claim(
        f"SimSiam minus {alone}, spread of embeddings",
        over("spread", "SimSiam", alone),
        at_least=0.5,
        floor=over("spread", "untrained", alone),
        ceiling={seed: 1.0 - run.spread for seed, run in runs[alone].items()},
        arms=("SimSiam", alone),
    )
    evidence.claim(
        f"SimSiam minus {same}, kNN accuracy",
        over("knn", "SimSiam", same),
        at_least=5.0,
        unit="points",
        floor=over("knn", "untrained", same),
        ceiling=over("knn", CEILING, same),
        arms=("SimSiam", same),
    )


if __name__ == "__main__":
    print("untrained", train("SimSiam", 0.1, SEARCH, steps=0))
    for arm in (*ARMS, CEILING):
        for rate in RATES:
            print(arm, rate, train(arm, rate, SEARCH), flush=True)
