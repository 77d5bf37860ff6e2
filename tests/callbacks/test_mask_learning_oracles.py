"""Gradual magnitude pruning, movement pruning and RigL as their papers write them, in plain loops, beside MaskLearning:
masks, weights and momenta after every step of a real run, in float64.

The loops train by SGD with momentum 0.9 at a rate that falls linearly, as `masked_net.Plain` does.
"""

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from masked_net import WEIGHTS, Plain, Watch, fit, loader, weights
from torch import Tensor
from torch.nn.functional import cross_entropy

from lightspan.callbacks.training.mask_learning import MaskLearning
from lightspan.optim.masks.by_score import ByScore
from lightspan.optim.masks.drop_and_grow import DropAndGrow
from lightspan.optim.masks.learner import MaskLearner
from lightspan.subspaces.masks.draws import uniform
from lightspan.subspaces.masks.schedules import Cubic, Schedule
from lightspan.subspaces.masks.scores import Movement

STEPS, LEARNING, EVERY, RATE = 20, 15, 4, 0.5  # masks move after steps 4, 8 and 12 and are fixed after step 15
FALLS = Cubic(0.8, 0.2)
Tensors = dict[str, Tensor]


def largest(scores: Tensor, count: int) -> Tensor:
    mask = torch.zeros(scores.numel(), dtype=torch.bool)
    mask[scores.flatten().argsort(descending=True)[:count]] = True
    return mask.view(scores.shape)


def count(w: Tensor, density: float) -> int:
    return round(density * w.numel())


def gradients(net: Plain, used: Tensors, step: int) -> Tensors:
    """At the weights in use, entries outside of the masks too."""
    x, y = [batch for _ in range(STEPS) for batch in loader(16)][step - 1]
    used = {name: w.detach().requires_grad_() for name, w in used.items()}
    stripped = {name.removeprefix("net."): w for name, w in used.items()}
    loss = cross_entropy(torch.func.functional_call(net.net, stripped, x.double()), y)
    return dict(zip(used, torch.autograd.grad(loss, list(used.values())), strict=True))


def descend(w: Tensors, v: Tensors, g: Tensors, m: Tensors, step: int) -> None:
    rate = RATE * (1 + (step - 1) * (0.1 - 1) / STEPS)
    for name in w:
        v[name] = 0.9 * v[name] + g[name] * m.get(name, 1)
        w[name] = w[name] - rate * v[name]


def masked(tensors: Tensors, m: Tensors) -> Tensors:
    return {name: t * m[name] if name in m else t for name, t in tensors.items()}


def gradual_magnitude(net: Plain) -> Iterator[tuple[Tensors, Tensors, Tensors]]:
    """Zhu and Gupta 2017, arXiv 1710.01878: every few steps the smallest weights go, down to equation 1."""
    w, v = weights(net), {name: torch.zeros_like(p) for name, p in weights(net).items()}
    m = {name: largest(w[name].abs(), count(w[name], 0.8)) for name in WEIGHTS}
    for step in range(1, STEPS + 1):
        descend(w, v, gradients(net, masked(w, m), step), m, step)
        if step in (4, 8, 12, 15):
            density = 0.2 + (0.8 - 0.2) * (1 - step / LEARNING) ** 3
            m = {name: largest(w[name].abs(), count(w[name], density)) for name in WEIGHTS}
            v = masked(v, m)
        if step >= LEARNING:
            w = masked(w, m)
        yield m, w, v


def movement(net: Plain) -> Iterator[tuple[Tensors, Tensors, Tensors]]:
    """Sanh, Wolf, Rush 2020, arXiv 2005.07683: scores are the sum of -g w over all steps, equation 3."""
    w, v = weights(net), {name: torch.zeros_like(p) for name, p in weights(net).items()}
    m = {name: largest(w[name].abs(), count(w[name], 0.8)) for name in WEIGHTS}
    s = {name: torch.zeros_like(w[name]) for name in WEIGHTS}
    for step in range(1, STEPS + 1):
        g = gradients(net, masked(w, m), step)
        s = {name: s[name] - g[name] * w[name] for name in WEIGHTS}
        descend(w, v, g, m, step)
        if step in (4, 8, 12, 15):
            density = 0.2 + (0.8 - 0.2) * (1 - step / LEARNING) ** 3
            m = {name: largest(s[name], count(w[name], density)) for name in WEIGHTS}
            v = masked(v, m)
        if step >= LEARNING:
            w = masked(w, m)
        yield m, w, v


def rigl(net: Plain) -> Iterator[tuple[Tensors, Tensors, Tensors]]:
    """Evci et al. 2020, arXiv 1911.11134, algorithm 1 with the counts of equation 1, from a random mask; an update
    comes after the step in place of the step.
    """
    w, v = weights(net), {name: torch.zeros_like(p) for name, p in weights(net).items()}
    chance = {name: uniform(0, -1, name, w[name].shape, dtype=torch.float64) for name in WEIGHTS}
    m = {name: largest(chance[name], count(w[name], 0.3)) for name in WEIGHTS}
    w = masked(w, m)
    for step in range(1, STEPS + 1):
        g = gradients(net, w, step)
        descend(w, v, g, m, step)
        if step in (4, 8, 12):
            for name in WEIGHTS:
                moved = int(0.3 / 2 * (1 + math.cos(math.pi * step / LEARNING)) * m[name].sum())
                stays = largest(w[name].abs().masked_fill(~m[name], -1), int(m[name].sum()) - moved)
                m[name] = stays | largest(g[name].abs().masked_fill(stays, -1), moved)
            v = masked(v, m)
        w = masked(w, m)
        yield dict(m), w, v


@pytest.mark.parametrize(
    ("learner", "density", "oracle"),
    [
        (ByScore(every=EVERY), FALLS, gradual_magnitude),
        (ByScore(Movement(), memory=1.0, every=EVERY), FALLS, movement),
        (DropAndGrow(alpha=0.3, every=EVERY), 0.3, rigl),
    ],
    ids=["gradual magnitude", "movement", "RigL"],
)
def test_masks_weights_and_momenta_are_those_of_the_plain_loop_after_every_step(
    learner: MaskLearner, density: float | Schedule, oracle: object, tmp_path: Path
) -> None:
    def make() -> Plain:
        return Plain(lambda parameters, lr: torch.optim.SGD(parameters, lr, momentum=0.9), RATE, torch.float64)

    def look(trainer: object, module: Plain) -> None:
        masks = callback.masks or learner.opened()
        momenta = {name: trainer.optimizers[0].state[p]["momentum_buffer"] for name, p in module.named_parameters()}
        seen.append([{k: t.clone() for k, t in of.items()} for of in (masks, weights(module), momenta)])

    seen: list[list[Tensors]] = []
    callback = MaskLearning(WEIGHTS, learner, density, until=LEARNING / STEPS)
    fit(make(), [callback, Watch(look)], tmp_path, max_steps=STEPS)
    assert len(seen) == STEPS
    masks = set()
    for step, (now, expected) in enumerate(zip(seen, oracle(make()), strict=True), 1):
        for what, ours, plain in zip(("mask", "weight", "momentum"), now, expected, strict=True):
            for name, tensor in plain.items():
                torch.testing.assert_close(ours[name], tensor, rtol=1e-9, atol=1e-12, msg=f"{what} {name} step {step}")
        masks.add(tuple(now[0]["net.0.weight"].flatten().tolist()))
    assert len(masks) == (4 if oracle is rigl else 5)
