"""MLC (arXiv 2301.01805) against k-means and spectral clustering of the features that it starts from.

Two data sets without labels in training: points of four bent surfaces of two dimensions in R^20, and 8 x 8 digits. All
arms share a network and a first stage of the total coding rate. MLC then trains on; a softmax head of as many clusters
with MCR2's rates, NMCE's form, trains on as long. Rates of both, then their temperature or distortion, which begins at
the usual one, and the neighbours of spectral clustering are searched on seed 100, which has surfaces and 600 digits of
its own; labels are used there and for scores. k-means has only starts. "unbalanced" keeps a quarter of the points of
half of the clusters.

The floor is the untrained network, read as MLC's. The ceiling is the second stage with the true clusters in place of
the membership, which is supervised MCR2, read from its features in the same way; with a second stage of half the length
its clusters of digits kept a rank too high for the margin. An earlier record asked which arm
loses less by unbalance, as one would that has nothing to lose; now arms are compared on the unbalanced points.
"""

import copy
import math
from functools import partial
from typing import NamedTuple

import torch
from digits import shuffled
from torch import Tensor, nn
from torch.nn import functional as F

from lightspan.evaluation.geometry.clustering import kmeans, matched_accuracy, spectral, spectral_of_neighbours
from lightspan.evaluation.geometry.spectra import energy_shares, singular_values
from lightspan.methods.clustering.mlc import MLC
from lightspan.nn.heads.projector import Projector
from lightspan.objectives.coding_rate import cluster_coding_rate, total_coding_rate_loss

SEEDS, SEARCH = tuple(range(12)), 100
FIRST, SECOND, BATCH, WIDTH, DISTORTION = 1000, 800, 256, 16, 0.2
USUAL = {"MLC": 0.1, "softmax head": 0.2}  # temperature, distortion
RATES, FACTORS, NEIGHBOURS = (1e-4, 3e-4, 1e-3), (0.5, 1.0, 2.0), (5, 8, 12, 18, 27)
Setting = tuple[float, float]  # temperature or distortion, and rate


class Data(NamedTuple):
    x: Tensor
    label: Tensor
    clusters: int
    shape: tuple[int, int, int]

    def views(self, rows: Tensor) -> Tensor:
        """Noise, and for pictures a shift by at most one pixel: [R ...]."""
        x = self.x[rows]
        if self.shape[1] > 1:
            x = torch.roll(x, tuple(torch.randint(-1, 2, (2,)).tolist()), dims=(2, 3))
        return x + 0.1 * torch.randn_like(x)


def surfaces(seed: int) -> Data:
    """300 points each of four smooth maps of the square into R^20, all of them changes of one map.

    Independent maps lie so far apart that spectral clustering is perfect. The size of the changes was chosen by the
    baselines alone, before MLC was run.
    """
    generator = torch.Generator().manual_seed(seed)
    common, start = torch.randn(2, 20, generator=generator), 2 * math.pi * torch.rand(20, generator=generator)
    parts = []
    for _ in range(4):
        z = 2 * torch.rand(300, 2, generator=generator) - 1
        into = common + 0.4 * torch.randn(2, 20, generator=generator)
        phase = start + 0.4 * torch.randn(20, generator=generator)
        parts.append(torch.sin(1.5 * z @ into + phase) + 0.1 * torch.randn(300, 20, generator=generator))
    return Data(torch.cat(parts)[:, None, None], torch.arange(4).repeat_interleave(300), 4, (1, 1, 20))


def digits(seed: int) -> Data:
    images, labels = shuffled(SEARCH)  # one order, of which the search has the beginning and all other seeds the rest
    part = slice(600) if seed == SEARCH else slice(600, None)
    x, label = torch.from_numpy(images[part])[:, None].float(), torch.from_numpy(labels[part]).long()
    return Data(x, label, 10, (1, 8, 8))


def unbalanced(data: Data) -> Data:
    fourth = torch.stack([(data.label[: i + 1] == data.label[i]).sum() % 4 == 0 for i in range(len(data.label))])
    kept = (data.label % 2 == 0) | fourth
    return data._replace(x=data.x[kept], label=data.label[kept])


SETS = {"surfaces": surfaces, "digits": digits}


class Vectors(nn.Sequential):
    def __init__(self, width: int) -> None:
        super().__init__(nn.Flatten(), nn.Linear(width, 128), nn.BatchNorm1d(128), nn.ReLU())
        self.num_features = 128


def started(data: Data, seed: int, steps: int = FIRST) -> MLC:
    """After the first stage, which all arms share."""
    torch.manual_seed(seed)
    parts = Vectors(math.prod(data.shape)), Projector(128, [128], 128), nn.Linear(128, WIDTH)
    method = MLC(*parts, distortion=DISTORTION, clusters=data.clusters, optimizer=partial(torch.optim.Adam, lr=1e-3))
    optimizer = torch.optim.Adam(method.parameters(), lr=1e-3)
    for _ in range(steps):
        rows = torch.randperm(len(data.x))[:BATCH]
        z = [method.represent(data.views(rows))[0] for _ in range(2)]
        optimizer.zero_grad()
        total_coding_rate_loss(*z, DISTORTION, 30.0).backward()
        optimizer.step()
    return method


def continued(method: MLC, data: Data, seed: int, setting: Setting, told: bool = False) -> MLC:
    """After the second stage; `told` has the true clusters in place of the membership, and the cluster head of Z."""
    torch.manual_seed(seed)
    method = copy.deepcopy(method).train()
    method.temperature = setting[0]
    method.copy_head()
    optimizer = torch.optim.Adam(method.parameters(), lr=setting[1])
    true_NK = F.one_hot(data.label, data.clusters).float()
    for _ in range(SECOND):
        rows = torch.randperm(len(data.x))[:BATCH]
        pairs = [method.represent(data.views(rows)) for _ in range(2)]
        z, c = (torch.stack(column) for column in zip(*pairs, strict=True))
        optimizer.zero_grad()
        loss = (
            reduction(F.normalize(z.mean(dim=0), dim=1), true_NK[rows]) if told else method.rate_reduction_loss(z, c)[0]
        )
        loss.backward()
        optimizer.step()
    if told:
        method.copy_head()
    return method.eval()


def reduction(z: Tensor, shares: Tensor, distortion: float = DISTORTION) -> Tensor:
    """R_c - R with shares in clusters."""
    whole = cluster_coding_rate(z, torch.ones(len(z), 1), distortion)
    return cluster_coding_rate(z, shares, distortion) - whole


def softmax_head(method: MLC, data: Data, seed: int, setting: Setting) -> tuple[Tensor, float, float]:
    """The cluster of each point by a head of as many outputs, trained by R_c - R, and R - R_c of a step, first and
    last.
    """
    torch.manual_seed(seed)
    method, head = copy.deepcopy(method).train(), nn.Linear(128, data.clusters)
    optimizer = torch.optim.Adam([*method.parameters(), *head.parameters()], lr=setting[1])
    reached = []
    for _ in range(SECOND):
        rows = torch.randperm(len(data.x))[:BATCH]
        pre = [method.projector(method.backbone(data.views(rows))) for _ in range(2)]
        z = F.normalize(sum(F.normalize(method.head(p), dim=1) for p in pre), dim=1)
        loss = reduction(z, sum(head(p).softmax(dim=1) for p in pre) / 2, setting[0])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        reached.append(-float(loss.detach()))
    with torch.no_grad():
        method.eval()
        return head(method.projector(method.backbone(data.x))).argmax(dim=1), reached[0], reached[-1]


@torch.no_grad()
def represented(method: MLC, data: Data) -> tuple[Tensor, Tensor]:
    return method.eval().represent(data.x)


def percent(found: Tensor, data: Data) -> float:
    return 100 * matched_accuracy(found, data.label)


def of_mlc(method: MLC, data: Data) -> float:
    membership = method.membership(represented(method, data)[1])
    return percent(spectral(membership, data.clusters), data)


def rank(x: Tensor) -> float:
    """Directions with 95 % of the energy."""
    return float((energy_shares(singular_values(x)).cumsum(dim=0) < 0.95).sum() + 1)


def share_of_clusters(x: Tensor, data: Data) -> float:
    """The mean rank of a true cluster by that of all points, which a network that collapses has low as well."""
    return sum(rank(x[data.label == c]) for c in range(data.clusters)) / data.clusters / rank(x)


@torch.no_grad()
def reduced(method: MLC, data: Data) -> float:
    """R - R_c of all points, what MLC trains for."""
    z, c = represented(method, data)
    return -float(method.rate_reduction_loss(z[None], c[None])[0])


def searched(evidence, name: str, data: Data) -> tuple[dict[str, Setting], int]:
    """The settings of both trained arms, and the neighbours."""
    first = started(data, SEARCH)
    z = represented(first, data)[0]

    def score(arm: str, setting: Setting) -> float:
        if arm == "MLC":
            return of_mlc(continued(first, data, SEARCH, setting), data)
        return percent(softmax_head(first, data, SEARCH, setting)[0], data)

    label = {arm: f"{name}, {arm}" for arm in USUAL}
    rates = evidence.search(
        {label[arm]: lambda rate, arm=arm: score(arm, (USUAL[arm], rate)) for arm in USUAL}, RATES, seed=SEARCH
    )
    factors = evidence.search(
        {label[arm]: lambda by, arm=arm: score(arm, (by * USUAL[arm], rates[label[arm]])) for arm in USUAL},
        FACTORS, what="factor of temperature or distortion", seed=SEARCH,
    )  # fmt: skip
    near = evidence.search(
        {f"{name}, spectral": lambda n: percent(spectral_of_neighbours(z, data.clusters, round(n)), data)},
        NEIGHBOURS, what="number of neighbours", seed=SEARCH,
    )  # fmt: skip
    settings = {arm: (factors[label[arm]] * USUAL[arm], rates[label[arm]]) for arm in USUAL}
    return settings, round(near[f"{name}, spectral"])


def compared(data: Data, seed: int, settings: dict[str, Setting], neighbours: int) -> dict[str, float]:
    first, nothing = started(data, seed), started(data, seed, steps=0)
    z = represented(first, data)[0]
    last = continued(first, data, seed, settings["MLC"])
    told = continued(first, data, seed, settings["MLC"], told=True)
    by_softmax, *reached = softmax_head(first, data, seed, settings["softmax head"])
    ranks = {}
    for arm, method in {"MLC": last, "true clusters": told, "untrained": nothing}.items():
        end = represented(method, data)[0]
        ranks[f"rank of a cluster, {arm}"] = share_of_clusters(end, data) / share_of_clusters(z, data)
        ranks[f"rank of all, {arm}"] = rank(end) / WIDTH
    return ranks | {
        "MLC": of_mlc(last, data),
        "true clusters": of_mlc(told, data),
        "untrained": of_mlc(nothing, data),
        "softmax head": percent(by_softmax, data),
        "spectral": percent(spectral_of_neighbours(z, data.clusters, neighbours, seed), data),
        "k-means": percent(kmeans(z, data.clusters, seed), data),
        "rate reduction of MLC, first": reduced(first, data),
        "rate reduction of MLC, last": reduced(last, data),
        "rate reduction of softmax head, first": reached[0],
        "rate reduction of softmax head, last": reached[1],
    }


def test_mlc(evidence) -> None:
    for name, make in SETS.items():
        settings, neighbours = searched(evidence, name, make(SEARCH))
        runs = {seed: compared(make(seed), seed, settings, neighbours) for seed in SEEDS}
        skewed = {seed: compared(unbalanced(make(seed)), seed, settings, neighbours) for seed in SEEDS}
        for kind, of_seed in ((name, runs), (f"{name}, unbalanced", skewed)):
            for seed, measured in of_seed.items():
                for figure, value in measured.items():
                    evidence.figure(f"{kind}: {figure}", value, seed=seed, unit="" if "ra" in figure else "%")
        for arm in USUAL:
            ends = (
                {seed: found[f"rate reduction of {arm}, {end}"] for seed, found in runs.items()}
                for end in ("last", "first")
            )
            evidence.gate(f"{name}, {arm}", *ends, by=0.5, unit="nats")

        def claim(what: str, of_seed: dict, key: str, over: str, *arms: str, name: str = name, **bound: float) -> None:
            """A figure of MLC, minus that of another arm if there is one."""
            value, floor, ceiling = (
                {s: found[key.format(arm)] - (found[over] if over else 0) for s, found in of_seed.items()}
                for arm in ("MLC", "untrained", "true clusters")
            )
            evidence.claim(
                f"{name}: {what}", value, floor=floor, ceiling=ceiling, unit="points" if over else "",
                arms=[f"{name}, {arm}" for arm in ("MLC", *arms)], **bound,
            )  # fmt: skip

        claim("MLC minus spectral clustering", runs, "{}", "spectral", at_least=5.0)
        claim("MLC minus k-means", runs, "{}", "k-means", at_least=0.0)
        claim(
            "rank of a true cluster by that of all, MLC over the first stage", runs, "rank of a cluster, {}", "",
            at_most=0.6,
        )  # fmt: skip
        claim("rank of all features as a share of their width", runs, "rank of all, {}", "", at_least=0.8)
        claim("unbalanced, MLC minus softmax head", skewed, "{}", "softmax head", "softmax head", at_least=0.0)


if __name__ == "__main__":
    for name, make in SETS.items():
        usual = {arm: (value, 3e-4) for arm, value in USUAL.items()}
        print(name, compared(make(SEARCH), SEARCH, usual, 12), flush=True)
