"""Learned masks: the support of a planted sparse net, and accuracy over density on Fashion-MNIST.

Rates of the weights are searched for each arm on seed 100 and samples of its own; masks.py has the arms. Floors: a
random mask, chance. Ceilings: the right mask, all weights. Gates: the loss, or the accuracy, on what was trained on.
"""

from collections.abc import Mapping
from functools import cache
from statistics import mean

import torch
from masks import ARMS, Batches, train
from torch import Tensor, nn
from torch.nn import functional as F

from lightspan.backbones.vision import MLP
from lightspan.core.drawing import COLOURS, SOFT, canvas, png, tidy
from lightspan.core.files.atomic import write_atomic
from lightspan.datamodules.image.sets.small import FashionMNIST, ImageSamples

# Planted: 100 correlated inputs, 20 units, a tenth of 2,000 weights is not zero; 400 noisy samples.
INPUTS, UNITS, SHARE, SAMPLES, NOISE = 100, 20, 0.1, 400, 0.5
SEEDS, SEARCH, PLANTED_RATES, PLANTED_STEPS = (0, 1, 2, 3, 4), 100, (3e-3, 1e-2, 3e-2), 600
# Fashion-MNIST: the 3,000 training images that lightspan ships, its 1,000 test images.
RATES, STEPS, BATCH = (3e-4, 1e-3, 3e-3), 400, 100
DENSITIES, SEARCHED_AT = (0.1, 0.05, 0.02), 0.05
HELD_OUT = 500  # training images that judge settings


class Planted:
    """y = V tanh(W x) + noise with a sparse W. V is known, so the units of a net that learns W cannot change places."""

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(1000 + seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        places = torch.randperm(UNITS * INPUTS, generator=generator)[: round(SHARE * UNITS * INPUTS)]
        self.support = torch.zeros(UNITS * INPUTS, dtype=torch.bool).index_fill(0, places, True).view(UNITS, INPUTS)
        sizes = 0.5 + torch.rand(UNITS, INPUTS, generator=generator)  # none is so small that no sample shows it
        self.w = sizes * normal(UNITS, INPUTS).sign() * self.support
        self.v = normal(UNITS, UNITS) / UNITS**0.5
        self.train, self.held_out = (self._draw(n, normal) for n in (SAMPLES, 1000))

    def _draw(self, n: int, normal) -> tuple[Tensor, Tensor]:
        # Groups of five inputs share half of their variance.
        x = normal(n, INPUTS) + normal(n, INPUTS // 5).repeat_interleave(5, dim=1)
        return x, torch.tanh(x @ self.w.T) @ self.v.T + NOISE * normal(n, UNITS)

    def net(self) -> nn.Sequential:
        net = nn.Sequential(nn.Linear(INPUTS, UNITS, bias=False), nn.Tanh(), nn.Linear(UNITS, UNITS, bias=False))
        net[2].weight.requires_grad_(False).copy_(self.v)
        return net

    def learnt(self, arm: str, rate: float, seed: int) -> dict[str, float]:
        """Recall in per cent, which is precision too, as the mask has as many entries as the support; losses."""
        torch.manual_seed(seed)
        net = self.net()
        with torch.no_grad():
            untrained = squared(net, *self.train).item()
        callback = ARMS[arm].callback(["net.0.weight"], SHARE, seed)
        train(net, squared, Batches(*self.train, BATCH, PLANTED_STEPS, seed), rate, callback)
        with torch.no_grad():
            return {
                "recall": 100 * float(callback.masks["net.0.weight"][self.support].double().mean()),
                "held-out loss": squared(net, *self.held_out).item(),
                "loss": squared(net, *self.train).item(),
                "untrained loss": untrained,
            }


def squared(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.mse_loss(net(x), y)


def test_a_learned_mask_finds_the_support_of_a_planted_net(evidence) -> None:
    tuned = Planted(SEARCH)
    rates = evidence.search(
        {f"planted, {arm}": lambda rate, arm=arm: -tuned.learnt(arm, rate, SEARCH)["held-out loss"] for arm in ARMS},
        PLANTED_RATES,
    )
    planted = {seed: Planted(seed) for seed in SEEDS}
    runs = {arm: {s: planted[s].learnt(arm, rates[f"planted, {arm}"], s) for s in SEEDS} for arm in ARMS}
    for arm, of_seed in runs.items():
        for seed, found in of_seed.items():
            evidence.figure(f"recall of the planted support, {arm}", found["recall"], seed, "%")
            evidence.figure(f"held-out loss on the planted net, {arm}", found["held-out loss"], seed)
        losses = ({seed: found[name] for seed, found in of_seed.items()} for name in ("loss", "untrained loss"))
        evidence.gate(f"planted, {arm}", *losses, by=0.2, lower_is_better=True)
    recall = {arm: {seed: found["recall"] for seed, found in of_seed.items()} for arm, of_seed in runs.items()}
    evidence.claim(
        "recall of the planted support, Concrete", recall["Concrete"], at_least=90, unit="%",
        floor=recall["random"], ceiling=100.0, arms=("planted, Concrete",),
    )  # fmt: skip
    right, none = dict.fromkeys(SEEDS, 100.0), {seed: recall["random"][SEEDS[seed - 1]] for seed in SEEDS}
    for arm, other, margin in (
        ("Concrete", "magnitude, all at once", 5),
        ("Concrete", "magnitude", 1),
        ("drop and grow", "random", 60),
    ):
        evidence.claim(
            f"recall, {arm} minus {other}", difference(recall[arm], recall[other]), at_least=margin, unit="points",
            floor=difference(none, recall[other]), ceiling=difference(right, recall[other]),
            arms=(f"planted, {arm}", f"planted, {other}"),
        )  # fmt: skip


@cache
def images(held_out: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images and labels, then those that judge: test images, or `HELD_OUT` of the training images."""
    data = FashionMNIST(val_size=HELD_OUT if held_out else 0)
    data.setup()
    return *whole(data.train), *whole(data.val)


def whole(samples: ImageSamples | None) -> tuple[Tensor, Tensor]:
    assert samples is not None
    batch = [samples.sample(i, 0) for i in range(len(samples))]
    return torch.stack([s["image"] for s in batch]), torch.stack([s["label"] for s in batch])


@cache
def accuracy(arm: str, rate: float, density: float, seed: int) -> dict[str, float]:
    """In per cent, of 784-200-200-10 with this share of the weights of both hidden layers: judged, and of what it was
    trained on. The search seed is judged on training images.
    """
    x, y, judged_x, judged_y = images(held_out=seed == SEARCH)
    torch.manual_seed(seed)
    net = nn.Sequential(MLP((1, 28, 28), (200, 200)), nn.Linear(200, 10))
    callback = ARMS[arm].callback(["net.0.*weight"], density, seed) if arm in ARMS else None
    loss = lambda net, x, y: F.cross_entropy(net(x), y)  # noqa: E731
    train(net, loss, Batches(x, y, BATCH, STEPS, seed), rate, callback)
    with torch.no_grad():
        both = {"judged": (judged_x, judged_y), "trained on": (x, y)}
        return {name: 100 * (net(x).argmax(1) == y).float().mean().item() for name, (x, y) in both.items()}


def test_accuracy_over_density_on_fashion_mnist(evidence) -> None:
    rates = evidence.search(
        {
            arm: lambda rate, arm=arm: accuracy(arm, rate, SEARCHED_AT, SEARCH)["judged"]
            for arm in (*ARMS, "all weights")
        },
        RATES,
    )
    curves: dict[str, dict[float, dict[int, float]]] = {}
    for arm, rate in rates.items():
        runs = {
            density: {seed: accuracy(arm, rate, density, seed) for seed in SEEDS}
            for density in (DENSITIES if arm in ARMS else (1.0,))
        }
        for density, of_seed in runs.items():
            where = f"accuracy at {100 * density:g} %, {arm}" if arm in ARMS else f"accuracy, {arm}"
            for seed, found in of_seed.items():
                evidence.figure(where, found["judged"], seed, "%")
        learned = {seed: found["trained on"] for seed, found in of_seed.items()}  # at the least density
        evidence.gate(arm, learned, 10.0, by=50.0, unit="points")
        curves[arm] = {density: {s: found["judged"] for s, found in of.items()} for density, of in runs.items()}
    dense = curves.pop("all weights")[1.0]
    write_atomic(evidence.path.with_suffix(".png"), picture(dense, curves))
    evidence.note("Test images judge once, with the rates found; the picture shows means, and lowest to highest.")
    at = {name: curve[0.02] for name, curve in curves.items()}
    chance = dict.fromkeys(SEEDS, 10.0)
    for arm, other, margin in (
        ("Concrete", "random", 1),
        ("Concrete", "magnitude, all at once", 1),
        ("Concrete", "magnitude", 0),
        ("drop and grow", "random", 1),
    ):
        evidence.claim(
            f"accuracy at 2 %, {arm} minus {other}", difference(at[arm], at[other]), at_least=margin, unit="points",
            floor=difference(chance, at[other]), ceiling=difference(dense, at[other]), arms=(arm, other),
        )  # fmt: skip
    again = {seed: dense[SEEDS[seed - 1]] for seed in SEEDS}
    evidence.claim(
        "accuracy, Concrete at 10 % minus all weights", difference(curves["Concrete"][0.1], dense), at_least=-1,
        unit="points", floor=difference(chance, dense), ceiling=difference(again, dense),
        arms=("Concrete", "all weights"),
    )  # fmt: skip


def difference(first: Mapping[int, float], second: Mapping[int, float]) -> dict[int, float]:
    return {seed: first[seed] - second[seed] for seed in first}


def picture(dense: Mapping[int, float], curves: Mapping[str, Mapping[float, Mapping[int, float]]]) -> bytes:
    """PNG bytes."""
    figure, ((axes,),) = canvas("", (7, 4))
    axes.axhline(mean(dense.values()), color=SOFT, linewidth=1.2, linestyle="--", label="all weights")
    colours = dict(zip(ARMS, COLOURS, strict=True))
    for name, curve in curves.items():
        density, values = [100 * d for d in curve], [list(found.values()) for found in curve.values()]
        axes.plot(density, list(map(mean, values)), "-o", color=colours[name], linewidth=1.6, markersize=4, label=name)
        axes.fill_between(
            density, list(map(min, values)), list(map(max, values)), color=colours[name], alpha=0.15, lw=0
        )
    axes.set_xscale("log")
    axes.set_xticks([100 * d for d in DENSITIES], [f"{100 * d:g}" for d in DENSITIES])
    axes.minorticks_off()
    axes.set_xlabel("open weights of both hidden layers in %")
    axes.set_ylabel("test accuracy in %")
    axes.set_title("784-200-200-10 on 3,000 images of Fashion-MNIST", fontsize=10, loc="left")
    tidy(axes)
    axes.legend(frameon=False, fontsize=8)
    return png(figure)


if __name__ == "__main__":
    for name in ARMS:
        print(name, Planted(SEARCH).learnt(name, 1e-2, SEARCH), accuracy(name, 1e-3, 0.02, SEARCH), flush=True)
    print("all weights", accuracy("all weights", 1e-3, 1.0, SEARCH))
