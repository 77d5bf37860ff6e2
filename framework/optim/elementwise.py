"""AdamW for what is not projected, with the same moment formats and the same rounding of bfloat16 weights."""

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw

from lightspan.optim.layout import WEIGHT_STREAM, Layout, State
from lightspan.optim.moments import Float32Moments, MomentStorage
from lightspan.optim.sharding import Shards, local, ranks_of
from lightspan.triton_kernels.rounding import stochastic_round

SMALLEST_QUANTISED = 4096
"""Smaller parameters keep float32 moments: they weigh nothing, and norms are sensitive."""
LONGEST_QUANTISED_ROW = 8192
"""Longer rows keep float32 moments: one scale would have to serve too many numbers."""


def initial_state(parameter: Tensor, moments: MomentStorage) -> State:
    """Zero moments by name, of the parameter's own shape, and the number of steps; sharded as the parameter is."""
    width = parameter.shape[-1] if parameter.ndim else 1
    quantise = parameter.numel() >= SMALLEST_QUANTISED and width <= LONGEST_QUANTISED_ROW and _has_whole_rows(parameter)
    storage = moments if quantise else Float32Moments()
    dtype = torch.promote_types(parameter.dtype, torch.float32)
    layout = Layout(parameter.numel() // width, width, width, False, dtype, parameter.device, (0,))
    ranks = ranks_of(parameter)
    state = {"step": torch.zeros((), dtype=torch.float32, device=parameter.device)}  # the fused step reads it there
    for name in ("exp_avg", "exp_avg_sq"):
        for key, value in storage.initial(layout, name, width).items():
            state[key] = torch.empty_like(parameter, dtype=value.dtype).zero_() if key == name else value[0]
            if key != name and ranks is not None:
                shards = Shards(ranks, len(value[0]), moved=False)
                state[key] = shards.distributed(shards.own(value[0]))
    return state


def _has_whole_rows(parameter: Tensor) -> bool:
    """Whether each row, which shares one scale, lies on one rank, in the order in which ranks split scales."""
    ranks = ranks_of(parameter)
    if ranks is None:
        return True
    assert isinstance(parameter, DTensor)
    return parameter.ndim == 2 and parameter.placements[ranks.axis].is_shard(0)


def step_elementwise(
    parameters: list[Tensor],
    gradients: list[Tensor],
    states: list[State],
    group: dict[str, Any],
    moments: MomentStorage,
    clip: Tensor | None,
    seed: Tensor,
) -> None:
    """One step of AdamW on every parameter; torch's fused one for all that it can take in one call."""
    parameters, gradients = [local(p) for p in parameters], [local(g) for g in gradients]
    states = [{key: local(value) for key, value in state.items()} for state in states]
    if clip is not None:
        gradients = [gradient * clip for gradient in gradients]
    plain: list[int] = []
    for i, (parameter, state) in enumerate(zip(parameters, states, strict=True)):
        if not parameter.numel():  # of a small parameter a rank may hold nothing
            state["step"].add_(1)
        elif parameter.dtype == state["exp_avg"].dtype and parameter.dtype.itemsize >= 4:
            plain.append(i)  # lower precision would be rounded to nearest, weights and moments alike
        else:
            _step_widened(parameter, gradients[i], state, group, moments, seed + i)
    if plain:
        chosen = ([parameters[i] for i in plain], [gradients[i] for i in plain], [states[i] for i in plain])
        _adamw(*chosen, group)


def _step_widened(
    parameter: Tensor, gradient: Tensor, state: State, group: dict[str, Any], moments: MomentStorage, seed: Tensor
) -> None:
    """In float32 from end to end, rounded once: low-precision weights, or quantised moments, or both."""
    storage = Float32Moments() if state["exp_avg"].dtype == torch.float32 else moments
    rows: State = {}
    for name in ("exp_avg", "exp_avg_sq"):
        rows[name] = state[name].reshape(1, -1, parameter.shape[-1] if parameter.ndim else 1)
        if f"{name}_scale" in state:
            rows[f"{name}_scale"] = state[f"{name}_scale"][None]
    wide = {name: storage.load(rows, name).reshape(parameter.shape) for name in ("exp_avg", "exp_avg_sq")}
    weight = parameter.float()
    weight = weight.clone() if weight is parameter else weight
    _adamw([weight], [gradient.float()], [{**wide, "step": state["step"]}], group)
    for name in ("exp_avg", "exp_avg_sq"):
        storage.save(wide[name].reshape(rows[name].shape), rows, name, seed)
        state[name].copy_(rows[name].reshape(parameter.shape))
    parameter.copy_(stochastic_round(weight, seed + WEIGHT_STREAM) if parameter.dtype == torch.bfloat16 else weight)


def _adamw(parameters: list[Tensor], gradients: list[Tensor], states: list[State], group: dict[str, Any]) -> None:
    beta1, beta2 = group["betas"]
    adamw(
        parameters,
        gradients,
        [state["exp_avg"] for state in states],
        [state["exp_avg_sq"] for state in states],
        [],
        [state["step"] for state in states],
        fused=True,
        amsgrad=False,
        beta1=beta1,
        beta2=beta2,
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=False,
    )
