"""DEPICT (arXiv 1704.06327) on 8 x 8 digits against k-means of the embedding that it starts from, and of the pixels.

A small convolutional autoencoder is trained first, once for each seed; all arms go on from it, with equal steps and the
same rates to choose from. Without balance the targets are squares of the predictions alone, self-training; without
reconstruction the clustering alone trains. Rates are chosen by accuracy on 597 digits of their own, where labels are
used, that of the autoencoder by its own loss; k-means has 40 starts. Figures are of the other 1,200, all of which are
clustered; there labels are used for scores alone.

Floors: k-means of the untrained embedding; for sizes the untrained softmax. Ceilings: the same softmax with the true
classes as its targets, fitted on the embedding that DEPICT starts from; for sizes the classes themselves. Gates: the
loss to the last targets, which predictions at chance have at log 10. Half of the epochs have the targets of k-means:
with fewer, DEPICT's own targets, which do not sharpen, stay near chance.
"""

import math
from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple

import torch
from digits import parted
from own_loss import own_loss
from quiet import quiet_trainer
from torch import Tensor
from torch.utils.data import DataLoader

from lightspan.backbones.conv_autoencoder import ConvAutoencoder
from lightspan.evaluation.geometry.clustering import agreement, kmeans
from lightspan.evaluation.probes.linear_probe import linear_probe_accuracy
from lightspan.methods.clustering.depict import DEPICT, STARTS

SEEDS, SEARCH = tuple(range(10, 18)), 100
RATES = (3e-3, 1e-2, 3e-2)
ARMS: dict[str, dict[str, float]] = {
    "DEPICT": {},
    "no balance": {"power": 2.0, "balance": 0.0},
    "no reconstruction": {"reconstruction": 0.0},
}
FIRST, EPOCHS, HARD, BATCH, CLUSTERS = 150, 60, 0.5, 100, 10


class Start(NamedTuple):
    """A trained autoencoder and an untrained one, their losses, and the embeddings of all images, [M 10]."""

    network: dict[str, Tensor]
    loss: float
    untrained_loss: float
    embedding: Tensor
    untrained: Tensor


@cache
def images(seed: int) -> tuple[Tensor, Tensor]:
    """Standardised digits [M 1 8 8] of the search, or all others, and labels."""
    x, label = parted(seed, seed == SEARCH)
    x = torch.from_numpy(x).float()[:, None]
    return (x - x.mean()) / x.std(), torch.from_numpy(label).long()


def fitted(method: DEPICT, seed: int, epochs: int) -> None:
    x, _ = images(seed)
    loader = DataLoader(
        range(len(x)), BATCH, shuffle=True, generator=torch.Generator().manual_seed(seed),
        collate_fn=lambda rows: {"image": x[rows], "index": torch.tensor(rows)},
    )  # fmt: skip
    quiet_trainer(max_epochs=epochs).fit(method, loader)


def made(seed: int, rate: float, **settings: float) -> DEPICT:
    network = ConvAutoencoder((1, 8, 8), (16, 16), (4, 3), embed_dim=CLUSTERS, bounded=False)
    optimizer = partial(torch.optim.Adam, lr=rate)
    return DEPICT(network, len(images(seed)[0]), CLUSTERS, seed=seed, optimizer=optimizer, **settings)


@cache
def started(seed: int, rate: float) -> Start:
    """The first stage alone."""
    torch.manual_seed(seed)
    method, (x, _) = made(seed, rate, first_share=1.0, hard_share=1.0), images(seed)
    whole = [{"image": x, "index": torch.arange(len(x))}]
    make: Callable[[], DEPICT] = partial(made, seed, rate)

    def judged() -> tuple[float, Tensor]:
        method.eval()
        with torch.no_grad():
            return own_loss(make, method.state_dict(), whole), method.network(x)

    untrained_loss, untrained = judged()
    fitted(method.train(), seed, FIRST)
    loss, embedding = judged()
    return Start(method.network.state_dict(), loss, untrained_loss, embedding, untrained)


@cache
def clustered(arm: str, seed: int, rate: float, first_rate: float, epochs: int = EPOCHS) -> dict[str, float]:
    """What an arm makes of all images; accuracy in per cent, loss and entropy in nats."""
    torch.manual_seed(seed)
    method, (x, label) = made(seed, rate, first_share=0.0, hard_share=HARD, **ARMS[arm]), images(seed)
    method.network.load_state_dict(started(seed, first_rate).network)
    fitted(method, seed, epochs)
    p_MK = method.eval().assignments({"image": x})
    return {
        "accuracy": 100 * agreement(p_MK.argmax(dim=1), label)["accuracy"],
        "loss to the last targets": -float((method.target_MK * p_MK.clamp_min(1e-30).log()).sum(dim=1).mean()),
        **sizes(p_MK.argmax(dim=1)),
    }


def sizes(cluster_M: Tensor) -> dict[str, float]:
    share = cluster_M.bincount(minlength=CLUSTERS) / len(cluster_M)
    return {"size entropy": float(torch.special.entr(share).sum()), "empty clusters": float((share == 0).sum())}


def without_training(seed: int, first_rate: float) -> dict[str, float]:
    """Accuracy in per cent of what the arms are compared with, and entropies in nats."""
    (x, label), start = images(seed), started(seed, first_rate)
    pair = start.embedding, label

    def by_kmeans(row_MF: Tensor) -> float:
        return 100 * agreement(kmeans(row_MF, CLUSTERS, seed, STARTS), label)["accuracy"]

    torch.manual_seed(seed)
    untrained = made(seed, first_rate).eval().assignments({"image": x}).argmax(dim=1)
    return {
        "k-means of the embedding": by_kmeans(start.embedding),
        "k-means of the pixels": by_kmeans(x.flatten(1)),
        "k-means of the untrained embedding": by_kmeans(start.untrained),
        "softmax with the classes as targets": 100 * linear_probe_accuracy(*pair, *pair),
        "size entropy, untrained softmax": sizes(untrained)["size entropy"],
        "size entropy, classes": sizes(label)["size entropy"],
    }


def test_depict(evidence):
    first = evidence.search(
        {"autoencoder": lambda rate: -started(SEARCH, rate).loss}, RATES, what="rate of the autoencoder", seed=SEARCH
    )["autoencoder"]
    scores = {arm: lambda rate, arm=arm: clustered(arm, SEARCH, rate, first)["accuracy"] for arm in ARMS}
    rates = evidence.search(scores, RATES, seed=SEARCH)
    runs = {arm: {seed: clustered(arm, seed, rates[arm], first) for seed in SEEDS} for arm in ARMS}
    runs["none"] = {seed: without_training(seed, first) for seed in SEEDS}
    for arm, of_seed in runs.items():
        for seed, found in of_seed.items():
            for name, value in found.items():
                unit = "" if "empty" in name else "nats" if "entropy" in name or "loss" in name else "%"
                evidence.figure(name if arm == "none" else f"{name}, {arm}", value, seed=seed, unit=unit)
    losses = {seed: started(seed, first) for seed in SEEDS}
    evidence.gate(
        "autoencoder", {s: one.loss for s, one in losses.items()}, {s: one.untrained_loss for s, one in losses.items()},
        by=0.5, lower_is_better=True,
    )  # fmt: skip
    for arm in ARMS:
        own = {seed: found["loss to the last targets"] for seed, found in runs[arm].items()}
        evidence.gate(arm, own, math.log(CLUSTERS), by=1.0, unit="nats", lower_is_better=True)

    def of(name: str, arm: str = "none") -> dict[int, float]:
        return {seed: found[name] for seed, found in runs[arm].items()}

    def less(first: dict[int, float], second: dict[int, float]) -> dict[int, float]:
        return {seed: first[seed] - second[seed] for seed in SEEDS}

    for title, other, margin, arms in (
        ("k-means of the same embedding", of("k-means of the embedding"), 3.0, ("DEPICT",)),
        ("k-means of the pixels", of("k-means of the pixels"), 0.0, ("DEPICT",)),
        ("no reconstruction", of("accuracy", "no reconstruction"), 0.0, ("DEPICT", "no reconstruction")),
    ):
        evidence.claim(
            f"accuracy, DEPICT minus {title}",
            less(of("accuracy", "DEPICT"), other),
            at_least=margin,
            unit="points",
            floor=less(of("k-means of the untrained embedding"), other),
            ceiling=less(of("softmax with the classes as targets"), other),
            arms=arms,
        )
    alone = of("size entropy", "no balance")
    evidence.claim(
        "size entropy, DEPICT minus no balance",
        less(of("size entropy", "DEPICT"), alone),
        at_least=0.01,
        unit="nats",
        floor=less(of("size entropy, untrained softmax"), alone),
        ceiling=less(of("size entropy, classes"), alone),
        arms=("DEPICT", "no balance"),
    )


if __name__ == "__main__":
    for rate in RATES:
        print(
            rate, without_training(SEARCH, rate), {arm: clustered(arm, SEARCH, rate, rate) for arm in ARMS}, flush=True
        )
