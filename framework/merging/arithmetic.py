"""Averages and sums of models. Negation and analogy are sums too: coefficients below 0, see `Scales`.

Sources: Wortsman et al., "Model soups", 2022, arXiv 2203.05482 (averages); Ilharco et al., "Editing Models with Task
Arithmetic", 2022, arXiv 2212.04089 (sums of task vectors).
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property

import torch
from torch import Tensor

from lightspan.core.errors import UserError
from lightspan.core.files.places import ReadPath
from lightspan.core.files.tensors import Form
from lightspan.merging.merger import Merger
from lightspan.merging.span import in_span_as
from lightspan.merging.weights import Weights, open_weights, real_finite


class WeightedAverage(Merger):
    """The weighted mean of models. The mean of equal models is that model, bit for bit; the first checkpoint leads.

    Args:
        weights: of each checkpoint by name, >= 0; normalised to a sum of 1. None weights all equally.
    """

    def __init__(self, weights: dict[str, float] | None = None) -> None:
        values = list((weights or {}).values())
        if weights is not None and not (all(0 <= w < math.inf for w in values) and sum(values) > 0):
            raise UserError(f"WeightedAverage weights={weights} must be 0 or more, and one of them above 0")
        self.weights = weights

    def leading(self, names: Sequence[str]) -> str:
        if not names:
            raise UserError("WeightedAverage got no checkpoint; name some under `checkpoints`")
        if self.weights is not None and set(self.weights) != set(names):
            raise UserError(f"WeightedAverage weighs {', '.join(self.weights)}; the checkpoints are {', '.join(names)}")
        return names[0]

    def numbers_of(self, names: Sequence[str]) -> dict[str, float]:
        weights = {name: 1.0 if self.weights is None else self.weights[name] for name in names}
        return {name: weight / sum(weights.values()) for name, weight in weights.items()}

    def tensor(self, name: str, form: Form, weights: Mapping[str, Tensor]) -> Tensor:
        shares = torch.tensor([1.0 if self.weights is None else self.weights[n] for n in weights], dtype=torch.float64)
        models = list(weights.values())
        return in_span_as(form.dtype, models[0], models, shares / shares.sum())


class Coefficients(ABC):
    """How much of each task vector goes into a tensor."""

    @abstractmethod
    def of(self, name: str, form: Form, tasks: Sequence[str]) -> Tensor:
        """[K], or [K *shape] for one per entry, float64; one for each task, in the order of the tasks.

        Raises: UserError for a task that has none.
        """

    def numbers_of(self, tasks: Sequence[str]) -> dict[str, float]:
        """See `Merger.numbers_of`."""
        return {}


class Scales(Coefficients):
    """One number a task, the same for all tensors. Below 0 it unlearns the task; with a: -1, b: 1, c: 1 what makes b of
    a is done to c (section 3 of the paper).

    Args:
        scale: of every task.
        of_tasks: what takes the place of `scale` for single tasks, by name.
    """

    def __init__(self, scale: float = 0.3, of_tasks: dict[str, float] | None = None) -> None:
        for value in (scale, *(of_tasks or {}).values()):
            if not math.isfinite(value):
                raise UserError(f"Scales: {value} must be a finite number")
        self.scale, self.of_tasks = scale, of_tasks or {}

    def of(self, name: str, form: Form, tasks: Sequence[str]) -> Tensor:
        if strange := self.of_tasks.keys() - set(tasks):
            raise UserError(f"Scales names an unknown task {min(strange)}; the tasks are {', '.join(tasks)}")
        return torch.tensor(list(self.numbers_of(tasks).values()), dtype=torch.float64)

    def numbers_of(self, tasks: Sequence[str]) -> dict[str, float]:
        return {task: self.of_tasks.get(task, self.scale) for task in tasks}


class StoredCoefficients(Coefficients):
    """Learned coefficients: a safetensors file with one [K] or [K *shape] per tensor, by the tensor's name.

    Args:
        path: of the file.
        tasks: the task of each row.
    """

    def __init__(self, path: ReadPath, tasks: list[str]) -> None:
        self.path, self.tasks = path, tasks

    @cached_property
    def _file(self) -> Weights:
        return open_weights(self.path)

    def of(self, name: str, form: Form, tasks: Sequence[str]) -> Tensor:
        stored = _stored(self._file, name, "coefficient")
        if sorted(tasks) != sorted(self.tasks) or stored.shape not in ((len(tasks),), (len(tasks), *form.shape)):
            raise UserError(
                f"{self.path}: {name} has coefficients {list(stored.shape)} of the tasks {', '.join(self.tasks)}, for "
                f"the tasks {', '.join(tasks)} of a tensor {list(form.shape)}"
            )
        return stored.double()[[self.tasks.index(task) for task in tasks]]


class Mask(ABC):
    """Which entries of a tensor change, and how much."""

    @abstractmethod
    def of(self, name: str, form: Form) -> Tensor:
        """A factor that broadcasts to the tensor's shape."""


class StoredMask(Mask):
    """A mask from a safetensors file, by the tensors' names.

    Args:
        path: of the file.
    """

    def __init__(self, path: ReadPath) -> None:
        self.path = path

    @cached_property
    def _file(self) -> Weights:
        return open_weights(self.path)

    def of(self, name: str, form: Form) -> Tensor:
        stored = _stored(self._file, name, "mask")
        if stored.shape != form.shape:
            raise UserError(f"{self.path}: the mask of {name} is {list(stored.shape)}, the tensor {list(form.shape)}")
        return stored.double()


class TaskArithmetic(Merger):
    """The base, plus each task's change of it times a coefficient, perhaps through a mask. The base leads.

    Args:
        coefficients: of the task vectors; None takes `Scales()`.
        mask: None changes every entry.
        base: name of the checkpoint that the tasks were trained from; all others are tasks.
    """

    base: str

    def __init__(self, coefficients: Coefficients | None = None, mask: Mask | None = None, base: str = "base") -> None:
        self.coefficients, self.mask, self.base = coefficients or Scales(), mask, base

    def leading(self, names: Sequence[str]) -> str:
        return require_base("TaskArithmetic", self.base, names)

    def numbers_of(self, names: Sequence[str]) -> dict[str, float]:
        return self.coefficients.numbers_of([name for name in names if name != self.base])

    def tensor(self, name: str, form: Form, weights: Mapping[str, Tensor]) -> Tensor:
        tasks = [task for task in weights if task != self.base]
        coefficients = self.coefficients.of(name, form, tasks)
        mask = None if self.mask is None else self.mask.of(name, form)
        return in_span_as(form.dtype, weights[self.base], [weights[task] for task in tasks], coefficients, mask)


def require_base(merger: str, base: str, names: Sequence[str]) -> str:
    """The base itself. Raises: UserError unless it is among the checkpoints, beside a task."""
    if base not in names or len(names) < 2:
        raise UserError(
            f"{merger} needs the checkpoint {base!r} that the tasks were trained from, and a task; got "
            f"{', '.join(names) or 'none'}: name them under `checkpoints`, or set base"
        )
    return base


def _stored(weights: Weights, name: str, what: str) -> Tensor:
    if name not in weights.forms:
        raise UserError(
            f"{weights.origin['path']} has no {what} of {name}; it has {', '.join(list(weights.forms)[:5])}"
        )
    return real_finite(weights, name, what)
