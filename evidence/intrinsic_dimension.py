"""The smallest dimension of a grid that reaches 90 % of a directly trained net, for the evidence of system 41.

d90 is the smallest dimension of a grid at which accuracy reaches 0.9 of what the same net reaches when all its weights
train ("local" baseline of arXiv 1804.08838). Seeds draw initial weights, subspace, order of samples and the shuffling
of labels. `climbed` trains only the part of the grid around d90; `trace` trains all of a grid, over which the mean of
three seeds is taken.

Rates of Adam are compared on seed 100 and images held out of training, those of a subspace at one dimension. Those of
`RATES` come from four rates for the baseline and four for the subspace: `python evidence/intrinsic_dimension.py [TASK]`
repeats it.
"""

import math
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cache, partial
from statistics import mean

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightspan.backbones.vision import MLP, LeNet
from lightspan.datamodules.image.sets.small import Digits, FashionMNIST, ImageData, ImageSamples, MNIST5k
from lightspan.methods.supervised.classifier import Classifier
from lightspan.optim.random_subspace import RandomSubspace
from lightspan.subspaces.projections import Dense, Fastfood, ProjectionCallable, Sparse

SEEDS = (0, 1, 2)
BATCH = 128
SHARE = 0.9
GRID = [10, 15, 20, 25, 30, 35, 40, 50, 60, 70, 85, 100, 125, 150, 175, 200, 250, 300, 350, 400, 500, 600, 750, 900]
GRID += [1100, 1350, 1650, 2000, 2500, 3000, 3700, 4500, 5500]
PROJECTIONS: dict[str, ProjectionCallable] = {"Fastfood": Fastfood, "sparse": Sparse, "dense": Dense}
DIRECT_RATES, SUBSPACE_RATES = (3e-4, 1e-3, 3e-3, 1e-2), (1e-2, 3e-2, 1e-1, 3e-1)


class Fashion5k(FashionMNIST):
    """500 training images of each class out of the 6,000, and all 10,000 test images."""

    def __init__(self, val_size: int) -> None:
        super().__init__(source="full", train_size=5000 - val_size, val_size=val_size)


HELD_OUT: dict[type[ImageData], int] = {Digits: 287, MNIST5k: 800, Fashion5k: 1000}
"""Training images that judge rates: a fifth."""


@dataclass(frozen=True)
class Task:
    """A net on a data set.

    Args:
        width: of the two hidden layers; 0 for LeNet.
        shuffled: whether labels are permuted among the training images, and judged there.
        searched_at: the dimension that rates of the subspace are compared at.
    """

    name: str
    data: type[ImageData]
    width: int
    epochs: int
    searched_at: int
    shuffled: bool = False

    def model(self) -> nn.Module:
        shape = self.data.image_shape
        backbone = MLP(shape, (self.width, self.width)) if self.width else LeNet(shape)
        return Classifier(backbone, 10, optimizer=torch.optim.Adam)

    @property
    def weights(self) -> int:
        return sum(p.numel() for p in self.model().parameters())


MNIST = {
    "FC": Task("MNIST-5k 784-200-200-10", MNIST5k, 200, 30, 600),
    "LeNet": Task("MNIST-5k LeNet", MNIST5k, 0, 20, 200),
}
FASHION = {  # as many steps as for MNIST-5k, whose 4,000 training images are fewer
    "FC": Task("Fashion-5k 784-200-200-10", Fashion5k, 200, 24, 600),
    "LeNet": Task("Fashion-5k LeNet", Fashion5k, 0, 16, 200),
}

RATES: dict[str, tuple[float, float]] = {
    "MNIST-5k 784-200-200-10": (3e-3, 0.03),
    "MNIST-5k LeNet": (3e-3, 0.1),
    "Fashion-5k 784-200-200-10": (1e-3, 0.1),
    "Fashion-5k LeNet": (3e-3, 0.03),
}
"""Of the baseline and of the subspace."""


@cache
def tensors(data: type[ImageData], held_out: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images and labels, then those that judge: the test images, or a fifth of the training images."""
    made = data(val_size=HELD_OUT[data] if held_out else 0)  # type: ignore[call-arg]
    made.setup()
    return *_whole(made.train), *_whole(made.val)


def _whole(samples: ImageSamples | None) -> tuple[Tensor, Tensor]:
    assert samples is not None
    batch = [samples.sample(i, 0) for i in range(len(samples))]
    return torch.stack([s["image"] for s in batch]), torch.stack([s["label"] for s in batch])


def train(task: Task, dim: int | None, kind: str, lr: float, seed: int, held_out: bool = False) -> float:
    """Accuracy in per cent after the last epoch; `dim` None trains all weights."""
    x, y, judged_x, judged_y = tensors(task.data, held_out)
    generator = torch.Generator().manual_seed(seed)
    if task.shuffled:
        y = y[torch.randperm(len(y), generator=generator)]
        judged_x, judged_y = x, y
    torch.manual_seed(seed)
    model, inner = task.model(), partial(torch.optim.Adam, lr=lr)
    if dim is None:
        optimizer = inner(model.parameters())
    else:
        optimizer = RandomSubspace(model.named_parameters(), inner, dim, PROJECTIONS[kind], seed=seed)
    for _ in range(task.epochs):
        order = torch.randperm(len(x), generator=generator)
        for rows in order.split(BATCH):
            F.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
            optimizer.zero_grad()
    with torch.no_grad():
        return 100 * (model(judged_x).argmax(1) == judged_y).float().mean().item()


@dataclass
class Curve:
    """Accuracies over the grid, one a seed, and where they pass the line."""

    task: Task
    kind: str
    accuracies: dict[int, dict[int, float]] = field(default_factory=dict)

    @property
    def line(self) -> dict[int, float]:
        return {seed: SHARE * value for seed, value in baseline(self.task).items()}

    def reaches(self, dim: int) -> bool:
        """Trains at one point of the grid and says whether the mean over seeds is on the line."""
        found = {seed: train(self.task, dim, self.kind, RATES[self.task.name][1], seed) for seed in SEEDS}
        self.accuracies = dict(sorted({**self.accuracies, dim: found}.items()))
        each = " ".join(f"{value:.1f}" for value in found.values())
        print(f"{self.task.name}, {self.kind}, d={dim}: {each} (line {mean(self.line.values()):.1f})", flush=True)
        return mean(found.values()) >= mean(self.line.values())

    @property
    def d90(self) -> float:
        """Of the mean over seeds; infinite where the grid ends below the line."""
        line = mean(self.line.values())
        return next((d for d, found in self.accuracies.items() if mean(found.values()) >= line), math.inf)

    def of_seed(self, seed: int) -> float:
        """Of one seed, against its own line, within what was trained for the mean."""
        return next((d for d, found in self.accuracies.items() if found[seed] >= self.line[seed]), math.inf)


@cache
def baseline(task: Task) -> dict[int, float]:
    return {seed: train(task, None, "", RATES[task.name][0], seed) for seed in SEEDS}


def climbed(reaches: Callable[[int], bool], start: int) -> float:
    """d90 of one seed, from the grid's point at `start`: down to one that does not reach the line, or up to one that
    does. Infinite where the grid ends below the line.
    """
    first = GRID.index(start)
    found = next((place for place in range(first, len(GRID)) if reaches(GRID[place])), len(GRID))
    while found == first and first > 0 and reaches(GRID[first - 1]):
        found = first = first - 1
    return GRID[found] if found < len(GRID) else math.inf


def trace(task: Task, kind: str, grid: Iterable[int]) -> Curve:
    """The curve over a whole grid."""
    curve = Curve(task, kind)
    for dim in grid:
        curve.reaches(dim)
    return curve


def record(evidence, curve: Curve) -> None:
    name = f"{curve.task.name}, {curve.kind}"
    for dim, found in curve.accuracies.items():
        for seed, value in found.items():
            evidence.figure(f"accuracy, {name}, d = {dim}", value, seed, "%")
    for seed in SEEDS:
        evidence.figure(f"d90, {name}", curve.of_seed(seed), seed)
    evidence.figure(f"d90 of the mean, {name}", curve.d90)


def record_baseline(evidence, task: Task) -> None:
    evidence.figure(f"D, {task.name}", task.weights)
    for seed, value in baseline(task).items():
        evidence.figure(f"accuracy with all weights, {task.name}", value, seed, "%")


def spread(values) -> float:
    values = list(values)
    return max(values) / min(values) if all(map(math.isfinite, values)) else math.inf


if __name__ == "__main__":
    torch.set_num_threads(1)
    tasks = [*MNIST.values(), *FASHION.values()]
    for task in [t for t in tasks if len(sys.argv) < 2 or t.name.startswith(sys.argv[1])]:
        best = []
        for rates, dim in ((DIRECT_RATES, None), (SUBSPACE_RATES, task.searched_at)):
            scores = {rate: train(task, dim, "Fastfood", rate, 100, held_out=True) for rate in rates}
            best.append(max(scores, key=scores.__getitem__))
            print(task.name, dim or "all", {rate: round(score, 2) for rate, score in scores.items()}, flush=True)
        print(f'    "{task.name}": ({best[0]:g}, {best[1]:g}),', flush=True)
