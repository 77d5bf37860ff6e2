"""Gradients that owners alone keep, as ZeRO's stage 2 divides them: each goes to the rank that steps its parameter.

While a backward pass goes on, the gradient of what has an owner is averaged on that rank, and given up on all others as
soon as it has arrived there. The small ones of other parameters are averaged on all ranks, once a step.
"""

from collections import deque
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightspan.core.distributed import mean_over_ranks, world_size
from lightspan.core.errors import UserError
from lightspan.optim.matrices.owners import DividedOptimizer
from lightspan.optim.matrices.shapes import is_dense


class OwnedGradients:
    """Sends gradients to the owners of their parameters, from now on until `detach`.

    All ranks send in one order, about that in which gradients arrive. What has no gradient on a rank counts as zero, as
    under DeepSpeed's ZeRO.

    Args:
        parameters: all that a model has, in the order in which it uses them.
        optimizer: with `owners`.
        room: numbers of the gradients that may be on their way at a time.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], optimizer: DividedOptimizer, room: int) -> None:
        self.optimizer, self.room = optimizer, room
        self._every = list(parameters)
        self._sums: dict[Tensor, Tensor] = {}
        self._under_way: deque[tuple[Any, Tensor, Tensor]] = deque()
        self._numbers = 0
        self._begin()
        self._hooks = [p.register_post_accumulate_grad_hook(self._arrived) for p in self._every if p.requires_grad]
        optimizer.gradients_at_owners = True

    def detach(self) -> None:
        """Gradients stay where they arise again."""
        for hook in self._hooks:
            hook.remove()
        self.optimizer.gradients_at_owners = False

    def finish(self, last: bool) -> None:
        """Ends a backward pass: what is left is sent, and all has arrived. All ranks must call it.

        Args:
            last: whether a step follows, for which each owner then has the sums of all passes since the step before.
        Raises: UserError for a parameter that got a gradient in two parts: the second would be lost.
        """
        while self._left:
            self._send(self._left.popleft())
        while self._under_way:
            self._take()
        twice = [p for p in self._every if p.grad is not None and p in self._owners.of]
        if twice:
            raise UserError(
                f"{self.optimizer.called(twice[0])} got its gradient in several parts, as reentrant checkpoints of "
                "activations give it, which cannot be sent to its owner while they arrive; set use_reentrant=False, "
                "or divide the optimiser state alone (stage 1)"
            )
        if last:
            small = [p for p in self._every if p.requires_grad and p not in self._owners.of]
            mean_over_ranks([_filled(p) for p in small])
            for parameter, total in self._sums.items():
                parameter.grad = total
            self._sums = {}
        self._begin()

    def _begin(self) -> None:
        self._owners = self.optimizer.divided(world_size())
        self._left = deque(p for p in reversed(self._every) if p.requires_grad and p in self._owners.of)

    def _arrived(self, _: Tensor) -> None:
        while self._left and self._left[0].grad is not None:
            self._send(self._left.popleft())

    @torch.no_grad()
    def _send(self, parameter: Tensor) -> None:
        gradient, parameter.grad = _filled(parameter), None
        gradient = gradient if is_dense(gradient) else gradient.contiguous()
        gradient.div_(self._owners.ranks)  # before the sum, as DDP does
        flat = gradient.as_strided((gradient.numel(),), (1,))
        self._under_way.append((
            dist.reduce(flat, dst=self._owners.of[parameter], async_op=True), parameter, gradient
        ))  # fmt: skip
        self._numbers += gradient.numel()
        while self._numbers > self.room:
            self._take()

    @torch.no_grad()
    def _take(self) -> None:
        work, parameter, gradient = self._under_way.popleft()
        work.wait()
        self._numbers -= gradient.numel()
        if self._owners.mine(parameter):
            self._sums[parameter] = gradient if parameter not in self._sums else self._sums[parameter].add_(gradient)


def _filled(parameter: Tensor) -> Tensor:
    """A parameter's gradient; if it has none, zeros that it has from now on."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad
