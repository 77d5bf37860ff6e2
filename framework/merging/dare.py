"""DARE: entries of the task vectors are dropped at random, and the others scaled up so that the mean stays.

Source: Yu, Yu, Yu, Huang, Li, "Language Models are Super Mario: Absorbing Abilities from Homologous Models as a Free
Lunch", ICML 2024, arXiv 2311.03099, its section 3. With m ~ Bernoulli(p), for each entry and task,

    tau~ = (1 - m) tau / (1 - p)

`TaskArithmetic(Dropped(...))` merges these as sums, `Ties(coefficients=Dropped(...), density=1)` by election. What is
dropped is a function of seed, task and tensor name: neither the order of tensors nor that of tasks changes it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightspan.core.errors import UserError
from lightspan.core.files.tensors import Form
from lightspan.merging.arithmetic import Coefficients, Scales
from lightspan.subspaces.masks.draws import uniform


class Dropped(Coefficients):
    """Coefficients of single entries: 0 for what is dropped, those of `coefficients` over 1 - rate elsewhere.

    Args:
        rate: p, the share that is dropped, in [0, 1).
        coefficients: of the task vectors; None is `Scales()`.
        seed: of the draw.
    """

    def __init__(self, rate: float = 0.9, coefficients: Coefficients | None = None, seed: int = 0) -> None:
        if not 0 <= rate < 1:
            raise UserError(f"Dropped rate={rate} must be at least 0 and below 1; 0.9 keeps a tenth of the entries")
        self.rate, self.coefficients, self.seed = rate, coefficients or Scales(), seed

    def numbers_of(self, tasks: Sequence[str]) -> dict[str, float]:
        return self.coefficients.numbers_of(tasks)

    def of(self, name: str, form: Form, tasks: Sequence[str]) -> Tensor:
        c = self.coefficients.of(name, form, tasks)
        kept = torch.stack([uniform(self.seed, 0, f"{task}/{name}", form.shape) >= self.rate for task in tasks])
        return c.reshape(*c.shape, *(1,) * (kept.ndim - c.ndim)) * kept / (1 - self.rate)
