"""Small checkpoints that tests of mergers share."""

import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lightspan.core.files.tensors import Form
from lightspan.merging.merger import Merger, merge
from lightspan.merging.weights import Weights


class InMemory(Weights):
    def __init__(self, tensors: Mapping[str, Tensor], aliases: Mapping[str, str] | None = None) -> None:
        self.tensors, self.aliases = dict(tensors), dict(aliases or {})
        self.forms = {name: Form(tuple(x.shape), x.dtype) for name, x in tensors.items()}
        self.origin, self.home = {"path": "memory", "sha256": "0"}, Path("memory")

    def read(self, name: str) -> Tensor:
        return self.tensors[name]


def net(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weights = {
        name: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        for name, shape in {"a.weight": (7, 5), "a.bias": (7,), "scale": (), "empty": (0, 3)}.items()
    }
    return {**weights, "steps": torch.tensor(seed), "on": torch.tensor([True, seed > 0])}


def merged(merger: Merger, folder: Path, **models: Mapping[str, Tensor]) -> dict[str, Tensor]:
    merge(merger, {name: InMemory(model) for name, model in models.items()}, folder / "out.safetensors")
    return load_file(folder / "out.safetensors")


class Live(TorchDispatchMode):
    """The most bytes that tensors made inside have held at a time."""

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.alive: list[weakref.ref[Tensor]] = []
        self.most = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        self.alive += [weakref.ref(out)] if isinstance(out, Tensor) else []
        storages = {}
        for reference in list(self.alive):
            if (tensor := reference()) is None:
                self.alive.remove(reference)
            else:
                storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        self.most = max(self.most, sum(size for at, size in storages.items() if at not in self.known))
        return out
