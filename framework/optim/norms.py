"""Norms of a step's gradients in a few kernels, and what follows from them before anything changes: the step clips, or
it refuses gradients that it does not support or that are not finite.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from lightspan.devices import wide_type
from lightspan.errors import UserError
from lightspan.optim.elementwise import real
from lightspan.optim.sharding import Ranks, splits_of, total_over
from lightspan.sharded import local

Called = Callable[[Tensor], str]
"""The name of a parameter in a message."""


def square_norms(tensors: Sequence[Tensor]) -> Tensor:
    """Squared Euclidean norms [T] in float32 or wider, in no particular order; infinite if a sum of squares is
    beyond that format, even if torch summed it in a wider one.
    """
    by_kind: dict[tuple[torch.device, torch.dtype], list[Tensor]] = defaultdict(list)
    for tensor in tensors:
        by_kind[tensor.device, wide_type(tensor.dtype)].append(tensor)
    parts = [torch.stack(torch._foreach_norm(part, 2, dtype=dtype)) for (_, dtype), part in by_kind.items()]
    return torch.cat([part.to(parts[0].device) for part in parts]).square() if parts else torch.zeros(0)


def held_gradient(parameter: Tensor) -> Tensor:
    """This rank's part of a gradient, in real numbers."""
    assert parameter.grad is not None
    return real(local(parameter.grad))


def squares_by_ranks(gradients: Iterable[tuple[Ranks | None, Tensor]]) -> list[tuple[Ranks | None, Tensor]]:
    """Squared norms of gradients, each with the ranks among which it is split; together for those split alike."""
    alike: dict[Ranks | None, list[Tensor]] = defaultdict(list)
    for ranks, gradient in gradients:
        alike[ranks].append(gradient)
    return [(ranks, square_norms(together)) for ranks, together in alike.items()]


def clip_factor(squares: Iterable[tuple[Ranks | None, Tensor]], max_norm: float) -> Tensor:
    """The factor, 0-d and at most 1, that brings the global norm down to `max_norm`, as in clip_grad_norm_.

    Args:
        squares: squared norms, each with the ranks among which its tensor is split.
    """
    norm = total_over(squares).sqrt()
    return (max_norm / (norm + 1e-6)).clamp_max(1.0)


def require_attached(backward: str, attached: bool, scaled: bool) -> None:
    """Raises: UserError for a backward mode that was not set up, or that a GradScaler would mislead."""
    if backward != "whole" and not attached:
        raise UserError(
            f"backward={backward!r} needs the model: call lightspan.optim.gradients.attach(model, optimizer) "
            "before the first backward pass (SubspaceProjection and Method do)"
        )
    if backward != "whole" and scaled:
        raise UserError(
            f"backward={backward!r} keeps coordinates that torch.amp.GradScaler does not see, so they would "
            "stay scaled; train in bfloat16, which needs no scaling, or set backward='whole'"
        )


def require_dense_gradients(parameters: Sequence[Tensor], called: Called, owner: str) -> None:
    """Raises: UserError for a sparse gradient.

    Args:
        owner: the optimiser's class.
    """
    for parameter in parameters:
        if parameter.grad is not None and parameter.grad.layout != torch.strided:
            raise UserError(
                f"the gradient of {called(parameter)} is sparse ({parameter.grad.layout}); neither weights nor "
                f"optimiser state were changed. {owner} needs dense gradients: build nn.Embedding with sparse=False, "
                "or give that parameter to torch.optim.SparseAdam"
            )


def require_finite(norms: Sequence[Tensor], parameters: Sequence[Tensor], called: Called) -> None:
    """Checks once the norms of all gradients: what is not finite anywhere in a tensor is not finite in its norm, and
    second moments and row norms are squares, which overflow above 1.8e19 in float32. All ranks raise or none does; each
    passes the norms of its own parts of the same gradients. Costs one host synchronisation.

    Args:
        norms: norms or their squares, of any shape.
        parameters: all of the optimiser's, in the same order on all ranks; used only to name the wrong ones.
    Raises: UserError that blames the weights if they are not finite, otherwise the gradients.
    """
    if not any(norm.numel() for norm in norms):
        return
    wrong = (~torch.cat([norm.reshape(-1).isfinite().to(norms[0].device) for norm in norms])).sum()
    for ranks in splits_of(parameters):
        wrong = ranks.total(wrong)
    if wrong:
        raise UserError(_blame(parameters, called))


def _blame(parameters: Sequence[Tensor], called: Called) -> str:
    if broken := _not_finite(parameters, [local(p) for p in parameters], parameters, called):
        return (
            f"the weights of {broken} are not finite (NaN or infinity), so no gradient can be finite; this step "
            "changed nothing. An earlier step or a checkpoint brought them: resume from one before that, with a lower "
            "learning rate"
        )
    given = [p for p in parameters if p.grad is not None]
    broken = _not_finite(given, [square_norms([held_gradient(p)]) for p in given], parameters, called)
    return (
        f"the gradient of {broken or 'a parameter that is kept in coordinates'} is not finite (NaN, infinity, or so "
        "large that its squares are: above 1.8e19 in float32); neither weights nor optimiser state were changed. "
        "Lower the learning rate, clip with max_norm, or inspect the batch; check_finite=False continues regardless"
    )


def _not_finite(given: Sequence[Tensor], values: Sequence[Tensor], parameters: Sequence[Tensor], called: Called) -> str:
    """Names those of the `given` parameters whose value is not finite on any rank; empty if all are."""
    if not given:
        return ""
    flags = torch.stack([(~value.isfinite()).sum() for value in values])
    for ranks in splits_of(parameters):
        flags = ranks.total(flags)
    wrong = [called(p) for p, flag in zip(given, flags.tolist(), strict=True) if flag]
    return ", ".join(wrong[:3]) + (f" and {len(wrong) - 3} more" if len(wrong) > 3 else "")
