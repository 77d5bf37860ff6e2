"""CropMAE (arXiv 2403.17823) on rendered scenes of textured objects, read by label propagation through moving clips.

Arms with one vision transformer (6 x 6 patches of 48 x 48 pictures, 64 channels, 4 blocks), the same decoder and equal
steps: CropMAE on nested crops, and on the same crop twice; beside them the untrained network. Propagation has the same
settings for all (`moving_scenes.jaccard_of_clips`), set before any run. Rates are chosen by J on clips of the search
seed. MAE was an arm of an earlier record, level with the untrained network and with pixels.

Floor: the untrained network. Ceiling: propagation by what each patch shows most, in true labels; of hidden patches
guessed, no error. Gate: the arm's own loss on pictures that it trains on, by that of the untrained network.
"""

from functools import partial

import numpy as np
import torch
from lightning import seed_everything
from masked_arms import HEADS, WIDTH, encoder, optimisation
from moving_scenes import SIDE, clips, jaccard_of_clips, stills
from own_loss import own_loss
from quiet import quiet_trainer
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightspan.datamodules.image.augment.views import NestedCrops, RandomViews, Views, seeded
from lightspan.methods.masked.cropmae import CropMAE
from lightspan.nn.decoders.cross_decoder import CrossDecoder, CrossFirst
from lightspan.nn.masking.mask_samplers import RandomMasks, seen_and_hidden
from lightspan.nn.sequences.patches import at_places, patchify
from lightspan.objectives.masked import patch_regression

SEEDS, SEARCH = (0, 1, 2, 3), 100
PATCH, STEPS, BATCH = 6, 300, 48
TRAINING, CLIPS = 2000, 40
MEAN, STD = 0.5, 0.25
crop = partial(RandomViews, count=1, size=SIDE, brightness=0.0, contrast=0.0)


class SameView(Views):
    """One crop, twice."""

    def __call__(self, image: Tensor) -> list[Tensor]:
        return crop(scale=(0.3, 1.0))(image) * 2


def network() -> torch.nn.Module:
    return encoder(img_size=SIDE, patch_size=PATCH, in_chans=3)


def cropmae(rate: float = 1e-3) -> CropMAE:
    block = partial(CrossFirst, heads=HEADS, mlp_width=128)
    decoder = CrossDecoder(WIDTH, 3 * PATCH**2, 32, 2, block, place_other=False)
    return CropMAE(network(), decoder, RandomMasks(0.97), **optimisation(rate))  # 2 of 64 patches are seen


ARMS: dict[str, Views] = {
    "CropMAE": NestedCrops(crop(scale=(0.3, 1.0)), crop(scale=(0.3, 0.6))),
    "same view": SameView(),
}
RATES = (3e-3, 1e-2, 3e-2)


def standardised(images: np.ndarray | Tensor) -> Tensor:
    if isinstance(images, np.ndarray):
        images = torch.from_numpy(images).float() / 255
    return (images - MEAN) / STD


def batches(views: Views, seed: int, steps: int) -> DataLoader:
    """Views of pictures in a random order, a new view in each epoch."""
    images, generator = torch.from_numpy(stills(TRAINING, seed)), np.random.default_rng(seed)
    chosen = [generator.choice(TRAINING, BATCH, replace=False) for _ in range(steps)]

    def batch(step: int) -> dict[str, object]:
        with seeded(seed * 1_000_003 + step):
            of_images = [views(images[row]) for row in chosen[step]]
        stacked = [standardised(torch.stack(view)) for view in zip(*of_images, strict=True)]
        return {"views": stacked, "index": torch.from_numpy(chosen[step])}

    return DataLoader([*range(steps)], batch_size=None, collate_fn=batch)


@torch.no_grad()
def gain_of_right_crop(method: CropMAE, seed: int) -> float:
    """By how much the error of guesses is below that with another picture's outer crop, in per cent."""
    whole, image = next(iter(batches(ARMS["CropMAE"], seed + 50, 4)))["views"]
    seen, hidden = seen_and_hidden(method.masks.draw((SIDE // PATCH,) * 2, 0, range(BATCH)))
    target = at_places(patchify(image, (PATCH, PATCH)), hidden)
    right, wrong = (
        float(patch_regression(method.guess(image, other, seen, hidden), target)) for other in (whole, whole.roll(1, 0))
    )
    return 100 * (1 - right / wrong)


@torch.no_grad()
def jaccard(method: CropMAE | None, seed: int) -> float:
    """Of clips; without a method by the object that most of each patch shows."""
    moving = clips(CLIPS, seed)
    if method is None:
        return jaccard_of_clips([shown(objects) for _, objects in moving], moving)
    prefix = method.backbone.num_prefix_tokens
    return jaccard_of_clips([method.backbone.tokens(standardised(images))[:, prefix:] for images, _ in moving], moving)  # type: ignore[operator]


def shown(objects_FSS: np.ndarray) -> Tensor:
    """Shares of each object in the patches of frames, [F T objects]."""
    owners_FSS = torch.from_numpy(objects_FSS)
    one_hot_FCSS = F.one_hot(owners_FSS).permute(0, 3, 1, 2).float()
    return F.avg_pool2d(one_hot_FCSS, PATCH).flatten(2).mT


def measured(arm: str, seed: int, rate: float, stream: int = 0) -> tuple[dict[str, float], dict[str, float]]:
    """Figures of the trained network, with its loss by the untrained one's, and those of the untrained one.

    Args:
        stream: which clips are propagated through; the search has clips of its own.
    """
    seed_everything(seed, verbose=False)
    method, few = cropmae(rate), list(batches(ARMS[arm], seed, 2))

    def figures() -> dict[str, float]:
        found = {"J": jaccard(method.eval(), seed + 1000 * stream), "loss": own_loss(cropmae, method.state_dict(), few)}
        return found | ({"gain": gain_of_right_crop(method, seed)} if arm == "CropMAE" else {})

    before = figures()
    quiet_trainer(max_steps=STEPS).fit(method.train(), batches(ARMS[arm], seed, STEPS))
    return figures(), before


def test_cropmae(evidence):
    rates = evidence.search(
        {arm: lambda rate, arm=arm: measured(arm, SEARCH, rate, stream=1)[0]["J"] for arm in ARMS}, RATES
    )
    runs: dict[str, dict[int, dict[str, float]]] = {}
    for arm in ARMS:
        found = {seed: measured(arm, seed, rates[arm]) for seed in SEEDS}
        runs[arm], before = ({seed: pair[i] for seed, pair in found.items()} for i in range(2))
        losses = ({seed: one["loss"] for seed, one in of.items()} for of in (runs[arm], before))
        evidence.gate(arm, *losses, by=0.1, unit="of patches' variance", lower_is_better=True)
        runs.setdefault("untrained", before)
    oracle = {seed: jaccard(None, seed) for seed in SEEDS}
    for arm, of_seed in runs.items():
        for seed, one in of_seed.items():
            evidence.figure(f"J, {arm}", one["J"], seed, "%")
    for seed, value in oracle.items():
        evidence.figure("J, true labels of patches", value, seed, "%")
    evidence.note(f"{TRAINING} pictures, {STEPS} steps of {BATCH}, {CLIPS} clips of 20 frames, J after the first one.")
    for over, margin in (("untrained", 8.0), ("same view", 5.0)):
        evidence.claim(
            f"J, CropMAE minus {over}",
            {seed: runs["CropMAE"][seed]["J"] - runs[over][seed]["J"] for seed in SEEDS},
            at_least=margin,
            unit="points",
            floor={seed: runs["untrained"][seed]["J"] - runs[over][seed]["J"] for seed in SEEDS},
            ceiling={seed: oracle[seed] - runs[over][seed]["J"] for seed in SEEDS},
            arms=("CropMAE",) if over == "untrained" else ("CropMAE", over),
        )
    evidence.claim(
        "error with the right outer crop below that with another picture's",
        {seed: one["gain"] for seed, one in runs["CropMAE"].items()},
        at_least=100 / 6,
        unit="%",
        floor={seed: one["gain"] for seed, one in runs["untrained"].items()},
        ceiling=100.0,
        arms=("CropMAE",),
    )
