"""`RandomSubspace`: any optimiser, in d coordinates of a random slice through the initial weights.

Source: Li et al. 2018, arXiv 1804.08838; with `layer_scales` SAID of Aghajanyan et al. 2021, arXiv 2012.13255.
Shapes: D weights, d coordinates, l layers with a scale.
"""

import inspect
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Adafactor, Optimizer, SparseAdam

from lightspan.core.distributed import mean_over_ranks
from lightspan.core.errors import UserError
from lightspan.optim.affine import AffineSlice
from lightspan.optim.matrices.loading import described, load_between_hooks, numbered, with_own_groups
from lightspan.subspaces.projections import Fastfood, ProjectionCallable

OptimizerCallable = Callable[[Iterable[Any]], Optimizer]
"""Makes an optimiser of parameters: Lightning's type of this name, without importing a trainer for it."""

COORDINATES, SCALES, START = "coordinates", "scales", "start_sha256"
"""Names in the state of the first trained parameter, which contains all state; those of `inner` begin with the first
two."""


class RandomSubspace(Optimizer):
    """Trains theta = theta_0 + lambda P z: `inner` steps z, and the parameters follow.

    After the backward pass `step` maps the gradients to the coordinates, lets `inner` step, and writes theta_0 + P z
    to all parameters, even those that had no gradient. Accumulation, clipping and data-parallel means act on the
    gradients of the parameters as usual. Schedules act on `param_groups`, whose settings `inner` gets in each step.

    Weight decay, from `inner` or from a group, acts on all of theta: its gradient decay * theta is mapped to the
    coordinates, and added to that of the loss or, for an AdamW, to the step itself. All other settings are common to
    all groups.

    The state is that of the coordinates: d numbers and what `inner` keeps for them, plus the sha256 of theta_0. theta_0
    is only in memory, so a state is loaded into an optimiser that was built on the same initial weights. Sharded
    parameters (FSDP2) are written where they are; ranks sum d numbers. With `averages` set, gradients are each rank's
    own and their mean is computed in the coordinates: `lightspan.training.wiring.optimizers.average_in_coordinates`
    does so for DDP.

    Args:
        params: parameters, named parameters, or groups of either. Frozen ones are not in the subspace.
        inner: makes the optimiser of the coordinates, which must accept a vector and step only by its gradient. Its
            rate is 10 to 100 times what it would be for the weights.
        dim: d, lambdas included.
        projection: makes P from (size, dim, seed).
        seed: seed of P.
        per_tensor: each tensor has its own projection of the same z; see `PerTensor`.
        layer_scales: SAID's lambda for each layer, or for each tensor if parameters have no names.
        start: theta_0 for parameters that have already been trained, in their order.
    Raises: UserError for a `dim` out of range, an `inner` that cannot step coordinates or groups that differ, and in
        `step` for a gradient that is not finite.
    """

    KEPT_IN_COPIES: tuple[str, ...] = (
        "_slice", "_shared", "z_d", "scales_l", "inner", "_decoupled", "start_sha256", "averages",
    )  # fmt: skip
    """Own attributes that a copy or a pickle has; a class that adds attributes adds their names."""
    check_finite = True
    """A plan on fake tensors, whose numbers nobody knows, sets it to False."""

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
        defaults = _settings(inner)
        self._slice: AffineSlice | None = None
        super().__init__(params, {key: value for key, value in defaults.items() if key != "params"})
        trained = [pair for group in self.param_groups for pair in _trained(group)]
        if not trained:
            raise UserError("RandomSubspace got no parameter with requires_grad=True; unfreeze what should train")
        names, parameters = zip(*trained, strict=True)
        self._slice = AffineSlice(parameters, names, dim, projection, seed, per_tensor, layer_scales, start)
        self._shared = defaults.keys() - {"weight_decay"}
        self._require_one_setting()
        self.z_d, self.scales_l = (part.requires_grad_() for part in self._slice.origin())
        self.inner = inner([part for part in (self.z_d, self.scales_l) if part.numel()])
        self._decoupled = bool(defaults.get("decoupled_weight_decay"))
        self.start_sha256 = self._slice.start_sha256()
        self.averages = False
        for group in self.param_groups:
            group["rule"] = {"inner": type(self.inner).__name__, "projection": described(self._slice.projection)}

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
        reached = any(gradient is not None for gradient in gradients)
        if not (reached or self.averages):
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
        if self.averages:
            # A rank without a gradient counts zeros for the others; where no rank has one there is no step, as in one
            # process.
            reached_by = pulled[0].new_tensor(float(reached))
            mean_over_ranks([*pulled, reached_by])
            if not reached_by:
                return loss
        if self.check_finite and not math.isfinite(torch.linalg.vector_norm(torch.cat(pulled), torch.inf)):
            raise UserError(
                "the gradient is not finite, which in a random subspace affects every weight; nothing was changed. "
                "Lower the learning rate or clip gradients, and check the loss and the data of this step"
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
            raise UserError("the subspace was drawn for its first parameters; build a new RandomSubspace to add others")
        super().add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        # The state is empty before the first step: that is how torch's distributed checkpoints know that they must
        # create one, with what `inner` keeps, to load into. Other checkpoints of that moment contain the coordinates.
        if not self.state:
            self._publish()
        return super().state_dict()

    def __getstate__(self) -> dict[str, Any]:
        """What a copy or a pickle contains: as in torch, without hooks and what schedulers patched in."""
        return {**super().__getstate__(), **{key: self.__dict__[key] for key in self.KEPT_IN_COPIES}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads coordinates and what `inner` keeps, and moves the parameters to them.

        Raises: UserError for a state of another subspace, or of other initial weights; nothing is changed then.
        """
        load_between_hooks(self, state_dict, self._prepared, self._restore)

    def _saved(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """What `_publish` showed as the state of the first parameter that trains."""
        numbers = (number for p, _, number in numbered(self, state_dict) if p is self.slice.parameters[0])
        return state_dict["state"].get(next(numbers, None), {})

    def _prepared(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        saved = self._saved(state_dict)
        for name, own in ((COORDINATES, self.z_d), (SCALES, self.scales_l)):
            if name not in saved or saved[name].shape != own.shape:
                found = tuple(saved[name].shape) if name in saved else "missing"
                raise UserError(
                    f"the saved state has {name} of shape {found}, but this RandomSubspace has {tuple(own.shape)}; "
                    "resume with the dim, layer_scales and optimiser of that run"
                )
        if not torch.equal(saved[START].cpu(), self.start_sha256):
            raise UserError(
                "the saved coordinates belong to other initial weights than this model had when the optimiser was "
                "built (their sha256 differ); build the model with the same seed or pretrained weights, and the "
                "optimiser before any trained weights are loaded"
            )
        return with_own_groups(self, state_dict)

    def _restore(self, state_dict: dict[str, Any]) -> None:
        saved = self._saved(state_dict)
        with torch.no_grad():
            for name, own in ((COORDINATES, self.z_d), (SCALES, self.scales_l)):
                own.copy_(saved[name])
                kept = {key: value for key, value in saved.items() if key.startswith(f"{name}_")}
                self.inner.state[own] = {key.removeprefix(f"{name}_"): _copy(kept[key], own.device) for key in kept}
        self.slice.write(self.z_d, self.scales_l)
        self._publish()

    def _publish(self) -> None:
        """Shows the coordinates and the inner state as the first parameter's state, each under one name."""
        state: dict[str, Any] = {
            COORDINATES: self.z_d.detach(),
            SCALES: self.scales_l.detach(),
            START: self.start_sha256,
        }
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
        decays = {p: float(group.get("weight_decay", 0.0)) for group in self.param_groups for p in group["params"]}
        factors = [decays[parameter] for parameter in self.slice.parameters]
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


def _settings(inner: OptimizerCallable) -> dict[str, Any]:
    """The settings of `inner`, from one on a placeholder: coordinates cannot be created before their parameters are
    known.

    Raises: UserError for an optimiser that cannot step coordinates.
    """
    try:
        tried = inner([torch.zeros(1, requires_grad=True)])
    except UserError:
        raise
    except ValueError as error:  # as torch.optim.Muon does for vectors
        raise UserError(
            f"the coordinates of a RandomSubspace are a vector, and their optimiser refused one: {error}"
        ) from error
    kind = type(tried)
    way_out = "; use another, such as torch.optim.Adam"
    if inspect.signature(kind.step).parameters["closure"].default is inspect.Parameter.empty:
        raise UserError(
            f"{kind.__name__} evaluates the loss several times per step, but a RandomSubspace has one gradient{way_out}"
        )
    if isinstance(tried, Adafactor):
        raise UserError(
            f"{kind.__name__} steps relative to the size of what it trains, but coordinates start at 0{way_out}"
        )
    if isinstance(tried, SparseAdam):
        raise UserError(f"{kind.__name__} needs sparse gradients, but those of coordinates are dense{way_out}")
    return tried.defaults


def _copy(value: Any, device: torch.device) -> Any:
    """Counters of steps stay on the CPU, where torch keeps them."""
    if not isinstance(value, Tensor):
        return value
    return value.clone() if value.ndim == 0 else value.to(device, copy=True)
