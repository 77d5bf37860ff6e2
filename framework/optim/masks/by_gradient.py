"""Masks with a gradient: logits of a Concrete distribution, trained beside the weights."""

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adagrad, Adam, Adamax, NAdam, Optimizer, RAdam, RMSprop

from lightspan.core.devices import wide, wide_type
from lightspan.core.errors import UserError
from lightspan.core.sharded import ranks_of, total_over
from lightspan.optim.masks.follow import probed_state, require_entrywise
from lightspan.optim.masks.learner import MaskLearner, on_cpu
from lightspan.subspaces.masks.distributions import BinaryConcrete, MaskDistribution, require_temperature
from lightspan.subspaces.masks.expected_count import shift_to_count
from lightspan.subspaces.masks.schedules import Schedule, schedule_of

LogitOptimizerCallable = Callable[[Iterable[Any]], Optimizer]
"""Makes the optimiser of the logits."""
ELEMENTWISE = (SGD, Adam, Adamax, NAdam, RAdam, RMSprop, Adagrad)


class ByGradient(MaskLearner):
    """A mask m is drawn for every optimiser step, from logits x, one an entry, and the network runs with w m. Gradients
    of x are those of the sample, g w dm/dx for a gradient g of w m; those of w are g m.

    After each step of x the expected number of open entries is brought down to the density of the moment, if it is
    above, by the smallest shift of all logits in a ranking (`lightspan.subspaces.masks.expected_count`). So the density
    is a limit, not a penalty with a weight to tune. When the mask is fixed the entries with the largest logits stay.

    The logits are plain float32 numbers of the callback, not of the module: nothing clips or decays them.

    Args:
        distribution: binary or hard Concrete.
        temperature: T > 0 or its schedule.
        optimizer: of the logits, an elementwise one. None makes one of the class, settings and rate of the weights'
            optimiser, and follows its schedule; logits often want a rate 10 to 100 times that.
        start: logits at the start, finite; 0 opens an entry with probability 1/2.
    """

    def __init__(
        self,
        distribution: MaskDistribution | None = None,
        temperature: float | Schedule = 0.5,
        optimizer: LogitOptimizerCallable | None = None,
        start: float = 0.0,
    ) -> None:
        self.distribution, self.temperature = distribution or BinaryConcrete(), schedule_of(temperature)
        for value in self.temperature.ends():
            require_temperature(value)
        if not abs(start) < 100:
            raise UserError(f"ByGradient start={start} is a logit and must lie between -100 and 100")
        self.optimizer, self.start = optimizer, start

    def prepare(self, optimizer: Optimizer | None) -> None:
        self.logits = {
            name: torch.full_like(place.weight, self.start, dtype=wide_type(place.weight.dtype)).requires_grad_()
            for name, place in self.places.items()
        }
        self._followed = optimizer if self.optimizer is None else None
        parameters = list(self.logits.values())
        if self.optimizer is not None:
            self._steps = _named(self.optimizer, parameters)
        else:
            self._steps = SGD(parameters, lr=0.0) if optimizer is None else _alike(optimizer, parameters)
        self._drawn: dict[str, Tensor] = {}
        self._step, self._progress = -1, 0.0
        self._limit(0.0)

    def draw(self, step: int, progress: float) -> None:
        if step == self._step and self._drawn.keys() == self.places.keys():
            return
        self._step, self._progress = step, progress
        self._steps.zero_grad()  # of a step that was not taken
        temperature = self.temperature.at(progress)
        with torch.enable_grad():
            self._drawn = {
                name: self.distribution.sample(self.logits[name], temperature, place.uniform(self.seed, step))
                for name, place in self.places.items()
            }

    def factor(self, name: str) -> Tensor:
        return self._drawn[name].detach()

    def mean_factor(self, name: str) -> Tensor:
        return self.distribution.mean_mask(self.logits[name].detach())

    def pull(self, name: str, gradient_S: Tensor) -> Tensor:
        drawn_S = self._drawn.pop(name)
        (self.logits[name].grad,) = torch.autograd.grad(
            drawn_S, self.logits[name], (gradient_S * self.places[name].weight).to(drawn_S.dtype)
        )
        return gradient_S * drawn_S.detach()

    def update(self, step: int, progress: float) -> bool:
        if self._followed is not None:
            for group in self._steps.param_groups:
                group["lr"] = self._followed.param_groups[0]["lr"]
        self._steps.step()
        self._steps.zero_grad()
        self._drawn = {}
        self._progress = progress
        self._limit(progress)
        return False

    def chosen(self, progress: float) -> dict[str, Tensor]:
        return self.highest(self.logits, self.density.at(progress))

    @torch.no_grad()
    def open_counts(self) -> dict[str, float]:
        temperature = self.temperature.at(self._progress)
        return self.totals(
            {name: self.distribution.keep_probability(x, temperature) for name, x in self.logits.items()}
        )

    def figures(self, progress: float) -> dict[str, float]:
        return {"temperature": self.temperature.at(progress)}

    def state_dict(self) -> dict[str, Any]:
        moments = {}
        for name, logits in self.logits.items():
            kept = self._steps.state.get(logits, {})
            parts = {key: value for key, value in kept.items() if isinstance(value, Tensor)}
            whole = {
                key: self.places[name].whole(value) if value.shape == logits.shape and value.ndim else value
                for key, value in parts.items()
            }
            moments[name] = on_cpu(whole)
        return {"logits": on_cpu(self.wholes(self.logits)), "moments": moments}

    @torch.no_grad()
    def load_masks(self, state: Mapping[str, Any]) -> None:
        for name, logits in self.saved(state, "logits").items():
            self.logits[name].copy_(logits)

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        saved, moments = self.saved(state, "logits"), state.get("moments")
        keeps = {key for key, value in probed_state(self._steps).items() if isinstance(value, Tensor)}
        told = bool(keeps) or isinstance(self._steps, ELEMENTWISE)
        for name, place in self.places.items():
            kept = moments.get(name) if isinstance(moments, Mapping) else None
            if not isinstance(kept, Mapping) or {value.shape for value in kept.values()} - {place.shape, torch.Size()}:
                raise UserError(f"the saved masks have no moments of {name} that fit its {tuple(place.shape)} logits")
            if told and kept and kept.keys() != keeps:
                raise UserError(
                    f"the saved logits of {name} have moments {', '.join(sorted(kept))}, and a "
                    f"{type(self._steps).__name__} as it is here keeps {', '.join(sorted(keeps)) or 'none'}; resume "
                    "with the optimizer of ByGradient of that run"
                )
            self.logits[name].copy_(saved[name])
            self._steps.state[self.logits[name]] = {
                key: place.own(value).clone() if value.shape == place.shape and value.ndim else value.clone()
                for key, value in kept.items()
            }
        self._step, self._drawn = -1, {}

    @torch.no_grad()
    def _limit(self, progress: float) -> None:
        """Shifts logits so that no group expects more open entries than the density allows."""
        temperature, shapes = self.temperature.at(progress), {name: p.shape for name, p in self.places.items()}
        for names, count in self.allocation.groups(shapes, self.density.at(progress)):
            numbers = sum(shapes[name].numel() for name in names)
            if count >= numbers:
                continue
            parts = [
                (ranks_of(self.places[n].parameter), self.distribution.keep_logits(self.logits[n], temperature))
                for n in names
            ]

            def sums(shift: float, parts: Any = parts) -> tuple[float, float]:
                open_ones = [(ranks, torch.sigmoid(x - shift)) for ranks, x in parts]
                both = (
                    total_over(open_ones),
                    total_over([(ranks, p * (1 - p)) for ranks, p in open_ones]),
                )
                total, slope = torch.stack(both).tolist()
                return total, slope

            # A bound on the largest logit is enough, and a sum over ranks gives one that is the same on all of them.
            highest = float(total_over([(ranks, wide(x).clamp_min(0).square().sum()) for ranks, x in parts])) ** 0.5
            if shift := shift_to_count(sums, count, numbers, highest):
                for name in names:
                    self.logits[name].sub_(shift)


def _named(make: LogitOptimizerCallable, parameters: list[Tensor]) -> Optimizer:
    """The optimiser that `make` gives. Raises: UserError unless it is an elementwise one of all the parameters."""
    made: Any = make(parameters)
    groups = made.param_groups if isinstance(made, Optimizer) else []
    if {id(one) for group in groups for one in group["params"]} != {id(one) for one in parameters}:
        raise UserError(
            f"optimizer of ByGradient must give an optimiser of all logits, and gave {type(made).__name__} of "
            f"{sum(len(group['params']) for group in groups)} out of {len(parameters)}"
        )
    require_entrywise(made)
    return made


def _alike(optimizer: Optimizer, parameters: list[Tensor]) -> Optimizer:
    """An optimiser of other numbers of the same class and settings. Raises: UserError for one that is no elementwise
    optimiser of torch.
    """
    if not isinstance(optimizer, ELEMENTWISE):
        raise UserError(
            f"the logits of ByGradient cannot be trained by a {type(optimizer).__name__}, which does not treat numbers "
            "one by one; name an optimizer for them, such as torch.optim.Adam"
        )
    first, taken = optimizer.param_groups[0], inspect.signature(type(optimizer)).parameters
    settings = {key: first[key] for key in optimizer.defaults if key in taken and key in first}
    settings.update({key: value for key, value in (("weight_decay", 0.0), ("fused", None)) if key in taken})
    made: Optimizer = type(optimizer)(parameters, **settings)
    return made
