"""Convergent learning (arXiv 1511.07543): networks of other seeds share units in part, and most of their span.

Pairs of networks of two hidden layers of 64 units on digits, trained with other weights and the same order of data, or
another one, and before any training. Units are compared on 1,000 images that trained nothing. The floor of a matching
is that of untrained networks, its ceiling a copy whose units were permuted and rescaled. A planted pair has half of its
units in common. The learning rate is chosen on seed 100, by cross-entropy on these images: accuracies are all alike.
"""

import torch
from digits import shuffled
from torch import Tensor, nn

from lightspan.evaluation.features.features import Features
from lightspan.evaluation.geometry.convergent_learning import Convergence, ConvergentLearning

SEEDS, SEARCH_SEED = (0, 1, 2, 3, 4), 100
TRAINED_ON, WIDTH, EPOCHS, BATCH = 797, 64, 60, 64
RATES = (1e-3, 3e-3, 1e-2)


def data() -> tuple[Tensor, Tensor]:
    images, labels = shuffled(0)
    return torch.from_numpy(images).float().flatten(1), torch.from_numpy(labels).long()


def network(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = nn.Linear(64, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 10)
    return nn.Sequential(*layers)


def trained(seed: int, order: int, rate: float) -> nn.Sequential:
    x, y = data()
    net, generator = network(seed), torch.Generator().manual_seed(order)
    optimizer = torch.optim.Adam(net.parameters(), lr=rate, weight_decay=1e-4)
    for _ in range(EPOCHS):
        for rows in torch.randperm(TRAINED_ON, generator=generator).split(BATCH):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x[rows]), y[rows]).backward()
            optimizer.step()
    return net.eval()


@torch.no_grad()
def units(net: nn.Sequential, layer: int) -> Tensor:
    """Of 1,000 images, behind the ReLU of layer 1 or 2."""
    return net[: 2 * layer](data()[0][TRAINED_ON:])


def accuracy(net: nn.Module) -> float:
    x, y = data()
    with torch.no_grad():
        return 100 * float((net(x[TRAINED_ON:]).argmax(dim=1) == y[TRAINED_ON:]).float().mean())


def searched(rate: float) -> float:
    """Minus the cross-entropy on the images that units are compared on."""
    (x, y), net = data(), trained(SEARCH_SEED, SEARCH_SEED, rate)
    with torch.no_grad():
        return -float(nn.functional.cross_entropy(net(x[TRAINED_ON:]), y[TRAINED_ON:]))


def compared(first: Tensor, second: Tensor) -> Convergence:
    return ConvergentLearning(clusters=20).fit(Features(first), Features(second))


def copied(x: Tensor, seed: int) -> Tensor:
    """The same units in another order, each with a scale of its own."""
    generator = torch.Generator().manual_seed(seed)
    scale = 0.5 + torch.rand(x.shape[1], generator=generator)
    return x[:, torch.randperm(x.shape[1], generator=generator)] * scale


def planted(seed: int) -> tuple[float, float]:
    """(precision, recall) of finding the half of the units that two sets share."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1000, 40, generator=generator)
    own = torch.randn(1000, 20, generator=generator)
    noisy = x[:, :20] + 0.5 * torch.randn(1000, 20, generator=generator)
    found = compared(x, torch.cat([noisy, own], dim=1))
    said = {row["unit"] for row in found.units if row["correlation"] > max(found.chance)}
    right = {row["unit"] for row in found.units if row["partner"] == row["unit"] < 20} & said
    return len(right) / max(1, len(said)), len(right) / 20


def test_trained_networks_share_units_and_more_of_their_span(evidence) -> None:
    torch.set_num_threads(1)
    rate = evidence.search({"trained": searched}, RATES)["trained"]
    pairs, before, after = {}, {}, {}
    for seed in SEEDS:
        one, two, three = (
            trained(s, order, rate) for s, order in ((2 * seed, seed), (2 * seed + 1, seed), (2 * seed + 1, seed + 50))
        )
        drawn = network(2 * seed), network(2 * seed + 1)
        before[seed], after[seed] = accuracy(drawn[0]), accuracy(one)
        for layer in (1, 2):
            here = {
                "trained": (units(one, layer), units(two, layer)),
                "trained, other order": (units(one, layer), units(three, layer)),
                "untrained": tuple(units(net, layer) for net in drawn),
                "copy": (units(one, layer), copied(units(one, layer), seed)),
            }
            for name, (first, second) in here.items():
                pairs[name, layer, seed] = found = compared(first, second)
                for figure in found.figures():
                    evidence.figure(f"layer {layer}, {name}: {figure.name}", figure.value, seed, figure.unit)
    evidence.gate("trained", after, before, by=50.0, unit="%")

    def gain(name: str, less: str, layer: int = 1) -> dict[int, float]:
        return {s: pairs[name, layer, s].found["matched"] - pairs[less, layer, s].found["matched"] for s in SEEDS}

    evidence.claim(
        "layer 1, correlation of matched units, trained minus untrained",
        gain("trained", "untrained"), at_least=0.2,
        floor=gain("untrained", "untrained"), ceiling=gain("copy", "untrained"), arms=("trained",),
    )  # fmt: skip

    def over_random(name: str) -> dict[int, float]:
        return {s: pairs[name, 1, s].found["matched"] - pairs["trained", 1, s].found["random"] for s in SEEDS}

    evidence.claim(
        "layer 1, correlation, matched minus at random",
        over_random("trained"), at_least=0.3,
        floor={s: pairs["trained", 1, s].floors["matched"] - pairs["trained", 1, s].found["random"] for s in SEEDS},
        ceiling=over_random("copy"), arms=("trained",),
    )  # fmt: skip

    def span(name: str, which: str = "found") -> dict[int, float]:
        return {s: getattr(pairs[name, 1, s], which)["linear"] for s in SEEDS}

    evidence.claim(
        "layer 1, R2 of all units by a linear map, held out", span("trained"), at_least=0.8,
        floor=span("trained", "floors"), ceiling=span("copy"), arms=("trained",),
    )  # fmt: skip
    squares = {s: pairs["trained", 1, s].found["matched_squared"] for s in SEEDS}
    evidence.claim(
        "layer 1, squared correlation of matched units", squares, at_most=0.6,
        floor={s: pairs["copy", 1, s].found["matched_squared"] for s in SEEDS},
        ceiling={s: pairs["untrained", 1, s].found["matched_squared"] for s in SEEDS}, arms=("trained",),
    )  # fmt: skip
    found = {seed: planted(seed) for seed in SEEDS}
    for i, what in enumerate(("precision", "recall")):
        evidence.claim(
            f"planted half, {what}", {seed: each[i] for seed, each in found.items()}, at_least=0.95,
            floor=0.5 * (1 - i), ceiling=1.0, arms=(),
        )  # fmt: skip


if __name__ == "__main__":
    scores = {rate: searched(rate) for rate in (3e-4, *RATES, 3e-2)}
    print(scores)
    best = max(scores, key=scores.__getitem__)
    first, second = trained(SEARCH_SEED, 0, best), trained(SEARCH_SEED + 1, 0, best)
    drawn = network(SEARCH_SEED), network(SEARCH_SEED + 1)
    for layer in (1, 2):
        for a, b in ((first, second), drawn, (first, first)):
            found = compared(units(a, layer), units(b, layer))
            print(layer, found.found, found.floors["matched"], found.floors["linear"], found.dead)
    print(planted(SEARCH_SEED))
