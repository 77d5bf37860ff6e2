"""Data-parallel means of gradients that are kept in coordinates: r / n of the traffic of whole gradients.

Coordinates of a mean are means of coordinates, in a frame that all ranks share. So except at a refresh, the ranks
reduce M x R numbers of an M x N matrix; in a step that chooses the matrix' frame again they reduce its whole gradient,
and choose equally. Either happens once per step, after the last micro-batch.

DDP must ignore these parameters. A communication hook of DDP could project as well, but DDP fills its buckets
with whole gradients first, and returns whole gradients: the memory that coordinates save would be lost, and a
gradient that is never formed could not take part at all.

Shapes: P parameters that are kept in coordinates.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from lightspan.core.distributed import broadcast_first_rank, mean_over_ranks


class Share(Protocol):
    """One rank's part in the gradient of `parameter`."""

    parameter: Tensor

    def exists(self) -> bool:
        """Whether this rank's loss has reached the parameter since gradients were last cleared."""

    def tensor(self) -> Tensor:
        """What is to be reduced in place: the whole gradient or its coordinates; zeros, kept, if there are none."""


class Reduction:
    """Reduces the shares of an optimiser's parameters in its steps, between the closure and the update.

    The parameters get rank 0's values, and a DDP that is built around `model` later neither copies nor reduces them.

    A parameter that no rank's loss has reached takes no step, as in one process; one that some ranks' losses have
    reached counts zeros for the others. To know, the ranks exchange P bytes, and the host waits for them, once per
    step.
    """

    def __init__(self, optimizer: Optimizer, model: nn.Module, shares: Sequence[Share]) -> None:
        self.model, self.shares, self.device = model, shares, shares[0].parameter.device
        parameters = {share.parameter for share in shares}
        broadcast_first_rank([share.parameter for share in shares])
        self.names = [name for name, p in model.named_parameters(remove_duplicate=False) if p in parameters]
        exclude_from_ddp(model, self.names)
        self.handle = optimizer.register_step_pre_hook(self._before_step)

    def remove(self) -> None:
        """Ends it. An existing DDP still ignores the parameters; one built from now on reduces them."""
        self.handle.remove()
        _let_ddp_ignore(self.model, [name for name in _ignored(self.model) if name not in self.names])

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        closure = {**dict(zip(("self", "closure"), args, strict=False)), **kwargs}.get("closure")
        if closure is None:
            self.reduce()
            return None
        return (optimizer, self._followed_by_reduction(closure)), {}

    def _followed_by_reduction(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        def closed() -> Any:
            loss = closure()
            self.reduce()
            return loss

        return closed

    @torch.no_grad()
    def reduce(self) -> None:
        """Every rank must call it, once per step."""
        exists_P = torch.tensor([share.exists() for share in self.shares], dtype=torch.uint8, device=self.device)
        dist.all_reduce(exists_P, op=dist.ReduceOp.MAX)
        reached = [share for share, exists in zip(self.shares, exists_P.tolist(), strict=True) if exists]
        mean_over_ranks([share.tensor() for share in reached])


def exclude_from_ddp(model: nn.Module, names: Sequence[str]) -> None:
    """A DDP that is built around `model` later neither copies nor reduces these parameters."""
    _let_ddp_ignore(model, [*_ignored(model), *names])


def ddp_has_no_parameters(model: nn.Module) -> bool:
    """Whether DDP would refuse to wrap `model`, because all its trained parameters are ignored."""
    ignored = _ignored(model)
    return all(name in ignored for name, p in model.named_parameters() if p.requires_grad)


def _ignored(model: nn.Module) -> list[str]:
    return list(getattr(model, "_ddp_params_and_buffers_to_ignore", []))


def _let_ddp_ignore(model: nn.Module, names: list[str]) -> None:
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)
