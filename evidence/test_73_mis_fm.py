"""Volume Fusion (MIS-FM, arXiv 2306.16925) on drawn trunks, when four are labelled: all of the network, its way down.

The trunks and the tuning are those of the evidence on VoCo. A U-Net is pre-trained on 60 trunks without labels, on
mixtures of two crops; then it is fine-tuned on four labelled trunks, and labels 12 others. The score is Dice, mean over
organs and trunks. Arms, with equal steps: all its weights; those of its way down alone; random weights. Rates are
searched on trunks that no figure is taken on: that of pre-training by the Dice of coefficients, and then that of
fine-tuning among the same for all; the floor and the ceiling have those of the first arm.

Floor: pre-training on maps of other mixtures of the batch; of the second claim random weights. Ceiling: a U-Net
pre-trained on the labels of all 60. Gate: the Dice of coefficients on held-out trunks; of random weights that of the
trunks that they are fine-tuned on.
"""

from collections.abc import Mapping
from functools import cache, partial
from typing import Any

import torch
from labelled_trunks import BATCH, LABELLED, TEST, UNLABELLED, network, supervised, trunks, tuned, way_down
from quiet import quiet_trainer
from torch import Tensor

from lightspan.core.collate import collated
from lightspan.datamodules.volume.augment import VolumeAugmentation
from lightspan.datamodules.volume.data import VolumeSamples
from lightspan.datamodules.volume.phantoms import Phantoms
from lightspan.methods.supervised.volume_fusion import VolumeFusion
from lightspan.nn.masking.coefficient_maps import CoefficientMaps
from lightspan.objectives.dice import dice_loss
from lightspan.optim.schedules import WarmupCosine

SEEDS, SEARCH = (0, 1, 2), 100
STEPS, TUNING = 250, 120
RATES, TUNING_RATES = (1e-3, 3e-3, 1e-2), (1e-2, 3e-2, 1e-1)
SIZE, EDGES = (16, 32, 32), (4, 12)
AUGMENT = VolumeAugmentation(flip=(0.5, 0.5, 0.5), scale=0.3, gain=0.1, offset=0.05, gamma=0.4)
WHOLE, DOWN, NONE = "Volume Fusion", "its way down", "random weights"
MIXED_UP, TRUE = "maps mixed up", "true labels"


class MixedUp(VolumeFusion):
    """Learns the map of another mixture of the batch."""

    def fused(self, front: Tensor, back: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        mixture, label = super().fused(front, back, index)
        return mixture, label.roll(1, 0)


@cache
def crops(seed: int) -> Phantoms:
    return trunks(seed, AUGMENT, size=SIZE, crops=2)


def built(arm: str, rate: float, seed: int) -> VolumeFusion:
    torch.manual_seed(seed)
    return (MixedUp if arm == MIXED_UP else VolumeFusion)(
        network(), CoefficientMaps(edges=EDGES, seed=seed),
        optimizer=partial(torch.optim.Adam, lr=rate, weight_decay=1e-5),
        lr_scheduler=partial(WarmupCosine, final=0.0),
    )  # fmt: skip


@torch.no_grad()
def told(method: VolumeFusion, seed: int) -> float:
    """Dice of the coefficients of mixtures of held-out trunks, mean over classes."""
    data = crops(seed)
    assert data.train is not None
    held = VolumeSamples(data.train.archive, data.val.numbers, data.size, True, 2, None)
    batch = collated([held.sample(row, row) for row in range(len(held))])
    mixture, label = VolumeFusion.fused(method, *batch["views"], batch["index"])
    guess = torch.nn.functional.one_hot(method.eval()(mixture)[0].argmax(dim=1), method.coefficients.levels + 1)
    return 1 - float(dice_loss(1e4 * guess.movedim(-1, 1).float(), label, smooth=1e-5, first=0))


@cache
def pretrained(arm: str, rate: float, seed: int, steps: int) -> tuple[Mapping[str, Tensor], float]:
    """Weights of the U-Net, and the Dice of its pretext."""
    if arm == TRUE:
        return supervised(rate, seed, steps), 0.0
    method = built(arm, rate, seed)
    if steps:
        quiet_trainer(max_steps=steps).fit(method, datamodule=crops(seed))
    return method.backbone.state_dict(), told(method, seed)


def run(arm: str, rates: tuple[float, float], seed: int, steps: int, tuning: int) -> dict[str, float]:
    """Dice of other trunks and of those it is tuned on, before and after, and that of the pretext."""
    known, pretext = ({}, 0.0) if arm == NONE else pretrained(WHOLE if arm == DOWN else arm, rates[0], seed, steps)
    if arm == DOWN:
        known = {name: tensor for name, tensor in known.items() if name in way_down().state_dict()}
    return tuned(known, rates[1], seed, tuning) | {"pretext": pretext}


def compare(evidence: Any, seeds: tuple[int, ...] = SEEDS, steps: int = STEPS, tuning: int = TUNING) -> None:
    early = evidence.search(
        {f"{WHOLE}, before tuning": lambda rate: pretrained(WHOLE, rate, SEARCH, steps)[1]}, RATES,
        what="rate of pre-training", seed=SEARCH,
    )  # fmt: skip
    before = dict.fromkeys((WHOLE, DOWN, MIXED_UP), early[f"{WHOLE}, before tuning"]) | {TRUE: 3e-3, NONE: 0.0}
    after = evidence.search(
        {
            arm: partial(lambda arm, rate: run(arm, (before[arm], rate), SEARCH, steps, tuning)["dice"], arm)
            for arm in (WHOLE, DOWN, NONE)
        },
        TUNING_RATES, what="rate of fine-tuning", seed=SEARCH,
    )  # fmt: skip
    after |= dict.fromkeys((MIXED_UP, TRUE), after[WHOLE])
    runs = {arm: {s: run(arm, (before[arm], after[arm]), s, steps, tuning) for s in seeds} for arm in before}
    for arm, of_seed in runs.items():
        for seed, found in of_seed.items():
            evidence.figure(f"Dice, {arm}", found["dice"], seed, "%")
    untrained = {seed: told(built(WHOLE, 1e-3, seed), seed) for seed in seeds}
    for arm in (WHOLE, DOWN):
        evidence.gate(arm, {s: found["pretext"] for s, found in runs[arm].items()}, untrained, by=0.2)
    own = {what: {s: found[what] for s, found in runs[NONE].items()} for what in ("own", "own before")}
    evidence.gate(NONE, own["own"], own["own before"], by=20, unit="points")
    evidence.note(
        f"{UNLABELLED} trunks without labels, {LABELLED} with, {TEST} to test; {steps} steps of {BATCH} mixtures, then "
        f"{tuning} of 2 labelled trunks. Rates on seed {SEARCH}, whose trunks are others."
    )

    def minus(arm: str, other: str) -> dict[int, float]:
        return {seed: runs[arm][seed]["dice"] - runs[other][seed]["dice"] for seed in seeds}

    evidence.claim(
        "Dice with four labelled trunks, Volume Fusion minus random weights", minus(WHOLE, NONE), at_least=4.0,
        unit="points", floor=minus(MIXED_UP, NONE), ceiling=minus(TRUE, NONE), arms=(WHOLE, NONE),
    )  # fmt: skip
    evidence.claim(
        "Dice with four labelled trunks, Volume Fusion minus its way down", minus(WHOLE, DOWN), at_least=1.0,
        unit="points", floor=minus(NONE, DOWN), ceiling=minus(TRUE, DOWN), arms=(WHOLE, DOWN),
    )  # fmt: skip


def test_volume_fusion(evidence: Any) -> None:
    compare(evidence)
