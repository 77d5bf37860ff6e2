"""Prithvi (arXiv 2310.18660) on rendered series of land: gaps under clouds, and segmentation from twenty scenes.

Series of six HLS bands, three dates and 48 x 48 pixels: fields of nine materials with seasonal spectra, light and air
of each date, and smooth clouds over a fifth to three fifths of one date. The network is trained on random masks, then
on masks in the shape of clouds; it never sees what is under the clouds of its training series. Gaps of unseen series
are filled by it, by the same network trained on single dates in as many steps, by linear interpolation between dates
and by the bands' means. Errors are in squared deviations of a band, over cloudy pixels alone.

For segmentation the pre-trained encoder and one with random weights are fine-tuned, with a neck and a head, on twenty
series with the land cover of each pixel, in equal steps. Rates of each arm are the best of the same few on seed 100,
and of the next one too where the last of them was best.
"""

import sys
import warnings
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.functional.classification import multiclass_jaccard_index

from lightspan.backbones.placed_vit import SeriesViT, series_widths
from lightspan.datamodules.rendered.land import LandSeries
from lightspan.datamodules.rendered.spectra import MATERIALS
from lightspan.evaluation.scores.gap_filling import between_dates
from lightspan.methods.masked.prithvi import Prithvi
from lightspan.nn.decoders.mask_decoder import MaskDecoder
from lightspan.nn.decoders.series_neck import SeriesNeck
from lightspan.nn.masking.cloud_masks import CloudMasks
from lightspan.nn.masking.mask_samplers import RandomMasks
from lightspan.optim.schedules import WarmupCosine

SEEDS, SEARCH = (0, 1, 2), 100
RATES, TUNING_RATES = (1e-3, 2e-3, 4e-3), (5e-4, 1e-3, 2e-3)
CHOSEN = {"3-D": 4e-3, "single date": 4e-3, "segmentation, pre-trained": 1e-3, "segmentation, random": 2e-3}
STEPS, CLOUD_STEPS, BATCH, WIDTH, PATCH = 700, 800, 16, 96, 6
POOL, UNSEEN, LABELLED, JUDGED = 2048, 256, 20, 128
TUNING, EVERY, TUNING_BATCH = 200, 10, 10


class Series(NamedTuple):
    """image, clear [N C T h w], valid bool of the same shape, day [N T], cover [N h w]."""

    image: Tensor
    clear: Tensor
    valid: Tensor
    day: Tensor
    cover: Tensor

    def rows(self, chosen: Tensor | slice) -> "Series":
        return Series(*(part[chosen] for part in self))

    def date(self, at_N: Tensor) -> "Series":
        """One date of each series, as a series of one."""
        rows = torch.arange(len(self.image))
        image, clear, valid = (part[rows, :, at_N].unsqueeze(2) for part in self[:3])
        return Series(image, clear, valid, self.day[rows, at_N, None], self.cover)


def series(seed: int, part: str, count: int) -> Series:
    data = LandSeries(size=POOL, val_size=UNSEEN, test_size=UNSEEN, draw_seed=seed)
    data.setup()
    given = getattr(data, part).batch(range(count), [0] * count)
    return Series(given["image"], given["clear"], given["valid"] > 0, given["day"], given["cover"])


def built(seed: int, rate: float) -> Prithvi:
    torch.manual_seed(seed)
    method = Prithvi(
        SeriesViT(6, WIDTH, depth=4, heads=4, patch_size=PATCH),
        MaskDecoder(WIDTH, width=64, depth=2, heads=4, axis_widths=series_widths(64)),
        optimizer=partial(torch.optim.AdamW, lr=rate, betas=(0.9, 0.95), weight_decay=0.05),
    )
    method.log_training = lambda figures: None  # type: ignore[method-assign]
    return method


def train(arm: str, pool: Series, seed: int, rate: float, share: float = 1.0) -> tuple[Prithvi, Any]:
    """The method after random masks and after cloud masks; a copy of its backbone's weights between the two.

    Args:
        share: of the steps.
    """
    method, generator, between = built(seed, rate), torch.Generator().manual_seed(seed), None
    phases = ((partial(RandomMasks, 0.75), STEPS), (partial(CloudMasks, 0.3, 0.9), CLOUD_STEPS))
    for masks, count in phases:
        steps = round(share * count)
        optimizer = method.groups.optimizer(method, method.optimizer)
        schedule = WarmupCosine(optimizer, steps, warmup=0.05, final=0.0)
        method.train()
        for step in range(steps):
            numbers = torch.randint(len(pool.image), (BATCH,), generator=generator)
            given = pool.rows(numbers)
            if arm == "single date":
                given = given.date(torch.randint(3, (BATCH,), generator=generator))
            method.masks = masks(seed=1_000_003 * seed + step)  # without a Trainer the method counts no steps
            batch = {"image": given.image, "valid": given.valid.long(), "index": numbers}
            optimizer.zero_grad()
            method.training_step(batch, step).backward()
            optimizer.step()
            schedule.step()
        if between is None:
            between = {name: weight.clone() for name, weight in method.backbone.state_dict().items()}
    method.eval()
    return method, between


def gap_error(filled: Tensor, given: Series, dates: tuple[int, ...] = (0, 1, 2)) -> float:
    error, gap = (filled - given.clear).square()[:, :, dates], ~given.valid[:, :, dates]
    return error[gap].mean().item()


def filled(method: Prithvi, arm: str, given: Series) -> Tensor:
    def of(part: Series) -> Tensor:
        return method.fill({"image": part.image, "valid": part.valid.long()})

    if arm == "3-D":
        return of(given)
    return torch.cat([of(given.date(torch.full((len(given.image),), t))) for t in range(3)], dim=2)


class Segmenter(nn.Module):
    def __init__(self, backbone: SeriesViT) -> None:
        super().__init__()
        self.backbone, self.neck = backbone, SeriesNeck(WIDTH, 3, len(MATERIALS), width=64, doublings=2)

    def forward(self, image: Tensor) -> Tensor:
        tokens_BND = self.backbone.tokens(image)[:, 1:]
        return self.neck(tokens_BND, self.backbone.grid(image), image.shape[3:])


def tuned(weights: Any, labelled: Series, judged: Series, seed: int, rate: float) -> list[float]:
    """Mean IoU on unseen series, in per cent, every few steps."""
    torch.manual_seed(seed)
    network = Segmenter(built(seed, rate).backbone)
    if weights is not None:
        network.backbone.load_state_dict(weights)
    optimizer = torch.optim.AdamW(network.parameters(), lr=rate, weight_decay=0.05)
    schedule = WarmupCosine(optimizer, TUNING, warmup=0.05, final=0.0)
    generator, curve = torch.Generator().manual_seed(seed), list[float]()
    for step in range(1, TUNING + 1):
        given = labelled.rows(torch.randperm(len(labelled.image), generator=generator)[:TUNING_BATCH])
        optimizer.zero_grad()
        F.cross_entropy(network(given.image), given.cover).backward()
        optimizer.step()
        schedule.step()
        if step % EVERY == 0:
            with torch.no_grad():
                said = torch.cat([network(part).argmax(dim=1) for part in judged.image.split(64)])
            score = multiclass_jaccard_index(said, judged.cover, len(MATERIALS), average="macro")
            curve.append(100 * score.item())
    return curve


def run(seed: int) -> dict[str, Any]:
    pool, unseen = series(seed, "train", POOL), series(seed, "test", UNSEEN)
    found: dict[str, Any] = {"mean": gap_error(unseen.image, unseen)}
    interpolated = between_dates(unseen.image, unseen.valid, unseen.day)
    found["interpolation"] = gap_error(interpolated, unseen)
    found["interpolation, middle date"] = gap_error(interpolated, unseen, (1,))
    weights = None
    for arm in ("3-D", "single date"):
        method, between = train(arm, pool, seed, CHOSEN[arm])
        made = filled(method, arm, unseen)
        found[arm], found[f"{arm}, middle date"] = gap_error(made, unseen), gap_error(made, unseen, (1,))
        weights = between if arm == "3-D" else weights
    labelled, judged = series(seed, "val", LABELLED), unseen.rows(slice(JUDGED))
    found["pre-trained"] = tuned(weights, labelled, judged, seed, CHOSEN["segmentation, pre-trained"])
    found["random"] = tuned(None, labelled, judged, seed, CHOSEN["segmentation, random"])
    return found


def steps_to(curve: list[float], least: float) -> float:
    """Steps until a curve reaches a score; twice the run if it never does."""
    return next((EVERY * (at + 1) for at, score in enumerate(curve) if score >= least), 2.0 * TUNING)


def test_prithvi(evidence) -> None:
    runs = {seed: run(seed) for seed in SEEDS}
    for seed, found in runs.items():
        for name, value in found.items():
            if isinstance(value, list):
                evidence.figure(f"mean IoU, {name}", value[-1], seed=seed, unit="%")
            else:
                evidence.figure(f"error in gaps, {name}", value, seed=seed)
    evidence.note(
        f"{STEPS} steps with random masks and {CLOUD_STEPS} with cloud masks, of {BATCH} of {POOL} series; {UNSEEN} "
        f"unseen series; {TUNING} steps of fine-tuning on {LABELLED}, read on {JUDGED}. Rates of {RATES}, and of "
        f"{TUNING_RATES} for segmentation, chosen on seed {SEARCH}",
        CHOSEN,
    )
    for other, most in (("interpolation", 0.7), ("single date", 0.6)):
        ratios = {seed: found["3-D"] / found[other] for seed, found in runs.items()}
        evidence.claim(f"error in gaps, 3-D over {other}", ratios, at_most=most)
    sooner = {seed: steps_to(found["pre-trained"], found["random"][-1]) / TUNING for seed, found in runs.items()}
    evidence.claim("steps to the last mean IoU of random weights, pre-trained over random", sooner, at_most=0.5)
    gain = {seed: found["pre-trained"][-1] - found["random"][-1] for seed, found in runs.items()}
    evidence.claim("mean IoU, pre-trained minus random", gain, at_least=3.0, unit="points")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    share = float(sys.argv[1]) if sys.argv[1:] else 1.0
    pool, unseen = series(SEARCH, "train", POOL), series(SEARCH, "test", UNSEEN)
    print("mean", gap_error(unseen.image, unseen), flush=True)
    print("interpolation", gap_error(between_dates(unseen.image, unseen.valid, unseen.day), unseen), flush=True)
    kept: dict[float, tuple[float, Any]] = {}
    for arm in ("3-D", "single date"):
        for rate in RATES:
            method, between = train(arm, pool, SEARCH, rate, share)
            error = gap_error(filled(method, arm, unseen), unseen)
            print(arm, rate, error, flush=True)
            if arm == "3-D":
                kept[rate] = error, between
    weights = min(kept.values(), key=lambda pair: pair[0])[1]
    labelled, judged = series(SEARCH, "val", LABELLED), unseen.rows(slice(JUDGED))
    for name, start in (("pre-trained", weights), ("random", None)):
        for rate in TUNING_RATES:
            curve = tuned(start, labelled, judged, SEARCH, rate)
            print(name, rate, [round(score, 1) for score in curve], flush=True)
