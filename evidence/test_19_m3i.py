"""M3I (arXiv 2211.09807) on rendered scenes: each target alone, one stage with all, a chain of stages, no mixing.

Scenes of 24 x 24 pixels with one object of four shapes, which are the classes. A tenth of them has a class, three
tenths a caption, which names colour and texture and not the shape, and all have pixels. A vision transformer of three
blocks and 48 channels, in patches of 4. Means of frozen patches are read by linear probes of shape and texture with 400
scenes, and frozen patches by a linear map to object or ground. Arms are the method with weights of 0, with equal steps;
the chain trains a third of them on hidden features, then on captions, then on classes. Without mixing, half of each
image is hidden, so that the encoder sees as many patches of each. The rate of each arm, among the same for all, is the
best by the mean of the three figures on scenes of another seed.
"""

from functools import lru_cache
from typing import Any

import torch
from lightning import seed_everything
from quiet import quiet_trainer
from scene_probes import adamw, kept, linear, seen, segmentation, served
from torch import nn

from lightspan.backbones.dual_encoder import DualEncoder
from lightspan.backbones.text import TextTransformer
from lightspan.backbones.tokenizers import HashedWords
from lightspan.backbones.vit import vit
from lightspan.datamodules.rendered.scene_data import Known, RenderedScenes
from lightspan.datamodules.rendered.scenes import COLOURS, SceneSpace, Style
from lightspan.datamodules.rendered.textures import TEXTURES
from lightspan.datamodules.text.tokenized import tokenized
from lightspan.evaluation.features.features import Features
from lightspan.methods.image_text.m3i import M3I
from lightspan.nn.decoders.mask_decoder import MaskDecoder
from lightspan.nn.masking.patch_mix import PatchMix
from lightspan.objectives.moving_targets import MomentumFeatures

SEEDS, SEARCH = (0, 1, 2), 100
SIDE, PATCH, WIDTH, SHAPES, LENGTH = 24, 4, 48, 4, 4
STEPS, BATCH, JUDGED, LABELLED = 390, 64, 800, 400
RATES = (1e-3, 3e-3)
TARGETS = ("dense", "captions", "labels")
ONE_STAGE, CHAIN, UNMIXED = "one stage", "three stages", "one stage, not mixed"
ARMS = (*TARGETS, ONE_STAGE, CHAIN, UNMIXED)
PROBES = ("shape", "texture", "mean IoU of objects")
WORDS = HashedWords(512)
Found = dict[str, float]


@lru_cache(maxsize=1)
def scenes(seed: int, steps: int, judged: int) -> tuple[RenderedScenes, list[dict[str, Any]]]:
    """Scenes to judge on, and batches to train on, which no step has twice."""
    data = RenderedScenes(
        SceneSpace(SIDE, SIDE, fewest=1, most=1, shapes=SHAPES),
        Style(),
        Known(labels=0.1, captions=0.3),
        WORDS,
        size=steps * BATCH,
        val_size=judged,
        test_size=judged,
        batch_size=BATCH,
        draw_seed=seed,
        seed=seed,
    )
    fields = ("image", "shape", "colour", "texture", "label_known", "caption_known", "index")
    return data, [captioned(batch) for batch in kept(data, fields)]


def captioned(batch: dict[str, Any]) -> dict[str, Any]:
    """With the shape as the class, also of an object that cannot be seen, and a caption that does not name it."""
    named = zip(batch.pop("colour")[:, 0].tolist(), batch.pop("texture")[:, 0].tolist(), strict=True)
    tokens, mask = tokenized(WORDS, [f"{COLOURS[colour]} {TEXTURES[texture]}" for colour, texture in named], LENGTH)
    text = {"tokens": torch.from_numpy(tokens), "mask": torch.from_numpy(mask)}
    return batch | text | {"label": batch.pop("shape")[:, 0]}


def method(targets: tuple[str, ...], rate: float, mix: PatchMix) -> M3I:
    image = vit(WIDTH, 3, 4, img_size=SIDE, patch_size=PATCH, class_token=False)
    encoders = DualEncoder(image, TextTransformer(WORDS.size, WIDTH, 1, 4, LENGTH), width=32)
    decoder = MaskDecoder(WIDTH, width=32, depth=1, heads=4)
    weights: dict[str, Any] = {target: float(target in targets) for target in TARGETS}
    target, categories = MomentumFeatures(0.98), nn.Linear(WIDTH, SHAPES)
    return M3I(encoders, decoder, categories, target, mix, **weights, **adamw(rate))


def trained(arm: str, rate: float, batches: list[dict[str, Any]]) -> M3I:
    """One stage, or in the chain one after another, each from the weights of the one before."""
    stages = [(target,) for target in TARGETS] if arm == CHAIN else [(arm,)] if arm in TARGETS else [TARGETS]
    mix, steps = PatchMix(1, hidden=0.5) if arm == UNMIXED else PatchMix(), len(batches) // len(stages)
    model = method(stages[0], rate, mix)
    for number, targets in enumerate(stages):
        following = method(targets, rate, mix)
        following.load_state_dict(model.state_dict())
        model = following
        part = batches[number * steps : (number + 1) * steps]
        quiet_trainer(max_steps=steps, gradient_clip_val=3.0).fit(model, served(part))
    return model


def with_objects(features: Features) -> Features:
    """With object or ground for each pixel."""
    fields = dict(features.fields)
    return Features(features.x, grid=features.grid, fields=fields | {"objects": (fields["instances"] > 0).long()})


def measured(arm: str, rate: float, seed: int, steps: int = STEPS, judged: int = JUDGED) -> Found:
    data, batches = scenes(seed, steps, judged)
    seed_everything(seed, verbose=False)
    model = trained(arm, rate, batches)
    fields = ("shape", "texture", "instances")
    bank, query = (with_objects(seen(model.backbone, data, part, fields)) for part in ("val", "test"))
    found = [linear(bank, query, lambda features, f=field: features.fields[f][:, 0], LABELLED) for field in PROBES[:2]]  # type: ignore[misc]
    return dict(zip(PROBES, [*found, segmentation(bank, query, "objects")], strict=True))


def mean(found: Found) -> float:
    return sum(found.values()) / len(found)


def compare(evidence, seeds=SEEDS, **settings: int) -> None:
    tried = {arm: {rate: mean(measured(arm, rate, SEARCH, **settings)) for rate in RATES} for arm in ARMS}
    chosen = {arm: max(of, key=lambda rate: of[rate]) for arm, of in tried.items()}
    # Seed by seed, as scenes are kept of one.
    runs = {seed: {arm: measured(arm, chosen[arm], seed, **settings) for arm in ARMS} for seed in seeds}
    for arm in ARMS:
        for seed in seeds:
            for probe, value in runs[seed][arm].items():
                evidence.figure(f"{probe}, {arm}", value, seed, "%")
            evidence.figure(f"mean of three, {arm}", mean(runs[seed][arm]), seed, "%")
    evidence.note(f"{STEPS} steps of {BATCH} scenes, weights of 1. Rates of {RATES} chosen on seed {SEARCH}", chosen)

    def gain(over: str) -> dict[int, float]:
        return {seed: mean(runs[seed][ONE_STAGE]) - mean(runs[seed][over]) for seed in seeds}

    best = {seed: max(mean(of[arm]) for arm in TARGETS) for seed, of in runs.items()}
    evidence.claim(
        "mean of three, one stage minus the best single target",
        {seed: mean(runs[seed][ONE_STAGE]) - best[seed] for seed in seeds},
        at_least=3.0,
        unit="points",
    )
    for probe in PROBES:
        behind = {seed: of[ONE_STAGE][probe] - max(of[arm][probe] for arm in TARGETS) for seed, of in runs.items()}
        evidence.claim(f"{probe}, one stage minus the best single target", behind, at_least=-1.0, unit="points")
    evidence.claim("mean of three, one stage minus three stages", gain(CHAIN), at_least=0.0, unit="points")
    evidence.claim("mean of three, mixed minus not mixed", gain(UNMIXED), at_least=0.0, unit="points")


def test_m3i(evidence) -> None:
    compare(evidence)
