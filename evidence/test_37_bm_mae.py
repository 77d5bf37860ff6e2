"""BM-MAE (arXiv 2505.00568): one encoder for every subset of registered modalities, and what is missing guessed.

Drawn trunks in three registered contrasts, 12 x 24 x 24 voxels; the second does not show lesions. A transformer
(width 96, 4 blocks, patches of 4^3 voxels) is pre-trained on 96 patients without labels, then for each of the seven
subsets of contrasts fine-tuned on 4 labelled patients to tell 12 organs, and judged by the mean Dice of 24 others. Arms
with equal steps of fine-tuning: BM-MAE, one pre-training for all subsets; scratch; for subsets of a single contrast
also an encoder pre-trained on that contrast alone. Ceiling: pre-trained by the organs of all 96 patients. Synthesis:
PSNR of the second and third contrast, guessed from the first, against the mean volume of the training patients; its
ceiling is the same network trained to translate the first contrast into the others alone.
Rates are searched on patients that no figure is taken on.
"""

from collections.abc import Sequence
from functools import cache, partial
from itertools import chain, combinations
from typing import Any

import numpy as np
import torch
from lightning import seed_everything
from registered_volumes import (
    DEPTH,
    HEADS,
    PATCH,
    RATES,
    STEPS,
    WIDTH,
    FirstSeen,
    chosen_rows,
    pretrained,
    psnr,
    synthesised,
)
from torch import Tensor, nn
from torch.nn import functional as F

from lightspan.backbones.placed_vit import ModalityViT
from lightspan.datamodules.volume.phantoms import ORGANS, Phantoms
from lightspan.nn.sequences.patches import unpatchify
from lightspan.optim.schedules import WarmupCosine

SEEDS, SEARCH = (0, 1, 2), 100
SIDES = (12, 24, 24)
UNLABELLED, LABELLED, TEST, TUNING = 96, 4, 24, 60
SUBSETS = tuple(chain.from_iterable(combinations(range(3), count) for count in (1, 2, 3)))


@cache
def patients(count: int, seed: int, stream: int) -> tuple[Tensor, Tensor]:
    """Volumes [N 3 D H W] and organs [N D H W] of patients that no other stream has."""
    cuts, side, _ = SIDES
    found = Phantoms(count + 1, cuts, side, val_size=1, contrasts=3, draw_seed=10 * seed + stream).find()
    read = [found.archive.read(number) for number in range(count)]
    volumes, organs = (np.stack([getattr(one, name) for one in read]) for name in ("values", "segmentation"))
    return torch.from_numpy(volumes).float(), torch.from_numpy(organs).long()


class Segmenter(nn.Module):
    """Organs of voxels, from the mean of a place's tokens over the contrasts that there are."""

    def __init__(self, backbone: ModalityViT) -> None:
        super().__init__()
        self.backbone, self.head = backbone, nn.Linear(WIDTH, len(ORGANS) * int(np.prod(PATCH)))

    def forward(self, volumes: Tensor, present: Tensor) -> Tensor:
        grid = self.backbone.grid(volumes)[1:]
        return unpatchify(self.head(self.backbone.at_places(volumes, present)), PATCH, grid)


def shown(subset: Sequence[int], rows: int) -> Tensor:
    present = torch.zeros(rows, 3, dtype=torch.bool)
    present[:, list(subset)] = True
    return present


def tuned(
    backbone: ModalityViT, given: tuple[Tensor, Tensor], subsets: Sequence[Sequence[int]], rate: float, seed: int,
    steps: int,
) -> Segmenter:  # fmt: skip
    """All weights of a copy; a step sees one of the subsets."""
    seed_everything(seed, verbose=False)
    network = Segmenter(ModalityViT(PATCH, 3, WIDTH, DEPTH, HEADS))
    network.backbone.load_state_dict(backbone.state_dict())
    (volumes, organs), generator = given, np.random.default_rng(seed)
    optimizer = torch.optim.AdamW(network.parameters(), lr=rate, weight_decay=0.05)
    schedule = WarmupCosine(optimizer, max(steps, 1), final=0.0)
    for row in chosen_rows(len(volumes), steps, seed):
        subset = subsets[generator.integers(len(subsets))]
        optimizer.zero_grad()
        F.cross_entropy(network(volumes[row], shown(subset, len(row))), organs[row]).backward()
        optimizer.step()
        schedule.step()
    return network.eval()


@torch.no_grad()
def dice(network: Segmenter, given: tuple[Tensor, Tensor], subset: Sequence[int]) -> float:
    """Mean over organs of the Dice of all patients' voxels together, in per cent."""
    volumes, organs = given
    guess, scores = network(volumes, shown(subset, len(volumes))).argmax(dim=1), []
    for organ in range(1, len(ORGANS)):
        a, b = guess == organ, organs == organ
        scores.append(2 * float((a & b).sum()) / max(float(a.sum() + b.sum()), 1.0))
    return 100 * float(np.mean(scores))


def of_one(volumes: Tensor, modality: int, seed: int, rate: float, steps: int) -> ModalityViT:
    """Pre-trained on a single contrast, whose map of patches is at its place among three; the others are untrained."""
    alone = pretrained(volumes[:, modality : modality + 1], seed, rate, steps).backbone.state_dict()
    torch.manual_seed(seed)
    whole = ModalityViT(PATCH, 3, WIDTH, DEPTH, HEADS)
    renamed = {name.replace("parts.0.", f"parts.{modality}."): weight for name, weight in alone.items()}
    whole.load_state_dict(whole.state_dict() | renamed)
    return whole


def untrained(seed: int) -> ModalityViT:
    return pretrained(torch.zeros(1, 3, *SIDES), seed, 1.0, steps=0).backbone


def encoder(arm: str, seed: int, rate: float, steps: int) -> ModalityViT:
    """Of one arm, as fine-tuning starts from it."""
    volumes, organs = patients(UNLABELLED, seed, 0)
    if arm == "organs of all":
        return tuned(untrained(seed), (volumes, organs), SUBSETS, rate, seed, steps).backbone
    return untrained(seed) if arm == "scratch" else pretrained(volumes, seed, rate, steps).backbone


def compare(evidence: Any, seeds: Sequence[int] = SEEDS, steps: int = STEPS, tuning: int = TUNING) -> None:
    held = patients(TEST, SEARCH, 2)
    searched = patients(UNLABELLED, SEARCH, 0)[0]
    rates = evidence.search(
        {
            "BM-MAE": lambda rate: synthesised(pretrained(searched, SEARCH, rate, steps), held[0]),
            "translation": lambda rate: synthesised(pretrained(searched, SEARCH, rate, steps, FirstSeen()), held[0]),
        },
        RATES,
        what="rate of pre-training",
        seed=SEARCH,
    )
    rates |= {"scratch": rates["BM-MAE"], "organs of all": rates["BM-MAE"]}
    starts = {arm: encoder(arm, SEARCH, rates[arm], steps) for arm in ("BM-MAE", "scratch", "organs of all")}

    def score(arm: str, rate: float) -> float:
        few = patients(LABELLED, SEARCH, 1)
        return float(np.mean([dice(tuned(starts[arm], few, [s], rate, SEARCH, tuning), held, s) for s in SUBSETS]))

    tuning_rates = evidence.search(
        {arm: partial(score, arm) for arm in starts}, RATES, what="rate of fine-tuning", seed=SEARCH
    )
    found: dict[str, dict[int, list[float]]] = {arm: {} for arm in (*starts, "its contrast alone")}
    sound: dict[str, dict[int, float]] = {arm: {} for arm in ("BM-MAE", "translation", "mean", "untrained")}
    learned: dict[str, dict[int, float]] = {arm: {} for arm in ("scratch", "no step")}
    for seed in seeds:
        volumes, few, test = patients(UNLABELLED, seed, 0)[0], patients(LABELLED, seed, 1), patients(TEST, seed, 2)
        whole = pretrained(volumes, seed, rates["BM-MAE"], steps)
        sound["BM-MAE"][seed] = synthesised(whole, test[0])
        translated = pretrained(volumes, seed, rates["translation"], steps, FirstSeen())
        sound["translation"][seed] = synthesised(translated, test[0])
        sound["untrained"][seed] = synthesised(pretrained(volumes, seed, 1.0, 0), test[0])
        sound["mean"][seed] = psnr(volumes.mean(dim=0)[None, 1:], test[0][:, 1:])
        backbones = {"BM-MAE": whole.backbone} | {
            arm: encoder(arm, seed, rates[arm], steps) for arm in ("scratch", "organs of all")
        }
        for arm, start in backbones.items():
            networks = [tuned(start, few, [subset], tuning_rates[arm], seed, tuning) for subset in SUBSETS]
            pairs = list(zip(networks, SUBSETS, strict=True))
            found[arm][seed] = [dice(network, test, subset) for network, subset in pairs]
            if arm == "scratch":
                learned["scratch"][seed] = float(np.mean([dice(network, few, subset) for network, subset in pairs]))
        blank = tuned(backbones["scratch"], few, SUBSETS, 1.0, seed, 0)
        learned["no step"][seed] = float(np.mean([dice(blank, few, subset) for subset in SUBSETS]))
        found["its contrast alone"][seed] = [
            dice(tuned(of_one(volumes, m, seed, rates["BM-MAE"], steps), few, [(m,)], tuning_rates["BM-MAE"], seed,
                       tuning), test, (m,))
            for m in range(3)
        ]  # fmt: skip
    for arm, of_seed in found.items():
        for seed, scores in of_seed.items():
            for subset, value in zip(SUBSETS, scores, strict=False):
                evidence.figure(f"Dice of contrasts {'+'.join(map(str, subset))}, {arm}", value, seed, "%")
    for arm, of_seed in sound.items():
        for seed, value in of_seed.items():
            evidence.figure(f"PSNR of two contrasts from the first, {arm}", value, seed, "dB")
    evidence.gate("BM-MAE", sound["BM-MAE"], sound["untrained"], by=3.0, unit="dB")
    evidence.gate("scratch", learned["scratch"], learned["no step"], by=10.0, unit="points of Dice")

    def less(a: dict[int, float], b: dict[int, float]) -> dict[int, float]:
        return {seed: a[seed] - b[seed] for seed in seeds}

    def mean(arm: str, count: int = len(SUBSETS)) -> dict[int, float]:
        return {seed: float(np.mean(found[arm][seed][:count])) for seed in seeds}

    evidence.claim(
        "PSNR of two contrasts from the first, BM-MAE minus the mean volume", less(sound["BM-MAE"], sound["mean"]),
        at_least=4.0, unit="dB", arms=("BM-MAE",), floor=less(sound["untrained"], sound["mean"]),
        ceiling=less(sound["translation"], sound["mean"]),
    )  # fmt: skip
    evidence.claim(
        "mean Dice of the seven subsets, BM-MAE minus scratch", less(mean("BM-MAE"), mean("scratch")), at_least=3.0,
        unit="points", arms=("BM-MAE", "scratch"), floor=less(mean("scratch"), mean("scratch")),
        ceiling=less(mean("organs of all"), mean("scratch")),
    )  # fmt: skip
    worst = {
        arm: {seed: float(np.min(np.subtract(found[arm][seed], found["scratch"][seed]))) for seed in seeds}
        for arm in ("BM-MAE", "organs of all")
    }
    blank_loss = {seed: -float(np.max(found["scratch"][seed])) for seed in seeds}
    evidence.claim(
        "Dice of the subset with the least gain, BM-MAE minus scratch", worst["BM-MAE"], at_least=-1.0, unit="points",
        arms=("BM-MAE", "scratch"), floor=blank_loss, ceiling=worst["organs of all"],
    )  # fmt: skip
    evidence.claim(
        "mean Dice of single contrasts, BM-MAE minus its contrast alone",
        less(mean("BM-MAE", 3), mean("its contrast alone")), at_least=-1.0, unit="points", arms=("BM-MAE",),
        floor=less(mean("scratch", 3), mean("its contrast alone")),
        ceiling=less(mean("organs of all", 3), mean("its contrast alone")),
    )  # fmt: skip


def test_bm_mae_on_trunks(evidence) -> None:
    compare(evidence)
