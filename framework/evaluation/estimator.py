"""`Estimator`: computes without training."""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any

from lightspan.core.errors import UserError
from lightspan.core.results import Result


class Estimator(ABC):
    """Computes a small result from features, weights, graphs or tables: no optimiser, no Trainer, no state.

    Settings belong to the constructor, which checks them. `fit` takes its inputs by name, keeps no state, and answers
    degenerate ones (no row, one class, constant features) with a finite result or one UserError. Every rank calls
    it and gets the same result, so it may sum over ranks (`Features.moments`).
    """

    @abstractmethod
    def fit(self, *inputs: Any, **named: Any) -> Result:
        """A subclass names and annotates what it takes: `def fit(self, bank: Features, query: Features) -> ...`."""


def require_inputs(estimator: Estimator, names: Iterable[str]) -> None:
    """Raises: UserError unless these names are the inputs that `estimator.fit` takes."""
    given, taken = set(names), inspect.signature(estimator.fit).parameters
    if any(parameter.kind == parameter.VAR_KEYWORD for parameter in taken.values()):
        return
    needed = {name for name, parameter in taken.items() if parameter.default is parameter.empty}
    wrong = [f"{name} is missing" for name in sorted(needed - given)]
    wrong += [f"{name} is not one of them" for name in sorted(given - taken.keys())]
    if wrong:
        raise UserError(
            f"{type(estimator).__name__} takes the inputs {', '.join(taken) or 'none'}: {'; '.join(wrong)}; "
            "use these names under `inputs`"
        )
