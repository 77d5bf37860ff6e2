"""TIES: task vectors trimmed to their largest entries, a sign elected for each entry, and the mean of those that agree.

Source: Yadav, Tam, Choshen, Raffel, Bansal, "TIES-Merging: Resolving Interference When Merging Models", NeurIPS 2023,
arXiv 2306.01708, algorithm 1. With tau_i = c_i (theta_i - theta_0):

    trim    tau^_i keeps the k % largest magnitudes of tau_i, over the whole model, and 0 elsewhere
    elect   gamma = sgn(sum_i tau^_i), for each entry
    merge   tau_m = mean of the tau^_i that have the sign gamma;   theta = theta_0 + scale tau_m

Magnitudes are compared in float32, and all that equal the smallest kept one are kept. Where the trimmed vectors cancel
exactly nobody is elected, and the entry stays the base's; the authors' code gives it the sign that most entries have.
mergekit trims tensor by tensor: `scope="tensor"`.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Literal, Self

import torch
from torch import Tensor

from lightspan.core.errors import UserError
from lightspan.core.files.tensors import Form
from lightspan.merging.arithmetic import Coefficients, Scales, require_base
from lightspan.merging.merger import Merger
from lightspan.merging.span import CHUNK, difference, in_pieces
from lightspan.merging.weights import Weights


class Ties(Merger):
    """The base, plus the mean of what tasks that agree on a direction changed of it. The base leads.

    Args:
        density: share of each task vector's entries that is kept, in (0, 1].
        scale: of the merged vector; the paper takes 1, or a value tuned on validation data.
        coefficients: of the task vectors before they are trimmed; None is 1. `lightspan.merging.dare.Dropped` at
            density 1 makes it DARE with TIES' election.
        scope: what a density is of: the whole "model", or each "tensor".
        base: name of the checkpoint that the tasks were trained from; all others are tasks.
    """

    base: str

    def __init__(
        self,
        density: float = 0.2,
        scale: float = 1.0,
        coefficients: Coefficients | None = None,
        scope: Literal["model", "tensor"] = "model",
        base: str = "base",
    ) -> None:
        if not 0 < density <= 1:
            raise UserError(f"Ties density={density} must be above 0 and at most 1; 0.2 keeps a fifth of the entries")
        if not math.isfinite(scale):
            raise UserError(f"Ties scale={scale} must be a finite number")
        if scope not in ("model", "tensor"):
            raise UserError(f"Ties scope={scope!r} must be model or tensor")
        self.density, self.scale, self.coefficients = density, scale, coefficients or Scales(1.0)
        self.scope, self.base = scope, base
        self._least: dict[str, float] = {}

    def leading(self, names: Sequence[str]) -> str:
        return require_base("Ties", self.base, names)

    def numbers_of(self, names: Sequence[str]) -> dict[str, float]:
        return self.coefficients.numbers_of([name for name in names if name != self.base])

    def prepared(self, checkpoints: Mapping[str, Weights], forms: Mapping[str, Form]) -> Self:
        """Finds for each task the least magnitude that is kept, in two passes over the files."""
        if wrong := [name for name, form in forms.items() if form.dtype.is_complex]:
            raise UserError(f"Ties: {wrong[0]} is complex, and complex numbers have no sign to elect")
        if self.scope == "tensor":
            return self
        tasks = [task for task in checkpoints if task != self.base]
        ready = type(self)(self.density, self.scale, self.coefficients, self.scope, self.base)
        for i, task in enumerate(tasks):

            def magnitudes(i: int = i, task: str = task) -> Iterator[Tensor]:
                for name, form in forms.items():
                    base_S, model_S = checkpoints[self.base].read(name), checkpoints[task].read(name)
                    c = self.coefficients.of(name, form, tasks)[i]
                    yield from _magnitudes(base_S, model_S, c)

            ready._least[task] = least_kept(magnitudes, sum(form.numbers for form in forms.values()), self.density)
        return ready

    def tensor(self, name: str, form: Form, weights: Mapping[str, Tensor]) -> Tensor:
        base_S, models_S = weights[self.base], {n: w for n, w in weights.items() if n != self.base}
        c = self.coefficients.of(name, form, list(models_S))
        entries = [c_i.expand(form.shape) for c_i in c]
        least = [
            self._least[task] if self.scope == "model" else self._least_of(base_S, model_S, c_S)
            for (task, model_S), c_S in zip(models_S.items(), c, strict=True)
        ]

        def piece(base: Tensor, *others: Tensor) -> Tensor:
            base = base.double()
            models, shares = others[: len(least)], others[len(least) :]
            taus = [share * difference(m.double(), base) for m, share in zip(models, shares, strict=True)]
            return base + self.scale * elected_mean([trim(tau, at) for tau, at in zip(taus, least, strict=True)])

        return in_pieces(form.dtype, piece, base_S, *models_S.values(), *entries)

    def _least_of(self, base_S: Tensor, model_S: Tensor, c: Tensor) -> float:
        return least_kept(lambda: _magnitudes(base_S, model_S, c), base_S.numel(), self.density)


def trim(tau_S: Tensor, least: float) -> Tensor:
    """The entries of at least this magnitude, compared in float32; 0 elsewhere."""
    return torch.where(tau_S.float().abs() >= least, tau_S, 0)


def elected_mean(trimmed_S: Sequence[Tensor]) -> Tensor:
    """The mean of what has the sign of the sum; 0 where that is 0."""
    gamma_S = torch.stack(list(trimmed_S)).sum(dim=0).sign()
    agreeing = [torch.where(tau_S.sign() == gamma_S, tau_S, 0) for tau_S in trimmed_S]
    count_S = torch.stack([tau_S != 0 for tau_S in agreeing]).sum(dim=0)
    return torch.stack(agreeing).sum(dim=0) / count_S.clamp_min(1)


def least_kept(passes: Callable[[], Iterable[Tensor]], numbers: int, density: float) -> float:
    """The n-th largest of magnitudes that are too many to hold, n = density * numbers rounded down and at least 1.

    Exact, from the bits: those of non-negative floats are in the order of the numbers. A first pass counts their upper
    16 bits, a second the lower ones where the upper are those of the wanted number.

    Args:
        passes: gives the same flat float32 pieces at each call.
    """
    if not numbers:
        return 0.0
    n = max(1, int(density * numbers))
    upper, n = _from_top(passes, n, lambda bits: bits >> 16)
    lower, _ = _from_top(passes, n, lambda bits: bits[bits >> 16 == upper] & 0xFFFF)
    return float(torch.tensor((upper << 16) | lower, dtype=torch.int32).view(torch.float32))


def _from_top(passes: Callable[[], Iterable[Tensor]], n: int, key: Callable[[Tensor], Tensor]) -> tuple[int, int]:
    """(the largest key that n numbers reach, how many of these have that key)."""
    counts = torch.zeros(2**16, dtype=torch.int64)
    for piece in passes():
        counts += torch.bincount(key(piece.view(torch.int32)), minlength=2**16)
    reached = counts.flip(0).cumsum(0)
    at = int((reached >= n).int().argmax())
    found = len(counts) - 1 - at
    return found, n - int(reached[at] - counts[found])


def _magnitudes(base_S: Tensor, model_S: Tensor, c: Tensor) -> Iterator[Tensor]:
    """|c tau| in float32, flat, in pieces."""
    flat = (base_S.reshape(-1), model_S.reshape(-1), c.expand(base_S.shape).reshape(-1))
    for base, model, share in zip(*(x.split(CHUNK) for x in flat), strict=True):
        yield (share * difference(model.double(), base.double())).float().abs()
