"""The equations of published code for whole matrices, written down again apart from the package, on one parameter in
its own orientation. Momentum is as there: a moving average in Jordan's, torch's and NorMuon's, a sum in Dion2's.

Facts come from KellerJordan/Muon, zichongli5/NorMuon and microsoft/dion (dion2.py).
"""

import math

import torch
from torch import Tensor


def polar_by_quintics(x: Tensor) -> Tensor:
    """Five steps of the quintic iteration from X / |X|, with the Gram matrix of the shorter side."""
    y = x / (x.norm() + 1e-7)
    for _ in range(5):
        if x.shape[0] <= x.shape[1]:
            gram = y @ y.T
            y = 3.4445 * y + (-4.7750 * gram + 2.0315 * gram @ gram) @ y
        else:
            gram = y.T @ y
            y = 3.4445 * y + y @ (-4.7750 * gram + 2.0315 * gram @ gram)
    return y


class JordansMuon:
    def __init__(self, lr: float, momentum: float, decay: float, nesterov: bool = True) -> None:
        self.lr, self.momentum, self.decay, self.nesterov, self.buffer = lr, momentum, decay, nesterov, torch.zeros(())

    def ahead(self, gradient: Tensor) -> Tensor:
        self.buffer = self.buffer + (1 - self.momentum) * (gradient - self.buffer)
        return gradient + self.momentum * (self.buffer - gradient) if self.nesterov else self.buffer

    def scale(self, weight: Tensor) -> float:
        return max(1.0, weight.shape[0] / weight.shape[1]) ** 0.5

    def direction(self, gradient: Tensor) -> Tensor:
        return polar_by_quintics(self.ahead(gradient))

    def step(self, weight: Tensor, gradient: Tensor) -> Tensor:
        return weight * (1 - self.lr * self.decay) - self.lr * self.scale(weight) * self.direction(gradient)


class Moonlight(JordansMuon):
    """The update's root mean square is brought to 0.2, about that of AdamW; decay is not scaled."""

    def scale(self, weight: Tensor) -> float:
        return 0.2 * math.sqrt(max(weight.shape))


class NorMuonCode(JordansMuon):
    """Rows are divided by the root of a running mean of their squares, the whole is brought back to its norm."""

    beta2, second = 0.95, 0.0

    def direction(self, gradient: Tensor) -> Tensor:
        polar = super().direction(gradient)
        self.second = self.beta2 * self.second + (1 - self.beta2) * (polar * polar).mean(dim=1, keepdim=True)
        even = polar / (self.second.sqrt() + 1e-10)
        return even * polar.norm() / (even.norm() + 1e-10)


class Dion2Code:
    """Rows of wide matrices or columns of tall ones, those with the largest 1-norm; square ones by columns, as here."""

    def __init__(self, lr: float, momentum: float, decay: float, fraction: float) -> None:
        self.lr, self.momentum, self.decay, self.fraction, self.sum = lr, momentum, decay, fraction, torch.zeros(())

    def step(self, weight: Tensor, gradient: Tensor) -> Tensor:
        rows = weight.shape[0] < weight.shape[1]
        self.sum = self.sum + gradient
        sizes = self.sum.abs().sum(dim=1 if rows else 0)
        chosen = sizes.topk(max(1, math.ceil(self.fraction * len(sizes)))).indices.tolist()
        step = polar_by_quintics(self.sum[chosen] if rows else self.sum[:, chosen])
        weight, rate = weight * (1 - self.lr * self.decay), self.lr * math.sqrt(weight.shape[0] / weight.shape[1])
        for place, line in enumerate(chosen):
            at = line if rows else (slice(None), line)
            weight[at] -= rate * (step[place] if rows else step[:, place])
            self.sum[at] *= self.momentum
        return weight
