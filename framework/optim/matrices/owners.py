"""Owners: ranks that hold the same weights divide the step of an optimiser among them.

Under DDP every rank has all weights and all gradients, so one rank alone can step a matrix, and the others need nothing
of its state. With `owners` each matrix belongs to one rank, as does every other parameter that is worth it. That rank
keeps its state and steps it; its new weights then travel to all others, which is the update without a second rounding.
Small parameters, such as norms and biases, are stepped by every rank, as without owners.

Who owns what follows from shapes alone, so that ranks agree without asking; parameters that are added later change
nothing for those that are there, whose state stays where it is. A weight is sent as soon as it is stepped,
while its owner works on its next one, and all ranks send and receive in one order; the step ends when all have arrived.

Shapes: P parameters.
"""

import zlib
from abc import ABC, abstractmethod
from collections import defaultdict, deque
from collections.abc import Callable, Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lightspan.core.distributed import all_reduce_max, rank, world_size
from lightspan.core.errors import UserError
from lightspan.optim.matrices.stacks import State

SMALLEST_OWNED = 4096
"""Numbers of the smallest parameter, matrices apart, that belongs to one rank: sending less takes longer than stepping
it everywhere."""


def divided(costs: Sequence[int], ranks: int, loads: Sequence[int] = ()) -> list[int]:
    """The rank that each cost goes to: the largest first, each to the rank with the least so far, of these to the first
    (Graham 1969: the rank with most has at most 4/3 of the least that is possible).

    Args:
        loads: what each rank has already; empty is nothing.
    """
    have, found = [*loads] or [0] * ranks, [0] * len(costs)
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        found[i] = have.index(min(have))
        have[found[i]] += costs[i]
    return found


class Owners:
    """Which rank steps which parameter.

    Args:
        matrices, others: operations of a step by parameter, of what belongs to one rank.
        ranks: how many share the work.
        index: this rank's number; None for that of this process.
        kept: the ranks of parameters that stay where they are, as their state does.

    Attributes:
        order: parameters in the order in which their weights travel: matrices, then others, the largest first.
        of: the rank that each of these belongs to.
        place: where each of these is in `order`.
    """

    def __init__(
        self,
        matrices: Mapping[Tensor, int],
        others: Mapping[Tensor, int],
        ranks: int,
        index: int | None = None,
        kept: Mapping[Tensor, int] = MappingProxyType({}),
    ) -> None:
        self.ranks, self.index = ranks, rank() if index is None else index
        costs = {**matrices, **others}
        self.order = [p for part in (matrices, others) for p in sorted(part, key=lambda p: -costs[p])]
        self.of = {p: kept[p] for p in self.order if p in kept}
        loads = [0] * ranks
        for p, owner in self.of.items():
            loads[owner] += costs[p]
        new = [p for p in self.order if p not in kept]
        self.of.update(zip(new, divided([costs[p] for p in new], ranks, loads), strict=True))
        self.place = {p: place for place, p in enumerate(self.order)}

    def mine(self, parameter: Tensor) -> bool:
        """Whether this rank steps it, be it alone or with all others."""
        return self.of.get(parameter, self.index) == self.index


NOBODY = Owners({}, {}, ranks=1, index=0)
"""Every rank steps everything."""


class Sending:
    """The weights of those parameters that have a gradient, `given`, on their way from their owners to all ranks."""

    def __init__(self, owners: Owners, given: Collection[Tensor]) -> None:
        self.owners, stepped = owners, set(given)
        self._left = deque(p for p in owners.order if p in stepped)
        self._under_way: list[tuple[Any, Tensor, Tensor]] = []

    def after(self, parameter: Tensor, apply: Callable[[Sequence[State]], None]) -> Callable[[Sequence[State]], None]:
        """`apply`, this rank's step of a parameter, followed by sending it. Steps are taken in the owners' order."""
        if parameter not in self.owners.of:
            return apply

        def applied(states: Sequence[State]) -> None:
            apply(states)
            self._send_to(parameter)

        return applied

    def finish(self) -> None:
        """What is left travels, and all has arrived for what this rank computes from now on."""
        while self._left:
            self._send(self._left.popleft())
        for work, parameter, sent in self._under_way:
            work.wait()
            if not parameter.is_contiguous() and not self.owners.mine(parameter):
                parameter.copy_(sent)
        self._under_way = []

    def _send_to(self, parameter: Tensor) -> None:
        """All up to this one: those before it come from other ranks, and are waited for by nobody yet."""
        while (first := self._left.popleft()) is not parameter:
            self._send(first)
        self._send(parameter)

    @torch.compiler.disable
    def _send(self, parameter: Tensor) -> None:
        sent = parameter.detach().contiguous()  # itself, if it has no gaps and its axes are in order
        self._under_way.append(
            (dist.broadcast(_bytes_of(sent), src=self.owners.of[parameter], async_op=True), parameter, sent)
        )


def gathered(owners: Owners, state: Mapping[Tensor, State], to: int) -> dict[Tensor, State]:
    """On the rank `to`, what the other ranks own of a state, in host memory, one tensor after the other; empty on all
    others. All ranks must call it.
    """
    own = {owners.place[p]: held for p, held in state.items() if p in owners.of and owners.mine(p)}
    said = {at: {key: (value.shape, value.dtype) for key, value in held.items()} for at, held in own.items()}
    every: list[Any] = [None] * owners.ranks
    dist.all_gather_object(every, said)
    found: dict[Tensor, State] = {}
    for at, parameter in enumerate(owners.order):
        source = owners.of[parameter]
        if source == to or at not in every[source] or owners.index not in (source, to):
            continue
        for key, (shape, dtype) in every[source][at].items():
            sends = owners.index == source
            value = (own[at][key] if sends else torch.empty(shape, dtype=dtype)).to(parameter.device).contiguous()
            if sends and value.numel():
                dist.send(_bytes_of(value), dst=to)
            elif value.numel():
                dist.recv(_bytes_of(value), src=source)
            if not sends:
                found.setdefault(parameter, {})[key] = value.cpu()
    return found


def fullest_rank(owners: Owners, state: Mapping[Tensor, State]) -> dict[Tensor, State]:
    """Of a state that one process has whole, the part of the rank that has most."""
    sizes = [0] * owners.ranks
    for parameter, held in state.items():
        if parameter in owners.of:
            sizes[owners.of[parameter]] += bytes_of(held)
    most = sizes.index(max(sizes))
    return {parameter: held for parameter, held in state.items() if owners.of.get(parameter, most) == most}


def bytes_of(held: State) -> int:
    """Of one parameter's state."""
    return sum(value.nbytes for value in held.values())


@torch.compiler.disable
def require_equal_weights(owners: Owners, parameters: Sequence[Tensor], name_of: Callable[[Tensor], str]) -> None:
    """All ranks must call it.

    Raises: UserError if ranks differ in a parameter or in its owner: its owner's would overwrite the others.
    """
    own = [
        (tuple(p.shape), str(p.dtype), int(_bits(p).sum(dtype=torch.int64)), owners.of.get(p, -1)) for p in parameters
    ]
    every: list[Any] = [None] * owners.ranks
    dist.all_gather_object(every, own)
    for number, theirs in enumerate(every):
        if theirs != every[0]:
            which = [name_of(p) for p, one, other in zip(parameters, every[0], theirs, strict=False) if one != other]
            raise UserError(
                f"owners=True needs equal weights on all ranks, but rank {number} differs from rank 0 in "
                f"{', '.join(which[:3]) or 'the number of parameters'}; train under DDP (trainer.strategy=ddp), which "
                "makes them equal, or set owners=False"
            )


@torch.compiler.disable
def most_wrong(
    parameters: Sequence[Tensor], given: Collection[Tensor], wrong: Tensor, name_of: Callable[[Tensor], str]
) -> int:
    """The most that any rank finds wrong with its gradients. All ranks must call it, and wait for the answer.

    Args:
        given: those of the `parameters` that have a gradient.
        wrong: int64, 0-d.

    Raises: UserError, on all ranks, if these have gradients of different parameters: what one sends, no other awaits.
    """
    has = set(given)
    mark = zlib.crc32(bytes(p in has for p in parameters))
    own = torch.stack([wrong, wrong.new_tensor(mark), wrong.new_tensor(-mark)])
    most, largest, smallest = map(int, all_reduce_max(own).tolist())
    if largest == -smallest:
        return most
    every: list[Any] = [None] * world_size()
    dist.all_gather_object(every, [at for at, p in enumerate(parameters) if p not in has])
    number = next(number for number, lacking in enumerate(every) if lacking != every[0])
    which = [name_of(parameters[at]) for at in sorted({*every[0]} ^ {*every[number]})]
    raise UserError(
        f"owners=True needs gradients of the same parameters on all ranks, but of ranks 0 and {number} one alone has "
        f"that of {', '.join(which[:3])}; neither weights nor optimiser state were changed. Train under DDP "
        "(trainer.strategy=ddp, or ddp_find_unused_parameters_true), which makes them equal, or set owners=False"
    )


def require_whole_weights(parameters: Sequence[Tensor]) -> None:
    """Raises: UserError for a parameter that is split over ranks: these share its step already."""
    if any(isinstance(p, DTensor) for p in parameters):
        raise UserError(
            "owners=True divides matrices that every rank has whole, as under DDP, but FSDP2 has split these, and "
            "their state and work with them; set owners=False"
        )


class DividedOptimizer(Optimizer, ABC):
    """An optimiser whose step ranks with equal weights can divide: who owns what, and whole state to save.

    Attributes:
        owners: whether they do.
        gradients_at_owners: whether the gradient of what has an owner comes to that rank alone, see
            `lightspan.optim.matrices.owned_gradients`.
    """

    KEPT_IN_COPIES: tuple[str, ...] = ("owners", "_owners")
    owners = False
    gradients_at_owners = False
    _owners = NOBODY
    """Who owns what in the steps from now on."""
    _agreed = False
    """Whether ranks that divide the step are known to have equal weights."""
    _others: dict[Tensor, State] | None = None
    """The state of other ranks, if it has been brought here since the last step."""

    @abstractmethod
    def costs(self) -> tuple[dict[Tensor, int], dict[Tensor, int]]:
        """About how many operations a step takes, by parameter, of what should belong to one rank: of matrices, and of
        others.
        """

    @abstractmethod
    def called(self, parameter: Tensor) -> str:
        """What messages call a parameter."""

    @abstractmethod
    def _parameters(self) -> list[Tensor]:
        """Those of all groups."""

    def given(self) -> list[Tensor]:
        """Parameters that have a gradient, on this rank or on the one that owns them."""
        away = self._owners.of if self.gradients_at_owners else ()
        return [p for p in self._parameters() if p.grad is not None or (p in away and p.requires_grad)]

    def divided(self, ranks: int, index: int | None = None) -> Owners:
        """What belongs to whom if so many ranks share the work; nothing belongs to anybody without `owners`. What has
        an owner among so many ranks keeps it.

        Args:
            index: of the rank that looks; None for this process.
        """
        if not self.owners:
            return NOBODY
        return Owners(*self.costs(), ranks, index, self._owners.of if self._owners.ranks == ranks else {})

    def require_agreement(self) -> None:
        """Asks once, before anything is sent. Raises: UserError if ranks do not have the same weights."""
        require_whole_weights(self._parameters())
        owners = self.divided(world_size())
        if owners.ranks > 1:
            require_equal_weights(owners, self._parameters(), self.called)
        self._agreed = True

    def consolidate_state_dict(self, to: int = 0) -> None:
        """With `owners`, brings the state of all ranks to the rank `to`, into host memory, so that its `state_dict`
        before the next step is whole: that of one process, which continues on any number of ranks. All ranks must call
        it. Lightning does before it saves, as it does for torch's ZeroRedundancyOptimizer. Otherwise it does nothing.
        """
        if (owners := self.divided(world_size())).ranks > 1:
            others = gathered(owners, self.state, to)
            self._others = others if owners.index == to else None

    def state_dict(self) -> dict[str, Any]:
        """torch's. Raises: UserError with `owners` on several ranks, unless `consolidate_state_dict` has brought the
        state of all of them here since the last step: what is saved would lack it.
        """
        if not self.owners or not self.state or world_size() == 1:
            return super().state_dict()
        if self._others is None:
            raise UserError(
                f"owners=True: rank {rank()} has the state of its own parameters alone. Call "
                "optimizer.consolidate_state_dict(to=0) on all ranks, then optimizer.state_dict() on rank 0; Lightning "
                "does both when it saves a checkpoint"
            )
        every = [p for p in self._parameters() if p in self.state or p in self._others]
        whole = {p: self.state[p] if p in self.state else self._others[p] for p in every}
        return self._state_dict_of(whole)

    def own_state_dict(self) -> dict[str, Any]:
        """As `state_dict`, with what this rank keeps: to go back to by `load_state_dict` on the same rank."""
        return self._state_dict_of(self.state)

    def _state_dict_of(self, state: Mapping[Tensor, State]) -> dict[str, Any]:
        kept, self.state = self.state, defaultdict(dict, state)
        try:
            return super().state_dict()
        finally:
            self.state = kept


def _bits(parameter: Tensor) -> Tensor:
    """Its memory as whole numbers of the size of its own."""
    kinds = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    part = parameter.detach()
    part = torch.view_as_real(part.resolve_conj()) if part.is_complex() else part
    return part.contiguous().view(kinds[part.dtype.itemsize])


def _bytes_of(tensor: Tensor) -> Tensor:
    """The memory of a contiguous tensor: collectives then need not know its dtype."""
    return tensor.view(-1).view(torch.uint8)
