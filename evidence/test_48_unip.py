"""UNIP (arXiv 2502.02257) on Fashion-MNIST in an infrared style: whose attention a small transformer should learn.

Photographs of clothes of 28 x 28 pixels, in patches of 4; each pixel that shows something has the garment's class, and
the others are ground. (In scenes of small drawn shapes no layer of such a teacher told patches better than random
weights did, so that there was nothing to learn from it.) A teacher of 8 blocks and 64 channels trains as MAE on grey
pictures. Students of 4 blocks and 32 channels see grey pictures and infrared ones (inverted, blurred, with a third of
the contrast and with noise), and learn of it for equal steps: the attention of the layer nearest the hybrid level of
mutual information, of the first layer, or of the last one; or the features of that hybrid layer; or nothing. Figures
are the mean IoU of a linear map from frozen patches to the 11 labels, on infrared test pictures.

The mutual information of a layer is that on grey pictures, on which the teacher was trained. The hybrid level depends
on the number of tokens, and is calibrated once, on the teacher of seed 100: it is the mutual information of the layer
whose patches are told best there. On that seed, and pictures that no figure is taken on, each arm also has its rate
chosen, and whether patches are read before the last block or behind it, among the same for all.
"""

import copy
from collections.abc import Callable
from functools import cache, partial
from itertools import product
from typing import Any

import numpy as np
import torch
from lightning import seed_everything
from quiet import quiet_trainer
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightspan.backbones.vit import TokenViT, vit
from lightspan.datamodules.image.augment.rendering import blurred
from lightspan.datamodules.image.sets.small import FashionMNIST, Labelled
from lightspan.evaluation.dense.dense_probes import LinearSegmentation
from lightspan.evaluation.features.features import Features
from lightspan.evaluation.scores.attention_information import information_of_layers
from lightspan.methods.distillation.unip import UNIP
from lightspan.methods.masked.mae import MAE
from lightspan.nn.decoders.mask_decoder import MaskDecoder
from lightspan.nn.sequences.token_backbone import AllTokens
from lightspan.nn.teachers.frozen import Frozen
from lightspan.nn.tokens import token_features
from lightspan.objectives.distillation import mean_squared
from lightspan.optim.schedules import WarmupCosine
from lightspan.training.method import Method

SEEDS, SEARCH = (0, 1, 2), 100
SIDE, PATCH, WIDTH, DEPTH, HEADS = 28, 4, 64, 8, 4
TEACHING, STEPS, BATCH, TRAINING, BANK, JUDGED = 1000, 400, 64, 6000, 600, 600
MEAN, DEVIATION, SHOWN = 0.286, 0.353, 0.1  # of the training pictures; a pixel above the last belongs to the garment
Style = Callable[[Tensor], Tensor]
RATES, PLACES = (1e-3, 3e-3), (-2, -1)
HYBRID, ARMS = "hybrid layer", ("random weights", "hybrid layer", "first layer", "last layer", "features")


class FeatureStudent(Method):
    """Its tokens, through a linear layer, are held to a teacher's normalised ones."""

    def __init__(self, backbone: TokenViT, teacher: TokenViT, layer: int, **optimization: Any) -> None:
        super().__init__(**optimization)
        teacher.cut_behind(layer)
        self.backbone, self.teacher = backbone, Frozen(AllTokens(teacher))
        self.map = nn.Linear(backbone.num_features, teacher.num_features)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        taught = F.layer_norm(self.teacher(batch["image"]), [self.map.out_features])
        return mean_squared(self.map(self.backbone.tokens(batch["image"])), taught)


def grey(image_BHW: Tensor) -> Tensor:
    return image_BHW


def infrared(image_BHW: Tensor) -> Tensor:
    softened = blurred(image_BHW[:, None], 1.0, most=1.0)[:, 0]
    noise = torch.randn(image_BHW.shape, generator=torch.Generator().manual_seed(0))
    return 0.65 - softened / 3 + 0.03 * noise


@cache
def clothes() -> dict[str, Labelled]:
    train, test = FashionMNIST(source="full").load()
    training, held_out = (
        Labelled(train.images[part], train.labels[part]) for part in np.split(np.arange(60000), [50000])
    )
    return {"train": training, "val": held_out, "test": test}


def pictures(style: Style, seed: int, part: str, count: int) -> dict[str, Tensor]:
    """image: [count 1 28 28]; semantic: 0 for ground, else 1 + the class."""
    images, labels = clothes()[part]
    drawn = np.random.default_rng(seed).permutation(len(images))[:count]
    image_BHW, label_B = torch.from_numpy(images[drawn]) / 255, torch.from_numpy(labels[drawn])
    semantic = torch.where(image_BHW > SHOWN, 1 + label_B[:, None, None], 0)
    return {"image": (style(image_BHW)[:, None] - MEAN) / DEVIATION, "semantic": semantic}


def fitted(method: Any, images: Tensor, steps: int, batch: int, seed: int) -> TokenViT:
    generator = np.random.default_rng(seed)
    chosen = [torch.from_numpy(generator.choice(len(images), batch)) for _ in range(steps)]
    loader: DataLoader = DataLoader(
        [*range(steps)],  # type: ignore[arg-type]
        batch_size=None,
        collate_fn=lambda step: {"image": images[chosen[step]], "index": chosen[step]},
    )
    quiet_trainer(max_steps=steps).fit(method, loader)
    return method.backbone.eval()


def optimisation(rate: float) -> dict[str, Callable]:
    return {
        "optimizer": partial(torch.optim.AdamW, lr=rate, betas=(0.9, 0.95), weight_decay=0.05),
        "lr_scheduler": partial(WarmupCosine, warmup=0.05, final=0.0),
    }


def taught(seed: int, steps: int) -> TokenViT:
    """The teacher, trained as MAE."""
    images = pictures(grey, seed, "train", TRAINING)["image"]
    seed_everything(seed, verbose=False)
    backbone = vit(WIDTH, DEPTH, HEADS, img_size=SIDE, patch_size=PATCH, in_chans=1, pool="avg")
    method = MAE(backbone, MaskDecoder(WIDTH, PATCH**2, WIDTH // 2, 2, HEADS), **optimisation(2e-3))
    return fitted(method, images, steps, 2 * BATCH, seed)


def student(arm: str, teacher: TokenViT, layer: int, rate: float, images: Tensor, seed: int, steps: int) -> TokenViT:
    seed_everything(seed, verbose=False)
    sizes = {"img_size": SIDE, "patch_size": PATCH, "in_chans": 1, "pool": "avg"}
    backbone = vit(WIDTH // 2, DEPTH // 2, HEADS, **sizes, last_heads=HEADS)
    if arm == "random weights":
        return backbone.eval()
    kind = FeatureStudent if arm == "features" else UNIP
    layer = {"first layer": 0, "last layer": DEPTH - 1}.get(arm, layer)
    return fitted(kind(backbone, copy.deepcopy(teacher), layer, **optimisation(rate)), images, steps, BATCH, seed)


class Judge:
    """Mean IoU of frozen patches on infrared pictures, in per cent; the map is fitted on labelled ones for training."""

    def __init__(self, seed: int, part: str) -> None:
        self.grey = pictures(grey, seed, part, JUDGED)["image"]
        self.bank, self.query = pictures(infrared, seed, "train", BANK), pictures(infrared, seed, part, JUDGED)

    @torch.no_grad()
    def __call__(self, backbone: TokenViT, layers: tuple[int, ...]) -> list[float]:
        """By layer."""
        of_bank, of_query = (
            token_features(backbone, lambda images=images: backbone.tokens(images), layers)
            for images in (self.bank["image"], self.query["image"])
        )
        probe, found = LinearSegmentation("semantic"), []
        for pair in zip(of_bank, of_query, strict=True):
            features = [
                Features(tokens.tokens_BTD, grid=tokens.grid, fields={"semantic": drawn["semantic"]})
                for tokens, drawn in zip(pair, (self.bank, self.query), strict=True)
            ]
            found.append(100 * probe.fit(*features).scores["mean_iou"])
        return found

    def by_layer(self, teacher: TokenViT) -> tuple[np.ndarray, np.ndarray]:
        """(mutual information, mean IoU) of each layer of the teacher."""
        _, nmi = information_of_layers(teacher, self.grey.split(BATCH))
        return np.array([float(of_heads.mean()) for of_heads in nmi]), np.array(self(teacher, tuple(range(DEPTH))))


def to_learn_from(seed: int) -> Tensor:
    return torch.cat([pictures(style, seed, "train", TRAINING)["image"] for style in (grey, infrared)])


def searched(teaching: int, steps: int) -> tuple[float, dict[str, tuple[float, int]]]:
    """(hybrid level, rate and layer to read of each arm), on the pictures of a seed of their own."""
    teacher, judge, images = taught(SEARCH, teaching), Judge(SEARCH, "val"), to_learn_from(SEARCH)
    nmi, iou = judge.by_layer(teacher)
    best, chosen = int(iou.argmax()), {}
    for arm in ARMS:
        rates = RATES[:1] if arm == "random weights" else RATES
        found = [judge(student(arm, teacher, best, rate, images, SEARCH, steps), PLACES) for rate in rates]
        chosen[arm] = max(product(rates, PLACES), key=lambda pair: found[rates.index(pair[0])][PLACES.index(pair[1])])
    return float(nmi[best]), chosen


def compare(evidence, seeds=SEEDS, teaching: int = TEACHING, steps: int = STEPS) -> None:
    level, chosen = searched(teaching, steps)
    runs: dict[str, dict[int, float]] = {arm: {} for arm in ARMS}
    spread, rank_correlation = {}, {}
    for seed in seeds:
        teacher, judge, images = taught(seed, teaching), Judge(seed, "test"), to_learn_from(seed)
        nmi, iou = judge.by_layer(teacher)
        layer = int(np.abs(nmi - level).argmin())
        spread[seed], rank_correlation[seed] = float(np.ptp(nmi)), float(spearmanr(np.abs(nmi - level), iou).statistic)
        for at in range(DEPTH):
            evidence.figure(f"mutual information of the teacher, layer {at}", nmi[at], seed)
            evidence.figure(f"mean IoU of the teacher, layer {at}", iou[at], seed, "%")
        evidence.figure("chosen layer", layer, seed)
        for arm, (rate, place) in chosen.items():
            (runs[arm][seed],) = judge(student(arm, teacher, layer, rate, images, seed, steps), (place,))
    for arm, of_seed in runs.items():
        for seed, value in of_seed.items():
            evidence.figure(f"mean IoU, {arm}", value, seed, "%")
    said = ", ".join(f"{arm} {rate:g} and layer {place}" for arm, (rate, place) in chosen.items())
    evidence.note(
        f"{teaching} steps of {2 * BATCH} for teachers, {steps} of {BATCH} for students. Layers count from 0. Hybrid "
        f"level {level:.3f}; rates of {RATES} and layers to read of {PLACES}, chosen on seed {SEARCH}: {said}."
    )

    def gain(over: str) -> dict[int, float]:
        return {seed: runs[HYBRID][seed] - runs[over][seed] for seed in seeds}

    evidence.claim("mean IoU, hybrid layer minus random weights", gain("random weights"), at_least=10.0, unit="points")
    evidence.claim("mean IoU, hybrid layer minus first layer", gain("first layer"), at_least=0.0, unit="points")
    evidence.claim("mean IoU, hybrid layer minus last layer", gain("last layer"), at_least=0.0, unit="points")
    evidence.claim("mean IoU, hybrid layer minus features", gain("features"), at_least=-2.0, unit="points")
    evidence.claim("mutual information of the teacher, most minus least of a layer", spread, at_least=0.1)
    evidence.claim(
        "rank correlation of the distance from the level and the teacher's mean IoU by layer",
        rank_correlation,
        at_most=-0.5,
    )


def test_unip(evidence) -> None:
    compare(evidence)
