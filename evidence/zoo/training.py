"""One cell of the comparison: a method or a peer trains an encoder for a number of steps, and probes read what it
learned.

Shapes: N pictures, F features.
"""

import time
import warnings
from collections.abc import Callable, Collection
from functools import partial
from typing import Any, NamedTuple

import torch
from lightning import Callback, Trainer, seed_everything
from torch import Tensor, nn

from evidence.quiet import quiet_trainer
from evidence.zoo.methods import ENTRIES, Task
from evidence.zoo.pictures import Batch, Passes, Split
from lightspan.evaluation.probes.knn import knn_accuracy
from lightspan.evaluation.probes.linear_probe import linear_probe_accuracy
from lightspan.methods.distillation.dino import DINO
from lightspan.optim.schedules import WarmupCosine
from lightspan.training.method import Method

BATCH, NEIGHBOURS = 64, 20
DECAY, CLIP, WARMUP = 0.05, 3.0, 0.1
Features = Callable[[Tensor], Tensor]


class Trained(NamedTuple):
    """What a run leaves.

    Attributes:
        features: those that the method or the package's example keeps.
        step_ms: milliseconds of the processor for a step; None without a step.
        student: the student's features, of lightspan's DINO, which keeps the teacher's.
    """

    features: Features
    step_ms: float | None = None
    student: Features | None = None


def task_of(split: Split, encoder: str) -> Task:
    return Task(encoder, split.channels, split.side, split.classes, len(split.train.labels))


def optimisation(rate: float) -> dict[str, Any]:
    """AdamW and a cosine, the same for all."""
    return {
        "optimizer": partial(torch.optim.AdamW, lr=rate, weight_decay=DECAY),
        "lr_scheduler": partial(WarmupCosine, warmup=WARMUP, final=0.0),
    }


def untrained(task: Task, seed: int) -> Trained:
    seed_everything(seed, verbose=False)
    return Trained(task.encoder().eval())


class Watching(Callback):
    """Scores features after some steps of a run, which go on as if nobody had looked.

    Attributes:
        curve: {"step", "knn", "linear"} of each look, per cent as of `scores`.
        spent_s: seconds of the processor that it took.
    """

    def __init__(self, split: Split, part: str, steps: Collection[int]) -> None:
        self.split, self.part, self.steps = split, part, frozenset(steps)
        self.curve: list[dict[str, float]] = []
        self.spent_s = 0.0

    def look(self, step: int, network: nn.Module, features: Features) -> None:
        if step not in self.steps:
            return
        start_s = time.thread_time()
        modes = [(module, module.training) for module in network.modules()]
        network.eval()
        with torch.random.fork_rng(devices=[]):
            found = scores(features, self.split, self.part)
        for module, mode in modes:
            module.training = mode
        self.curve.append({"step": step, **{name: round(value, 3) for name, value in found.items()}})
        self.spent_s += time.thread_time() - start_s

    def on_train_batch_end(self, trainer: Trainer, pl_module: Method, *_: Any) -> None:  # type: ignore[override]
        self.look(trainer.global_step, pl_module, features_of(pl_module))


def features_of(method: Method) -> Features:
    return lambda image: method.features({"image": image})


def train(arm: str, task: Task, rate: float, seed: int, made: list[Batch], watching: Watching | None = None) -> Trained:
    """A method of lightspan after a step on each batch."""
    seed_everything(seed, verbose=False)
    method = ENTRIES[arm].build(task, **optimisation(rate))
    callbacks = [] if watching is None else [watching]
    trainer = quiet_trainer(max_steps=len(made), gradient_clip_val=CLIP, callbacks=callbacks)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of workers, which ready batches do not need
        start_s = time.thread_time()
        trainer.fit(method, Passes(made, task.images))
    spent_s = time.thread_time() - start_s - (0.0 if watching is None else watching.spent_s)
    assert trainer.global_step == len(made)
    method.eval()
    student = method.student.backbone if isinstance(method, DINO) else None
    return Trained(features_of(method), 1000 * spent_s / len(made), student)


def train_peer(
    arm: str, task: Task, rate: float, seed: int, made: list[Batch], watching: Watching | None = None
) -> Trained:
    """As `train`, of lightly's counterpart in a plain loop."""
    from evidence.zoo.lightly_methods import PEERS

    seed_everything(seed, verbose=False)
    peer = PEERS[arm](task, len(made))
    optimizer = torch.optim.AdamW((p for p in peer.parameters() if p.requires_grad), lr=rate, weight_decay=DECAY)
    schedule = WarmupCosine(optimizer, len(made), WARMUP, final=0.0)
    start_s = time.thread_time()
    for step, batch in enumerate(made):
        optimizer.zero_grad()
        peer.loss(batch["views"], step).backward()  # type: ignore[arg-type]
        nn.utils.clip_grad_norm_(peer.parameters(), CLIP)
        optimizer.step()
        schedule.step()
        if watching is not None:
            watching.look(step + 1, peer, peer.encoder)
    spent_s = time.thread_time() - start_s - (0.0 if watching is None else watching.spent_s)
    return Trained(peer.eval().encoder, 1000 * spent_s / len(made))


@torch.no_grad()
def encoded(features: Features, split: Split, part: str) -> tuple[Tensor, Tensor]:
    """Features [N F] and labels [N] of the training, validation or test pictures as they are."""
    images, data = split.images[part], getattr(split, part)
    labels = torch.from_numpy(data.labels[: len(images)])
    return torch.cat([features(some) for some in images.split(250)]), labels


def scores(features: Features, split: Split, part: str) -> dict[str, float]:
    """Per cent of the pictures of `part` that probes of the training pictures' features tell right."""
    bank, asked = encoded(features, split, "train"), encoded(features, split, part)
    return {
        "knn": 100 * knn_accuracy(*bank, *asked, k=NEIGHBOURS),
        "linear": 100 * linear_probe_accuracy(*bank, *asked),
    }


def interleaved(arm: str, task: Task, made: list[Batch]) -> tuple[list[float], list[float]]:
    """Milliseconds of steps by lightspan and by lightly on the same ready batches, in turns, in one thread: forward,
    loss, backward, optimiser and teacher, by plain loops without clipping.
    """
    from evidence.zoo.lightly_methods import PEERS

    torch.manual_seed(0)
    method: Method = ENTRIES[arm].build(task, **optimisation(1e-4)).train()
    method.log_training = lambda figures, **options: None  # type: ignore[method-assign]
    ours = method.groups.optimizer(method, method.optimizer)
    peer = PEERS[arm](task, len(made)).train()
    theirs = torch.optim.AdamW((p for p in peer.parameters() if p.requires_grad), lr=1e-4, weight_decay=DECAY)

    def our_step(step: int, batch: Batch) -> None:
        ours.zero_grad()
        method.training_step(batch, step).backward()
        ours.step()
        with torch.no_grad():
            method.after_optimizer_step()

    def their_step(step: int, batch: Batch) -> None:
        theirs.zero_grad()
        peer.loss(batch["views"], step).backward()  # type: ignore[arg-type]
        theirs.step()

    times: tuple[list[float], list[float]] = [], []
    for step, batch in enumerate(made):
        for found, taken in zip(times, (our_step, their_step), strict=True):
            start_s = time.thread_time()
            taken(step, batch)
            found.append(1000 * (time.thread_time() - start_s))
    return times
