"""MLC (arXiv 2301.01805) against k-means and spectral clustering of the features that it starts from.

Two data sets without labels in training: points of four bent surfaces of two dimensions in R^20, and 8 x 8 digits. All
arms share a network and a first stage of the total coding rate. MLC then trains on; a softmax head of as many clusters
with MCR2's rates, NMCE's form, trains on as long. Each arm has six settings, of which the best on seed 100 is taken:
temperatures and rates of MLC, distortions and rates of the softmax head, numbers of neighbours of spectral clustering;
k-means has only starts. That seed has surfaces and 600 digits of its own, and labels are used there and for scores.
"unbalanced" keeps a quarter of the points of half of the clusters.
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

SEEDS, SEARCH = (0, 1, 2), 100
FIRST, SECOND, BATCH, WIDTH, DISTORTION = 1000, 400, 256, 16, 0.2
MLC_SETTINGS = [(temperature, rate) for temperature in (0.05, 0.1, 0.2) for rate in (3e-4, 1e-3)]
SOFTMAX_SETTINGS = [(distortion, rate) for distortion in (0.1, 0.2, 0.5) for rate in (3e-4, 1e-3)]
NEIGHBOURS = [5, 8, 10, 15, 20, 30]


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


def continued(method: MLC, data: Data, seed: int, setting: tuple[float, float], steps: int = SECOND) -> MLC:
    torch.manual_seed(seed)
    method = copy.deepcopy(method).train()
    method.temperature = setting[0]
    method.copy_head()
    optimizer = torch.optim.Adam(method.parameters(), lr=setting[1])
    for _ in range(steps):
        rows = torch.randperm(len(data.x))[:BATCH]
        pairs = [method.represent(data.views(rows)) for _ in range(2)]
        z, c = (torch.stack(column) for column in zip(*pairs, strict=True))
        optimizer.zero_grad()
        method.rate_reduction_loss(z, c)[0].backward()
        optimizer.step()
    return method.eval()


def softmax_head(method: MLC, data: Data, seed: int, setting: tuple[float, float], steps: int = SECOND) -> Tensor:
    """The cluster of each point by a head of as many outputs, trained by R_c - R."""
    torch.manual_seed(seed)
    method, head = copy.deepcopy(method).train(), nn.Linear(128, data.clusters)
    optimizer = torch.optim.Adam([*method.parameters(), *head.parameters()], lr=setting[1])
    for _ in range(steps):
        rows = torch.randperm(len(data.x))[:BATCH]
        pre = [method.projector(method.backbone(data.views(rows))) for _ in range(2)]
        z = F.normalize(sum(F.normalize(method.head(p), dim=1) for p in pre), dim=1)
        shares = sum(head(p).softmax(dim=1) for p in pre) / 2
        whole = cluster_coding_rate(z, torch.ones(len(z), 1), setting[0])
        optimizer.zero_grad()
        (cluster_coding_rate(z, shares, setting[0]) - whole).backward()
        optimizer.step()
    with torch.no_grad():
        method.eval()
        return head(method.projector(method.backbone(data.x))).argmax(dim=1)


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


def rank_of_clusters(x: Tensor, data: Data) -> float:
    return sum(rank(x[data.label == c]) for c in range(data.clusters)) / data.clusters


class Chosen(NamedTuple):
    mlc: tuple[float, float]
    softmax: tuple[float, float]
    neighbours: int


def chosen(make: str) -> Chosen:
    data = SETS[make](SEARCH)
    first = started(data, SEARCH)
    z = represented(first, data)[0]
    return Chosen(
        max(MLC_SETTINGS, key=lambda s: of_mlc(continued(first, data, SEARCH, s), data)),
        max(SOFTMAX_SETTINGS, key=lambda s: percent(softmax_head(first, data, SEARCH, s), data)),
        max(NEIGHBOURS, key=lambda n: percent(spectral_of_neighbours(z, data.clusters, n), data)),
    )


def compared(data: Data, seed: int, settings: Chosen) -> dict[str, float]:
    first = started(data, seed)
    z = represented(first, data)[0]
    last = continued(first, data, seed, settings.mlc)
    end = represented(last, data)[0]
    return {
        "MLC": of_mlc(last, data),
        "softmax head": percent(softmax_head(first, data, seed, settings.softmax), data),
        "spectral": percent(spectral_of_neighbours(z, data.clusters, settings.neighbours, seed), data),
        "k-means": percent(kmeans(z, data.clusters, seed), data),
        "rank ratio": rank_of_clusters(end, data) / rank_of_clusters(z, data),
        "rank of all": rank(end) / WIDTH,
    }


def test_mlc(evidence):
    for name, make in SETS.items():
        settings = chosen(name)
        evidence.note(f"{name}, chosen on seed {SEARCH}: {settings._asdict()}.")
        runs = {seed: compared(make(seed), seed, settings) for seed in SEEDS}
        skewed = {seed: compared(unbalanced(make(seed)), seed, settings) for seed in SEEDS}
        for kind, of_seed in ((name, runs), (f"{name}, unbalanced", skewed)):
            for seed, measured in of_seed.items():
                for figure, value in measured.items():
                    evidence.figure(f"{kind}: {figure}", value, seed=seed, unit="" if "rank" in figure else "%")

        def apart(over: str, of_seed: dict[int, dict[str, float]] = runs) -> dict[int, float]:
            return {seed: of_seed[seed]["MLC"] - of_seed[seed][over] for seed in SEEDS}

        def lost(arm: str, of_seed: dict[int, dict[str, float]] = runs, to: dict = skewed) -> dict[int, float]:
            return {seed: of_seed[seed][arm] - to[seed][arm] for seed in SEEDS}

        evidence.claim(f"{name}: MLC minus spectral clustering", apart("spectral"), at_least=5.0, unit="points")
        evidence.claim(f"{name}: MLC minus k-means", apart("k-means"), at_least=0.0, unit="points")
        ratio, whole = ({seed: runs[seed][key] for seed in SEEDS} for key in ("rank ratio", "rank of all"))
        evidence.claim(f"{name}: rank of a true cluster, MLC over the first stage", ratio, at_most=0.6)
        evidence.claim(f"{name}: rank of all features over their width", whole, at_least=0.8)
        kept = {seed: lost("softmax head")[seed] - lost("MLC")[seed] for seed in SEEDS}
        evidence.claim(f"{name}: loss by unbalance, softmax head minus MLC", kept, at_least=0.0, unit="points")


if __name__ == "__main__":
    for name in SETS:
        print(name, chosen(name), flush=True)
