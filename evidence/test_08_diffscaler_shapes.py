"""DiffScaler (arXiv 2404.09976) on shapes: a frozen diffusion transformer that knows five learns to draw five more.

28 x 28 shapes without grain and with a tenth of the variety in place, size and angle: first disc, ring, half disc,
square and frame, then triangle, cross, bar, two bars and flower. A transformer of 4 blocks and width 64 on patches of 7
x 7 predicts velocity under a cosine schedule. Arms, figures and search are those of evidence/diffscaler.py, with 200
validation images and one draw of noise. A LeNet trained on shapes of all ten classes, drawn from another seed,
classifies the generated images. `python evidence/test_08_diffscaler_shapes.py` repeats the search.
"""

from functools import partial

import torch
from diffscaler import Judge, Task, brightness, everything, fit, measure, search
from lightning import seed_everything
from torch import Tensor

from lightspan.backbones.diffusion import DiT
from lightspan.backbones.vision import LeNet
from lightspan.datamodules.image.sets.shapes import SIDE, Shapes
from lightspan.methods.supervised.classifier import Classifier

PLAIN = partial(Shapes, size=2400, noise=0.0, variety=0.1)
SHAPES = Task(
    data=PLAIN,
    network=partial(DiT, image_size=SIDE, patch_size=7, num_classes=10),
    rates={"DiffScaler": 3e-2, "scale and shift": 9e-2, "BitFit": 9e-2, "full": 9e-3},
    schedule="cosine",
    prediction="velocity",
    old_steps=2000,
    old_rate=4e-3,
    steps=300,
    batch=32,
    validation=200,
    draws=1,
)
JUDGE_SEED, JUDGE_STEPS, JUDGE_RATE = 7, 600, 2e-3


def judge(evidence) -> Judge:
    seed_everything(JUDGE_SEED, verbose=False)
    data = PLAIN(batch_size=64, draw_seed=JUDGE_SEED)
    classifier = Classifier(LeNet(data.image_shape), data.num_classes, optimizer=torch.optim.AdamW)
    fit(classifier, data, JUDGE_STEPS, JUDGE_RATE)
    classifier.eval()
    black, white = data.bounds

    @torch.no_grad()
    def named(images: Tensor) -> Tensor:
        return classifier(black + (white - black) * images).argmax(dim=1)

    test = everything(data.test_dataloader())
    right = named(brightness(test["image"], data)) == test["label"]
    evidence.figure("test accuracy of the classifier", 100 * right.double().mean().item(), JUDGE_SEED, "%")
    return named


def test_diffscaler_draws_new_shapes_and_forgets_none(evidence) -> None:
    measure(evidence, SHAPES, judge(evidence))


if __name__ == "__main__":
    search(SHAPES)
