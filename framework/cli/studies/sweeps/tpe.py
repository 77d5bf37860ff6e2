"""The next point by Optuna's tree-structured Parzen estimator, from the results so far and nothing else.

Optuna keeps no state between two calls: what it knows is built anew from sweep.json and the runs' metrics, so a sweep
that is continued goes the way of an uninterrupted one.
Source: Bergstra et al. 2011, "Algorithms for Hyper-Parameter Optimization", section 4, as optuna.samplers.TPESampler.
"""

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lightspan.cli.runs.direction import Mode
from lightspan.cli.studies.sweeps.points import Axis, Choices, Settings, written
from lightspan.core.errors import UserError, install_extra

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.trial import FrozenTrial


def require() -> None:
    """Raises: UserError where Optuna is not installed."""
    try:
        import optuna  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"--method tpe needs Optuna, which is not installed: {install_extra('sweep')}, or use --method random"
        ) from error


def suggest(
    axes: Mapping[str, Axis], mode: Mode, known: Sequence[tuple[Settings, float | None]], seed: int
) -> Settings:
    """The point to try after those known.

    Args:
        axes: key -> what it runs through.
        known: the points before it, in order, with their metric: NaN for one without a result, which counts as worse
            than all others; None for one that is still running, which keeps others away from it.
        seed: of all draws; the point depends on it and on `known` alone.
    """
    require()
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        sampler = optuna.samplers.TPESampler(seed=seed * 2**20 + len(known), constant_liar=True, multivariate=True)
    study = optuna.create_study(sampler=sampler, direction="minimize" if mode == "min" else "maximize")
    spaces = {key: _distribution(axis) for key, axis in axes.items()}
    for point, value in known:
        study.add_trial(_trial(axes, spaces, point, value))
    chosen = study.ask(spaces).params
    return {key: _value(axis, chosen[key]) for key, axis in axes.items()}


def _distribution(axis: Axis) -> "BaseDistribution":
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if isinstance(axis, Choices) or axis.points is not None:
        return CategoricalDistribution(range(len(axis.grid())))  # values may be lists, which Optuna does not take
    if axis.whole:
        return IntDistribution(int(axis.low), int(axis.high), log=axis.log)
    return FloatDistribution(axis.low, axis.high, log=axis.log)


def _trial(
    axes: Mapping[str, Axis], spaces: Mapping[str, "BaseDistribution"], point: Settings, value: float | None
) -> "FrozenTrial":
    from optuna.trial import TrialState, create_trial

    given = {key: _index(axis, point[key]) for key, axis in axes.items()}
    if value is None:
        return create_trial(state=TrialState.RUNNING, params=given, distributions=dict(spaces))
    if math.isfinite(value):
        return create_trial(state=TrialState.COMPLETE, params=given, distributions=dict(spaces), value=value)
    # Optuna forgets failed trials and would propose them again; pruned ones are the worst.
    return create_trial(state=TrialState.PRUNED, params=given, distributions=dict(spaces))


def _index(axis: Axis, value: Any) -> Any:
    if isinstance(axis, Choices) or axis.points is not None:
        return list(map(written, axis.grid())).index(written(value))  # 1, 1.0 and true are equal and differ
    return value


def _value(axis: Axis, chosen: Any) -> Any:
    if isinstance(axis, Choices) or axis.points is not None:
        return axis.grid()[chosen]
    return chosen if axis.whole else axis.rounded(chosen)
