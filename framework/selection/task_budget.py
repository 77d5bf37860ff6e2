"""Which source tasks to buy labels of, for one target task that has few: the relevance of tasks becomes a budget.

Source: Wang, Chen, Jamieson, Du, "Improved Active Multi-Task Representation Learning via Lasso", ICML 2023, arXiv
2306.02556, in its two phases: a pilot of as many rows of each task gives the shared subspace and the heads, and the
Lasso the relevance nu, in proportion to whose magnitude the rest of the budget is spent.

Not of the paper: the default spends half of the budget evenly. A pilot that is too small for its number of tasks gives
heads that are mostly noise, of which the Lasso picks some, and then the paper's rule does worse than even spending. The
figure `cross_checked` measures this on the pilot itself.

Shapes: N rows, D columns, T source tasks, K dimensions of the subspace.
"""

from typing import Literal, NamedTuple, get_args

import numpy as np
from torch import Tensor

from lightspan.core.errors import UserError
from lightspan.core.ranges import require_in
from lightspan.datamodules.loading.selection import DataSelection
from lightspan.evaluation.estimator import Estimator
from lightspan.evaluation.features.features import Features
from lightspan.selection.design import design_matrix
from lightspan.selection.sampling import allocated
from lightspan.selection.selected import NamedSamples, SelectedData
from lightspan.selection.task_relevance import TaskMoments, lasso_relevance, least_l2, shared_subspace

Rule = Literal["mix", "l1", "l2", "uniform"]
TRUSTED = 0.75
"""Largest rest of the target that heads of the other half of a pilot may leave, of 1, for relevance to be trusted."""

Rows = tuple[Tensor, Tensor]
"""x [N D] and y [N] of a task."""


class PilotFit(NamedTuple):
    """What a pilot tells: the sources' heads, float64 [K T], and that of the target, [K], on one subspace."""

    heads_KT: np.ndarray
    target_K: np.ndarray

    @classmethod
    def of(cls, sources: list[Rows], target: Rows, rank: int) -> "PilotFit":
        found = shared_subspace(TaskMoments.of(sources), rank)
        return cls(found.heads_KT.numpy(), found.head_of(*target).numpy())

    def relevance(self, strength: float) -> np.ndarray:
        """nu by the Lasso, float64 [T]: `strength` is a share of the least one at which nu is 0."""
        largest = float(np.abs(self.heads_KT.T @ self.target_K).max())
        if not largest:
            return np.zeros(self.heads_KT.shape[1])
        return lasso_relevance(self.heads_KT, self.target_K, strength * largest)

    def rest(self, nu_T: np.ndarray) -> float:
        """|W nu - w|^2 / |w|^2: 0 where nu gives the target, 1 where it gives nothing; 1 for a target of 0."""
        size = float(np.square(self.target_K).sum())
        return float(np.square(self.heads_KT @ nu_T - self.target_K).sum()) / size if size else 1.0


def spending(pilot: PilotFit, rule: Rule, strength: float) -> np.ndarray:
    """Scores in proportion to which a budget is spent, float64 [T]: |nu| of the Lasso ("l1"), the square of the nu of
    least L2 norm ("l2"), the same for all ("uniform"), or half of the first and half of the last ("mix").
    """
    tasks = pilot.heads_KT.shape[1]
    even_T = np.full(tasks, 1 / tasks)
    if rule == "uniform":
        return even_T
    score_T = np.abs(pilot.relevance(strength)) if rule != "l2" else least_l2(pilot.heads_KT, pilot.target_K) ** 2
    if not score_T.any():
        return even_T
    score_T = score_T / score_T.sum()
    return (score_T + even_T) / 2 if rule == "mix" else score_T


def cross_checked(sources: list[Rows], target: Rows, rank: int, strength: float) -> float:
    """The rest that nu of one half of a pilot leaves of the target in the other half, the mean of both ways.

    Near 0 both halves agree on a mix of heads that gives the target; from 1 on the mix is worse than none. Rows are
    divided by turns, so they have to be in random order.
    """
    halves = []
    for start in (0, 1):
        parts = [(x[start::2], y[start::2]) for x, y in (*sources, target)]
        halves.append(PilotFit.of(parts[:-1], parts[-1], rank))
    one, two = halves
    return (one.rest(two.relevance(strength)) + two.rest(one.relevance(strength))) / 2


class TaskBudget(Estimator):
    """Chooses so many rows of the source tasks to label, for the sake of one target task.

    Of the features, the field `task` says which task asks, counted from 0, and the field `target`, or numbers as
    labels, its answer. Only answers of the pilot and of the target task are read; those of the other rows may be
    anything finite, such as 0, as long as they are not bought. The selection has the chosen rows of the sources, those
    of the pilot among them, and all rows of the target task.

    Args:
        budget: rows of all sources together, at least `pilot` of each.
        target: number of the target task.
        rank: K, of the subspace that tasks share; at most the number of columns.
        pilot: rows of each source whose answers are known, at least 2.
        rule: how the budget is spent, see `spending`.
        strength: of the Lasso, in (0, 1), as a share of the least at which no task is relevant.
        components: features are reduced to their strongest principal components first; None keeps all. A pilot of fewer
            rows than columns hardly tells the heads of its tasks.
        constant: whether a column of ones is added.
        seed: of the order in which rows of a task are taken.
    """

    def __init__(
        self,
        budget: int,
        target: int = 0,
        rank: int = 10,
        pilot: int = 50,
        rule: Rule = "mix",
        strength: float = 0.01,
        components: int | None = None,
        constant: bool = True,
        seed: int = 0,
    ) -> None:
        require_in("[1, inf)", budget=budget, rank=rank, components=components)
        require_in("[2, inf)", pilot=pilot)
        require_in("[0, inf)", target=target, seed=seed)
        require_in("(0, 1)", strength=strength)
        if rule not in get_args(Rule):
            raise UserError(f"rule={rule!r} is not one of {', '.join(get_args(Rule))}")
        self.budget, self.target, self.rank, self.pilot = budget, target, rank, pilot
        self.rule, self.strength, self.components = rule, strength, components
        self.constant, self.seed = constant, seed

    def fit(self, features: Features, samples: NamedSamples) -> SelectedData:
        """Raises: UserError for features without tasks or answers or that are not of these samples; for a target task
        without at least 2 rows, no source, one with fewer rows than the pilot, and a budget that does not fit.
        """
        index_N = samples.places(features)
        x_ND, y_N, task_N = self._columns(features)
        rows = {int(task): self._in_order(np.flatnonzero(task_N == task)) for task in np.unique(task_N)}
        own = rows.pop(self.target, np.empty(0, np.int64))
        if len(own) < 2 or not rows:
            raise UserError(
                f"target={self.target} has {len(own)} rows and there are {len(rows)} other tasks; it needs 2 rows and "
                "a source"
            )
        if short := [task for task, places in rows.items() if len(places) < self.pilot]:
            raise UserError(
                f"pilot={self.pilot} is more than the {len(rows[short[0]])} rows of task {short[0]}; lower it, or "
                "leave that task out"
            )
        pilots = [(x_ND[places[: self.pilot]], y_N[places[: self.pilot]]) for places in rows.values()]
        target = x_ND[own], y_N[own]
        fit = PilotFit.of(pilots, target, self.rank)
        most_T = np.array([len(places) for places in rows.values()])
        count_T = allocated(spending(fit, self.rule, self.strength), self.budget, self.pilot, most_T)
        rest = cross_checked(pilots, target, self.rank, self.strength)
        measured = {
            "rest of the target, cross-checked": rest,
            "relevance can be trusted": int(rest <= TRUSTED),
            "source tasks": len(rows),
            "of relevance above 0": int(np.count_nonzero(fit.relevance(self.strength))),
            "rows of the most bought task": int(count_T.max()),
            "rows of the target": len(own),
        }
        chosen = np.concatenate([own, *(places[:n] for places, n in zip(rows.values(), count_T, strict=True))])
        rule = f"{self.rule} budget of {self.budget} rows for task {self.target}, pilot {self.pilot}, seed {self.seed}"
        selection = DataSelection(samples.count, samples.name, rule, np.sort(index_N[chosen]))
        shown_N = np.full(samples.count, int(task_N.max()) + 1)  # rows without features are a group of their own
        shown_N[index_N] = task_N
        return SelectedData.of(selection, samples, measured, shown_N)

    def _in_order(self, places: np.ndarray) -> np.ndarray:
        generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence([self.seed, 5])))
        return generator.permutation(places)

    def _columns(self, features: Features) -> tuple[Tensor, Tensor, np.ndarray]:
        task_N, y_N = features.fields.get("task"), features.fields.get("target", features.label_N)
        if task_N is None or task_N.ndim != 1 or task_N.is_floating_point() or bool((task_N < 0).any()):
            raise UserError(
                "a budget over tasks needs the field `task`, a whole number from 0 a row; set fields: [task]"
            )
        if y_N is None or y_N.ndim != 1 or not y_N.is_floating_point():
            raise UserError("a budget over tasks needs one number a row as the answer: the field `target`, or labels")
        x_ND = design_matrix(features, self.components, self.constant)
        require_in(f"[1, {x_ND.shape[1]}]", rank=self.rank)
        return x_ND, y_N.double(), task_N.numpy()
