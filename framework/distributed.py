"""What a loss needs to see the batch of all ranks, with gradients that DDP's averaging makes exact.

Convention: every rank computes the same GLOBAL loss L from sums over all ranks. The backward pass of `all_reduce_sum`
sums the gradients of all ranks, so a rank's parameter gradient is world_size * dL/d(theta through its own samples), and
the mean over ranks that DDP and FSDP take is dL/d(theta): what one rank with the whole batch gets. A loss written this
way is therefore neither multiplied nor divided by the number of ranks.
"""

import gc

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """Ranks of the default process group; 1 without one."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's rank in the default process group; 0 without one."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def leave() -> None:
    """Ends the default process group, all ranks in step; does nothing without one. For the end of a process's work.

    A gloo group that is still there when the interpreter exits, or that one rank ends while another still talks to it,
    can abort the process after all its work is done, and a launcher would take that for a failure.
    """
    if dist.is_available() and dist.is_initialized():
        gc.collect()  # a DDP reducer nobody uses any more still holds the group
        dist.barrier()
        dist.destroy_process_group()


class _AllReduceSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor) -> Tensor:
        total = x.detach().clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> Tensor:
        # d(sum of all ranks' losses)/dx: torch's own dist.all_reduce would drop this term without a word.
        total = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total


def all_reduce_sum(x: Tensor) -> Tensor:
    """Sum of `x` over all ranks, differentiable in every rank's `x`; `x` itself on one rank.

    Every rank must call it, in the same order and with the same shape, and must run backward when any rank does.
    """
    return _AllReduceSum.apply(x) if world_size() > 1 else x
