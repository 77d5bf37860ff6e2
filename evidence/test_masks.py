"""Learned masks: the support of a planted sparse net, and accuracy over density on Fashion-MNIST."""

from collections.abc import Mapping
from functools import cache
from statistics import mean

import torch
from masks import SEARCH_SEED, Arm, Batches, Settings, arms, callback_of, searched, train
from torch import Tensor, nn
from torch.nn import functional as F

from lightspan.backbones.vision import MLP
from lightspan.core.drawing import COLOURS, SOFT, canvas, png, tidy
from lightspan.core.files.atomic import write_atomic
from lightspan.datamodules.image.sets.small import FashionMNIST, ImageSamples

# Planted: 100 correlated inputs, 20 units, a tenth of 2,000 weights is not zero; 400 noisy samples.
INPUTS, UNITS, SHARE, SAMPLES, NOISE = 100, 20, 0.1, 400, 0.5
PLANTED_SEEDS, PLANTED_RATES, PLANTED_STEPS = (0, 1, 2, 3, 4), (1e-3, 3e-3, 1e-2, 3e-2), 600
# Fashion-MNIST: the 3,000 training images that lightspan ships, its 1,000 test images.
SEEDS, RATES, STEPS, BATCH = (0, 1, 2), (3e-4, 1e-3, 3e-3, 1e-2), 400, 100
DENSITIES, SEARCHED_AT = (0.5, 0.2, 0.1, 0.05, 0.02), 0.05
HELD_OUT = 500  # training images that judge settings
ARMS = ("Concrete", "magnitude", "drop and grow", "movement", "magnitude, all at once", "random")


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

    def learnt(self, arm: Arm, settings: Settings, seed: int) -> tuple[Tensor, float]:
        """(mask, loss on held-out samples)."""
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(INPUTS, UNITS, bias=False), nn.Tanh(), nn.Linear(UNITS, UNITS, bias=False))
        net[2].weight.requires_grad_(False).copy_(self.v)
        callback = callback_of(arm, settings, ["net.0.weight"], SHARE, seed)
        train(net, squared, Batches(*self.train, BATCH, PLANTED_STEPS, seed), settings["rate"], callback)
        with torch.no_grad():
            return callback.masks["net.0.weight"], squared(net, *self.held_out).item()


def squared(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.mse_loss(net(x), y)


def test_a_learned_mask_finds_the_support_of_a_planted_net(evidence) -> None:
    tuned = Planted(SEARCH_SEED)
    recall: dict[str, dict[int, float]] = {}
    for arm in arms(PLANTED_RATES):
        settings = searched(arm, lambda arm, settings: -tuned.learnt(arm, settings, SEARCH_SEED)[1])
        recall[arm.name] = {}
        for seed in PLANTED_SEEDS:
            planted = Planted(seed)
            mask, loss = planted.learnt(arm, settings, seed)
            found = int((mask & planted.support).sum())
            recall[arm.name][seed] = 100 * found / int(planted.support.sum())
            evidence.figure(f"recall of the planted support, {arm.name}", recall[arm.name][seed], seed, "%")
            evidence.figure(f"precision, {arm.name}", 100 * found / int(mask.sum()), seed, "%")
            evidence.figure(f"held-out loss on the planted net, {arm.name}", loss, seed)
        evidence.note(f"Planted net, {arm.name}: {described(settings)}, of four settings on seed {SEARCH_SEED}.")
    evidence.note("Precision equals recall, since every mask has as many entries as the support.")
    evidence.claim("recall of the planted support, Concrete", recall["Concrete"], at_least=90, unit="%")
    for other, margin in (("random", 70), ("magnitude, all at once", 5), ("magnitude", 1)):
        gains = difference(recall["Concrete"], recall[other])
        evidence.claim(f"recall, Concrete minus {other}", gains, at_least=margin, unit="points")
    gains = difference(recall["drop and grow"], recall["random"])
    evidence.claim("recall, drop and grow minus random", gains, at_least=60, unit="points")


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


def accuracy(arm: Arm | None, settings: Settings, density: float, seed: int, held_out: bool = False) -> float:
    """In per cent, of 784-200-200-10 with this share of the weights of both hidden layers; all of them for None."""
    x, y, judged_x, judged_y = images(held_out)
    torch.manual_seed(seed)
    net = nn.Sequential(MLP((1, 28, 28), (200, 200)), nn.Linear(200, 10))
    callback = None if arm is None else callback_of(arm, settings, ["net.0.*weight"], density, seed)
    loss = lambda net, x, y: F.cross_entropy(net(x), y)  # noqa: E731
    train(net, loss, Batches(x, y, BATCH, STEPS, seed), settings["rate"], callback)
    with torch.no_grad():
        return 100 * (net(judged_x).argmax(1) == judged_y).float().mean().item()


def test_accuracy_over_density_on_fashion_mnist(evidence) -> None:
    rate = max(RATES, key=lambda rate: accuracy(None, {"rate": rate}, 1.0, SEARCH_SEED, held_out=True))
    dense = {seed: accuracy(None, {"rate": rate}, 1.0, seed) for seed in SEEDS}
    for seed, value in dense.items():
        evidence.figure("accuracy, all weights", value, seed, "%")
    evidence.note(f"All weights: rate {rate:g}, of four on seed {SEARCH_SEED}.")
    curves: dict[str, dict[float, dict[int, float]]] = {}
    for arm in arms(RATES):
        settings = searched(arm, lambda arm, s: accuracy(arm, s, SEARCHED_AT, SEARCH_SEED, held_out=True))
        evidence.note(f"Fashion-MNIST, {arm.name}: {described(settings)}, at 5 % on seed {SEARCH_SEED}.")
        curves[arm.name] = {}
        for density in DENSITIES:
            found = {seed: accuracy(arm, settings, density, seed) for seed in SEEDS}
            curves[arm.name][density] = found
            for seed, value in found.items():
                evidence.figure(f"accuracy at {100 * density:g} %, {arm.name}", value, seed, "%")
            print(arm.name, density, [f"{value:.1f}" for value in found.values()], flush=True)
    write_atomic(evidence.path.with_suffix(".png"), picture(dense, curves))
    evidence.note("Test images judge once, with the settings found; the picture shows means, and lowest to highest.")
    at = {name: curve[0.02] for name, curve in curves.items()}
    for other, margin in (("random", 1), ("magnitude, all at once", 1), ("magnitude", 0)):
        gains = difference(at["Concrete"], at[other])
        evidence.claim(f"accuracy at 2 %, Concrete minus {other}", gains, at_least=margin, unit="points")
    gains = difference(at["drop and grow"], at["random"])
    evidence.claim("accuracy at 2 %, drop and grow minus random", gains, at_least=1, unit="points")
    loss = difference(curves["Concrete"][0.1], dense)
    evidence.claim("accuracy, Concrete at 10 % minus all weights", loss, at_least=-1, unit="points")


def described(settings: Settings) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in settings.items())


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
