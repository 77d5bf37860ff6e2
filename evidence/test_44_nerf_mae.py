"""NeRF-MAE (arXiv 2404.01300): hidden blocks of radiance fields are guessed; shapes are recognised from few labels.

Drawn rooms with boxes, spheres and cylinders of any colour, as grids of colour and opacity of up to 18^3 voxels. A
Swin transformer of two stages (width 36, patches of 3^3 voxels) is pre-trained on 96 rooms without labels, with three
quarters of the blocks of 2^3 patches hidden, then fine-tuned with a decoder on a few labelled rooms to name the kind of
each voxel, and judged by the mean intersection over union of the three kinds in other rooms. Arms with equal
steps of fine-tuning: NeRF-MAE and scratch. Ceiling: from scratch with the labels of all 96 rooms.
How well opacity of hidden voxels is guessed is told by its squared error in rooms not trained on, over that of the mean
grid of the training rooms; its ceiling is that of the grids without noise.
Rates are searched on rooms that no figure is taken on.
"""

from collections.abc import Sequence
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from lightning import seed_everything
from quiet import quiet_trainer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightspan.backbones.dense import DecodedMaps
from lightspan.backbones.grid_swin import GridSwin
from lightspan.datamodules.rendered.rooms import CLASSES, RoomSpace
from lightspan.datamodules.volume.data import cropped
from lightspan.datamodules.volume.rooms import drawn_rooms
from lightspan.methods.masked.nerf_mae import NeRFMAE
from lightspan.nn.decoders.unetr_decoder import UNETRDecoder
from lightspan.nn.masking.mask_samplers import CoarseMasks
from lightspan.objectives.dice import dice_loss
from lightspan.optim.schedules import WarmupCosine

SEEDS, SEARCH = (0, 1, 2), 100
SPACE, NOISE = RoomSpace(18, cells=2, fewest=3, most=4), 0.02
PATCH, WIDTH = (3, 3, 3), 36
UNLABELLED, LABELLED, TEST, BATCH, TUNED = 96, 6, 24, 4, 2
STEPS, TUNING = 480, 500
RATES = (1e-3, 3e-3, 1e-2)
MASKS = CoarseMasks((2, 2, 2))

Rooms = tuple[Tensor, Tensor, Tensor]


@cache
def rooms(count: int, seed: int, stream: int, noise: float = NOISE) -> Rooms:
    """Grids [N 4 D H W], classes [N D H W] with -1 for padding, and what lies inside, of rooms no other stream has."""
    drawn = drawn_rooms(SPACE, 10 * seed + stream, np.arange(count), noise)
    size, first = [SPACE.side] * 3, [0, 0, 0]
    grids = np.stack([cropped(room.values, first, size, 0) for room in drawn])
    classes = np.stack([cropped(room.segmentation, first, size, -1) for room in drawn])
    labels = torch.from_numpy(classes).long()
    return torch.from_numpy(grids).float(), labels, labels >= 0


def backbone() -> GridSwin:
    return GridSwin(PATCH, (4, 4, 4), 4, WIDTH, (2, 2), (3, 6), positions=True)


def decoder(channels: int) -> UNETRDecoder:
    return UNETRDecoder([WIDTH, 2 * WIDTH], channels, PATCH)


def method(rate: float) -> NeRFMAE:
    return NeRFMAE(
        backbone(),
        decoder(4),
        MASKS,
        optimizer=partial(torch.optim.AdamW, lr=rate, weight_decay=1e-3),
        lr_scheduler=partial(WarmupCosine, warmup=0.1, final=0.0),
    )


def chosen_rows(count: int, batch: int, steps: int, seed: int) -> list[np.ndarray]:
    generator = np.random.default_rng(seed)
    return [generator.choice(count, batch, replace=False) for _ in range(steps)]


def turned(row: np.ndarray, step: int, *parts: Tensor) -> list[Tensor]:
    """Quarter turns and a flip about the vertical axis, the same for all of a batch."""
    draws = np.random.default_rng([step, *row.tolist()])
    turns, flip = int(draws.integers(4)), bool(draws.integers(2))
    found = [part.rot90(turns, (-2, -1)) for part in parts]
    return [part.flip(-1) if flip else part for part in found]


def pretrained(seed: int, rate: float, steps: int) -> NeRFMAE:
    """In evaluation mode; with steps=0 untrained."""
    seed_everything(seed, verbose=False)
    model = method(rate)
    if steps:
        grids, _, inside = rooms(UNLABELLED, seed, 0)

        def batch(numbered: tuple[int, np.ndarray]) -> dict[str, Tensor]:
            step, row = numbered
            volume, within = turned(row, step, grids[row], inside[row])
            return {"volume": volume, "inside": within, "index": torch.from_numpy(row)}

        rows = [*enumerate(chosen_rows(UNLABELLED, BATCH, steps, seed))]
        batches = DataLoader(rows, batch_size=None, collate_fn=batch)
        quiet_trainer(max_steps=steps, gradient_clip_val=0.1).fit(model, batches)
    return model.eval()


@torch.no_grad()
def hidden_error(model: NeRFMAE, given: Rooms, guess: Tensor | None = None) -> float:
    """Mean squared error of the opacity of hidden voxels, under the masks of NeRF-MAE for all.

    Args:
        guess: what is judged in place of what the model guesses, [N 4 D H W] or [4 D H W].
    """
    grids, _, inside = given
    patches = tuple(side // p for side, p in zip(grids.shape[2:], PATCH, strict=True))
    hidden = torch.from_numpy(MASKS.draw(patches, 0, range(len(grids))))
    at = model.voxels(hidden, grids) & inside
    found = model.guess(grids, hidden)[:, 3].sigmoid() if guess is None else guess[..., 3, :, :, :].expand_as(inside)
    return float((found - grids[:, 3])[at].square().mean())


class Namer(nn.Module):
    """The kind of each voxel."""

    def __init__(self) -> None:
        super().__init__()
        self.maps, self.head = DecodedMaps(backbone(), decoder(16)), nn.Conv3d(16, len(CLASSES), 1)

    def forward(self, grids: Tensor) -> Tensor:
        return self.head(self.maps(grids))


def tuned(start: GridSwin, given: Rooms, rate: float, seed: int, steps: int) -> Namer:
    """All weights of a copy of the encoder, behind a new decoder."""
    seed_everything(seed, verbose=False)
    network = Namer()
    network.maps.encoder.load_state_dict(start.state_dict())
    grids, classes, _ = given
    optimizer = torch.optim.AdamW(network.parameters(), lr=rate, weight_decay=1e-3)
    schedule = WarmupCosine(optimizer, max(steps, 1), warmup=0.1, final=0.0)
    for step, row in enumerate(chosen_rows(len(grids), TUNED, steps, seed)):
        volume, labels = turned(row, step, grids[row], classes[row])
        optimizer.zero_grad()
        logits = network(volume)
        (F.cross_entropy(logits, labels, ignore_index=-1) + dice_loss(logits, labels)).backward()
        optimizer.step()
        schedule.step()
    return network.eval()


@torch.no_grad()
def overlap(network: Namer, given: Rooms) -> float:
    """Mean over the kinds of objects of the intersection over union of all rooms' voxels together, in per cent."""
    grids, classes, inside = given
    guess = torch.cat([network(part).argmax(dim=1) for part in grids.split(BATCH)])
    scores = []
    for kind in range(CLASSES.index("room") + 1, len(CLASSES)):
        a, b = (guess == kind) & inside, classes == kind
        scores.append(float((a & b).sum()) / max(float((a | b).sum()), 1.0))
    return 100 * float(np.mean(scores))


def compare(evidence: Any, seeds: Sequence[int] = SEEDS, steps: int = STEPS, tuning: int = TUNING) -> None:
    held = rooms(TEST, SEARCH, 2)
    rate = evidence.search(
        {"NeRF-MAE, before tuning": lambda rate: -hidden_error(pretrained(SEARCH, rate, steps), held)},
        RATES,
        what="rate of pre-training",
        seed=SEARCH,
    )["NeRF-MAE, before tuning"]

    def namer(arm: str, seed: int, start: GridSwin, rate: float, steps: int = tuning) -> Namer:
        given = rooms(UNLABELLED, seed, 0) if arm == "all labels" else rooms(LABELLED, seed, 1)
        return tuned(start, given, rate, seed, steps)

    blank = pretrained(SEARCH, 1.0, 0).backbone
    starts = {"NeRF-MAE": pretrained(SEARCH, rate, steps).backbone, "scratch": blank, "all labels": blank}
    rates = evidence.search(
        {arm: lambda rate, arm=arm: overlap(namer(arm, SEARCH, starts[arm], rate), held) for arm in starts},
        RATES,
        what="rate of fine-tuning",
        seed=SEARCH,
    )
    named: dict[str, dict[int, float]] = {arm: {} for arm in starts}
    error: dict[str, dict[int, float]] = {name: {} for name in ("NeRF-MAE", "untrained", "mean grid", "clean grids")}
    learned: dict[str, dict[int, float]] = {name: {} for name in ("scratch", "no step")}
    for seed in seeds:
        test, known = rooms(TEST, seed, 2), rooms(LABELLED, seed, 1)
        whole, empty = (pretrained(seed, rate, count) for count in (steps, 0))
        error["NeRF-MAE"][seed] = hidden_error(whole, test)
        error["untrained"][seed] = hidden_error(empty, test)
        error["mean grid"][seed] = hidden_error(empty, test, rooms(UNLABELLED, seed, 0)[0].mean(dim=0))
        error["clean grids"][seed] = hidden_error(empty, test, rooms(TEST, seed, 2, 0.0)[0])
        for arm in named:
            network = namer(arm, seed, (whole if arm == "NeRF-MAE" else empty).backbone, rates[arm])
            named[arm][seed] = overlap(network, test)
            if arm == "scratch":
                learned["scratch"][seed] = overlap(network, known)
                learned["no step"][seed] = overlap(namer(arm, seed, empty.backbone, 1.0, 0), known)
    for name, of_seed in named.items():
        for seed, value in of_seed.items():
            evidence.figure(f"mean intersection over union of kinds, {name}", value, seed, "%")
    for name, of_seed in error.items():
        for seed, value in of_seed.items():
            evidence.figure(f"squared error of hidden opacity, {name}", value, seed)
    learned_by = {
        name: {seed: -10 * float(np.log10(of_seed[seed])) for seed in seeds} for name, of_seed in error.items()
    }
    evidence.gate("NeRF-MAE", learned_by["NeRF-MAE"], learned_by["untrained"], by=3.0, unit="dB")
    evidence.gate("scratch", learned["scratch"], learned["no step"], by=10.0, unit="points")

    def less(arm: str) -> dict[int, float]:
        return {seed: named[arm][seed] - named["scratch"][seed] for seed in seeds}

    evidence.claim(
        "mean intersection over union of kinds, NeRF-MAE minus scratch", less("NeRF-MAE"), at_least=5.0, unit="points",
        arms=("NeRF-MAE", "scratch"), floor=less("scratch"), ceiling=less("all labels"),
    )  # fmt: skip
    ratio = {name: {seed: of[seed] / error["mean grid"][seed] for seed in seeds} for name, of in error.items()}
    evidence.claim(
        "squared error of hidden opacity, NeRF-MAE over the mean grid", ratio["NeRF-MAE"], at_most=0.5,
        arms=("NeRF-MAE",), floor=ratio["untrained"], ceiling=ratio["clean grids"],
    )  # fmt: skip


def test_nerf_mae_on_drawn_rooms(evidence) -> None:
    compare(evidence)
