"""The models of a merge that is learned: theta_0 and what was trained from it, from files or drawn as a control."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from lightspan.core.absent import unless_missing
from lightspan.core.errors import UserError
from lightspan.core.files.places import ReadPath
from lightspan.core.files.tensors import Form
from lightspan.merging.adapted import AdaptedWeights
from lightspan.merging.merger import require_alike
from lightspan.merging.weights import Weights, is_adapter, open_weights, place_of
from lightspan.subspaces.masks.draws import uniform

BASE = "base"
"""What theta_0 is called beside the tasks."""


class Models(ABC):
    """Says what theta_0 and the theta_i of a network are.

    Attributes:
        tasks: names of the theta_i, in the order of their coefficients.
    """

    tasks: list[str]

    @abstractmethod
    def open(self, own: Weights) -> dict[str, Weights]:
        """theta_0 under `BASE`, then the theta_i by task: of the names and shapes of `own`, the network's weights.

        Raises: UserError for what is no checkpoint, or one of another network.
        """


class StoredModels(Models):
    """Checkpoints: run folders, `.ckpt`, safetensors, Hugging Face folders, and PEFT adapters of the base.

    Args:
        base: path of theta_0.
        tasks: paths of the theta_i by name.
    """

    def __init__(self, base: ReadPath, tasks: dict[str, ReadPath]) -> None:
        require_names(tasks)
        self.base, self.paths, self.tasks = base, dict(tasks), list(tasks)

    def open(self, own: Weights) -> dict[str, Weights]:
        found = dict.fromkeys((BASE, *self.paths), own)
        with unless_missing():
            found[BASE] = open_weights(self.base)
        for task, path in self.paths.items():
            with unless_missing():
                place = place_of(path)
                found[task] = AdaptedWeights(place, found[BASE]) if is_adapter(place) else open_weights(place)
        parts: dict[str, Weights] = {name: Part(weights, own.forms) for name, weights in found.items()}
        require_alike({"the network": own, **parts})
        return parts


class GaussianModels(Models):
    """theta_0 plus noise: tau ~ N(mean, std^2) with the mean and deviation of each tensor of theta_0.

    The control of aTLAS: what random directions of the same count are worth (arXiv 2407.02880, section 3.2 and its
    third footnote).

    Args:
        tasks: their names.
        base: path of theta_0; None takes the weights that the network was built with.
        seed: of the draw, a function of it, task and tensor name.
    """

    def __init__(self, tasks: list[str], base: str | None = None, seed: int = 0) -> None:
        require_names(tasks)
        self.tasks, self.base, self.seed = list(tasks), base, seed

    def open(self, own: Weights) -> dict[str, Weights]:
        base = own if self.base is None else Part(open_weights(self.base), own.forms)
        require_alike({"the network": own, BASE: base})
        return {BASE: base} | {task: _Noisy(base, self.seed, task) for task in self.tasks}


class BlankModels(Models):
    """The network's own weights under every name, so that no task changes anything: to plan or time a run whose
    checkpoints are not at hand.

    Args:
        tasks: their names.
    """

    def __init__(self, tasks: list[str]) -> None:
        require_names(tasks)
        self.tasks = list(tasks)

    def open(self, own: Weights) -> dict[str, Weights]:
        return dict.fromkeys((BASE, *self.tasks), own)


class Part(Weights):
    """Some tensors of a checkpoint, those of these names that it has."""

    def __init__(self, whole: Weights, names: Mapping[str, Form]) -> None:
        self._whole = whole
        self.forms = {name: whole.forms[name] for name in names if name in whole.forms}
        self.aliases = {n: kept for n, kept in whole.aliases.items() if n in self.forms and kept in self.forms}
        self.origin, self.home = whole.origin, whole.home

    def read(self, name: str) -> Tensor:
        return self._whole.read(name)


class Renamed(Weights):
    """The tensors of a checkpoint whose names begin with some text, without it; the others keep their names."""

    def __init__(self, whole: Weights, beginning: str) -> None:
        self._whole = whole
        self._names = {name.removeprefix(beginning): name for name in whole.forms}
        self.forms = {short: whole.forms[name] for short, name in self._names.items()}
        self.aliases = {n.removeprefix(beginning): k.removeprefix(beginning) for n, k in whole.aliases.items()}
        self.origin, self.home = whole.origin, whole.home

    def read(self, name: str) -> Tensor:
        return self._whole.read(self._names[name])


def renamed_alike(one: Weights, other: Weights) -> tuple[Weights, Weights]:
    """Both as they are, or, where they share no name, one without the beginning of its names that makes most of them
    equal: a run has its network as `backbone.`, a folder of Hugging Face the same one without.
    """
    if one.forms.keys() & other.forms.keys():
        return one, other
    found: tuple[int, str, bool] = (0, "", True)
    for longer, shorter, is_other in ((other, one, True), (one, other, False)):
        first = next(iter(shorter.forms), "")
        for name in longer.forms:
            if first and name.endswith(f".{first}"):
                beginning = name.removesuffix(first)
                shared = sum(beginning + short in longer.forms for short in shorter.forms)
                found = max(found, (shared, beginning, is_other))
    _, beginning, is_other = found
    if not beginning:
        return one, other
    return (one, Renamed(other, beginning)) if is_other else (Renamed(one, beginning), other)


class Held(Weights):
    """Tensors in memory.

    Args:
        tensors: by name; those that share memory may each be given.
        path: what they are called.
    """

    def __init__(self, tensors: Mapping[str, Tensor], path: ReadPath) -> None:
        self._tensors = dict(tensors)
        self.forms = {name: Form(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
        self.aliases, self.origin, self.home = {}, {"path": path, "sha256": ""}, Path(path)

    def read(self, name: str) -> Tensor:
        return self._tensors[name]


class _Noisy(Weights):
    def __init__(self, base: Weights, seed: int, task: str) -> None:
        self._base, self._seed, self._task = base, seed, task
        self.forms, self.aliases, self.home = base.forms, base.aliases, base.home
        self.origin = {"path": f"noise {seed} on {base.origin['path']}", "sha256": base.origin["sha256"]}

    def read(self, name: str) -> Tensor:
        base = self._base.read(name)
        if not base.is_floating_point() or not base.numel():
            return base
        drawn = torch.special.ndtri(uniform(self._seed, 0, f"{self._task}/{name}", base.shape, dtype=torch.float64))
        wide = base.double()
        return wide + wide.mean() + wide.std(correction=0) * drawn


def require_names(tasks: Mapping[str, str] | list[str]) -> None:
    """Raises: UserError for no task, two of one name, or a name that a module cannot have."""
    names = list(tasks)
    if not names or len(set(names)) < len(names) or any("." in name or not name or name == BASE for name in names):
        raise UserError(
            f"tasks are named {', '.join(names) or 'nothing'}; give one or more names, each once, without a dot and "
            f"other than {BASE!r}"
        )
