"""MHS-VM (arXiv 2406.05992) on faint outlines of real drawings: scans of four patterns against scans of the raster.

Pictures of 24 x 24 grey pixels are crops of two photographs, with noise, and brighter or darker by a quarter of white
where a drawing of Debian's openclipart-png, turned and scaled at random, is not transparent: its outline can be told
from noise and background only by following it. The part of each photograph, and the drawings, from which training,
choice of rates and test come are apart. Arms, one network (two stages, four blocks, patches of 2 x 2) with equal
steps: MHS-VM's four heads; one head, of the raster, in the same width; VM-UNet's SS2D, which scans the raster in twice
the width. The score is Dice of the drawn pixels, mean over pictures, of all and of the half of the outlines that are
thinnest for their length (4 pi area / perimeter^2): bars, rings, and figures with limbs and holes.

Floor: the untrained network. Ceiling: MHS-VM on the outlines themselves, without noise, in place of the pictures.
Gate: Dice on pictures for training.
"""

from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from scipy import ndimage
from sklearn.datasets import load_sample_images
from torch import Tensor

from lightspan.backbones.scanned_unet import ScannedUNet
from lightspan.methods.supervised.segmenter import Segmenter
from lightspan.objectives.means import weighted_sum
from lightspan.optim.schedules import WarmupCosine

DRAWINGS = Path("/usr/share/openclipart/png")
NEEDS = ("/usr/share/openclipart/png",)
SEEDS, SEARCH = (0, 1, 2), 100
SIDE, KEPT, COUNTS = 24, 48, {"train": 2048, "choice": 256, "test": 512}
STRENGTH, NOISE, PHOTO = 0.25, 0.15, 0.5
STEPS, BATCH, WIDTH, STATES = 250, 8, 32, 8
RATES = (1e-3, 3e-3, 1e-2)
MHS, ONE, SS2D, ORACLE = "MHS-VM", "one head", "SS2D", "MHS-VM on outlines"
HEADS: dict[str, dict[str, Any]] = {
    MHS: {},
    ONE: {"patterns": ["raster"]},
    SS2D: {"patterns": None},
    ORACLE: {},
}


class Drawn(NamedTuple):
    """image: float32 [N 1 24 24]; mask: int64 [N 24 24]; thin: bool [N]."""

    image: Tensor
    mask: Tensor
    thin: Tensor


@cache
def outlines() -> dict[str, list[np.ndarray]]:
    """Transparency of drawings that fill neither little nor all of their frame, uint8 of at most 48 pixels a side."""
    files = sorted(DRAWINGS.rglob("*.png"), key=lambda file: file.name)
    few = [file for file in files if file.stat().st_size < 30_000][::4]
    found: dict[str, list[np.ndarray]] = {"train": [], "choice": [], "test": []}
    for number, file in enumerate(few):
        try:
            with Image.open(file) as picture:
                alpha = picture.convert("RGBA").getchannel("A")
        except (OSError, ValueError):
            continue  # some of the package's files are cut short
        if (box := alpha.getbbox()) is None:
            continue
        alpha = alpha.crop(box)
        alpha.thumbnail((KEPT, KEPT), Image.Resampling.BOX)
        values = np.asarray(alpha)
        if min(values.shape) >= 8 and 0.05 < (values > 127).mean() < 0.8:
            found[("train", "train", "train", "choice", "test")[number % 5]].append(values)
    return found


def backgrounds(part: str) -> list[np.ndarray]:
    """Of each photograph the left for training, the middle to choose rates, the right to test; halved, in [0, 1]."""
    found = []
    for photo in load_sample_images().images:
        grey = photo.mean(axis=2)[::2, ::2] / 255
        cuts = np.split(grey, (3 * grey.shape[1] // 5, 4 * grey.shape[1] // 5), axis=1)
        found.append(cuts[["train", "choice", "test"].index(part)])
    return found


@cache
def pictures(part: str, seed: int) -> Drawn:
    draws = np.random.default_rng([seed, list(COUNTS).index(part)])
    shapes, photos = outlines()[part], backgrounds(part)
    images, masks, roundness = [], [], []
    while len(images) < COUNTS[part]:
        mask = _placed(shapes[draws.integers(len(shapes))], draws)
        if not 20 <= mask.sum() <= SIDE**2 // 2:
            continue
        photo = photos[draws.integers(len(photos))]
        top, left = (draws.integers(length - SIDE) for length in photo.shape)
        crop = photo[top : top + SIDE, left : left + SIDE]
        grey = PHOTO * (crop - crop.mean()) + draws.choice([-1, 1]) * STRENGTH * mask
        images.append(grey + NOISE * draws.standard_normal(mask.shape))
        masks.append(mask)
        border = mask & ~ndimage.binary_erosion(mask)
        roundness.append(4 * np.pi * mask.sum() / border.sum() ** 2)
    image = torch.from_numpy(np.stack(images)).float()[:, None] / 0.25
    thin = torch.from_numpy(np.asarray(roundness) <= np.median(roundness))
    return Drawn(image, torch.from_numpy(np.stack(masks)).long(), thin)


def _placed(values: np.ndarray, draws: np.random.Generator) -> np.ndarray:
    """bool [24 24]: turned by any angle, 11 to 21 pixels long, anywhere."""
    turned = Image.fromarray(values).rotate(draws.uniform(0, 360), Image.Resampling.BILINEAR, expand=True)
    length, longest = draws.integers(11, 22), max(turned.size)
    width, height = (max(1, round(length * side / longest)) for side in turned.size)
    small = np.asarray(turned.resize((width, height), Image.Resampling.BOX)) > 127
    top, left = draws.integers(SIDE - height + 1), draws.integers(SIDE - width + 1)
    mask = np.zeros((SIDE, SIDE), bool)
    mask[top : top + height, left : left + width] = small
    return mask


def method(arm: str, rate: float, seed: int) -> Segmenter:
    torch.manual_seed(seed)
    sizes = {"patch": (2, 2), "in_chans": 1, "width": WIDTH, "depths": (1, 1), "depths_up": (1, 1), "states": STATES}
    network = ScannedUNet(**sizes, drop_path=0.0, **HEADS[arm])
    return Segmenter(network, 2, optimizer=partial(torch.optim.AdamW, lr=rate, weight_decay=0.01))


def seen(arm: str, drawn: Drawn) -> Tensor:
    return drawn.mask[:, None].float() if arm == ORACLE else drawn.image


def trained(arm: str, rate: float, seed: int, steps: int) -> Segmenter:
    model, drawn = method(arm, rate, seed), pictures("train", seed)
    optimizer = model.optimizer(model.parameters())
    schedule = WarmupCosine(optimizer, max(steps, 1), warmup=0.05, final=0.0)
    draws, images = np.random.default_rng(seed), seen(arm, drawn)
    for _ in range(steps):
        rows = draws.choice(len(images), BATCH, replace=False)
        losses, *_ = model.losses({"image": images[rows], "semantic": drawn.mask[rows]})
        optimizer.zero_grad()
        weighted_sum(losses, model.weights).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model.eval()


@torch.no_grad()
def dice(model: Segmenter, arm: str, drawn: Drawn) -> dict[str, float]:
    """In per cent, mean over pictures: of all, and of the thin half."""
    guess = torch.cat([model(part).argmax(dim=1) for part in seen(arm, drawn).split(64)])
    both, sizes = (guess & drawn.mask).sum((1, 2)), (guess + drawn.mask).sum((1, 2))
    scores = 200 * both / sizes
    return {"all": float(scores.mean()), "thin": float(scores[drawn.thin].mean())}


def run(arm: str, rate: float, seed: int, steps: int) -> dict[str, float]:
    model, untrained = trained(arm, rate, seed, steps), method(arm, rate, seed).eval()
    test, own = pictures("test", seed), Drawn(*(field[:256] for field in pictures("train", seed)))
    found = dice(model, arm, test) | {f"{name} before": x for name, x in dice(untrained, arm, test).items()}
    found |= {"own": dice(model, arm, own)["all"], "own before": dice(untrained, arm, own)["all"]}
    return found | {"weights": float(sum(weight.numel() for weight in model.parameters()))}


def compare(evidence: Any, seeds: tuple[int, ...] = SEEDS, steps: int = STEPS) -> None:
    def chosen(arm: str) -> Callable[[float], float]:
        return lambda rate: dice(trained(arm, rate, SEARCH, steps), arm, pictures("choice", SEARCH))["all"]

    rates = evidence.search({arm: chosen(arm) for arm in HEADS}, RATES, what="rate", seed=SEARCH)
    runs = {arm: {seed: run(arm, rates[arm], seed, steps) for seed in seeds} for arm in HEADS}
    for arm, of_seed in runs.items():
        for seed, found in of_seed.items():
            evidence.figure(f"Dice, {arm}", found["all"], seed, "%")
            evidence.figure(f"Dice of thin outlines, {arm}", found["thin"], seed, "%")
        evidence.figure(f"weights, {arm}", of_seed[seeds[0]]["weights"])
    for arm in (MHS, ONE, SS2D):
        own = {what: {seed: found[what] for seed, found in runs[arm].items()} for what in ("own", "own before")}
        evidence.gate(arm, own["own"], own["own before"], by=20, unit="points")
    counts = {name: len(found) for name, found in outlines().items()}
    evidence.note(
        f"{counts['train']} drawings for training, {counts['choice']} to choose rates, {counts['test']} to test; "
        f"{steps} steps of {BATCH} pictures, gradients clipped at 1."
    )

    def gain(arm: str, over: str, what: str, key: str = "") -> dict[int, float]:
        return {seed: runs[arm][seed][what + key] - runs[over][seed][what] for seed in seeds}

    for over, what, name, least in (
        (ONE, "thin", "Dice of thin outlines", 1.5),
        (SS2D, "all", "Dice", -0.5),
    ):
        evidence.claim(
            f"{name}, {MHS} minus {over}", gain(MHS, over, what), at_least=least, unit="points",
            floor=gain(MHS, over, what, " before"), ceiling=gain(ORACLE, over, what), arms=(MHS, over),
        )  # fmt: skip


def test_mhs_vm(evidence: Any) -> None:
    compare(evidence)
