"""Heuristic MTL (arXiv 2310.07510) on rendered scenes: tags, masked pixels and contrast, each alone, at once and none.

Scenes of 32 x 32 pixels with one to four objects of four shapes and colours, of whose tags each is told with
probability 0.7; a vision transformer of three blocks and 48 channels, in patches of 4. Frozen features are read on
scenes that nothing was trained on: tags by a linear probe with 100 labelled scenes, which pixels show an object by a
linear map of patches, and which of two patches is nearer, among those of objects. Arms are the method with weights of
0, with equal steps and views. In the combination each weight is about 1 over the loss at the start. The rate of each
arm, among the same for all, is the best by the sum of the three figures on scenes of another seed.
"""

from functools import lru_cache
from typing import Any

import torch
from lightning import seed_everything
from quiet import quiet_trainer
from scene_probes import adamw, depth_order, kept, linear, seen, segmentation, served
from torch import nn

from lightspan.backbones.vit import vit
from lightspan.datamodules.image.augment.views import RandomViews
from lightspan.datamodules.rendered.scene_data import Known, RenderedScenes
from lightspan.datamodules.rendered.scenes import SceneSpace, Style
from lightspan.evaluation.features.features import Features
from lightspan.methods.supervised.heuristic_mtl import HeuristicMTL
from lightspan.nn.heads.projector import Projector

SEEDS, SEARCH = (0, 1, 2), 100
SIDE, PATCH, WIDTH = 32, 4, 48
STEPS, BATCH, JUDGED, LABELS = 400, 32, 512, 100
RATES = (1e-3, 3e-3)
WEIGHTS = {"tags": 5.0, "pixels": 1.0, "contrast": 0.3}
TOGETHER = "all three"
ARMS = {task: (task,) for task in WEIGHTS} | {TOGETHER: tuple(WEIGHTS), "random weights": ()}
TASKS = ("tags, 100 labels", "mean IoU of objects", "order of depth")


@lru_cache(maxsize=1)
def scenes(seed: int, steps: int, judged: int) -> tuple[RenderedScenes, list[dict[str, Any]]]:
    """Scenes to judge on, and batches to train on, which no step has twice."""
    data = RenderedScenes(
        SceneSpace(SIDE, SIDE, fewest=1, most=4, shapes=4, colours=4),
        Style(texture=0.5),
        Known(tags=0.7),
        views=RandomViews(2, scale=(0.6, 1.0), saturation=0.4, grey=0.1),
        size=steps * BATCH,
        val_size=judged,
        test_size=judged,
        batch_size=BATCH,
        draw_seed=seed,
        seed=seed,
    )
    return data, kept(data, ("views", "tags", "tags_known", "index"))


def method(arm: str, rate: float, tags: int) -> HeuristicMTL:
    weights = {task: weight * (task in ARMS[arm]) for task, weight in WEIGHTS.items()}
    backbone = vit(WIDTH, 3, 4, img_size=SIDE, patch_size=PATCH, class_token=False, mask_token=True)
    heads = nn.Linear(WIDTH, tags), Projector(WIDTH, [128], 64)
    return HeuristicMTL(backbone, *heads, momentum=0.98, **weights, **adamw(rate))


def judged_by(features: Features) -> Features:
    """With object or ground for each pixel, and the depth of objects alone: that of the ground is always the same."""
    object_Nhw = features.fields["instances"] > 0
    depth_Nhw = features.fields["depth"].where(object_Nhw, 0)
    fields = {"tags": features.fields["tags"].bool(), "objects": object_Nhw.long(), "depth": depth_Nhw}
    return Features(features.x, grid=features.grid, fields=fields)


def measured(arm: str, rate: float, seed: int, steps: int = STEPS, judged: int = JUDGED) -> dict[str, float]:
    data, batches = scenes(seed, steps, judged)
    seed_everything(seed, verbose=False)
    trained = method(arm, rate, data.num_tags)
    if ARMS[arm]:
        quiet_trainer(max_steps=steps, gradient_clip_val=3.0).fit(trained, served(batches))
    fields = ("tags", "depth", "instances")
    bank, query = (judged_by(seen(trained.backbone, data, part, fields)) for part in ("val", "test"))
    found = (
        linear(bank, query, lambda features: features.fields["tags"], LABELS),
        segmentation(bank, query, "objects"),
        depth_order(bank, query),
    )
    return dict(zip(TASKS, found, strict=True))


def mean_rank(found: dict[str, dict[str, float]], arm: str) -> float:
    """Over the tasks, 1 for the best arm; equal figures share a rank."""

    def rank(task: str) -> float:
        others = torch.tensor([of[task] for name, of in found.items() if name != arm])
        return 1 + float((others > found[arm][task]).sum() + 0.5 * (others == found[arm][task]).sum())

    return sum(map(rank, TASKS)) / len(TASKS)


def compare(evidence, seeds=SEEDS, **settings: int) -> None:
    trained = [arm for arm, tasks in ARMS.items() if tasks]
    tried = {arm: {rate: sum(measured(arm, rate, SEARCH, **settings).values()) for rate in RATES} for arm in trained}
    chosen = {arm: max(of, key=lambda rate: of[rate]) for arm, of in tried.items()}
    of_seeds = {
        seed: {arm: measured(arm, chosen.get(arm, 0.0), seed, **settings) for arm in ARMS} for seed in seeds
    }  # seed by seed, as scenes are kept of one
    runs = {arm: {seed: of_seeds[seed][arm] for seed in seeds} for arm in ARMS}
    ranks = {seed: {arm: mean_rank(found, arm) for arm in ARMS} for seed, found in of_seeds.items()}
    for arm, of_seed in runs.items():
        for seed, found in of_seed.items():
            for task, value in found.items():
                evidence.figure(f"{task}, {arm}", value, seed, "%")
            evidence.figure(f"mean rank of five, {arm}", ranks[seed][arm], seed)
    evidence.note(
        f"{STEPS} steps of {BATCH} scenes; weights {WEIGHTS}. Rates of {RATES} chosen on seed {SEARCH}",
        chosen,
    )

    def gain(task: str, over: str) -> dict[int, float]:
        return {seed: runs[TOGETHER][seed][task] - runs[over][seed][task] for seed in seeds}

    evidence.claim(f"{TASKS[1]}, all three minus tags", gain(TASKS[1], "tags"), at_least=3.0, unit="points")
    evidence.claim(f"{TASKS[0]}, all three minus pixels", gain(TASKS[0], "pixels"), at_least=5.0, unit="points")
    for seed in seeds:
        better = min(rank for arm, rank in ranks[seed].items() if arm != TOGETHER) - ranks[seed][TOGETHER]
        evidence.claim(f"mean rank, best other arm minus all three, seed {seed}", better, at_least=0.0)


def test_heuristic_mtl(evidence) -> None:
    compare(evidence)
