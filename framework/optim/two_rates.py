"""`TwoRates`: an optimiser whose rule in matrices needs a rate that is far too high for the AdamW of the rest."""

from collections.abc import Iterable
from copy import deepcopy
from math import isclose
from typing import Any

from torch import Tensor

from lightspan.core.errors import UserError
from lightspan.optim.matrices.limits import require_valid
from lightspan.optim.matrices.matrix_optimizer import MatrixOptimizer


class TwoRates(MatrixOptimizer):
    """What is not projected (vectors, matrices that the rule does not take, and groups with project=False) is stepped
    at a rate of its own: if a group has no `lr` of its own, it gets `other_lr`, in a separate group after it, which
    keeps that rate under this name. A schedule that takes one rate for all groups, such as OneCycleLR(max_lr=0.02),
    would give both the same: unless the two are equal, the first step with rates above 0 refuses it, even if a group
    without projected parameters has an `lr` of its own. Give the schedule a list,
    max_lr=[group["lr"] for group in optimizer.param_groups]; schedules that multiply rates keep their ratio.

    Raises: UserError in the first step with rates above 0 if a schedule has given both kinds of groups the same rate.

    Args:
        lr: of the projected matrices.
        other_lr: of everything else, unless a group has `lr`; >= 0.
        options: of the next class in the order of resolution: `MatrixOptimizer`, or a `LowRank` that is mixed in.
    """

    KEPT_IN_COPIES: tuple[str, ...] = ("other_lr", "rates_checked")
    KEYS_OF_GROUPS = MatrixOptimizer.KEYS_OF_GROUPS | {"other_lr"}

    def __init__(
        self, params: Iterable[Any], lr: float | Tensor = 1e-3, *, other_lr: float | Tensor = 3e-4, **options: Any
    ) -> None:
        require_valid(type(self).__name__, {"lr": lr, "other_lr": other_lr})  # a rule may take one for both
        self.other_lr = other_lr
        super().__init__(params, lr, **options)
        own = (group["other_lr"] for group in self.param_groups if "other_lr" in group)
        self.rates_checked = all(_alike(float(rate), float(lr)) for rate in own)  # then there is nothing to keep apart

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds the group, or two: in a group without a rate, what is not projected gets `other_lr`."""
        has_rate = "lr" in param_group
        super().add_param_group(param_group)
        group = self.param_groups.pop()
        projected = [self.projected(p, group) for p in group["params"]]
        if has_rate:
            if not any(projected):
                group.setdefault("other_lr", deepcopy(group["lr"]))
            self.param_groups.append(group)
            return
        # A copy: schedules fill rates that are tensors, and `other_lr` is where they began.
        for wanted, rate in ((True, group["lr"]), (False, deepcopy(self.other_lr))):
            members = [i for i, is_projected in enumerate(projected) if is_projected == wanted]
            if members:
                lists: dict[str, Any] = {
                    key: [group[key][i] for i in members] for key in ("params", "param_names") if key in group
                }
                own: dict[str, Any] = {} if wanted else {"other_lr": self.other_lr}
                if not wanted and "name" in group and any(projected):  # names distinguish groups, also in logs of rates
                    own["name"] = f"{group['name']}-other"
                self.param_groups.append({**group, **lists, "lr": rate, **own})
        self._info = {p: self._info_of(p) for p in self._parameters()}  # in the order of groups

    def require_rates(self) -> None:
        self._refuse_one_rate()
        self.rates_checked = self._has_rates()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As `MatrixOptimizer.load_state_dict`. What has stepped at these rates before has them by choice."""
        super().load_state_dict(state_dict)
        self.rates_checked |= bool(self.state) and self._has_rates()

    def _has_rates(self) -> bool:
        """Whether both kinds of groups have a rate above 0: a warm-up that begins at 0 says nothing before."""
        rates = [("other_lr" in group, _peak(group) > 0) for group in self.param_groups]
        return all((kind, True) in rates for kind, _ in rates)

    def _refuse_one_rate(self) -> None:
        peaks = [_peak(group) for group in self.param_groups if "other_lr" not in group]
        for group in self.param_groups:
            peak = _peak(group)
            kept = _alike(peak, float(group.get("other_lr", peak)))
            if peak > 0 and not kept and any(_alike(peak, other) for other in peaks):
                raise UserError(
                    f"a schedule gives AdamW's group of {type(self).__name__} the rate of Newton-Schulz, {peak:g}, "
                    f"instead of other_lr={float(group['other_lr']):g}; give the schedule a list of rates, one for "
                    'each group, such as max_lr=[group["lr"] for group in optimizer.param_groups], or build the '
                    "optimiser with other_lr equal to lr if one rate is meant for all, as by a finder of rates"
                )


def _alike(one: float, other: float) -> bool:
    """Whether two rates are one that was given: a tensor has it in float32."""
    return isclose(one, other, rel_tol=1e-6)


def _peak(group: dict[str, Any]) -> float:
    """The highest rate that a group is known to get: schedules store theirs under these names."""
    return max(float(group.get(name, 0.0)) for name in ("lr", "initial_lr", "max_lr"))
