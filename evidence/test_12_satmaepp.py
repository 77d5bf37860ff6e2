"""SatMAE++ (arXiv 2403.05419) on rendered land in ten bands: with its upsampler, at one scale, and untrained.

Scenes of 64 x 64 pixels of nine materials with known spectra, mixed by fractal fields, with roads and settlements
whose streets and houses are thinner than the pixels of the 16 x 16 picture that the encoder sees, in patches of 4 and
the paper's three groups of bands. All arms have one encoder and decoder, batch, steps and rates to choose from: the
one with the best probe on seed 100 and scenes kept for that. The larger picture is guessed with nothing hidden, and
compared with bilinear enlargement of what the encoder sees, over all bands. Land cover is that of most of a scene,
read by a logistic probe from the mean over tokens; its class `built` is the one that thin structures make.

Beside it, the same on a real scene of Landsat 7, whose test blocks share no pixel with those that train: figures alone.
"""

import math
import sys
import warnings
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lightspan.backbones.placed_vit import GroupedViT
from lightspan.core.errors import UserError
from lightspan.datamodules.multispectral.bands import Bands
from lightspan.datamodules.multispectral.scene import SceneBlocks
from lightspan.datamodules.r_data import LIBRARIES
from lightspan.datamodules.rendered.land import LandScenes
from lightspan.datamodules.rendered.spectra import MATERIALS
from lightspan.evaluation.probes.linear_probe import fit_linear_probe
from lightspan.methods.masked.satmaepp import SatMAEpp
from lightspan.nn.decoders.grouped_mask_decoder import GroupedMaskDecoder
from lightspan.nn.decoders.upsampler import UpsamplerPyramid
from lightspan.optim.schedules import WarmupCosine

NEEDS = ("tifffile", "R/stars")
SEEDS, SEARCH = (0, 1, 2), 100
RATES = (1e-3, 2e-3, 4e-3, 8e-3)
CHOSEN = {"multi-scale": 4e-3, "single scale": 4e-3}
TEN = ("B2", "B3", "B4", "B5", "B6", "B7", "B8", "B8A", "B11", "B12")
GROUPS, LANDSAT_GROUPS = ((0, 1, 2, 6), (3, 4, 5, 7), (8, 9)), ((0, 1, 2), (3,), (4, 5))
STEPS, BATCH, WIDTH, FEATURES = 2400, 16, 64, 12
POOL, UNSEEN, SIDE = 2048, 1000, 64


class Scenes(NamedTuple):
    """image [N C h w], label [N]."""

    image: Tensor
    label: Tensor


def scenes(seed: int, part: str, count: int) -> Scenes:
    data = LandScenes(side=SIDE, bands=TEN, size=POOL, draw_seed=seed, val_size=UNSEEN, test_size=UNSEEN)
    data.setup()
    given = getattr(data, part).batch(range(count), [0] * count)
    return Scenes(given["image"], given["label"])


def built(arm: str, seed: int, rate: float, groups: Any = GROUPS) -> SatMAEpp:
    torch.manual_seed(seed)
    bands = sum(map(len, groups))
    method = SatMAEpp(
        GroupedViT(groups, WIDTH, depth=4, heads=4, patch_size=4, group_width=16),
        GroupedMaskDecoder(WIDTH, WIDTH, depth=2, heads=4, group_width=16),
        UpsamplerPyramid(bands, 2, FEATURES) if arm == "multi-scale" else None,
        optimizer=partial(torch.optim.AdamW, lr=rate, betas=(0.9, 0.95), weight_decay=0.05),
    )
    method.log_training = lambda figures: None  # type: ignore[method-assign]
    return method


def train(method: SatMAEpp, image: Tensor, seed: int, steps: int) -> list[float]:
    """Every arm sees the same pictures in the same steps. Losses."""
    optimizer = method.groups.optimizer(method, method.optimizer)
    schedule = WarmupCosine(optimizer, steps, warmup=0.05, final=0.0)
    generator, losses = torch.Generator().manual_seed(seed), list[float]()
    method.train()
    for step in range(steps):
        rows = torch.randint(len(image), (BATCH,), generator=generator)
        optimizer.zero_grad()
        # Masks depend on step and picture; without a Trainer the method counts no steps.
        loss = method.training_step({"image": image[rows], "index": rows + len(image) * step}, step)
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    method.eval()
    return losses


@torch.no_grad()
def encoded(method: SatMAEpp, image: Tensor) -> Tensor:
    return torch.cat([method.features({"image": part}) for part in image.split(250)])


@torch.no_grad()
def enlarged(method: SatMAEpp, image: Tensor) -> dict[str, float]:
    """Peak signal to noise in decibels of the guessed and of the bilinear picture, the peak being the range of nearly
    all values.
    """
    errors = {"grown": 0.0, "bilinear": 0.0}
    for part in image.split(100):
        small = F.avg_pool2d(part, 4)
        made = {"grown": method.grown(small)[-1], "bilinear": F.interpolate(small, part.shape[2:], mode="bilinear")}
        for name, picture in made.items():
            errors[name] += (picture - part).square().mean(dim=(1, 2, 3)).sum().item() / len(image)
    peak = float(image.flatten()[::101].quantile(0.999) - image.flatten()[::101].quantile(0.001))
    return {name: 10 * math.log10(peak**2 / error) for name, error in errors.items()}


def probed(method: SatMAEpp, bank: Scenes, query: Scenes) -> dict[str, float]:
    """Accuracy over all scenes, and the share of those of the class `built` that are told, in per cent."""
    weight_DC, bias_C = fit_linear_probe(encoded(method, bank.image), bank.label)
    right = (encoded(method, query.image).to(weight_DC) @ weight_DC + bias_C).argmax(dim=1) == query.label
    thin = query.label == MATERIALS.index("built")
    return {"accuracy": 100 * right.float().mean().item(), "built": 100 * right[thin].float().mean().item()}


def run(arm: str, seed: int, rate: float, part: str, steps: int = STEPS) -> dict[str, float]:
    bank, query = scenes(seed, "train", POOL), scenes(seed, part, UNSEEN)
    method = built(arm, seed, rate)
    losses = train(method, bank.image, seed, steps) if arm != "untrained" else [0.0]
    found = probed(method, bank, query) | {"loss": sum(losses[-20:]) / len(losses[-20:])}
    if arm == "multi-scale":
        sizes = enlarged(method, query.image)
        found |= {"gain": sizes["grown"] - sizes["bilinear"]} | sizes
    return found


def landsat_scene() -> Path:
    """352 x 349 pixels of six bands of Landsat 7, 30 m each, at the coast of Olinda, Brazil: of the R package stars."""
    for library in LIBRARIES:
        if (found := library / "stars/tif/L7_ETMs.tif").is_file():
            return found
    raise UserError(f"r-cran-stars is not in {' or '.join(map(str, LIBRARIES))}; install it with `make evidence-data`")


def on_landsat(seed: int, steps: int) -> dict[str, float]:
    """Trained on random corners of the real scene's training blocks, read on its test blocks."""
    data = SceneBlocks(str(landsat_scene()), Bands("landsat-7", scale=1 / 255), patch=SIDE, block=116, stride=4)
    data.setup()
    assert data.train is not None
    image, unseen = (
        torch.stack([of.sample(index, 0)["image"] for index in range(len(of))]) for of in (data.train, data.test)
    )
    method = built("multi-scale", seed, CHOSEN["multi-scale"], LANDSAT_GROUPS)
    train(method, image, seed, steps)
    return enlarged(method, unseen)


def test_satmaepp(evidence) -> None:
    arms = {**CHOSEN, "untrained": 0.0}
    runs = {arm: {seed: run(arm, seed, rate, "test") for seed in SEEDS} for arm, rate in arms.items()}
    for arm, of_seed in runs.items():
        for seed, found in of_seed.items():
            evidence.figure(f"land cover, {arm}", found["accuracy"], seed=seed, unit="%")
            evidence.figure(f"built, {arm}", found["built"], seed=seed, unit="%")
            if arm != "untrained":
                evidence.figure(f"loss of the last steps, {arm}", found["loss"], seed=seed)
    for seed, found in runs["multi-scale"].items():
        for name in ("grown", "bilinear"):
            evidence.figure(f"PSNR at four times the size, {name}", found[name], seed=seed, unit="dB")
    for name, value in on_landsat(SEEDS[0], STEPS // 2).items():
        evidence.figure(f"PSNR at four times the size, Landsat 7, {name}", value, seed=SEEDS[0], unit="dB")
    evidence.note(
        f"{STEPS} steps of {BATCH} of {POOL} scenes; probes learn from these and are read on {UNSEEN}. Rates of "
        f"{RATES} chosen on seed {SEARCH} by land cover on scenes of its own",
        CHOSEN,
    )

    def gain(what: str, over: str) -> dict[int, float]:
        return {seed: runs["multi-scale"][seed][what] - runs[over][seed][what] for seed in SEEDS}

    grown = {seed: found["gain"] for seed, found in runs["multi-scale"].items()}
    evidence.claim("PSNR, grown minus bilinear", grown, at_least=1.0, unit="dB")
    trained = gain("accuracy", "untrained")
    evidence.claim("land cover, multi-scale minus untrained", trained, at_least=15.0, unit="points")
    least = min(gain("accuracy", "single scale").values())
    evidence.claim("least land cover, multi-scale minus single scale", least, at_least=-1.0, unit="points")
    evidence.claim("built, multi-scale minus single scale", gain("built", "single scale"), at_least=0.0, unit="points")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    steps = int(sys.argv[1]) if sys.argv[1:] else STEPS
    print("untrained", run("untrained", SEARCH, 0.0, "val"), flush=True)
    for arm in CHOSEN:
        for rate in RATES:
            print(arm, rate, run(arm, SEARCH, rate, "val", steps), flush=True)
