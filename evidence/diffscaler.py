"""A frozen diffusion transformer that knows some classes learns to draw others, for the evidence of system 08.

A transformer learns to remove noise from images of the old classes. Each arm then has the same number of steps on the
new classes, and its own table of classes:

- DiffScaler: scale, shift and a bottleneck of 8 in attention and MLP of every block; the rest frozen.
- scale and shift: the same without the bottleneck.
- BitFit: all biases.
- full: everything.

Two things are measured: the loss on test images, as a mean over ten fixed levels and fixed draws of noise; and the
Frechet distance of as many generated images as there are test images, in the space of the 16 principal directions of
the training images. The frozen network is used in the better of two ways, with the classes it never saw or without a
class.

Rates: one search for all arms on seed 100, by the loss on validation images that are neither trained nor tested on. It
starts at the rates of the task and moves by factors of three until both neighbours are worse.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from lightning import seed_everything
from quiet import quiet_trainer
from torch import Tensor
from torchvision.utils import make_grid

from lightspan.adapters.diffscaler import DiffScaler
from lightspan.adapters.full import Full
from lightspan.adapters.inject import activate, adapt
from lightspan.backbones.diffusion import DiT
from lightspan.core.files.atomic import write_atomic
from lightspan.core.pixels import png_of
from lightspan.datamodules.image.sets.classes import ClassSubset
from lightspan.datamodules.image.sets.small import ImageData
from lightspan.evaluation.geometry.frechet import frechet_distance, principal_directions
from lightspan.methods.generative.denoising_diffusion import DenoisingDiffusion
from lightspan.optim.schedules import WarmupCosine
from lightspan.training.method import Method

SEEDS, SEARCH_SEED = (0, 1, 2), 100
OLD, NEW = [0, 1, 2, 3, 4], [5, 6, 7, 8, 9]
RANK, LAYERS = 8, ["*.attn.qkv", "*.attn.proj", "*.mlp.fc1", "*.mlp.fc2"]
DIRECTIONS, SAMPLING_STEPS = 16, 25

Judge = Callable[[Tensor], Tensor]
"""Images in [0, 1], [B C H W] -> the class of each, int64 [B]."""


@dataclass(frozen=True)
class Task:
    """Images of ten classes and a network for them.

    Args:
        rates: peak rate of each arm, as the search found it.
        old_steps, old_rate: of the network on the old classes.
        steps: of every arm on the new ones.
        validation: images of the search.
        draws: of the noise a loss is the mean of.
    """

    data: Callable[[], ImageData]
    network: Callable[[], DiT]
    rates: dict[str, float]
    schedule: Literal["linear", "cosine"]
    prediction: Literal["noise", "velocity"]
    old_steps: int
    old_rate: float
    steps: int
    batch: int
    validation: int
    draws: int

    def subset(self, classes: list[int], seed: int, val_size: int = 0) -> ClassSubset:
        data = ClassSubset(self.data(), classes, batch_size=self.batch, val_size=val_size, seed=seed)
        data.setup()
        return data

    def pretrained(self, seed: int, val_size: int = 0) -> DenoisingDiffusion:
        seed_everything(seed, verbose=False)
        method = DenoisingDiffusion(
            self.network(), optimizer=torch.optim.AdamW, schedule=self.schedule, prediction=self.prediction
        )
        fit(method, self.subset(OLD, seed, val_size), self.old_steps, self.old_rate)
        return method

    def tuned(
        self, whole: DenoisingDiffusion, arm: str, rate: float, seed: int, val_size: int = 0
    ) -> DenoisingDiffusion:
        seed_everything(seed, verbose=False)
        method = prepared(whole, arm)
        fit(method, self.subset(NEW, seed, val_size), self.steps, rate)
        return method

    @torch.no_grad()
    def loss(self, method: DenoisingDiffusion, held_out: dict[str, Tensor], told: bool = True) -> float:
        method.eval()
        draws = [method.held_out_loss(held_out, draw, told) for draw in range(self.draws)]  # type: ignore[arg-type]
        return float(torch.stack(draws).double().mean())


def everything(loader) -> dict[str, Tensor]:
    batches = list(loader)
    return {name: torch.cat([batch[name] for batch in batches]) for name in ("image", "label")}


def fit(method: Method, data: ImageData, steps: int, lr: float) -> None:
    method.optimizer = partial(torch.optim.AdamW, lr=lr, weight_decay=0.0)
    method.lr_scheduler = partial(WarmupCosine, warmup=0.1, final=0.0)
    trainer = quiet_trainer(max_steps=steps, max_epochs=-1)
    trainer.fit(method, datamodule=data)


def prepared(method: DenoisingDiffusion, arm: str) -> DenoisingDiffusion:
    """A copy in which the arm's parameters train and nothing else."""
    method = copy.deepcopy(method)
    if arm == "full":
        return method
    adapt(method.backbone, ["label"], Full(), name="new", train=["*.bias"] if arm == "BitFit" else [], show=False)
    if arm != "BitFit":
        adapt(method.backbone, LAYERS, DiffScaler(RANK if arm == "DiffScaler" else 0), name="new", show=False)
    return method


def drawn(method: DenoisingDiffusion, label_B: Tensor, data: ImageData) -> Tensor:
    """Images as `data` standardises them, within its bounds."""
    return method.eval().sample(label_B, data.image_shape, steps=SAMPLING_STEPS, clip=data.bounds)


def brightness(images: Tensor, data: ImageData) -> Tensor:
    """Standardised images as they were, in [0, 1]."""
    black, white = data.bounds
    return ((images - black) / (white - black)).clamp(0, 1)


def distance(images: Tensor, data: ImageData) -> float:
    training, test = (everything(loader)["image"] for loader in (data.bank_dataloader(), data.test_dataloader()))
    mean, directions = principal_directions(training.flatten(1), DIRECTIONS)
    a, b = ((rows.flatten(1).double() - mean) @ directions for rows in (images, test))
    return frechet_distance(a, b)


def share(method: DenoisingDiffusion, whole: DenoisingDiffusion) -> float:
    """Trained numbers over those of the network, in per cent."""
    trained = sum(p.numel() for p in method.parameters() if p.requires_grad)
    return 100 * trained / sum(p.numel() for p in whole.parameters())


def picture(path: Path, drawings: dict[str, Tensor], test: dict[str, Tensor], data: ImageData) -> None:
    """Two images a new class: a row of real ones, then one of each arm's."""
    columns = torch.cat([(test["label"] == label).nonzero().flatten()[:2] for label in NEW])
    rows = torch.cat([images[columns] for images in (test["image"], *drawings.values())])
    grid = make_grid(brightness(rows, data), nrow=len(columns), pad_value=0.5)
    zoom = round(56 / rows.shape[-1])
    write_atomic(path, png_of(grid.repeat_interleave(zoom, 1).repeat_interleave(zoom, 2)))


def measure(evidence, task: Task, judge: Judge | None = None) -> None:
    """Records all figures and claims. With a judge also which share of the images it takes for the class asked for."""
    closed, over_bitfit, over_scale, shares, unchanged, forgotten = {}, {}, {}, {}, {}, {}
    for seed in SEEDS:
        whole, new_data = task.pretrained(seed), task.subset(NEW, seed)
        new, old = (everything(data.test_dataloader()) for data in (new_data, task.subset(OLD, seed)))
        frozen = min(task.loss(whole, new), task.loss(whole, new, told=False))
        methods = {arm: task.tuned(whole, arm, rate, seed) for arm, rate in task.rates.items()}
        reached = {arm: task.loss(method, new) for arm, method in methods.items()}
        evidence.figure("loss on new classes, frozen", frozen, seed)
        for arm, method in methods.items():
            evidence.figure(f"loss on new classes, {arm}", reached[arm], seed)
            evidence.figure(f"trained share, {arm}", share(method, whole), seed, "%")
        drawings = {arm: drawn(method, new["label"], new_data) for arm, method in {"frozen": whole, **methods}.items()}
        for arm, images in drawings.items():
            evidence.figure(f"Frechet distance, {arm}", distance(images, new_data), seed)
        if judge:
            for arm, images in {"real": new["image"], **drawings}.items():
                named = 100 * (judge(brightness(images, new_data)) == new["label"]).double().mean().item()
                evidence.figure(f"images named as the class asked for, {arm}", named, seed, "%")
        before, after = task.loss(whole, old), task.loss(methods["full"], old)
        evidence.figure("loss on old classes, before", before, seed)
        evidence.figure("loss on old classes, full", after, seed)
        if seed == SEEDS[0]:
            picture(evidence.path.with_suffix(".png"), drawings, new, new_data)
        forgotten[seed] = 100 * (after / before - 1)
        closed[seed] = 100 * (frozen - reached["DiffScaler"]) / (frozen - reached["full"])
        over_bitfit[seed] = 100 * (1 - reached["DiffScaler"] / reached["BitFit"])
        over_scale[seed] = 100 * (1 - reached["DiffScaler"] / reached["scale and shift"])
        shares[seed] = share(methods["DiffScaler"], whole)
        activate(methods["DiffScaler"].backbone)
        unchanged[seed] = abs(task.loss(methods["DiffScaler"], old) - before)
    evidence.note(
        f"{task.old_steps} steps on the old classes, then {task.steps} on the new ones, batch {task.batch}; rates by "
        f"one search on seed {SEARCH_SEED}: " + ", ".join(f"{arm} {rate:g}" for arm, rate in task.rates.items()) + "."
    )
    shown = f"results/{evidence.path.stem}.png, seed {SEEDS[0]}: real images, then drawn by frozen, "
    evidence.note(shown + ", ".join(task.rates) + ".")
    evidence.claim("share of the gap from frozen to full that DiffScaler closes", closed, at_least=70.0, unit="%")
    evidence.claim("trained share, DiffScaler", shares, at_most=15.0, unit="%")
    evidence.claim("loss of DiffScaler below BitFit", over_bitfit, at_least=0.0, unit="%")
    evidence.claim("loss of DiffScaler below scale and shift", over_scale, at_least=0.0, unit="%")
    evidence.claim("change of the loss on old classes with the bank removed", unchanged, at_most=0.0)
    evidence.claim("rise of the loss on old classes by full fine-tuning", forgotten, at_least=5.0, unit="%")


def search(task: Task) -> None:
    """Prints the validation loss of every rate that the search visits."""
    torch.set_num_threads(1)
    whole = task.pretrained(SEARCH_SEED, task.validation)
    new, old = (everything(task.subset(part, SEARCH_SEED, task.validation).val_dataloader()) for part in (NEW, OLD))
    print(f"frozen: {task.loss(whole, new):.4f} with classes, {task.loss(whole, new, told=False):.4f} without")
    print(f"loss on old classes: {task.loss(whole, old):.4f}", flush=True)
    for arm, start in task.rates.items():
        known: dict[int, float] = {}

        def held_out(power: int, arm: str = arm, start: float = start, known: dict[int, float] = known) -> float:
            if power not in known:
                rate = start * 3.0**power
                known[power] = task.loss(task.tuned(whole, arm, rate, SEARCH_SEED, task.validation), new)
                print(f"{arm} lr {rate:.2g}: {known[power]:.4f}", flush=True)
            return known[power]

        best = 0
        while (better := min((best - 1, best, best + 1), key=held_out)) != best:
            best = better
