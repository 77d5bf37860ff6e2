"""What the evidence of merging shares: tasks, specialists that were fine-tuned from one network, and merges of them,
all scored on pictures that nothing was trained or chosen on.

A task is a set under one fixed change: none, a turn, or one order of all pixels. The network is pretrained for a short
time on a mixture of tasks, with heads that are frozen from then on, as CLIP's are: one for all tasks where they have
the same classes, or one for each. Each specialist is fine-tuned on its own task. Pictures are split anew for each seed:
half for training, a quarter without labels for adaptation, on whose labels the arms that need labels choose, and a
quarter for scoring.
"""

import contextlib
import copy
import io
import logging
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import scipy.ndimage
import torch
from quiet import quiet_trainer
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from lightspan.backbones.vision import MLP
from lightspan.datamodules.image.sets.small import ImageData, Labelled
from lightspan.datamodules.image.variants.tasks import TaskImages
from lightspan.merging.learned import LearnedMerging
from lightspan.merging.merger import Merger
from lightspan.merging.models import BASE, Held, Models
from lightspan.merging.weights import Weights

warnings.filterwarnings("ignore", module="lightning")
logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)

Change = Callable[[np.ndarray], np.ndarray]


def as_they_are(images: np.ndarray) -> np.ndarray:
    return images


def turned(degrees: float) -> Change:
    """Counter-clockwise, about the middle."""
    return lambda images: scipy.ndimage.rotate(images, degrees, axes=(1, 2), reshape=False, order=1, mode="constant")


def shuffled_pixels(seed: int) -> Change:
    def change(images: np.ndarray) -> np.ndarray:
        order = np.random.default_rng(seed).permutation(images[0].size)
        return images.reshape(len(images), -1)[:, order].reshape(images.shape)

    return change


def digits() -> Labelled:
    data = load_digits()
    return Labelled(np.rint(data.images * (255 / 16)).astype(np.uint8), data.target.astype(np.int64))


class Task(ImageData):
    """One task: half of the pictures to train on, a quarter as validation images (`val`), a quarter as `test`."""

    def __init__(self, pictures: Labelled, change: Change, seed: int, shots: int | None = None) -> None:
        quarter, classes = len(pictures.labels) // 4, int(pictures.labels.max()) + 1
        super().__init__(val_size=quarter, train_size=None if shots is None else shots * classes, seed=seed)
        self.pictures, self.change, self.num_classes = pictures, change, classes  # type: ignore[misc]
        self.image_shape = pictures.images.shape[1:] if pictures.images.ndim == 4 else (1, *pictures.images.shape[1:])  # type: ignore[misc]
        self.order = np.random.default_rng(seed).permutation(len(pictures.labels))

    def load(self) -> tuple[Labelled, Labelled]:
        images = self.change(self.pictures.images)[self.order]
        labels, quarter = self.pictures.labels[self.order], len(self.order) // 4
        return Labelled(images[quarter:], labels[quarter:]), Labelled(images[:quarter], labels[:quarter])


@dataclass(frozen=True)
class Pictures:
    """Standardised pictures [N C H W] and labels [N] of each part of a task."""

    train: tuple[Tensor, Tensor]
    adapt: tuple[Tensor, Tensor]
    score: tuple[Tensor, Tensor]

    @classmethod
    def of(cls, task: Task) -> "Pictures":
        with contextlib.redirect_stdout(io.StringIO()):
            task.setup()

        def tensors(samples: Any) -> tuple[Tensor, Tensor]:
            found = [samples.sample(i, 0) for i in range(len(samples))]
            return torch.stack([s["image"] for s in found]), torch.stack([s["label"] for s in found])

        return cls(tensors(task.bank), tensors(task.val), tensors(task.test))


@dataclass
class World:
    """The pretrained network, the heads that stay, and the specialists of each task."""

    tasks: dict[str, Task]
    pictures: dict[str, Pictures]
    base: nn.Module
    heads: dict[str, nn.Module]
    specialists: dict[str, nn.Module]

    def models(self, tasks: Iterable[str] | None = None) -> "InMemory":
        chosen = self.specialists if tasks is None else {t: self.specialists[t] for t in tasks}
        return InMemory(self.base, chosen)

    def accuracy(self, network: nn.Module, part: str = "score", tasks: Iterable[str] | None = None) -> float:
        """In per cent, the mean over tasks."""
        return sum(self.accuracies(network, part, tasks).values()) / len(list(tasks or self.tasks))

    @torch.no_grad()
    def accuracies(self, network: nn.Module, part: str, tasks: Iterable[str] | None = None) -> dict[str, float]:
        found = {}
        for task in tasks or self.tasks:
            x, y = getattr(self.pictures[task], part)
            found[task] = 100 * (self.heads[task](network(x)).argmax(dim=1) == y).double().mean().item()
        return found


class InMemory(Models):
    """Networks as the models of a merge."""

    def __init__(self, base: nn.Module, tasks: dict[str, nn.Module]) -> None:
        self._all, self.tasks = {BASE: base, **tasks}, list(tasks)

    def open(self, own: Weights) -> dict[str, Weights]:
        return {
            name: Held({f"backbone.{k}": t.clone() for k, t in network.state_dict().items()}, name)
            for name, network in self._all.items()
        }


def world(
    tasks: dict[str, Task],
    seed: int,
    pretraining: int,
    epochs: int = 20,
    hidden: tuple[int, ...] = (128, 128),
    pretrained_on: Iterable[str] | None = None,
    lr: float = 1e-3,
    own_heads: Callable[[int, int], nn.Module] | None = None,
) -> World:
    """Args:
    pretraining: steps of 64 pictures on the mixture of the tasks of `pretrained_on` (None: all).
    epochs, lr: of each specialist's fine-tuning.
    own_heads: makes a head, of its features and classes, for each task; None: one linear head for all.
    """
    torch.manual_seed(seed)
    parts = {name: Pictures.of(task) for name, task in tasks.items()}
    base = MLP(next(iter(tasks.values())).image_shape, hidden)
    heads: dict[str, nn.Module]
    if own_heads is None:
        heads = dict.fromkeys(tasks, nn.Linear(hidden[-1], next(iter(tasks.values())).num_classes))
    else:
        heads = {name: own_heads(hidden[-1], task.num_classes) for name, task in tasks.items()}
    mixture: dict[nn.Module, list[tuple[Tensor, Tensor]]] = {}
    for name in pretrained_on or tasks:
        mixture.setdefault(heads[name], []).append(parts[name].train)
    mixed = {head: (torch.cat([x for x, _ in of]), torch.cat([y for _, y in of])) for head, of in mixture.items()}
    learning = [*base.parameters(), *nn.ModuleList(heads.values()).parameters()]
    train(base, mixed, steps=pretraining, parameters=learning)
    specialists = {}
    for name, part in parts.items():
        specialists[name] = copy.deepcopy(base)
        steps = epochs * len(part.train[1]) // 64
        own = [*specialists[name].parameters()]
        train(specialists[name], {heads[name]: part.train}, steps=steps, parameters=own, lr=lr)
    for head in heads.values():
        head.requires_grad_(False)
    return World(tasks, parts, base, heads, specialists)


def train(
    network: nn.Module,
    data: Mapping[nn.Module, tuple[Tensor, Tensor]],
    steps: int,
    parameters: list[Any],
    lr: float = 1e-3,
) -> None:
    """On 64 pictures a step, drawn from those of all heads together."""
    optimizer = torch.optim.Adam(parameters, lr=lr)
    x = torch.cat([images for images, _ in data.values()])
    y = torch.cat([labels for _, labels in data.values()])
    head_of = torch.repeat_interleave(torch.tensor([len(labels) for _, labels in data.values()]))
    for _ in range(steps):
        rows = torch.randint(len(x), (min(64, len(x)),))
        optimizer.zero_grad()
        features, losses = network(x[rows]), []
        for i, head in enumerate(data):
            own = head_of[rows] == i
            losses.append(F.cross_entropy(head(features[own]), y[rows][own], reduction="sum"))
        (torch.stack(losses).sum() / len(rows)).backward()
        optimizer.step()


def merged_by(merger: Merger, models: InMemory, network: nn.Module) -> nn.Module:
    """A network with the weights of a merge that needs no training, by the merger's own `tensor`."""
    found = copy.deepcopy(network)
    opened = models.open(Held({}, ""))
    if merger.base is None:
        opened.pop(BASE)
    forms = opened[merger.leading(list(opened))].forms
    ready = merger.prepared(opened, forms)
    state = {n: ready.tensor(n, form, {k: w.read(n) for k, w in opened.items()}) for n, form in forms.items()}
    found.load_state_dict({name.removeprefix("backbone."): tensor for name, tensor in state.items()})
    return found


def best_on_labels(world: World, candidates: Iterable[nn.Module]) -> nn.Module:
    """The candidate with the highest accuracy on the labels of the pictures for adaptation."""
    return max(candidates, key=lambda network: world.accuracy(network, "adapt"))


def learned(
    kind: type[LearnedMerging],
    world: World,
    steps: int,
    lr: float,
    models: Models | None = None,
    tasks: dict[str, Task] | None = None,
    batch_size: int = 16,
    adapt_on: str = "val",
    optimizer: Any = torch.optim.Adam,
    val_every: int | None = None,
    seed: int = 0,
    **settings: Any,
) -> tuple[LearnedMerging, nn.Module]:
    """A learned merge, trained by `fit`, and a network with its weights."""
    tasks = tasks or world.tasks
    heads = {name: copy.deepcopy(world.heads[name]) for name in tasks}
    method = kind(
        copy.deepcopy(world.base), models or world.models(), heads, optimizer=partial(optimizer, lr=lr), **settings
    )
    score_on = "val" if val_every else "test"
    data = TaskImages(dict(tasks), batch_size, adapt_on, score_on, seed=seed)  # type: ignore[arg-type]
    validation: dict[str, Any] = {}
    if val_every is not None:
        validation = {"limit_val_batches": 1.0, "val_check_interval": val_every, "check_val_every_n_epoch": None}
    trainer = quiet_trainer(max_steps=steps, num_sanity_val_steps=0, **validation)
    with contextlib.redirect_stdout(io.StringIO()):
        trainer.fit(method, datamodule=data)
    network = copy.deepcopy(world.base)
    with torch.no_grad():
        for name, tensor in method.merged().items():
            network.get_parameter(name).copy_(tensor)
    return method, network
