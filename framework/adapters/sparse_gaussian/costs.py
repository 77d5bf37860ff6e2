"""What sparse Gaussian layers cost beside dense ones: bytes as they are stored, and operations, each counted openly.

Shapes: n weights of a layer, k of them active, p output positions of one sample.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightspan.adapters.sparse_gaussian.inject import gaussian_layers
from lightspan.adapters.sparse_gaussian.layer import SparseGaussian
from lightspan.core.results import Figure, Result

PRODUCTS = 2
"""Of a variational layer in a forward pass: x by mu, and x^2 by sigma^2."""
PASSES = 3
"""A training step is a forward pass and two of its size backward, for the input and for the weight."""


@dataclass(frozen=True)
class Costs(Result):
    """Of all sparse Gaussian layers of a network; operations are multiplications with their additions, counted as two,
    of one sample in one training step. The noise, norms and everything outside of these layers are left out.

    Attributes:
        weights, active: n and k, over all layers.
        stored_bytes: of mu, rho and places, as they are.
        dense_bytes: of mu and rho of all weights, which is what dense variational inference stores.
        optimizer_bytes, dense_optimizer_bytes: of what an optimiser keeps for them, where it does.
        sparse_flops: 2 * 2 * 3 k p: with kernels that skip what is inactive, plus the dense gradient of the steps that
            move coordinates. No such kernels are used here.
        dense_flops: 2 * 2 * 3 n p, of dense variational inference; that is also what is computed here.
    """

    weights: int
    active: int
    stored_bytes: int
    dense_bytes: int
    optimizer_bytes: int
    dense_optimizer_bytes: int
    sparse_flops: float
    dense_flops: float

    def figures(self) -> tuple[Figure, ...]:
        return (
            Figure("active weights", self.active / max(self.weights, 1)),
            Figure("stored", self.stored_bytes, "B"),
            Figure("stored by dense VI", self.dense_bytes, "B"),
            Figure("optimiser state", self.optimizer_bytes, "B"),
            Figure("optimiser state of dense VI", self.dense_optimizer_bytes, "B"),
            Figure("step with sparse kernels", self.sparse_flops, "FLOP"),
            Figure("step as computed here, and by dense VI", self.dense_flops, "FLOP"),
        )


def costs(
    model: nn.Module, sample: Tensor, optimizer: torch.optim.Optimizer | None = None, watched: float = 0.0
) -> Costs:
    """Runs the model once, in evaluation mode and by its means, to see how often each weight is used.

    Args:
        sample: one input, [1 ...].
        optimizer: whose state is counted.
        watched: share of the steps whose dense gradient is needed, such as 0.75 / 100.
    """
    layers = gaussian_layers(model)
    positions = _positions(model, layers, sample)
    sparse = dense = 0.0
    stored = dense_stored = state = dense_state = active = weights = 0
    for name, layer in layers.items():
        k, n = len(layer.mu), layer.count
        once = 2 * PRODUCTS * PASSES * positions[name]
        sparse, dense = sparse + once * k + 2 * positions[name] * watched * (n - k), dense + once * n
        stored += sum(_bytes(tensor) for tensor in (layer.mu, layer.rho, layer.places))
        dense_stored += n * (layer.mu.element_size() + layer.rho.element_size())
        kept = 0 if optimizer is None else sum(_state_bytes(optimizer, p) for p in (layer.mu, layer.rho))
        state, dense_state = state + kept, dense_state + (kept * n // k if k else 0)
        active, weights = active + k, weights + n
    return Costs(weights, active, stored, dense_stored, state, dense_state, sparse, dense)


def _positions(model: nn.Module, layers: dict[str, SparseGaussian], sample: Tensor) -> dict[str, int]:
    """p of each layer; 0 for one that is not called."""
    found = dict.fromkeys(layers, 0)

    def counting(name: str, layer: SparseGaussian) -> object:
        def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            found[name] += output.numel() // layer.shape.out_features

        return layer.register_forward_hook(count)

    hooks = [counting(name, layer) for name, layer in layers.items()]
    training = {module: module.training for module in model.modules()}
    try:
        with torch.no_grad():
            model.eval()(sample)
    finally:
        for hook in hooks:
            hook.remove()  # type: ignore[attr-defined]
        for module, mode in training.items():
            module.training = mode
    return found


def _bytes(tensor: Tensor) -> int:
    return tensor.untyped_storage().nbytes()


def _state_bytes(optimizer: torch.optim.Optimizer, parameter: Tensor) -> int:
    values = optimizer.state.get(parameter, {}).values()
    return sum(_bytes(value) for value in values if isinstance(value, Tensor) and value.shape == parameter.shape)
