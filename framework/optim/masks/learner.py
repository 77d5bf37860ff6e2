"""`MaskLearner`: how masks of parameters come about while a network trains. What each of them does is in its own file.

A training step asks a learner five things, in this order: `draw` the masks of the step, give a `factor` for each
weight, `pull` the gradient of the weight in use back to the weight, take note of a step with `update`, and say which
entries it would keep (`chosen`). Everything is about what this rank holds of a parameter, unless it says whole.

A learner of one's own writes `prepare`, `factor`, `update` and `chosen`, and names in `kept` what a checkpoint holds;
docs/masks.md shows one. The other methods are for masks that are soft, drawn or kept in another form.

Shapes: S, what this rank holds of a parameter.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightspan.core.distributed import broadcast_first_rank, world_size
from lightspan.core.errors import UserError
from lightspan.core.sharded import ranks_of, total_over
from lightspan.optim.masks.place import Place
from lightspan.subspaces.masks.allocation import Allocation
from lightspan.subspaces.masks.maps import SoftMask
from lightspan.subspaces.masks.schedules import Schedule


class MaskLearner(ABC):
    """Begins with `begin`; until then it holds settings alone.

    Attributes:
        sparse: whether weights outside the mask are zero, so that the weights are the masked ones. Otherwise they keep
            their values, and come back with them.
        kept: names of the attributes that a run goes on from, each a mapping of one tensor [S] for each parameter.
        places: what this rank holds of each parameter, by name.
        allocation, density, seed: the settings of `MaskLearning`.
    """

    sparse = False
    kept: tuple[str, ...] = ()
    places: Mapping[str, Place]
    allocation: Allocation
    density: Schedule
    seed: int

    def begin(
        self,
        places: Mapping[str, Place],
        allocation: Allocation,
        density: Schedule,
        seed: int,
        optimizer: Optimizer | None = None,
    ) -> None:
        """Takes over what a run gives. `optimizer` is that of the weights; None for a network that does not train."""
        self.places, self.allocation, self.density, self.seed = places, allocation, density, seed
        self.prepare(optimizer)

    @abstractmethod
    def prepare(self, optimizer: Optimizer | None) -> None:
        """Makes the first masks, from the weights as they are and the seed. All ranks call it."""

    def draw(self, step: int, progress: float) -> None:  # noqa: B027 - optional
        """Makes the masks of an optimiser step, counted from 0; `progress` is the share of the time for learning."""

    @abstractmethod
    def factor(self, name: str) -> Tensor:
        """The mask [S] of the step, bool or in [0, 1]."""

    def mean_factor(self, name: str) -> Tensor:
        """The mask [S] to test the network with; that of the step, unless it is up to chance."""
        return self.factor(name)

    def pull(self, name: str, gradient_S: Tensor) -> Tensor:
        """The gradient at the weight, from that at the weight in use, weight times factor; in float32 or wider. It must
        not keep `gradient_S`, whose memory is written to afterwards.
        """
        return SoftMask(self.factor(name)).pull(gradient_S)

    @abstractmethod
    def update(self, step: int, progress: float) -> bool:
        """After an optimiser step, of which `step` are done now. Says whether index sets changed."""

    @abstractmethod
    def chosen(self, progress: float) -> dict[str, Tensor]:
        """Whole masks, bool: what stays open if the mask is fixed now. All ranks must call it; `highest` gives them."""

    def opened(self) -> dict[str, Tensor]:
        """The masks [S], bool, of what is open now: more often than not, where that is up to chance."""
        return {name: self.mean_factor(name) > 0.5 for name in self.places}

    def open_counts(self) -> dict[str, float]:
        """Open entries of each whole parameter, or how many are to be expected. All ranks must call it."""
        return self.totals(self.opened())

    def figures(self, progress: float) -> dict[str, float]:
        """What else is worth a curve."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Plain whole tensors on the CPU, the same on any number of ranks. All ranks must call it."""
        return {key: on_cpu(self.wholes(getattr(self, key))) for key in self.kept}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse, after `begin`. Raises: UserError for the state of other masks."""
        for key in self.kept:
            setattr(self, key, self.saved(state, key))

    def load_masks(self, state: Mapping[str, Any]) -> None:
        """What `mean_factor` needs of a saved state, for a network that does not train. Raises: UserError as above."""
        self.load_state_dict(state)

    def totals(self, parts: Mapping[str, Tensor]) -> dict[str, float]:
        """Sums over whole tensors. All ranks must call it."""
        return {
            name: float(total_over([(ranks_of(self.places[name].parameter), part)])) for name, part in parts.items()
        }

    def wholes(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Whole tensors from the parts of all ranks."""
        return {name: self.places[name].whole(part) for name, part in parts.items()}

    def owns(self, wholes: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """This rank's parts, in memory of their own."""
        return {name: self.places[name].own(whole).clone() for name, whole in wholes.items()}

    def highest(self, scores: Mapping[str, Tensor], density: float) -> dict[str, Tensor]:
        """Whole masks of the highest scores, which are given in parts; the same bits on every rank."""
        return agreed_masks(self.allocation.choose(self.wholes(scores), density))

    def saved(self, state: Mapping[str, Any], key: str) -> dict[str, Tensor]:
        """This rank's parts of an entry of a saved state that holds one whole tensor a parameter. Raises: UserError."""
        entry = state.get(key)
        shapes = {name: tuple(part.shape) for name, part in entry.items()} if isinstance(entry, Mapping) else {}
        wanted = {name: tuple(place.shape) for name, place in self.places.items()}
        if shapes != wanted:
            wrong = next((name for name in wanted if shapes.get(name) != wanted[name]), next(iter(shapes), "none"))
            raise UserError(
                f"the saved masks have {key} of shape {shapes.get(wrong, 'none')} for {wrong}, this run has "
                f"{wanted.get(wrong, 'no mask of it')}; resume with the match and the mask of MaskLearning of that run"
            )
        assert isinstance(entry, Mapping)
        return self.owns(entry)


class Fixed(MaskLearner):
    """Masks that do not change any more. Whole masks are given at the start, or by a saved state."""

    sparse = True
    kept: tuple[str, ...] = ("masks",)

    def __init__(self, masks: Mapping[str, Tensor] | None = None) -> None:
        self._given = masks or {}

    def prepare(self, optimizer: Optimizer | None) -> None:
        self.masks = self.owns(self._given)
        self._given = {}

    def factor(self, name: str) -> Tensor:
        return self.masks[name]

    def update(self, step: int, progress: float) -> bool:
        return False

    def chosen(self, progress: float) -> dict[str, Tensor]:
        return self.wholes(self.masks)

    def opened(self) -> dict[str, Tensor]:
        return self.masks


def agreed_masks(masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The first rank's masks on every rank: replicas may round a score differently, and choose another entry."""
    if world_size() > 1:
        broadcast_first_rank(list(masks.values()))
    return dict(masks)


def on_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies that a checkpoint can keep while training goes on."""
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}


def random_scores(places: Mapping[str, Place], seed: int) -> dict[str, Tensor]:
    """Uniform numbers, the parts of this rank: a random mask that depends on seed and names alone."""
    with torch.no_grad():
        return {name: place.uniform(seed, -1) for name, place in places.items()}
