"""AdamW for what is not projected, with the same moment formats and the same rounding of bfloat16 weights.

Shapes: P numbers of several parameters, concatenated.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw

from lightspan.core.devices import wide_type
from lightspan.core.sharded import RowShards, local, ranks_of
from lightspan.optim.matrices.moments import Float32Moments, MomentStorage
from lightspan.optim.matrices.shapes import is_dense
from lightspan.optim.matrices.stacks import SEED_STRIDE, SHARD_STRIDE, WEIGHT_STREAM, Layout, State
from lightspan.triton_kernels.rounding import stochastic_round

SMALLEST_QUANTISED = 4096
"""Smaller parameters keep float32 moments: they need little memory, and norms are sensitive."""
LONGEST_QUANTISED_ROW = 8192
"""Longer rows keep float32 moments: one scale would have to fit too many numbers."""
LONGEST_RUN = 1 << 22
"""How many numbers are widened at once, unless a single parameter has more: 16 MiB of float32."""


def initial_state(parameter: Tensor, moments: MomentStorage) -> State:
    """Zero moments by name, of the parameter's own shape, and the number of steps; sharded as the parameter is."""
    width = parameter.shape[-1] if parameter.ndim else 1
    quantise = parameter.numel() >= SMALLEST_QUANTISED and width <= LONGEST_QUANTISED_ROW and _has_whole_rows(parameter)
    storage = moments if quantise and not parameter.is_complex() else Float32Moments()
    dtype = wide_type(parameter.dtype)
    layout = Layout(parameter.numel() // max(width, 1), width, width, False, dtype, parameter.device, (0,))
    ranks = ranks_of(parameter)
    state = {"step": torch.zeros((), dtype=torch.float32, device=parameter.device)}  # the fused step reads it there
    for name in ("exp_avg", "exp_avg_sq"):
        for key, value in storage.initial(layout, name, width).items():
            state[key] = torch.empty_like(parameter, dtype=value.dtype).zero_() if key == name else value[0]
            if key != name and ranks is not None:
                shards = RowShards(ranks, len(value[0]), moved=False)
                state[key] = shards.distributed(shards.own(value[0]))
    return state


def _has_whole_rows(parameter: Tensor) -> bool:
    """Whether each row, which shares one scale, is on one rank, in the order in which ranks split scales."""
    ranks = ranks_of(parameter)
    if ranks is None:
        return True
    assert isinstance(parameter, DTensor)
    return parameter.ndim == 2 and parameter.placements[ranks.axis].is_shard(0)


def step_elementwise(
    parameters: Sequence[Tensor],
    group: dict[str, Any],
    moments: MomentStorage,
    clip: Tensor | None,
    seeds: Sequence[int],
    states: Sequence[State],
) -> None:
    """One step of AdamW on parameters of one group, all of which have a gradient: torch's fused one if weights and
    moments are float32 or wider, otherwise widened, stepped and rounded once.

    Args:
        seeds: one per parameter; its roundings use the numbers after the seed, one per step.
        states: one per parameter, on its device.
    """
    by_kind: dict[Any, list[int]] = defaultdict(list)
    for i, (parameter, state) in enumerate(zip(parameters, states, strict=True)):
        quantised = local(state["exp_avg"]).dtype.itemsize < 4
        # A rank with a part of its own has its own roundings; otherwise all ranks round equally.
        shape = local(parameter).shape if quantised else None
        by_kind[quantised, parameter.dtype, parameter.device, ranks_of(parameter), shape].append(i)
    for (quantised, _, device, *_), members in by_kind.items():
        held = [real(local(parameters[i])) for i in members]
        gradients = [real(local(gradient)) for i in members if (gradient := parameters[i].grad) is not None]
        own = [{key: local(value) for key, value in states[i].items()} for i in members]
        starts = [seeds[i] for i in members]
        factor = None if clip is None else clip.to(device)
        if quantised:
            for run in _runs([part.numel() for part in held]):
                _step_quantised(held[run], gradients[run], own[run], starts[run.start], group, moments, factor)
        elif held[0].dtype.itemsize < 4:
            for run in _runs([part.numel() for part in held]):
                _step_widened(held[run], gradients[run], own[run], starts[run.start], group, factor)
        else:
            gradients = [gradient.to(part.dtype) for gradient, part in zip(gradients, held, strict=True)]
            if factor is not None:
                gradients = list(torch._foreach_mul(gradients, factor.to(gradients[0].dtype)))
            _adamw(held, gradients, own, group)


def _runs(sizes: Sequence[int]) -> Iterator[slice]:
    """Neighbouring parameters that are widened together."""
    start = total = 0
    for i, size in enumerate(sizes):
        if i > start and total + size > LONGEST_RUN:
            yield slice(start, i)
            start, total = i, 0
        total += size
    yield slice(start, len(sizes))


def _step_widened(
    parameters: list[Tensor],
    gradients: list[Tensor],
    states: list[State],
    seed: int,
    group: dict[str, Any],
    clip: Tensor | None,
) -> None:
    """Low-precision weights with float32 moments: all of them in a handful of kernels."""
    shapes, sizes = [p.shape for p in parameters], [p.numel() for p in parameters]

    def joined(tensors: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        whole_P = torch.cat([tensor.reshape(-1) for tensor in tensors]).float()
        return whole_P, [part.view(shape) for part, shape in zip(whole_P.split(sizes), shapes, strict=True)]

    wide_P, weights = joined(parameters)
    gradient_P, wide_gradients = joined(gradients)
    if clip is not None:
        gradient_P.mul_(clip)
    _adamw(weights, wide_gradients, states, group)
    rounded_P = _rounded(wide_P, parameters[0].dtype, _noise(states[0], seed))
    torch._foreach_copy_(parameters, [part.view(s) for part, s in zip(rounded_P.split(sizes), shapes, strict=True)])


def _step_quantised(
    parameters: list[Tensor],
    gradients: list[Tensor],
    states: list[State],
    seed: int,
    group: dict[str, Any],
    moments: MomentStorage,
    clip: Tensor | None,
) -> None:
    """Moments in less than 32 bits of parameters of one shape: all of them widened, stepped and rounded at once, the
    weights too if they are narrow.
    """
    like = parameters[0]
    if not like.numel():  # a rank may have no part of small parameters
        torch._foreach_add_([state["step"] for state in states], 1)
        return
    dtype, names, count = wide_type(like.dtype), ("exp_avg", "exp_avg_sq"), len(states)
    rows = {key: torch.stack([state[key] for state in states]) for key in states[0] if key != "step"}
    shapes = {key: value.shape for key, value in rows.items()}
    for name in names:
        rows[name] = rows[name].reshape(count, -1, like.shape[-1] if like.ndim else 1)
    wide = {name: moments.load(rows, name).reshape(shapes[name]).to(dtype) for name in names}
    stepped = [{**{name: wide[name][i] for name in names}, "step": state["step"]} for i, state in enumerate(states)]
    weights = parameters if like.dtype == dtype else list(torch.stack(parameters).to(dtype))
    read = gradients if gradients[0].dtype == dtype else list(torch.stack(gradients).to(dtype))
    _adamw(weights, read if clip is None else list(torch._foreach_mul(read, clip.to(dtype))), stepped, group)
    noise = _noise(states[0], seed)
    for name in names:
        moments.save(wide[name].reshape(rows[name].shape), rows, name, noise)
    for key, value in rows.items():
        torch._foreach_copy_([state[key] for state in states], list(value.reshape(shapes[key])))
    if weights is not parameters:
        torch._foreach_copy_(parameters, list(_rounded(torch.stack(weights), like.dtype, noise)))


def first_noise(parameter: Tensor, number: int, seed: int) -> int:
    """Where the roundings of an unprojected parameter begin: below those of all matrices, one stream each.

    Args:
        number: of the parameter among all of the optimiser's.
    """
    ranks = ranks_of(parameter)
    shard = 0 if ranks is None else ranks.index * SHARD_STRIDE
    return (seed * SEED_STRIDE - 1 - number) * SEED_STRIDE + shard


def _noise(state: State, seed: int) -> Tensor:
    """The seed of this step's roundings, on the device; the step count is saved, so a resumed run rounds equally."""
    return state["step"].long() + seed


def _rounded(wide: Tensor, dtype: torch.dtype, noise: Tensor) -> Tensor:
    return stochastic_round(wide, noise + WEIGHT_STREAM) if dtype == torch.bfloat16 else wide.to(dtype)


def real(tensor: Tensor) -> Tensor:
    """A complex tensor as pairs of real numbers, for which Adam's rule is torch's; others unchanged."""
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def _adamw(parameters: list[Tensor], gradients: list[Tensor], states: list[State], group: dict[str, Any]) -> None:
    """torch's fused step. It reads memory from end to end and ignores strides, so what is laid out differently from its
    weight, or with gaps, is stepped in a copy.
    """
    firsts, seconds = ([real(state[name]) for state in states] for name in ("exp_avg", "exp_avg_sq"))
    layouts = [weight if is_dense(weight) else weight.contiguous() for weight in parameters]
    weights, read, means, squares = (
        [_laid_as(like, tensor) for like, tensor in zip(layouts, tensors, strict=True)]
        for tensors in (parameters, gradients, firsts, seconds)
    )
    beta1, beta2 = group["betas"]
    adamw(
        weights, read, means, squares, [], [state["step"] for state in states],
        fused=True, amsgrad=False, beta1=beta1, beta2=beta2, lr=group["lr"],
        weight_decay=group["weight_decay"], eps=group["eps"], maximize=False,
    )  # fmt: skip
    for tensors, stepped in ((parameters, weights), (firsts, means), (seconds, squares)):
        for tensor, copy in zip(tensors, stepped, strict=True):
            if copy is not tensor:
                tensor.copy_(copy)


def _laid_as(like: Tensor, tensor: Tensor) -> Tensor:
    """The tensor itself if it has the dtype and the strides of `like`, otherwise a copy that has."""
    if tensor.stride() == like.stride() and tensor.dtype == like.dtype:
        return tensor
    return torch.empty_like(like).copy_(tensor)
