"""Which class each sample of a batch is paired with: a function of (seed, step) over the rows of all ranks.

Source: Wu et al., "Rethinking Positive Pairs in Contrastive Learning" (Hydra), 2024, arXiv 2410.18200: arbitrary,
identical and distinct pairs, and pairs weighted by a distance of classes.
Shapes: N rows of all ranks, C classes. Draws come from numpy on the CPU: ranks, devices and resumed runs agree.
"""

from abc import ABC, abstractmethod

import numpy as np
import torch
from torch import Tensor

from lightspan.core.devices import widest_float
from lightspan.core.errors import UserError
from lightspan.core.files.arrays import read_array
from lightspan.core.files.atomic import expanded
from lightspan.core.ranges import require_in
from lightspan.nn.labels import require_labels


class ClassPairs(ABC):
    """Maps the classes of a batch to those of their partners, int64 [N] -> [N].

    Args:
        seed: of the draws, >= 0.
    """

    def __init__(self, seed: int = 0) -> None:
        require_in("[0, inf)", seed=seed)
        self.seed = seed

    def partners(self, label_N: Tensor, step: int, micro_batch: int = 0) -> Tensor:
        """The partners of a batch, the same wherever they are drawn.

        Args:
            label_N: the rows of all ranks, in their order.
            step: optimiser steps done.
            micro_batch: number of the batch among those of the step or the epoch, which draws anew.
        """
        return self.draw(label_N, np.random.default_rng((self.seed, step, micro_batch)))

    @abstractmethod
    def draw(self, label_N: Tensor, generator: np.random.Generator) -> Tensor: ...


class Identical(ClassPairs):
    """Each class with itself: supervised contrast."""

    def draw(self, label_N: Tensor, generator: np.random.Generator) -> Tensor:
        return label_N


class Arbitrary(ClassPairs):
    """A random permutation of the batch: any class with any other, or with itself, and each partner is in the batch."""

    def draw(self, label_N: Tensor, generator: np.random.Generator) -> Tensor:
        return label_N[torch.from_numpy(generator.permutation(len(label_N))).to(label_N.device)]


class Distinct(ClassPairs):
    """Another class, uniform over all others, whether the batch has it or not. Each row has a shift of its own.

    Args:
        num_classes: C, >= 2; labels are in [0, C).
        seed: as in `ClassPairs`.
    """

    def __init__(self, num_classes: int, seed: int = 0) -> None:
        super().__init__(seed)
        require_in("[2, inf)", num_classes=num_classes)
        self.num_classes = num_classes

    def draw(self, label_N: Tensor, generator: np.random.Generator) -> Tensor:
        require_labels(label_N, self.num_classes, self)
        shift_N = torch.from_numpy(generator.integers(1, self.num_classes, len(label_N))).to(label_N.device)
        return (label_N + shift_N) % self.num_classes


class ByDistance(ClassPairs):
    """The class of a row of the batch, drawn with weight 1 / (1 + d)^alpha, d the distance of both classes.

    The paper weighs pairs by their distance in WordNet and does not say over what they are normalised; here over the
    rows of the batch, so that every partner is in it. alpha = 0 makes all rows equal.

    Args:
        distances: [C C], >= 0; or a .npy file with them.
        alpha: >= 0; the larger it is, the nearer the pairs.
        seed: as in `ClassPairs`.
    """

    def __init__(self, distances: str | list[list[float]], alpha: float = 1.0, seed: int = 0) -> None:
        super().__init__(seed)
        require_in("[0, inf)", alpha=alpha)
        self.weight_CC = torch.from_numpy((1 + _table(distances)) ** -alpha)

    def draw(self, label_N: Tensor, generator: np.random.Generator) -> Tensor:
        require_labels(label_N, len(self.weight_CC), self)
        weight_CC = self.weight_CC.to(label_N.device, widest_float(label_N.device))
        cumulative_NN = weight_CC[label_N][:, label_N].cumsum(dim=1)
        if not len(label_N):
            return label_N
        at_N1 = torch.from_numpy(generator.random((len(label_N), 1))).to(cumulative_NN) * cumulative_NN[:, -1:]
        # A draw may be rounded to the end of its row.
        chosen_N1 = torch.searchsorted(cumulative_NN, at_N1, right=True).clamp_max(len(label_N) - 1)
        return label_N[chosen_N1[:, 0]]


def _table(distances: str | list[list[float]]) -> np.ndarray:
    """Raises: UserError for what is no square table of numbers >= 0."""
    try:
        if isinstance(distances, str):
            source = str(file := expanded(distances, "distances"))
            table = read_array(file)
        else:
            source, table = "distances", np.asarray(distances)
        table = table.astype(np.float64)
    except ValueError as error:
        raise UserError(f"distances={distances!r:.80} cannot be read as a table of numbers: {error}") from error
    if table.ndim != 2 or table.shape[0] != table.shape[1] or not len(table) or not (table >= 0).all():
        raise UserError(
            f"{source} is a table of shape {list(table.shape)}; it must have a row and a column for each class, of "
            "numbers from 0 up"
        )
    return table
