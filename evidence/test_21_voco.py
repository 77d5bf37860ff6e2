"""VoCo (arXiv 2402.17300) on drawn trunks, when four are labelled: against random weights, and with overlaps mixed up.

Trunks of 16 x 48 x 48 voxels with twelve organs, several of one grey, so that only their surroundings tell them apart.
The way down of a U-Net is pre-trained on 60 trunks without labels, on a grid of 3 x 3 base crops and four crops at
random places; then a U-Net starts from it, is fine-tuned on four labelled trunks, and labels 12 others. The score is
Dice, mean over organs and trunks. Arms, with equal steps: VoCo; VoCo whose overlaps are those of other crops of the
batch; random weights. The rates of pre-training and then of fine-tuning are searched among the same for all, on trunks
that no figure is taken on.

Floor: overlaps mixed up; of the error in place the untrained network. Ceiling: a U-Net pre-trained on the labels of all
60, whose way down is kept; of the error in place the overlaps themselves. Gate: the error in place; of random weights
the Dice of the trunks that they are fine-tuned on.
"""

from collections.abc import Mapping
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from quiet import quiet_trainer
from torch import Tensor, nn
from torch.nn import functional as F

from lightspan.backbones.dense import PooledMaps, UNet, UNetEncoder
from lightspan.core.collate import collated
from lightspan.datamodules.volume.augment import VolumeAugmentation
from lightspan.datamodules.volume.data import VolumeSamples
from lightspan.datamodules.volume.phantoms import ORGANS, Phantoms
from lightspan.evaluation.dense.segmentation_scores import segmentation_scores
from lightspan.methods.contrastive.voco import VoCo
from lightspan.nn.base_crops import base_crops_of, by_volume
from lightspan.nn.heads.projector import Projector
from lightspan.objectives.overlaps import positive_cosines
from lightspan.optim.schedules import WarmupCosine

SEEDS, SEARCH = (0, 1, 2, 3, 4), 100
UNLABELLED, LABELLED, TEST = 60, 4, 12
WIDTH, LEVELS, SIZE, BASES, CROPS = 8, 3, 16, (1, 3, 3), 4
STEPS, TUNING, BATCH = 400, 150, 4
RATES, TUNING_RATES, TUNING_RATE = (1e-3, 3e-3, 1e-2), (1e-3, 3e-3, 1e-2), 3e-3
AUGMENT = VolumeAugmentation(flip=(0.2, 0.2, 0.2), turn=0.2, offset=0.1)
PRETRAINED = ("VoCo", "overlaps mixed up", "true labels")


class MixedUp(VoCo):
    """The overlaps of each crop are those of another crop of the batch."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        overlap_NK = batch["overlap"].flatten(0, 1)
        order = torch.randperm(len(overlap_NK), generator=torch.Generator().manual_seed(self.global_step))
        return super().training_step(batch | {"overlap": overlap_NK[order].view_as(batch["overlap"])}, batch_idx)


@cache
def trunks(seed: int, crops: int | None) -> Phantoms:
    """Of the last patients, the validation set, some are labelled and the others test."""
    whole = {"size": SIZE, "bases": BASES, "crops": crops} if crops else {"size": (16, 48, 48)}
    data = Phantoms(
        UNLABELLED + LABELLED + TEST, 16, 48, 0.0, noise=0.06, draw_seed=seed, val_size=LABELLED + TEST,
        batch_size=BATCH, augment=AUGMENT if crops else None, seed=seed, **whole,
    )  # fmt: skip
    data.setup()
    return data


@cache
def labelled(seed: int, part: str) -> tuple[Tensor, Tensor]:
    """Whole trunks [N 1 16 48 48] and the organ of each voxel."""
    data = trunks(seed, None)
    samples = data.bank if part == "unlabelled" else data.val
    rows = {"unlabelled": range(UNLABELLED), "tuning": range(LABELLED), "test": range(LABELLED, LABELLED + TEST)}[part]
    found = [samples.sample(row, 0) for row in rows]
    return torch.stack([one["volume"] for one in found]), torch.stack([one["segmentation"] for one in found])


def segmenter() -> nn.Sequential:
    return nn.Sequential(UNet(1, WIDTH, LEVELS, axes=3), nn.Conv3d(WIDTH, len(ORGANS), 1))


def segmentation_loss(logits_BK: Tensor, label_B: Tensor) -> Tensor:
    """Cross entropy, and 1 - Dice of the probabilities, mean over organs: of K maps and labels of any axes."""
    guess_BK, truth_BK = logits_BK.softmax(dim=1), F.one_hot(label_B, len(ORGANS)).movedim(-1, 1)
    axes = [0, *range(2, logits_BK.ndim)]
    both_K, either_K = (guess_BK * truth_BK).sum(axes), (guess_BK + truth_BK).sum(axes)
    return F.cross_entropy(logits_BK, label_B) + 1 - (2 * both_K / (either_K + 1e-5))[1:].mean()


def fitted(network: nn.Module, given: tuple[Tensor, Tensor], steps: int, rate: float, seed: int) -> nn.Module:
    """Trained to label voxels, in evaluation mode."""
    (x, y), generator = given, np.random.default_rng(seed)
    optimizer = torch.optim.AdamW(network.parameters(), lr=rate, weight_decay=0.01)
    schedule = WarmupCosine(optimizer, max(steps, 1), final=0.0)
    for _ in range(steps):
        rows = generator.choice(len(x), 2, replace=False)
        optimizer.zero_grad()
        segmentation_loss(network.train()(x[rows]), y[rows]).backward()
        optimizer.step()
        schedule.step()
    return network.eval()


@cache
def pretrained(arm: str, rate: float, seed: int, steps: int) -> Mapping[str, Tensor]:
    """Weights of the way down, and of a method the figures of its pretext."""
    torch.manual_seed(seed)
    if arm == "true labels":
        whole = fitted(segmenter(), labelled(seed, "unlabelled"), steps, rate, seed)[0]
        names = UNetEncoder(1, WIDTH, LEVELS, axes=3).state_dict()
        return {name: tensor for name, tensor in whole.state_dict().items() if name in names}
    method = built(arm, rate, seed)
    if steps:
        quiet_trainer(max_steps=steps, gradient_clip_val=3.0).fit(method, datamodule=trunks(seed, CROPS))
    return dict(method.backbone.encoder.state_dict()) | {f"_{name}": x for name, x in places(method, seed).items()}


def built(arm: str, rate: float, seed: int) -> VoCo:
    torch.manual_seed(seed)
    network = PooledMaps(UNetEncoder(1, WIDTH, LEVELS, axes=3))
    return (MixedUp if arm == "overlaps mixed up" else VoCo)(
        network,
        Projector(network.num_features, [256, 256], 256),
        optimizer=partial(torch.optim.AdamW, lr=rate, weight_decay=0.01),
        lr_scheduler=partial(WarmupCosine, final=0.0),
    )


@torch.no_grad()
def places(method: VoCo, seed: int) -> dict[str, Tensor]:
    """Of crops of held-out trunks: how far the mean place of base crops, weighted by similarity, is from theirs, over
    the same of the middle of all; and weighted by overlap.
    """
    data = trunks(seed, CROPS)
    assert data.train is not None
    held = VolumeSamples(data.train.archive, data.val.numbers, data.size, True, 8, None, BASES)
    batch = collated([held.sample(row, row) for row in range(len(held))])
    crops, overlap_BMK = base_crops_of(batch, "VoCo")
    bases_BKD, crops_BMD = by_volume(method.eval().student(crops), overlap_BMK)
    at_BV3 = batch["corner"].float()
    at_BK3, at_BM3 = at_BV3[:, : overlap_BMK.shape[2]], at_BV3[:, overlap_BMK.shape[2] :]

    def error(weight_BMK: Tensor) -> Tensor:
        guess_BM3 = (weight_BMK / weight_BMK.sum(dim=2, keepdim=True).clamp_min(1e-12)) @ at_BK3
        return (guess_BM3 - at_BM3).norm(dim=2).mean()

    middle = error(torch.ones_like(overlap_BMK))
    return {"error": error(positive_cosines(crops_BMD, bases_BKD)) / middle, "least": error(overlap_BMK) / middle}


@torch.no_grad()
def dice(network: nn.Module, given: tuple[Tensor, Tensor]) -> float:
    """Mean over organs and trunks, in per cent."""
    guesses = torch.cat([network(x[None]).argmax(dim=1) for x in given[0]])
    found = [segmentation_scores(*pair, len(ORGANS)).dice[1:] for pair in zip(guesses, given[1], strict=True)]
    return 100 * float(np.nanmean(np.stack(found)))


def tuned(arm: str, rates: tuple[float, float], seed: int, steps: int, tuning: int) -> dict[str, float]:
    """Dice of other trunks and of those it is tuned on, before and after; the figures of the pretext."""
    known = pretrained(arm, rates[0], seed, steps) if arm in PRETRAINED else {}
    torch.manual_seed(seed)
    network = segmenter()
    network[0].load_state_dict({name: x for name, x in known.items() if not name.startswith("_")}, strict=False)
    own = labelled(seed, "tuning")
    before = dice(network.eval(), own)
    fitted(network, own, tuning, rates[1], seed)
    pretext = {name[1:]: float(x) for name, x in known.items() if name.startswith("_")}
    return {"dice": dice(network, labelled(seed, "test")), "own": dice(network, own), "own before": before} | pretext


def compare(evidence: Any, seeds: tuple[int, ...] = SEEDS, steps: int = STEPS, tuning: int = TUNING) -> None:
    def score(arm: str, rate: float, tuning_rate: float) -> float:
        return tuned(arm, (rate, tuning_rate), SEARCH, steps, tuning)["dice"]

    before = evidence.search(
        {arm: lambda rate, arm=arm: score(arm, rate, TUNING_RATE) for arm in PRETRAINED}, RATES,
        what="rate of pre-training", seed=SEARCH,
    )  # fmt: skip
    before["random weights"] = 0.0
    after = evidence.search(
        {arm: lambda rate, arm=arm: score(arm, before[arm], rate) for arm in before}, TUNING_RATES,
        what="rate of fine-tuning", seed=SEARCH,
    )  # fmt: skip
    runs = {arm: {s: tuned(arm, (before[arm], after[arm]), s, steps, tuning) for s in seeds} for arm in before}
    for arm, of_seed in runs.items():
        for seed, found in of_seed.items():
            evidence.figure(f"Dice, {arm}", found["dice"], seed, "%")
    untrained = {seed: places(built("VoCo", 1e-3, seed), seed) for seed in seeds}
    learned = {seed: found["error"] for seed, found in runs["VoCo"].items()}
    guessed = {seed: float(found["error"]) for seed, found in untrained.items()}
    evidence.gate("VoCo", learned, guessed, by=0.2, lower_is_better=True)
    own = {what: {s: found[what] for s, found in runs["random weights"].items()} for what in ("own", "own before")}
    evidence.gate("random weights", own["own"], own["own before"], by=20, unit="points")
    evidence.note(
        f"{UNLABELLED} trunks without labels, {LABELLED} with, {TEST} to test; {steps} steps of {BATCH} trunks before, "
        f"{tuning} steps of 2 on labels. Rates on seed {SEARCH}, whose trunks are others."
    )

    def gain(arm: str) -> dict[int, float]:
        return {seed: runs[arm][seed]["dice"] - runs["random weights"][seed]["dice"] for seed in seeds}

    arms = ("VoCo", "random weights")
    evidence.claim(
        "Dice with four labelled trunks, VoCo minus random weights", gain("VoCo"), at_least=5.0, unit="points",
        floor=gain("overlaps mixed up"), ceiling=gain("true labels"), arms=arms,
    )  # fmt: skip
    evidence.claim(
        "Dice with four labelled trunks, overlaps mixed up minus random weights", gain("overlaps mixed up"),
        at_most=1.0, unit="points", floor=gain("VoCo"), ceiling=dict.fromkeys(seeds, 0.0), arms=arms,
    )  # fmt: skip
    evidence.claim(
        "error in place of held-out crops, VoCo over the middle",
        learned, at_most=1 / 3, floor=guessed,
        ceiling={seed: float(found["least"]) for seed, found in untrained.items()}, arms=("VoCo",),
    )  # fmt: skip


def test_voco(evidence: Any) -> None:
    compare(evidence)
