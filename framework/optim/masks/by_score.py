"""Masks of the entries with the highest scores, chosen anew every few steps at the density of the moment."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightspan.core.devices import wide
from lightspan.core.errors import UserError
from lightspan.optim.masks.learner import Fixed
from lightspan.subspaces.masks.scores import Magnitude, Score


class ByScore(Fixed):
    """Gradual pruning: magnitude with a cubic density is Zhu and Gupta 2017 (arXiv 1710.01878), `Movement` with a
    memory of 1 is Sanh et al. 2020 (arXiv 2005.07683).

    Scores are S <- memory S + score(weight, gradient), with the gradient of the weight in use (straight through the
    mask). With a memory the weight is the one that the gradient was taken at, as in Sanh et al.'s equation 3. Without
    one it is the weight after the step, so that masks keep what is worth most at the moment they are chosen.
    Closed weights get no gradient and keep their values, but for a weight decay, and open with them again. Before the
    first gradient entries rank by magnitude.

    Args:
        score: what an entry is worth.
        memory: 0 for the score of the moment, 1 for the sum over all steps, in [0, 1].
        every: optimiser steps between two choices, >= 1.
    """

    sparse = False
    kept = ("masks", "scores")

    def __init__(self, score: Score | None = None, memory: float = 0.0, every: int = 100) -> None:
        super().__init__()
        if every < 1 or not 0 <= memory <= 1:
            raise UserError(f"ByScore every={every} must be at least 1, and memory={memory} in [0, 1]")
        self.score, self.memory, self.every = score or Magnitude(), memory, every

    def prepare(self, optimizer: Optimizer | None) -> None:
        self.scores = {name: wide(place.weight).abs() for name, place in self.places.items()}
        self.masks = self.owns(self.highest(self.scores, self.density.at(0.0)))
        self._scored, self._gradients, self._added = set[str](), dict[str, Tensor](), dict[str, Tensor]()

    def draw(self, step: int, progress: float) -> None:
        self._gradients, self._added = {}, {}

    @torch.no_grad()
    def pull(self, name: str, gradient_S: Tensor) -> Tensor:
        if self.memory:
            # A copy: a score may be the weight or the gradient itself, and both are written to before `update`.
            self._added[name] = self.score.of(wide(self.places[name].weight), gradient_S).clone()
        else:
            self._gradients[name] = gradient_S.clone()  # what is pulled goes to the memory of this one
        return super().pull(name, gradient_S)

    @torch.no_grad()
    def update(self, step: int, progress: float) -> bool:
        gradients, self._gradients = self._gradients, {}
        for name, gradient_S in gradients.items():
            self.scores[name] = self.score.of(wide(self.places[name].weight), gradient_S)
        for name, score_S in self._added.items():  # here, so that a step that is not taken does not count
            self.scores[name] = self.memory * self.scores[name] + score_S if name in self._scored else score_S
            self._scored.add(name)
        if step % self.every:
            return False
        self.masks = self.owns(self.chosen(progress))
        return True

    def chosen(self, progress: float) -> dict[str, Tensor]:
        return self.highest(self.scores, self.density.at(progress))

    def state_dict(self) -> dict[str, Any]:
        scored = {name: name in self._scored for name in self.places}
        return {**super().state_dict(), "scored": scored}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        scored = state.get("scored")
        if not isinstance(scored, Mapping):  # an earlier checkpoint has one answer for all
            scored = dict.fromkeys(self.places, scored)
        self._scored = {name for name in self.places if scored.get(name)}
