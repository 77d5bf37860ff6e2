"""Gradients that are not kept: projected as soon as they exist, or never formed. For `LowRank(backward=...)`.

"hooks": when a parameter's gradient G of a micro-batch is complete, G Q is added to the parameter's coordinates and G
is freed. Sums of coordinates are coordinates of sums, so accumulation is exact, and the step clips the coordinates.

"projected": for y = x W^T of nn.Linear, G = dY^T X, so G Q = dY^T (X Q) costs 2 T R (M + N) instead of 2 T M N
operations for T tokens, and G never exists. (For a weight with M < N it is X^T (dY Q).) Hooks handle the rest: matrices
of other layers.

In a step that chooses a matrix' frame again, that matrix' gradient is formed and accumulated as usual: the frame needs
all of it. Refreshes are staggered, so these are few. For data-parallel ranks, see `lightspan.optim.low_rank.reduction`.

Shapes: T tokens, M out features, N in features, R rank.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

from lightspan.core.distributed import world_size
from lightspan.core.errors import UserError
from lightspan.optim.low_rank.core import due
from lightspan.optim.low_rank.optimizer import LowRank
from lightspan.optim.low_rank.reduction import Reduction
from lightspan.optim.matrices.shapes import canonical_gradient


class Sink:
    """Where the coordinates of one parameter's gradient are summed, in the optimiser's own bucket."""

    def __init__(self, optimizer: LowRank, parameter: Tensor) -> None:
        self.optimizer, self.parameter = optimizer, parameter

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        """A copy of a model, or a pickle, has no sink: it is attached to no optimiser."""
        return type(None), ()

    def frame(self) -> Tensor | None:
        """The frame [N R] of the coming step; None if that step needs the whole gradient."""
        if self._takes_whole():
            return None
        bucket, position = self.optimizer.place(self.parameter)
        state = {key: value[position : position + 1] for key, value in bucket.state.items()}
        return self.optimizer.rule.basis.frame(state, bucket.layout.part([position]))[0]

    def add(self, coordinates_MR: Tensor) -> None:
        """Adds one micro-batch's coordinates."""
        bucket, position = self.optimizer.place(self.parameter)
        wide = coordinates_MR.to(bucket.layout.dtype)
        if position in bucket.pending:
            bucket.pending[position].add_(wide)
        else:
            bucket.pending[position] = wide.clone() if wide is coordinates_MR else wide

    def take(self, parameter: Tensor) -> None:
        """Post-accumulate hook: turns the gradient into coordinates and frees it."""
        frame_NR = self.frame()
        if frame_NR is None or parameter.grad is None:
            return
        gradient_MN = canonical_gradient(parameter.grad, parameter)
        self.add(gradient_MN @ frame_NR.to(gradient_MN.dtype))
        parameter.grad = None

    def exists(self) -> bool:
        """Whether a backward pass has reached the parameter since gradients were last cleared."""
        bucket, position = self.optimizer.place(self.parameter)
        return self.parameter.grad is not None or position in bucket.pending

    def tensor(self) -> Tensor:
        """The gradient of a step that needs all of it, otherwise the coordinates; zeros, kept, if there are none."""
        bucket, position = self.optimizer.place(self.parameter)
        if self._takes_whole():
            if self.parameter.grad is None:
                self.parameter.grad = torch.zeros_like(self.parameter)
            return self.parameter.grad
        if position not in bucket.pending:
            layout = bucket.layout
            bucket.pending[position] = torch.zeros(layout.rows, layout.rank, dtype=layout.dtype, device=layout.device)
        return bucket.pending[position]

    def _takes_whole(self) -> bool:
        bucket, position = self.optimizer.place(self.parameter)
        return any(due(bucket, [position], self.optimizer.rule))


class _ProjectedProduct(torch.autograd.Function):
    """x W^T + b whose backward pass adds the coordinates of W's gradient to a sink and gives W no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_MN: Tensor, bias_M: Tensor | None, frame: Tensor, sink: Sink) -> Tensor:
        wide = weight_MN.shape[0] < weight_MN.shape[1]
        # For tall weights, X Q is all that the gradient needs of X, and much smaller.
        ctx.save_for_backward(x if wide else x @ frame, weight_MN, frame)
        ctx.sink, ctx.wide, ctx.has_bias = sink, wide, bias_M is not None
        return nn.functional.linear(x, weight_MN, bias_M)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        saved, weight_MN, frame = ctx.saved_tensors
        gradient_TM, saved_T = gradient.reshape(-1, gradient.shape[-1]), saved.reshape(-1, saved.shape[-1])
        if ctx.wide:
            ctx.sink.add(saved_T.mT @ (gradient_TM @ frame))
        else:
            ctx.sink.add(gradient_TM.mT @ saved_T)
        of_x = gradient @ weight_MN if ctx.needs_input_grad[0] else None
        of_bias = gradient_TM.sum(dim=0) if ctx.has_bias else None
        return of_x, None, of_bias, None, None


class ProjectedLinear(nn.Linear):
    """nn.Linear whose weight gradient reaches the optimiser in coordinates. Parameters, state dict and outputs are
    those of nn.Linear; `attach` turns existing layers into it, and `detach` back.
    """

    sink: Sink | None = None

    def forward(self, x: Tensor) -> Tensor:
        training = torch.is_grad_enabled() and self.weight.requires_grad
        frame = self.sink.frame() if training and self.sink is not None else None
        if frame is None:
            return super().forward(x)
        dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        with torch.autocast(x.device.type, enabled=False):
            return _ProjectedProduct.apply(x.to(dtype), self.weight.to(dtype), bias, frame.to(dtype), self.sink)


def _may_attach(module: nn.Module) -> bool:
    """Whether it is a plain nn.Linear, or the copy of one that was attached."""
    return type(module) is nn.Linear or (type(module) is ProjectedLinear and module.sink is None)


class Attachment:
    """Undoes what `attach` did."""

    def __init__(
        self,
        linears: list[ProjectedLinear],
        handles: list[RemovableHandle],
        reduction: Reduction | None,
        optimizer: LowRank,
    ) -> None:
        self.linears, self.handles, self.reduction, self.optimizer = linears, handles, reduction, optimizer

    def detach(self) -> None:
        """Restores the class of the layers and removes the hooks. After it DDP must be rebuilt."""
        for linear in self.linears:
            linear.__class__ = nn.Linear  # type: ignore[assignment]
            del linear.sink
        for handle in self.handles:
            handle.remove()
        if self.reduction is not None:
            self.reduction.remove()
        self.optimizer.attachment = None


def attach(model: nn.Module, optimizer: LowRank) -> Attachment:
    """Connects the gradients of a model with an optimiser made for `backward="hooks"` or `"projected"`.

    Call it after the model has its final device and dtype, before DistributedDataParallel is built around it, and
    before the first backward pass. A weight that two layers share, or that a parametrisation computes, is left to
    hooks. Among several ranks the projected parameters get rank 0's values, and every rank's step reduces them: all
    ranks must take it.

    Raises: UserError if the optimiser needs whole gradients, if DDP already wraps the model, or if it is sharded.
    """
    if optimizer.backward == "whole":
        raise UserError("this optimiser needs whole gradients; build it with backward='hooks' or backward='projected'")
    if isinstance(model, DistributedDataParallel):
        raise UserError("DDP already reduces whole gradients of this model; attach first, then build DDP around it")
    # A list: ranks reduce in this order, and sets have a different one in every process.
    projected = [p for group in optimizer.param_groups for p in group["params"] if optimizer.projected(p, group)]
    if any(isinstance(p, DTensor) for p in projected):
        raise UserError(
            f"backward={optimizer.backward!r} keeps coordinates of whole matrices, but this model is sharded; set "
            "backward='whole', or train with DDP"
        )
    owners: dict[Tensor, list[nn.Module]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(parameter, []).append(module)
    linears: list[ProjectedLinear] = []
    for parameter in projected:
        modules = owners.get(parameter, [])
        if optimizer.backward == "projected" and len(modules) == 1 and _may_attach(modules[0]):
            linear = modules[0]
            linear.__class__ = ProjectedLinear
            assert isinstance(linear, ProjectedLinear)
            linear.sink = Sink(optimizer, parameter)
            linears.append(linear)
    sinks = [Sink(optimizer, p) for p in projected]
    handles = [sink.parameter.register_post_accumulate_grad_hook(sink.take) for sink in sinks]
    reduction = Reduction(optimizer, model, sinks) if world_size() > 1 else None
    optimizer.attachment = attachment = Attachment(linears, handles, reduction, optimizer)
    return attachment
