"""`RandomSubspace`: any optimiser, in d coordinates of a random slice through the initial weights.

Source: Li et al. 2018, arXiv 1804.08838; with `layer_scales` SAID of Aghajanyan et al. 2021, arXiv 2012.13255.
Shapes: D weights, d coordinates, l layers with a scale.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor
from torch.optim import Optimizer

from lightspan.errors import UserError
from lightspan.optim.affine import AffineSlice
from lightspan.subspaces.projections import Fastfood, ProjectionCallable

COORDINATES, SCALES, START = "coordinates", "scales", "start_sha256"
"""Names in the state of the first trained parameter, which holds all there is; those of `inner` begin with the first
two."""


class RandomSubspace(Optimizer):
    """Trains theta = theta_0 + lambda P z: `inner` steps z, and the parameters follow.

    After the backward pass `step` takes the gradients to the coordinates, lets `inner` step, and writes theta_0 + P z
    into all parameters, also those that had no gradient. Accumulation, clipping and data-parallel means act on the
    gradients of the parameters as usual. Schedules act on `param_groups`, whose settings `inner` gets in each step.

    Weight decay, from `inner` or from a group, pulls at the whole of theta: its gradient decay * theta is taken to the
    coordinates, and joins that of the loss or, for an AdamW, the step itself. All other settings are common to all
    groups.

    The state is that of the coordinates: d numbers and what `inner` keeps for them, plus the sha256 of theta_0. theta_0
    is in memory only, so a state is loaded into an optimiser that was built on the same initial weights. Sharded
    parameters (FSDP2) are written where they are; ranks sum d numbers.

    Args:
        params: parameters, named parameters, or groups of either. Frozen ones stay out of the subspace.
        inner: makes the optimiser of the coordinates. Its rate is 10 to 100 times what it would be for the weights.
        dim: d, lambdas included.
        projection: makes P from (size, dim, seed).
        seed: of P.
        per_tensor: each tensor has a projection of its own, all fed the same z; see `PerTensor`.
        layer_scales: SAID's lambda for each layer, or for each tensor where parameters come without names.
        start: theta_0 for parameters that have moved already, in their order.
    Raises: UserError for a `dim` out of range or groups that differ, and in `step` for a gradient that is not finite.
    """

    def __init__(
        self,
        params: Iterable[Any],
        inner: OptimizerCallable,
        dim: int,
        projection: ProjectionCallable = Fastfood,
        seed: int = 0,
        per_tensor: bool = False,
        layer_scales: bool = False,
        start: Sequence[Tensor] | None = None,
    ) -> None:
        # A placeholder says which settings `inner` has: coordinates cannot be made before their parameters are known.
        defaults = inner([torch.zeros(1, requires_grad=True)]).defaults
        self._slice: AffineSlice | None = None
        super().__init__(params, {key: value for key, value in defaults.items() if key != "params"})
        trained = [(*pair, group) for group in self.param_groups for pair in _trained(group)]
        if not trained:
            raise UserError("RandomSubspace got no parameter with requires_grad=True; unfreeze what should train")
        names, parameters, self._groups = zip(*trained, strict=True)
        self._slice = AffineSlice(parameters, names, dim, projection, seed, per_tensor, layer_scales, start)
        self._shared = defaults.keys() - {"weight_decay"}
        self._require_one_setting()
        self.z_d, self.scales_l = (part.requires_grad_() for part in self._slice.origin())
        self.inner = inner([part for part in (self.z_d, self.scales_l) if part.numel()])
        self._decoupled = bool(defaults.get("decoupled_weight_decay"))
        self._digest = self._slice.start_sha256()

    @property
    def slice(self) -> AffineSlice:
        """The parameters and their map."""
        assert self._slice is not None
        return self._slice

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        gradients = [parameter.grad for parameter in self.slice.parameters]
        if all(gradient is None for gradient in gradients):
            return loss
        self._require_one_setting()
        settings = {key: value for key, value in self.param_groups[0].items() if key in self._shared}
        for group in self.inner.param_groups:
            group.update(settings)
            if "weight_decay" in group:
                group["weight_decay"] = 0.0
        g_D, decay_D = self.slice.flat(gradients), self._decay()
        if decay_D is not None and not self._decoupled:
            g_D += decay_D
        pulled = self._pull(g_D)
        if not all(bool(part.isfinite().all()) for part in pulled):
            raise UserError(
                "the gradient is not finite, and in a random subspace that reaches every weight; nothing was changed. "
                "Lower the learning rate or clip gradients, and look at the loss and the data of this step"
            )
        if decay_D is not None and self._decoupled:
            for variable, part in zip((self.z_d, self.scales_l), self._pull(decay_D), strict=True):
                variable.sub_(settings["lr"] * part)
        self.z_d.grad, self.scales_l.grad = pulled
        self.inner.step()
        self.inner.zero_grad()
        self.slice.write(self.z_d, self.scales_l)
        self._publish()
        return loss

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if self._slice is not None:
            raise UserError("the subspace is drawn for the parameters it has; build a new RandomSubspace to add others")
        super().add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        # The state is empty before the first step: that is how torch's distributed checkpoints know they have to make
        # one, with what `inner` keeps in it, to load into. Other checkpoints of that moment still hold the coordinates.
        if not self.state:
            self._publish()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads coordinates and what `inner` keeps, and moves the parameters there.

        Raises: UserError for a state of another subspace, or of other initial weights.
        """
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        place = [p for group in self.param_groups for p in group["params"]].index(self.slice.parameters[0])
        saved = state_dict["state"].get(numbers[place], {})
        for name, own in ((COORDINATES, self.z_d), (SCALES, self.scales_l)):
            if name not in saved or saved[name].shape != own.shape:
                found = tuple(saved[name].shape) if name in saved else "missing"
                raise UserError(
                    f"the saved state has {name} of shape {found}, this RandomSubspace has {tuple(own.shape)}; resume "
                    "with the dim, layer_scales and optimiser of that run"
                )
        if not torch.equal(saved[START].cpu(), self._digest):
            raise UserError(
                "the saved coordinates belong to other initial weights than this model had when the optimiser was "
                "built (their sha256 differ); build the model with the same seed or pretrained weights, and the "
                "optimiser before any trained weights are loaded"
            )
        super().load_state_dict({**state_dict, "state": {}})  # torch would cast state to the dtype of the parameters
        with torch.no_grad():
            for name, own in ((COORDINATES, self.z_d), (SCALES, self.scales_l)):
                own.copy_(saved[name])
                kept = {key: value for key, value in saved.items() if key.startswith(f"{name}_")}
                self.inner.state[own] = {key.removeprefix(f"{name}_"): _copy(kept[key], own.device) for key in kept}
        self.slice.write(self.z_d, self.scales_l)
        self._publish()

    def _publish(self) -> None:
        """Shows the coordinates and the inner state as the first parameter's state, under one name each."""
        state: dict[str, Any] = {COORDINATES: self.z_d.detach(), SCALES: self.scales_l.detach(), START: self._digest}
        for name, own in ((COORDINATES, self.z_d), (SCALES, self.scales_l)):
            kept = self.inner.state.get(own, {})
            state.update({f"{name}_{key}": value for key, value in kept.items() if value is not None})
        for parameter in self.slice.parameters:
            self.state[parameter] = {}  # torch's distributed checkpoints ask every parameter that trains for an entry
        self.state[self.slice.parameters[0]] = state

    def _pull(self, g_D: Tensor) -> tuple[Tensor, Tensor]:
        return self.slice.pull(g_D, self.z_d.detach(), self.scales_l.detach())

    def _decay(self) -> Tensor | None:
        """decay * theta [D], the gradient of decay / 2 |theta|^2; None if no group decays."""
        factors = [float(group.get("weight_decay", 0.0)) for group in self._groups]
        return self.slice.flat(self.slice.parameters, factors) if any(factors) else None

    def _require_one_setting(self) -> None:
        first = self.param_groups[0]
        for group in self.param_groups[1:]:
            for key in self._shared:
                if group[key] != first[key]:
                    raise UserError(
                        f"parameter groups have {key}={first[key]} and {group[key]}, but one set of coordinates moves "
                        f"them all; give them the same {key} (Method: groups.other_lr=null)"
                    )


def _trained(group: dict[str, Any]) -> list[tuple[str, Tensor]]:
    """(name or "", parameter) of what is not frozen."""
    names = group.get("param_names") or [""] * len(group["params"])
    return [pair for pair in zip(names, group["params"], strict=True) if pair[1].requires_grad]


def _copy(value: Any, device: torch.device) -> Any:
    """Counters of steps stay on the CPU, where torch keeps them."""
    if not isinstance(value, Tensor):
        return value
    return value.clone() if value.ndim == 0 else value.to(device, copy=True)
