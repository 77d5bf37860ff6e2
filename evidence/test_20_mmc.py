"""MMC (arXiv 2308.11448) on drawn scenes: one patch finds its object, by all three terms and by each alone.

Scenes have two or three textured objects on a textured ground, 32 x 32 pixels in patches of 4, and the object of every
pixel is known. A vision transformer of 4 blocks and 64 channels trains on 2,000 of them. Arms, with equal steps and
views: all three terms, and each of L_M (reconstruction), L_D (distillation) and L_C (contrast) alone. Baselines: the
network before training, and the raw pixels of the patches.

A prompt is each patch that lies mostly in one object. `PromptIoU` chooses the threshold of an arm on 100 training
scenes, and IoU is that on 200 test scenes; figures recorded before it did so, on a coarse grid of thresholds, are to be
measured anew. AUC says how well similarity tells pairs of patches of one object from pairs of two objects of one scene.
Each arm's rate is chosen of the same two on seed 100 by IoU on 100 validation scenes, whose threshold comes from
training scenes too: `python evidence/test_20_mmc.py` repeats that search.
"""

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from lightning import seed_everything
from quiet import quiet_trainer
from torch import Tensor, nn

from lightspan.backbones.vit import vit
from lightspan.datamodules.image.augment.views import TwoViews
from lightspan.datamodules.image.sets.textured_scenes import TexturedScenes, draw
from lightspan.evaluation.dense.dense_probes import PromptIoU
from lightspan.evaluation.dense.prompt_masks import (
    Similarities,
    best_iou_of_grid,
    object_similarities,
    objects_of_patches,
)
from lightspan.evaluation.features.features import Features
from lightspan.methods.distillation.mmc import MMC
from lightspan.nn.heads.dino_head import DINOHead
from lightspan.nn.heads.projector import Projector
from lightspan.nn.sequences.patches import patchify
from lightspan.optim.schedules import WarmupCosineDecay

SEEDS = (0, 1, 2)
STEPS, BATCH, TRAINING, GRID, NOISE = 300, 32, 2000, (8, 8), 0.05
RATES = (5e-4, 2e-3)
TERMS = ("reconstruction", "distillation", "contrast")
ARMS = {"all three": TERMS, **{f"{term} alone": (term,) for term in TERMS}}
CHOSEN = {"all three": 2e-3, "reconstruction alone": 2e-3, "distillation alone": 2e-3, "contrast alone": 5e-4}

Patches = Callable[[Tensor], Tensor]
"""Standardised images [B C h w] -> features of their patches [B T D]."""


def method(arm: str, rate: float) -> MMC:
    return MMC(
        vit(width=64, depth=4, heads=4, img_size=32, patch_size=4),
        Projector(64, [128], 64),
        Projector(64, [128], 64),
        DINOHead(64, 256, hidden=(128,), bottleneck=64),
        nn.Linear(64, 48),
        **{term: float(term in ARMS[arm]) for term in TERMS},
        momentum=0.98,
        optimizer=partial(torch.optim.AdamW, lr=rate, weight_decay=0.04),
        lr_scheduler=partial(WarmupCosineDecay, final=0.01),
    )


def scenes(seed: int) -> TexturedScenes:
    views = TwoViews(scale=(0.5, 1.0), saturation=0.4, hue=0.1)
    return TexturedScenes(TRAINING, NOISE, batch_size=BATCH, views=views, seed=seed)


def train(arm: str, rate: float, seed: int) -> tuple[MMC, MMC]:
    """(untrained, trained)."""
    seed_everything(seed, verbose=False)
    before, after = (method(arm, rate) for _ in range(2))
    after.load_state_dict(before.state_dict())
    trainer = quiet_trainer(max_steps=STEPS, gradient_clip_val=3.0)
    trainer.fit(after, datamodule=scenes(seed))
    return before.eval(), after.eval()


def tokens(trained: MMC) -> Patches:
    return lambda image_BChw: trained.backbone.tokens(image_BChw)[:, 1:]  # type: ignore[operator]


def pixels(image_BChw: Tensor) -> Tensor:
    return patchify(image_BChw, (4, 4))


@torch.no_grad()
def seen(patches: Patches, stream: int, count: int) -> Features:
    """[N T D] of scenes from a stream of their own, with their `objects` [N h w]."""
    data = scenes(0)
    data.setup()
    drawn = draw(count, NOISE, np.random.default_rng((0, stream)))
    assert data.train is not None
    images = (torch.from_numpy(drawn.images).float() / 255 - data.train.mean) / data.train.std
    return Features(patches(images), grid=GRID, fields={"objects": torch.from_numpy(drawn.objects)})


def measure(patches: Patches, stream: int = 2, count: int = 200) -> dict[str, float]:
    """IoU at the threshold that training scenes (stream 0) chose, AUC and means of similarities."""
    query = seen(patches, stream, count)
    found, objects = PromptIoU().fit(seen(patches, 0, 100), query), query.fields["objects"]
    pairs = [object_similarities(x, objects_of_patches(of, GRID)) for x, of in zip(query.x, objects, strict=True)]
    joined = Similarities(*(torch.cat([of[kind] for of in pairs]) for kind in range(2)))
    return {
        "IoU": 100 * found.scores["iou"], "AUC": joined.auc(), "overlap": joined.overlap(),
        "intra": float(joined.intra.mean()), "inter": float(joined.inter.mean()), **found.chosen,
    }  # fmt: skip


def test_mmc(evidence) -> None:
    runs: dict[str, dict[int, dict[str, float]]] = {name: {} for name in ("untrained", "raw pixels", *ARMS)}
    for seed in SEEDS:
        for arm in ARMS:
            before, after = train(arm, CHOSEN[arm], seed)
            runs[arm][seed] = measure(tokens(after))
            if arm == "all three":
                runs["untrained"][seed] = measure(tokens(before))
        runs["raw pixels"][seed] = measure(pixels)
    for name, of_seed in runs.items():
        for seed, measured in of_seed.items():
            for figure, value in measured.items():
                evidence.figure(f"{figure}, {name}", value, seed, "%" if figure == "IoU" else "")
    oracle = [best_iou_of_grid(objects, GRID) for objects in seen(pixels, 2, 200).fields["objects"]]
    evidence.figure("IoU that whole patches can reach", 100 * float(np.nanmean(oracle)), unit="%")
    evidence.note(
        f"{STEPS} steps of {BATCH} scenes. Rates of {RATES} chosen on seed 100: "
        f"{', '.join(f'{arm} {rate:g}' for arm, rate in CHOSEN.items())}. Raw pixels need no seed, and have one figure "
        "for all of them."
    )

    def gain(over: str, figure: str = "IoU") -> dict[int, float]:
        return {seed: runs["all three"][seed][figure] - runs[over][seed][figure] for seed in SEEDS}

    evidence.claim("prompt IoU, all three minus untrained", gain("untrained"), at_least=5.0, unit="points")
    evidence.claim("prompt IoU, all three minus raw pixels", gain("raw pixels"), at_least=3.0, unit="points")
    for term in TERMS:
        evidence.claim(f"prompt IoU, all three minus {term} alone", gain(f"{term} alone"), at_least=1.0, unit="points")
    evidence.claim("AUC of pairs, all three minus untrained", gain("untrained", "AUC"), at_least=0.05)


def search() -> None:
    for arm in ARMS:
        for rate in RATES:
            _, trained = train(arm, rate, 100)
            print(f"{arm}, rate {rate:g}: IoU {measure(tokens(trained), stream=3, count=100)['IoU']:.1f} %", flush=True)


if __name__ == "__main__":
    search()
