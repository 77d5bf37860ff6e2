"""LOOK (arXiv 2110.06014) on letters that are labelled odd or even: which letter they are, read from frozen features.

Arms with one network, equal steps and batches: LOOK with 5 neighbours, a quarter of the rows that a letter has in its
bank; LOOK with all rows of the bank; SupCon and cross-entropy. Each label has 13 letters, which no arm sees. A
linear probe learns the 26 letters from the training pictures' features and is scored on test pictures; nearest
neighbours tell odd from even; the effective rank, a figure without a margin, is that of features around the mean of
their label. Digits, of which an earlier record had them, are read from an untrained network nearly as well.

The floor is the untrained network; the ceiling is the network that cross-entropy told all letters, or no mistake. Rates
are searched by the probe, on letters of the search seed.
"""

from functools import partial

import torch
from coarse_letters import LETTERS, adam, halves, network, told, trained

from lightspan.evaluation.geometry.spectra import effective_rank, singular_values
from lightspan.methods.contrastive.supcon import SupCon
from lightspan.methods.supervised.classifier import Classifier
from lightspan.methods.supervised.look import LOOK
from lightspan.nn.heads.projector import Projector
from lightspan.training.method import Method

SEEDS, SEARCH_SEED = (0, 1, 2, 3, 4), 100
GROUPS, QUEUE, RATES = 2, 512, (1e-3, 3e-3, 1e-2, 3e-2)
NEIGHBOURS = {"LOOK": 5, "LOOK with all rows": QUEUE}
ARMS = (*NEIGHBOURS, "SupCon", "cross-entropy")


def method(arm: str, rate: float, groups: int) -> Method:
    backbone = network()
    if arm == "cross-entropy":
        return Classifier(backbone, groups, **adam(rate))
    head = Projector(backbone.num_features, [128], 64)
    if arm == "SupCon":
        return SupCon(backbone, head, **adam(rate))
    return LOOK(backbone, head, QUEUE, NEIGHBOURS[arm], momentum=0.95, batch_statistics=True, **adam(rate))


def measured(arm: str, seed: int, rate: float, groups: int = GROUPS, **steps: int) -> dict[str, float]:
    """Of one run; with steps=0 of the untrained network."""
    features = trained(partial(method, arm, rate, groups), groups, seed, **steps).backbone
    x, y = halves(seed)[1]
    with torch.no_grad():
        asked = features(x)
    around = torch.cat([asked[y % 2 == odd] - asked[y % 2 == odd].mean(dim=0) for odd in (0, 1)])
    found = told(features, GROUPS, seed)
    rank = float(effective_rank(singular_values(around)))
    return {
        "letters": found["letters"],
        "odd or even": found["groups"],
        "odd or even, learned from": found["learned"],
        "effective rank within a label": rank,
    }


def test_look(evidence) -> None:
    rates = evidence.search(
        {arm: lambda rate, arm=arm: measured(arm, SEARCH_SEED, rate)["letters"] for arm in ARMS},
        RATES, seed=SEARCH_SEED,
    )  # fmt: skip
    runs = {arm: {seed: measured(arm, seed, rates[arm]) for seed in SEEDS} for arm in ARMS}
    of_classes = partial(measured, "cross-entropy", rate=rates["cross-entropy"])
    runs["untrained"] = {seed: of_classes(seed=seed, steps=0) for seed in SEEDS}
    runs["all letters"] = {seed: of_classes(seed=seed, groups=LETTERS) for seed in SEEDS}
    for arm, of_seed in runs.items():
        for seed, found in of_seed.items():
            for name, value in found.items():
                evidence.figure(f"{name}, {arm}", value, seed, "" if "rank" in name else "%")
    learned = {arm: {s: found["odd or even, learned from"] for s, found in of.items()} for arm, of in runs.items()}
    for arm in ARMS:
        evidence.gate(arm, learned[arm], learned["untrained"], by=10.0, unit="points")

    def claim(name: str, over: str, margin: float) -> None:
        def gain(arm: str) -> dict[int, float]:
            return {seed: runs[arm][seed][name] - runs[over][seed][name] for seed in SEEDS}

        right = {seed: 100 - runs[over][seed][name] for seed in SEEDS}
        evidence.claim(
            f"{name}, LOOK minus {over}", gain("LOOK"), at_least=margin, unit="points", arms=("LOOK", over),
            floor=gain("untrained"), ceiling=gain("all letters") if name == "letters" else right,
        )  # fmt: skip

    for over in ("cross-entropy", "SupCon"):
        claim("letters", over, 4.0)
        claim("odd or even", over, -1.0)
    claim("letters", "LOOK with all rows", 0.0)


if __name__ == "__main__":
    print("untrained", measured("cross-entropy", SEARCH_SEED, 1e-2, steps=0))
    print("all letters", measured("cross-entropy", SEARCH_SEED, 1e-2, LETTERS))
    for arm in ARMS:
        print(arm, measured(arm, SEARCH_SEED, 1e-2), flush=True)
