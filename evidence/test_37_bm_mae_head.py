"""BM-MAE (arXiv 2505.00568) on a real head: grey and white matter guessed from a T1 image.

The MNI152 template of nilearn's package at half its resolution, in crops of 16^3 voxels. Its back two thirds train and
its front third is judged, by the PSNR of grey and white matter that are guessed from the T1 image alone. The baseline
is the mean of the training crops; floor the untrained network; ceiling the same network trained to translate the T1
image into the others alone. Rates are searched on other crops of the part that trains.
"""

from collections.abc import Sequence
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from registered_volumes import FirstSeen, Pretrained, pretrained, psnr
from torch import Tensor
from torch.nn import functional as F

from lightspan.nn.masking.mask_samplers import MaskSampler

NEEDS = ("nilearn", "nibabel")
SEEDS, SEARCH = (0, 1, 2, 3, 4), 100
TRAINING, TEST, SIDE, DEPTH = 192, 24, 16, 2
STEPS, RATES = 1000, (3e-3, 1e-2, 3e-2)
ARMS: dict[str, MaskSampler | None] = {"BM-MAE": None, "translation": FirstSeen()}


@cache
def template() -> Tensor:
    """T1, grey and white matter of the MNI152 template at 2 mm, [3 D H W] in [0, 1], the front last along H."""
    import nibabel

    folder = Path(str(find_spec("nilearn").origin)).parent / "datasets" / "data"  # type: ignore[union-attr]
    read = []
    for kind in ("t1", "gm", "wm"):
        file = folder / f"mni_icbm152_{kind}_tal_nlin_sym_09a_converted.nii.gz"
        image = nibabel.as_closest_canonical(nibabel.load(file))
        values = torch.from_numpy(np.asarray(image.dataobj, np.float32)).permute(2, 1, 0)
        read.append(values / values.max())
    return F.avg_pool3d(torch.stack(read), 2)


def crops(front: bool, count: int, seed: int) -> Tensor:
    """[N 3 s s s] that show some of the brain, from the front third or from the other two."""
    whole, generator, found = template(), np.random.default_rng((seed, front)), list[Tensor]()
    edge = 2 * whole.shape[2] // 3
    part = whole[:, :, edge:] if front else whole[:, :, :edge]
    while len(found) < count:
        at = [int(generator.integers(length - SIDE + 1)) for length in part.shape[1:]]
        crop = part[:, *(slice(first, first + SIDE) for first in at)]
        if float((crop[1] + crop[2] > 0.5).float().mean()) > 0.2:
            found.append(crop)
    return torch.stack(found)


def compare(evidence: Any, seeds: Sequence[int] = SEEDS, steps: int = STEPS) -> None:
    def model(arm: str, seed: int, rate: float, steps: int) -> Pretrained:
        return pretrained(crops(False, TRAINING, seed), seed, rate, steps, DEPTH, ARMS[arm])

    def score(arm: str, rate: float) -> float:
        other = crops(False, TEST, SEARCH + 1)
        return psnr(model(arm, SEARCH, rate, steps).guess(other), other[:, 1:])

    rates = evidence.search({arm: partial(score, arm) for arm in ARMS}, RATES, what="rate of pre-training", seed=SEARCH)
    found: dict[str, dict[int, float]] = {name: {} for name in (*ARMS, "mean", "untrained")}
    for seed in seeds:
        test = crops(True, TEST, seed)
        guesses = {arm: model(arm, seed, rates[arm], steps).guess(test) for arm in ARMS}
        guesses["untrained"] = model("BM-MAE", seed, 1.0, 0).guess(test)
        guesses["mean"] = crops(False, TRAINING, seed).mean(dim=0)[None, 1:]
        for name, guess in guesses.items():
            found[name][seed] = psnr(guess, test[:, 1:])
            evidence.figure(f"PSNR of grey and white matter from T1, {name}", found[name][seed], seed, "dB")
    for arm in ARMS:
        evidence.gate(arm, found[arm], found["untrained"], by=3.0, unit="dB")
    gain = {name: {seed: of[seed] - found["mean"][seed] for seed in seeds} for name, of in found.items()}
    evidence.claim(
        "PSNR of grey and white matter from T1, BM-MAE minus the mean crop", gain["BM-MAE"], at_least=4.0, unit="dB",
        arms=("BM-MAE",), floor=gain["untrained"], ceiling=gain["translation"],
    )  # fmt: skip


def test_bm_mae_on_a_head(evidence) -> None:
    compare(evidence)
