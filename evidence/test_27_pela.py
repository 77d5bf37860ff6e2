"""PELA (arXiv 2310.10700) on digits: a factorised transformer after three epochs, and what it was cut from.

A vision transformer of 4 blocks and width 64 learns the 8 x 8 digits until its training loss stops falling. Its linear
layers are then factorised to a quarter of their weights, and each arm has the same three epochs over the same images:

- PELA: task, features of all blocks, perturbation of the weights.
- task loss alone: the same truncated SVD, trained only with the task's loss.
- random start: the same low-rank network from a random start, trained with the task's loss.

Then PELA and the whole network are fine-tuned on 20 digits of each class that are turned by a quarter. One search gives
each arm its rate, by accuracy on 400 training images that are kept apart on seed 100; PELA's alpha is the best of three
there. Batches of 8, since three epochs of so few images are too few steps for any arm with larger ones.

The floor is the truncated SVD as it is, and the ceiling the whole network; on turned digits the floor is the random
low-rank network fine-tuned at PELA's rate, and the ceiling PELA's with all turned training images. Gates: accuracy on
training images, against the truncated SVD or chance.

The transformer starts from Xavier matrices. timm's own start has a standard deviation of 0.02, right for a width of 768
but at 64 so small that the weights are almost only what training adds: a matrix of low rank already, from which plain
truncation takes nothing (search seed: 90.0 % before, 91.5 % after), so there would be nothing to repair.
"""

import contextlib
import copy
import io
from collections.abc import Callable
from functools import cache, partial

import torch
from digits import accuracy
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from lightspan.adapters.factorise import factorise
from lightspan.datamodules.image.sets.small import Digits
from lightspan.methods.compression.pela import PELA
from lightspan.optim.schedules import WarmupCosine

SEEDS, SEARCH, HELD = tuple(range(10, 17)), 100, 400
RATES, RATIO, ALPHA = (1e-3, 4e-3, 1.6e-2), 4.0, 3.0
START_RATE = 4e-3  # of the network that is cut in the search
EPOCHS, BATCH, SHOTS = 3, 8, 20
WHOLE, TASK, RANDOM, SVD = "whole network", "task loss alone", "random start", "truncated SVD"
ARMS = (WHOLE, "PELA", TASK, RANDOM)
Set = tuple[Tensor, Tensor]


@cache
def digits(seed: int, turned: bool = False) -> tuple[Set, Set]:
    """(images [N 1 8 8], labels) to train on and to judge by: the test digits, or in the search some of training."""
    sides = []
    for part in Digits().load():
        images = torch.from_numpy(part.images)[:, None].float() / 255
        images = torch.rot90(images, 1, (2, 3)) if turned else images
        sides.append(((images - 0.3) / 0.37, torch.from_numpy(part.labels).long()))
    (x, y), test = sides
    return ((x[HELD:], y[HELD:]), (x[:HELD], y[:HELD])) if seed == SEARCH else ((x, y), test)


def transformer(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    sizes = {"img_size": 8, "patch_size": 2, "in_chans": 1, "embed_dim": 64, "depth": 4, "num_heads": 4}
    return nn.Sequential(VisionTransformer(**sizes, num_classes=0, weight_init="jax"), nn.Linear(64, 10))


def trained(
    network: nn.Module, given: Set, seed: int, epochs: int, batch: int, rate: float,
    loss: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> nn.Module:  # fmt: skip
    """In evaluation mode. A loss of None is cross-entropy."""
    torch.manual_seed(seed)
    (x, y), network = given, network.train()
    optimizer = torch.optim.AdamW((p for p in network.parameters() if p.requires_grad), lr=rate, weight_decay=0.05)
    schedule = WarmupCosine(optimizer, epochs * (len(x) // batch), warmup=0.1, final=0.0)
    for _ in range(epochs):
        for rows in torch.randperm(len(x))[: len(x) // batch * batch].split(batch):
            optimizer.zero_grad()
            (loss(x[rows], y[rows]) if loss else F.cross_entropy(network(x[rows]), y[rows])).backward()
            optimizer.step()
            schedule.step()
    return network.eval()


@cache
def whole(seed: int, rate: float) -> nn.Module:
    """What is to be cut; do not change it."""
    return trained(transformer(seed), digits(seed)[0], seed, epochs=40, batch=64, rate=rate)


def cut(network: nn.Module) -> nn.Sequential:
    """A factorised copy."""
    backbone, head = copy.deepcopy(network)  # type: ignore[misc]
    with contextlib.redirect_stdout(io.StringIO()):
        return nn.Sequential(factorise(backbone, RATIO), head).requires_grad_(True).eval()


def shrunk(arm: str, original: nn.Module, seed: int, rate: float) -> nn.Module:
    """Three epochs of a low-rank copy."""
    given = digits(seed)[0]
    if arm != "PELA":
        start = transformer(seed + 1000) if arm == RANDOM else original
        return trained(cut(start), given, seed, EPOCHS, BATCH, rate)
    with contextlib.redirect_stdout(io.StringIO()):
        method = PELA(*copy.deepcopy(original), ratio=RATIO, alpha=ALPHA, lam=1.0, optimizer=torch.optim.AdamW)  # type: ignore[misc]
    method.log_training = lambda figures: None  # type: ignore[method-assign]
    trained(method, given, seed, EPOCHS, BATCH, rate, lambda x, y: method.training_step({"image": x, "label": y}, 0))
    return nn.Sequential(method.backbone, method.head)


@cache
def few_turned(seed: int) -> Set:
    (x, y), _ = digits(seed, turned=True)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    rows = torch.cat([order[y[order] == digit][:SHOTS] for digit in range(10)])
    return x[rows], y[rows]


def moved(network: nn.Module, seed: int, rate: float, given: Set | None = None) -> nn.Module:
    """Fine-tuned on turned digits, with a new head, for 300 steps."""
    torch.manual_seed(seed)
    network = nn.Sequential(copy.deepcopy(network[0]), nn.Linear(64, 10))  # type: ignore[index]
    x, y = few_turned(seed) if given is None else given
    return trained(network, (x, y), seed, epochs=6000 // len(x), batch=20, rate=rate)


def searched(arm: str, rate: float) -> float:
    network = whole(SEARCH, rate) if arm == WHOLE else shrunk(arm, whole(SEARCH, START_RATE), SEARCH, rate)
    return accuracy(network, *digits(SEARCH)[1])


def test_pela_keeps_the_accuracy_of_the_network_it_cuts(evidence) -> None:
    torch.set_num_threads(1)
    rates = evidence.search({arm: partial(searched, arm) for arm in ARMS}, RATES, seed=SEARCH)
    original = whole(SEARCH, START_RATE)
    starts = {WHOLE: original, "PELA": shrunk("PELA", original, SEARCH, rates["PELA"])}
    judged = digits(SEARCH, turned=True)[1]
    turned_rates = evidence.search(
        {f"turned, {arm}": lambda r, n=n: accuracy(moved(n, SEARCH, r), *judged) for arm, n in starts.items()},
        RATES, what="rate, turned digits", seed=SEARCH,
    )  # fmt: skip
    reached: dict[str, dict[int, float]] = {}
    learned: dict[str, dict[int, float]] = {}

    def keep(name: str, seed: int, network: nn.Module, given: Set, test: Set) -> None:
        reached.setdefault(name, {})[seed] = accuracy(network, *test)
        learned.setdefault(name, {})[seed] = accuracy(network, *given)
        evidence.figure(f"accuracy, {name}", reached[name][seed], seed, "%")

    for seed in SEEDS:
        original = whole(seed, rates[WHOLE])
        networks = {WHOLE: original, SVD: cut(original)}
        networks |= {arm: shrunk(arm, original, seed, rates[arm]) for arm in ARMS[1:]}
        for name, network in networks.items():
            keep(name, seed, network, *digits(seed))
        _, test = digits(seed, turned=True)
        for arm in (WHOLE, "PELA"):
            name = f"turned, {arm}"
            keep(name, seed, moved(networks[arm], seed, turned_rates[name]), few_turned(seed), test)
        untrained = moved(cut(transformer(seed + 1000)), seed, turned_rates["turned, PELA"])
        keep("turned, untrained", seed, untrained, few_turned(seed), test)
    every, test = digits(SEEDS[-1], turned=True)
    told = accuracy(moved(networks["PELA"], SEEDS[-1], turned_rates["turned, PELA"], every), *test)
    evidence.figure("accuracy, turned, PELA with all images", told, SEEDS[-1], "%")
    sizes = [sum(p.numel() for p in networks[arm][0].parameters()) for arm in ("PELA", WHOLE)]  # type: ignore[index]
    evidence.figure("parameters of the backbone, PELA over whole", sizes[0] / sizes[1])
    evidence.note(f"A test image is 0.28 points. alpha {ALPHA:g}, lambda 1, eps 0.001.")
    for arm in ("PELA", TASK):
        evidence.gate(arm, learned[arm], learned[SVD], by=10.0, unit="points")
    for arm in (WHOLE, RANDOM, *(f"turned, {arm}" for arm in starts)):
        evidence.gate(arm, learned[arm], 10.0, by=40.0, unit="points")

    def gap(first: str, second: str) -> dict[int, float]:
        return {seed: reached[first][seed] - reached[second][seed] for seed in SEEDS}

    for other, least in ((SVD, 10.0), (RANDOM, 5.0), (TASK, 0.5)):
        evidence.claim(
            f"PELA minus {other}", gap("PELA", other), at_least=least, unit="points",
            floor=gap(SVD, other), ceiling=gap(WHOLE, other), arms=["PELA", *{other} & {*ARMS}],
        )  # fmt: skip
    evidence.claim(
        "whole network minus PELA", gap(WHOLE, "PELA"), at_most=1.5, unit="points",
        floor=gap(WHOLE, SVD), ceiling=gap(WHOLE, WHOLE), arms=[WHOLE, "PELA"],
    )  # fmt: skip
    first = f"turned, {WHOLE}"
    evidence.claim(
        "turned digits, whole network minus PELA", gap(first, "turned, PELA"), at_most=1.5, unit="points",
        floor=gap(first, "turned, untrained"),
        ceiling=sum(reached[first].values()) / len(SEEDS) - told, arms=[first, "turned, PELA"],
    )  # fmt: skip
