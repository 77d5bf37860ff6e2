"""SD-FPT (arXiv 2210.02871) on 150 digits of another style, from a masked autoencoder of clean ones.

A vision transformer (16 patches of 8 x 8 pixels) is pre-trained as MAE on scikit-learn's digits as they are. The new
set are other digits, inverted, under waves and noise: 150 without labels, of which 100 then have one for fine-tuning,
and others to test. Arms from the same start: fine-tuned at once; further pre-trained on the 150 first, for few steps up
to so many that it overfits; and SD-FPT, whose teacher is the further pre-trained one, and whose student starts anew. At
the same steps altogether further pre-training has twice as many in a row.

The 1,797 digits are divided once. Rates of both stages, the same choice for each arm, were chosen on 597 digits with
seed 100 (`python evidence/test_18_sd_fpt.py`); figures are taken on the other 1,200, in an order of each seed.
"""

import copy
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from digits import parted
from lightning import seed_everything
from quiet import quiet_trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightspan.backbones.vit import TokenViT, vit
from lightspan.methods.distillation.sd_fpt import SDFPT
from lightspan.methods.masked.mae import MAE
from lightspan.methods.supervised.classifier import Classifier
from lightspan.nn.decoders.mask_decoder import MaskDecoder
from lightspan.optim.schedules import WarmupCosine
from lightspan.training.method import Method

SEEDS, SEARCH_SEED = (0, 1, 2, 3, 4), 100
WIDTH, DEPTH, HEADS, BATCH = 32, 3, 4, 64
PRETRAINING, FEW, LONG, TUNING = 800, (100, 300), 1000, 200
UNLABELLED, LABELLED = 150, 100
PRETRAINING_RATE, RATES, TUNING_RATES = 2e-3, (5e-4, 2e-3), (1e-3, 3e-3)
CHOSEN = {"fine-tuned": (0.0, 1e-3), "further": (5e-4, 1e-3), "SD-FPT": (2e-3, 3e-3)}


class Digits(NamedTuple):
    """Clean pictures, the new set, and its test pictures, [N 1 8 8], with the labels of these two."""

    clean: Tensor
    new: Tensor
    new_label: Tensor
    test: Tensor
    test_label: Tensor


class Pretrained(NamedTuple):
    backbone: TokenViT
    decoder: MaskDecoder


def in_another_style(images: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Inverted, under waves of a direction, length and phase of each picture's own, and noise."""
    y, x = np.mgrid[:8, :8]
    angle, length, phase = (generator.uniform(*ends, (len(images), 1, 1)) for ends in ((0, 3.14), (2.5, 5), (0, 6.28)))
    waves = np.sin(6.28 * (x * np.cos(angle) + y * np.sin(angle)) / length + phase)
    return 0.8 - 0.6 * images + 0.25 * waves + generator.normal(0, 0.1, images.shape)


def digits(seed: int) -> Digits:
    images, labels = parted(seed, searching=seed == SEARCH_SEED)
    test = 200 if seed == SEARCH_SEED else 400
    new = in_another_style(images[: test + UNLABELLED], np.random.default_rng(seed))
    x, clean = (torch.from_numpy(part).float()[:, None] * 2 - 1 for part in (new, images[test + UNLABELLED :]))
    y = torch.from_numpy(labels[: test + UNLABELLED]).long()
    return Digits(clean, x[test:], y[test:], x[:test], y[:test])


def batches(x: Tensor, seed: int, steps: int, label: Tensor | None = None, size: int = BATCH) -> DataLoader:
    generator = np.random.default_rng(seed)
    chosen = [torch.from_numpy(generator.choice(len(x), size, replace=False)) for _ in range(steps)]

    def batch(step: int) -> dict[str, Tensor]:
        rows = chosen[step]
        given = {"image": x[rows], "index": rows}
        return given if label is None else given | {"label": label[rows]}

    return DataLoader([*range(steps)], batch_size=None, collate_fn=batch)


def optimisation(rate: float) -> dict[str, Any]:
    return {
        "optimizer": partial(torch.optim.AdamW, lr=rate, betas=(0.9, 0.95), weight_decay=0.01),
        "lr_scheduler": partial(WarmupCosine, warmup=0.05, final=0.0),
    }


def fitted(method: Any, loader: DataLoader, steps: int, seed: int) -> Any:
    seed_everything(seed, verbose=False)
    quiet_trainer(max_steps=steps, gradient_clip_val=1.0).fit(method, loader)
    return method


def pretrained(data: Digits, seed: int, steps: int = PRETRAINING) -> Pretrained:
    seed_everything(seed, verbose=False)
    backbone = vit(WIDTH, DEPTH, HEADS, img_size=8, patch_size=2, in_chans=1, pool="avg")
    start = MAE(backbone, MaskDecoder(WIDTH, 4, WIDTH // 2, 1, HEADS), **optimisation(PRETRAINING_RATE))
    fitted(start, batches(data.clean, seed, steps), steps, seed)
    return Pretrained(backbone, start.decoder)


def further(start: Pretrained, data: Digits, seed: int, steps: int, rate: float) -> nn.Module:
    """The encoder after further pre-training: the teacher."""
    method = MAE(*copy.deepcopy(start), **optimisation(rate))
    return fitted(method, batches(data.new, seed, steps), steps, seed).backbone


def self_distilled(
    start: Pretrained, teacher: nn.Module, data: Digits, seed: int, rate: float, steps: int = LONG
) -> nn.Module:
    method = SDFPT(*copy.deepcopy(start), copy.deepcopy(teacher), **optimisation(rate))
    return fitted(method, batches(data.new, seed, steps), steps, seed).backbone


def accuracy(backbone: nn.Module, data: Digits, seed: int, rate: float, steps: int = TUNING) -> float:
    """On the test pictures after fine-tuning, in per cent."""
    method: Method = Classifier(copy.deepcopy(backbone), 10, **optimisation(rate))
    x, label = data.new[:LABELLED], data.new_label[:LABELLED]
    fitted(method, batches(x, seed, steps, label, 32), steps, seed).eval()
    with torch.no_grad():
        return 100 * float((method(data.test).argmax(dim=1) == data.test_label).double().mean())


def moved(backbone: nn.Module, start: Pretrained) -> float:
    """|theta - theta_init| of the encoder."""
    pairs = zip(backbone.parameters(), start.backbone.parameters(), strict=True)
    return float(sum(((one - other).detach() ** 2).sum() for one, other in pairs) ** 0.5)


def test_sd_fpt(evidence) -> None:
    found: dict[str, dict[int, float]] = {}
    ratio: dict[int, float] = {}
    for seed in SEEDS:
        data = digits(seed)
        start = pretrained(data, seed)
        rate, tuning = CHOSEN["further"]
        encoders = {
            f"further, {steps} steps": further(start, data, seed, steps, rate) for steps in (*FEW, LONG, 2 * LONG)
        }
        distilled = CHOSEN["SD-FPT"][0]
        teacher = encoders[f"further, {LONG} steps"]
        if distilled != rate:
            teacher = further(start, data, seed, LONG, distilled)
        encoders["SD-FPT"] = student = self_distilled(start, teacher, data, seed, distilled)
        ratio[seed] = moved(student, start) / moved(teacher, start)
        for name, encoder in {"fine-tuned": start.backbone, **encoders}.items():
            tuning = CHOSEN[name.partition(",")[0]][1]
            found.setdefault(name, {})[seed] = accuracy(encoder, data, seed, tuning)
    for name, of_seed in found.items():
        for seed, value in of_seed.items():
            evidence.figure(f"accuracy, {name}", value, seed, "%")
    evidence.note(
        f"{PRETRAINING} steps of {BATCH} clean digits, {LONG} of the new ones for teacher and student each, {TUNING} "
        f"of fine-tuning with {LABELLED} labels. Rates of the second stage of {RATES} and of fine-tuning of "
        f"{TUNING_RATES}, chosen on seed {SEARCH_SEED}",
        CHOSEN,
    )

    def gain(over: str) -> dict[int, float]:
        return {seed: found["SD-FPT"][seed] - found[over][seed] for seed in SEEDS}

    for steps in (LONG, 2 * LONG):
        over = f"further, {steps} steps"
        evidence.claim(f"accuracy, SD-FPT minus {over}", gain(over), at_least=2.0, unit="points")
    evidence.claim("accuracy, SD-FPT minus fine-tuned", gain("fine-tuned"), at_least=0.0, unit="points")
    evidence.claim("way from the start, student over teacher", ratio, at_most=1.0)
    evidence.claim(
        "seeds whose student stays nearer the start", sum(r < 1 for r in ratio.values()), at_least=len(SEEDS)
    )


def search() -> None:
    seed, data = SEARCH_SEED, digits(SEARCH_SEED)
    start = pretrained(data, seed)
    for rate in RATES:
        teacher = further(start, data, seed, LONG, rate)
        student = self_distilled(start, teacher, data, seed, rate)
        arms = {"fine-tuned": start.backbone, "further": teacher, "SD-FPT": student}
        for arm, encoder in arms.items():
            for tuning in TUNING_RATES:
                print(arm, rate, tuning, accuracy(encoder, data, seed, tuning), flush=True)


if __name__ == "__main__":
    search()
