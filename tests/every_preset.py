"""The optimisers, looked up once for all tests: a new one is in here."""

import importlib
import inspect
import pkgutil

from torch.optim import Optimizer

from lightspan import optim
from lightspan.optim import presets
from lightspan.optim.low_rank import LowRank

PRESETS: list[type[LowRank]] = [
    kind for kind in vars(presets).values() if isinstance(kind, type) and kind.__module__ == presets.__name__
]


def optimizers() -> dict[str, type[Optimizer]]:
    """Every optimiser that a module of `lightspan.optim` defines, by name."""
    found: dict[str, type[Optimizer]] = {}
    for info in pkgutil.iter_modules(optim.__path__):
        module = importlib.import_module(f"lightspan.optim.{info.name}")
        for name, kind in vars(module).items():
            if inspect.isclass(kind) and issubclass(kind, Optimizer) and kind.__module__ == module.__name__:
                found[name] = kind
    return found
