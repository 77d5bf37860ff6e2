"""UNIP (arXiv 2502.02257) on Fashion-MNIST in an infrared style: whose attention a small transformer should learn.

Photographs of clothes of 28 x 28 pixels, in patches of 4; each pixel that shows something has the garment's class, and
the others are ground. A teacher of 8 blocks and 64 channels trains as MAE on grey pictures. Students of 4 blocks and
32 channels see grey pictures and infrared ones (inverted, blurred, with a third of the contrast and with noise), and
learn of it for equal steps: the attention of the layer nearest the hybrid level of mutual information, or of the last
one; or nothing. Figures are the mean IoU of a linear map from frozen patches to the 11 labels, on infrared test
pictures.

The mutual information of a layer is that on grey pictures, on which the teacher was trained. The hybrid level depends
on the number of tokens, and is calibrated once, on the teacher of the search seed: it is the mutual information of the
layer whose patches are told best there. On that seed, and pictures that no figure is taken on, each arm also has its
rate chosen, and whether patches are read before the last block or behind it.

Claims about the first layer and about the order of the teacher's layers are left out: layers of so small a teacher are
level in what their patches tell, and on one of three seeds the layer of the hybrid level was the first one. They need a
teacher of the paper's size, such as `distillation/unip_infmix` has.

Floor: the untrained student. Ceiling: the same student taught the labels of pixels. Gate: the arm's own loss, by that
of the untrained student.
"""

import copy
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from lightning import seed_everything
from own_loss import own_loss
from quiet import quiet_trainer
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
from lightspan.nn.tokens import token_features
from lightspan.optim.schedules import WarmupCosine
from lightspan.training.method import Method

SEEDS, SEARCH = (0, 1, 2), 100
SIDE, PATCH, WIDTH, DEPTH, HEADS = 28, 4, 64, 8, 4
TEACHING, STEPS, BATCH, TRAINING, BANK, JUDGED = 750, 400, 64, 6000, 600, 600
LABELS = 11
MEAN, DEVIATION, SHOWN = 0.286, 0.353, 0.1  # of the training pictures; a pixel above the last belongs to the garment
Style = Callable[[Tensor], Tensor]
RATES, PLACES = (1e-3, 3e-3, 1e-2), (-2, -1)
HYBRID, LAST, ORACLE = "hybrid layer", "last layer", "taught pixels"
ARMS = (HYBRID, LAST)


class Taught(Method):
    """The ceiling: told the label of each pixel."""

    def __init__(self, rate: float) -> None:
        super().__init__(**optimisation(rate))
        self.backbone, self.map = small(), nn.Linear(WIDTH // 2, LABELS * PATCH**2)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        patches = self.backbone.tokens(batch["image"])[:, self.backbone.num_prefix_tokens :]
        return F.cross_entropy(F.fold(self.map(patches).mT, (SIDE, SIDE), PATCH, stride=PATCH), batch["semantic"])


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


def batch_of(given: dict[str, Tensor], rows: Tensor) -> dict[str, Tensor]:
    return {name: field[rows] for name, field in given.items()} | {"index": rows}


def fitted(method: Any, given: dict[str, Tensor], steps: int, batch: int, seed: int) -> Any:
    """In evaluation mode."""
    generator = np.random.default_rng(seed)
    chosen = [torch.from_numpy(generator.choice(len(given["image"]), batch)) for _ in range(steps)]
    loader: DataLoader = DataLoader(chosen, batch_size=None, collate_fn=partial(batch_of, given))  # type: ignore[arg-type]
    quiet_trainer(max_steps=steps).fit(method, loader)
    return method.eval()


def optimisation(rate: float) -> dict[str, Callable]:
    return {
        "optimizer": partial(torch.optim.AdamW, lr=rate, betas=(0.9, 0.95), weight_decay=0.05),
        "lr_scheduler": partial(WarmupCosine, warmup=0.05, final=0.0),
    }


def taught(seed: int) -> TokenViT:
    """The teacher, trained as MAE."""
    given = {"image": pictures(grey, seed, "train", TRAINING)["image"]}
    seed_everything(seed, verbose=False)
    backbone = vit(WIDTH, DEPTH, HEADS, img_size=SIDE, patch_size=PATCH, in_chans=1, pool="avg")
    method = MAE(backbone, MaskDecoder(WIDTH, PATCH**2, WIDTH // 2, 2, HEADS), **optimisation(2e-3))
    return fitted(method, given, TEACHING, 2 * BATCH, seed).backbone


def small() -> TokenViT:
    sizes = {"img_size": SIDE, "patch_size": PATCH, "in_chans": 1, "pool": "avg"}
    return vit(WIDTH // 2, DEPTH // 2, HEADS, **sizes, last_heads=HEADS)  # type: ignore[arg-type]


def method(arm: str, teacher: TokenViT, layer: int, rate: float = 1e-3) -> Method:
    if arm == ORACLE:
        return Taught(rate)
    return UNIP(small(), copy.deepcopy(teacher), layer if arm == HYBRID else DEPTH - 1, **optimisation(rate))


def student(
    arm: str, teacher: TokenViT, layer: int, rate: float, given: dict[str, Tensor], seed: int
) -> tuple[TokenViT, TokenViT, float]:
    """(trained, untrained, loss of the trained one by that of the untrained one)."""
    make, few = partial(method, arm, teacher, layer), [batch_of(given, rows) for rows in torch.arange(512).split(64)]
    seed_everything(seed, verbose=False)
    model = make(rate)
    untrained, loss = copy.deepcopy(model.backbone).eval(), own_loss(make, model.state_dict(), few)
    fitted(model, given, STEPS, BATCH, seed)
    return model.backbone, untrained, own_loss(make, model.state_dict(), few) / loss  # type: ignore[return-value]


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


def to_learn_from(seed: int) -> dict[str, Tensor]:
    both = [pictures(style, seed, "train", TRAINING) for style in (grey, infrared)]
    return {name: torch.cat([one[name] for one in both]) for name in both[0]}


def test_unip(evidence) -> None:
    teacher, judge, given = taught(SEARCH), Judge(SEARCH, "val"), to_learn_from(SEARCH)
    nmi, iou = judge.by_layer(teacher)
    best = int(iou.argmax())
    level = float(nmi[best])
    read: dict[tuple[str, float], list[float]] = {}

    def validated(arm: str, rate: float) -> float:
        read[arm, rate] = judge(student(arm, teacher, best, rate, given, SEARCH)[0], PLACES)
        return max(read[arm, rate])

    rates = evidence.search({arm: partial(validated, arm) for arm in ARMS}, RATES)
    places = {arm: PLACES[int(np.argmax(read[arm, rates[arm]]))] for arm in ARMS}
    rates[ORACLE], places[ORACLE] = rates[HYBRID], -1
    runs: dict[str, dict[int, float]] = {arm: {} for arm in (*rates, "untrained")}
    losses: dict[str, dict[int, float]] = {arm: {} for arm in rates}
    for seed in SEEDS:
        teacher, judge, given = taught(seed), Judge(seed, "test"), to_learn_from(seed)
        layer = int(np.abs(judge.by_layer(teacher)[0] - level).argmin())
        evidence.figure("chosen layer", layer, seed)
        for arm, rate in rates.items():
            trained, untrained, losses[arm][seed] = student(arm, teacher, layer, rate, given, seed)
            (runs[arm][seed],) = judge(trained, (places[arm],))
            if arm == HYBRID:
                runs["untrained"][seed] = max(judge(untrained, PLACES))
    for arm, of_seed in runs.items():
        for seed, value in of_seed.items():
            evidence.figure(f"mean IoU, {arm}", value, seed, "%")
    for arm in ARMS:
        evidence.gate(arm, losses[arm], 1.0, by=0.2, unit="of its loss", lower_is_better=True)
    evidence.note(
        f"{TEACHING} steps of {2 * BATCH} for teachers, {STEPS} of {BATCH} for students. Layers count from 0. Hybrid "
        f"level {level:.3f}. Layers to read of {PLACES}",
        places,
    )
    for over, margin in (("untrained", 10.0), (LAST, 0.0)):

        def gain(arm: str, over: str = over) -> dict[int, float]:
            return {seed: runs[arm][seed] - runs[over][seed] for seed in SEEDS}

        evidence.claim(
            f"mean IoU, hybrid layer minus {over}",
            gain(HYBRID),
            at_least=margin,
            unit="points",
            floor=gain("untrained"),
            ceiling=gain(ORACLE),
            arms=(HYBRID, LAST) if over == LAST else (HYBRID,),
        )
