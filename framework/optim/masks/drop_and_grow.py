"""Sparse training from the first step: an index set that moves (RigL, Evci et al. 2020, arXiv 1911.11134)."""

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightspan.core.devices import wide
from lightspan.core.errors import UserError
from lightspan.optim.masks.learner import Fixed, agreed_masks, random_scores
from lightspan.subspaces.masks.allocation import PerTensorAllocation
from lightspan.subspaces.masks.index_sets import count_to_drop, drop_and_grow
from lightspan.subspaces.masks.scores import GradientMagnitude, Magnitude, Score


class DropAndGrow(Fixed):
    """Starts from a random mask; every few steps the open entries with the lowest scores close, and as many others open
    at zero. At alpha 0 the mask stays random and static.

    Scores of an update are those of the weights after a step and of the gradient that this step was taken with. RigL
    leaves that step out; here every step is taken, so that steps mean the same with and without the callback.

    Args:
        alpha: share of the open entries that is exchanged at first, falling to none by a cosine, in [0, 1].
        every: optimiser steps between two updates, >= 1.
        drop, grow: what an open entry and a closed one are worth.
    """

    def __init__(
        self, alpha: float = 0.3, every: int = 100, drop: Score | None = None, grow: Score | None = None
    ) -> None:
        super().__init__()
        if every < 1 or not 0 <= alpha <= 1:
            raise UserError(f"DropAndGrow every={every} must be at least 1, and alpha={alpha} in [0, 1]")
        self.alpha, self.every, self.drop, self.grow = alpha, every, drop or Magnitude(), grow or GradientMagnitude()

    def prepare(self, optimizer: Optimizer | None) -> None:
        if not isinstance(self.allocation, PerTensorAllocation):
            raise UserError(
                f"DropAndGrow keeps a count for each tensor, and {type(self.allocation).__name__} has none; take "
                "Uniform or ErdosRenyi of lightspan.subspaces.masks.allocation"
            )
        self.masks = self.owns(self.highest(random_scores(self.places, self.seed), self.density.at(0.0)))
        # Not in a checkpoint: gradients of a step that one lies in the middle of are pulled again when it is finished.
        self._step, self._gradients = 0, dict[str, Tensor]()

    def draw(self, step: int, progress: float) -> None:
        self._step, self._gradients = step, {}

    def pull(self, name: str, gradient_S: Tensor) -> Tensor:
        if (self._step + 1) % self.every == 0:  # dense gradients are kept for the update alone
            self._gradients[name] = gradient_S.clone()  # what is pulled goes to the memory of this one
        return super().pull(name, gradient_S)

    @torch.no_grad()
    def update(self, step: int, progress: float) -> bool:
        gradients, self._gradients = self._gradients, {}
        if step % self.every or not gradients:
            return False
        assert isinstance(self.allocation, PerTensorAllocation)
        shapes = {name: place.shape for name, place in self.places.items()}
        counts = self.allocation.counts(shapes, self.density.at(progress))
        wholes = self.wholes(self.masks)
        for name, gradient_S in gradients.items():
            place, weight_S = self.places[name], wide(self.places[name].weight)
            drop, grow = (place.whole(score.of(weight_S, gradient_S)) for score in (self.drop, self.grow))
            dropped = count_to_drop(int(wholes[name].sum()), self.alpha, progress)
            wholes[name] = drop_and_grow(wholes[name], drop, grow, dropped, counts[name])
        self.masks = self.owns(agreed_masks(wholes))
        return True

    def chosen(self, progress: float) -> dict[str, Tensor]:
        """The masks, brought to the counts of the moment: the smallest weights go, random entries come."""
        assert isinstance(self.allocation, PerTensorAllocation)
        shapes = {name: place.shape for name, place in self.places.items()}
        counts = self.allocation.counts(shapes, self.density.at(progress))
        sizes = self.wholes({name: wide(place.weight).abs() for name, place in self.places.items()})
        chance = self.wholes(random_scores(self.places, self.seed))
        return agreed_masks(
            {
                name: drop_and_grow(mask, sizes[name], chance[name], 0, counts[name])
                for name, mask in self.wholes(self.masks).items()
            }
        )
