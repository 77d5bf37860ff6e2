"""SiT (arXiv 2104.03602) on digits with ten labels a class: masked modelling and contrast, each alone, and neither.

scikit-learn's 8 x 8 digits enlarged to 32 x 32 pixels, in patches of 4; a vision transformer of 4 blocks and 64
channels. It is pre-trained on the images of 900 digits without labels, then all of it is fine-tuned on ten labelled
ones of each class, with its class token and the mean of its patches before a hidden layer, and classifies 300 others.
Arms, with equal steps and views: random weights, contrast alone, reconstruction alone, both. The rates of each arm, of
pre-training and of fine-tuning, are searched first, among the same for all, on 597 digits that no figure is taken on.
"""

from itertools import product

import torch
from few_labels import BATCH, accuracy, adamw, digits_of, few, fine_tuned, pretrained, standardised
from lightning import seed_everything
from torch import Tensor, nn

from lightspan.backbones.vit import vit
from lightspan.datamodules.image.augment.views import RandomViews
from lightspan.methods.masked.sit import SiT
from lightspan.nn.heads.mlp_head import MLPHead
from lightspan.nn.heads.projector import Projector
from lightspan.nn.masking.block_masks import RectangleMasks
from lightspan.nn.masking.corruption import GroupCorruption
from lightspan.nn.sequences.token_backbone import ClassAndMean
from lightspan.objectives.masked import hidden_absolute_error

SEEDS, SEARCH = (0, 1, 2), 100
SIDE, PATCH, LABELS = 32, 4, 10
STEPS, TUNING = 300, 100
RATES, TUNING_RATES = (1e-3, 3e-3), (5e-4, 2e-3)
VIEWS = RandomViews(2, scale=(0.4, 1.0), flip=0.0, degrees=10.0)
TUNING_VIEWS = RandomViews(1, scale=(0.7, 1.0), flip=0.0, degrees=10.0)
ARMS = {
    "random weights": (0.0, 0.0),
    "contrast alone": (1.0, 0.0),
    "reconstruction alone": (0.0, 1.0),
    "both": (1.0, 1.0),
}
"""Weights of contrast and reconstruction; without either an arm is not pre-trained."""


def method(arm: str, rate: float) -> SiT:
    masks = [RectangleMasks(share, align=PATCH) for share in (0.5, 0.3)]
    return SiT(
        vit(64, 4, 4, img_size=SIDE, patch_size=PATCH, in_chans=1, sincos=False),
        Projector(64, [256, 256], 64, bias=False, batch_norm=True),
        contrast=ARMS[arm][0],
        reconstruction=ARMS[arm][1],
        corruption=GroupCorruption(masks[0], 0.5, "zeros", masks[1]),
        momentum=0.98,
        **adamw(rate),
    )


@torch.no_grad()
def errors_of_hidden_pixels(trained: SiT, image: Tensor) -> tuple[float, float]:
    """(of the guesses, of each image's mean), as L1 over corrupted pixels of standardised test images."""
    index = torch.arange(len(image))
    seen, hidden = trained.corrupted(image, index, 0)
    guess = trained.pixels(trained.student(seen).patches_BTD, trained.backbone.grid(image))
    mean = image.mean(dim=(2, 3), keepdim=True).expand_as(image)
    return float(hidden_absolute_error(guess, image, hidden)), float(hidden_absolute_error(mean, image, hidden))


def measured(
    arm: str, rate: float, tuning_rates: tuple[float, ...], seed: int, searching: bool, steps: int, tuning: int
) -> dict[str, float]:
    """Accuracy for each rate of fine-tuning, after one pre-training; errors of hidden pixels."""
    seed_everything(seed, verbose=False)
    train, test = digits_of(seed, searching, SIDE, test=200 if searching else 300)
    trained = pretrained(method(arm, rate), train[0], VIEWS, steps if any(ARMS[arm]) else 0, seed)
    found = dict(zip(("L1", "L1 of means"), errors_of_hidden_pixels(trained, standardised(test[0])), strict=True))
    rows = few(train[1], LABELS, seed)
    start = {name: tensor.clone() for name, tensor in trained.backbone.state_dict().items()}
    for tuning_rate in tuning_rates:
        trained.backbone.load_state_dict(start)
        torch.manual_seed(seed)
        network = nn.Sequential(ClassAndMean(trained.backbone), MLPHead(128, 10, [128]))
        labelled = train[0][rows], train[1][rows]
        fine_tuned(network, labelled, TUNING_VIEWS, tuning, tuning_rate, seed)
        found[f"{tuning_rate:g}"] = accuracy(network, test)
    return found


def searched(arm: str, steps: int, tuning: int) -> tuple[float, float]:
    """(rate of pre-training, rate of fine-tuning) with the best accuracy on digits of their own."""
    rates = RATES if any(ARMS[arm]) else RATES[:1]
    found = {rate: measured(arm, rate, TUNING_RATES, SEARCH, True, steps, tuning) for rate in rates}
    return max(product(rates, TUNING_RATES), key=lambda pair: found[pair[0]][f"{pair[1]:g}"])


def compare(evidence, seeds=SEEDS, steps: int = STEPS, tuning: int = TUNING) -> None:
    chosen = {arm: searched(arm, steps, tuning) for arm in ARMS}
    runs = {
        arm: {seed: measured(arm, rate, (tuned,), seed, False, steps, tuning) for seed in seeds}
        for arm, (rate, tuned) in chosen.items()
    }
    accuracies = {arm: {seed: found[f"{chosen[arm][1]:g}"] for seed, found in of.items()} for arm, of in runs.items()}
    for arm, of_seed in accuracies.items():
        for seed, value in of_seed.items():
            evidence.figure(f"accuracy with {LABELS} labels a class, {arm}", value, seed, "%")
    for arm in ("reconstruction alone", "both"):
        for seed, found in runs[arm].items():
            evidence.figure(f"L1 of hidden pixels, {arm}", found["L1"], seed)
            evidence.figure(f"L1 of hidden pixels by each image's mean, {arm}", found["L1 of means"], seed)
    said = ", ".join(f"{arm} {rate:g} and {tuned:g}" for arm, (rate, tuned) in chosen.items())
    evidence.note(
        f"{steps} steps of {BATCH} digits before, {tuning} steps on labels. Rates of {RATES} and {TUNING_RATES} chosen "
        f"on seed {SEARCH} and other digits: {said}."
    )

    def gain(over: str) -> dict[int, float]:
        return {seed: accuracies["both"][seed] - accuracies[over][seed] for seed in seeds}

    evidence.claim("accuracy, both minus random weights", gain("random weights"), at_least=10.0, unit="points")
    for arm in ("contrast alone", "reconstruction alone"):
        evidence.claim(f"accuracy, both minus {arm}", gain(arm), at_least=-1.0, unit="points")
    below = {seed: 100 * (1 - found["L1"] / found["L1 of means"]) for seed, found in runs["both"].items()}
    evidence.claim("L1 of hidden pixels, both below each image's mean", below, at_least=30.0, unit="%")


def test_sit(evidence) -> None:
    compare(evidence)
