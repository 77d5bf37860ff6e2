"""The optimisers, looked up once for all tests: a new one is in here."""

import importlib
import inspect
import pkgutil
from types import ModuleType

from torch.optim import Optimizer

from lightspan import optim
from lightspan.optim import low_rank, matrices, muon
from lightspan.optim.low_rank import presets
from lightspan.optim.matrices.matrix_optimizer import MatrixOptimizer


def optimizers() -> dict[str, type[Optimizer]]:
    """Every optimiser that a module of `lightspan.optim` defines, by name."""
    found: dict[str, type[Optimizer]] = {}
    for package in (optim, low_rank, matrices):
        for info in pkgutil.iter_modules(package.__path__):
            found |= defined_in(importlib.import_module(f"{package.__name__}.{info.name}"))
    return found


def defined_in(module: ModuleType) -> dict[str, type[Optimizer]]:
    """The optimisers that a module defines and that can be built, by name."""
    kinds = {name: kind for name, kind in vars(module).items() if inspect.isclass(kind) and issubclass(kind, Optimizer)}
    return {
        name: kind
        for name, kind in kinds.items()
        if kind.__module__ == module.__name__ and not inspect.isabstract(kind)
    }


WHOLE: list[type[MatrixOptimizer]] = [*defined_in(muon).values()]
"""Those of whole matrices, which have no rank."""
PRESETS: list[type[MatrixOptimizer]] = [*defined_in(presets).values(), *WHOLE]


def of_rank(kind: type[Optimizer], rank: int) -> dict[str, int]:
    """The argument that gives an optimiser this rank, if it can have it."""
    return {} if kind in (*WHOLE, presets.APOLLOMini) else {"rank": rank}
