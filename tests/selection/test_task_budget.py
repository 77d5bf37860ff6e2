"""Relevance of tasks against its definition, low-rank regression of many tasks, and budgets that follow from them."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import Lasso
from torch import Tensor

from lightspan.core.errors import UserError
from lightspan.datamodules.image.sets.small import Digits
from lightspan.datamodules.image.variants.questions import YesNoTasks
from lightspan.datamodules.image.variants.tasks import Derived
from lightspan.evaluation.features.features import Features
from lightspan.selection.sampling import allocated
from lightspan.selection.selected import NamedSamples
from lightspan.selection.task_budget import PilotFit, Rows, Rule, TaskBudget, cross_checked, spending
from lightspan.selection.task_relevance import (
    TaskMoments,
    lasso_relevance,
    least_l1,
    least_l2,
    shared_subspace,
)

TASKS, RANK, WIDTH = 40, 5, 20


def heads(seed: int = 0, tasks: int = TASKS) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    return generator.standard_normal((RANK, tasks)), generator.standard_normal(RANK)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000))
def test_the_least_l1_norm_gives_the_target_with_few_tasks(seed: int) -> None:
    heads_KT, target_K = heads(seed)
    one_T, two_T = least_l1(heads_KT, target_K), least_l2(heads_KT, target_K)
    for nu_T in (one_T, two_T):
        assert heads_KT @ nu_T == pytest.approx(target_K, abs=1e-8)
    assert np.count_nonzero(np.abs(one_T) > 1e-12) <= RANK
    assert np.abs(one_T).sum() <= np.abs(two_T).sum() + 1e-9
    assert np.linalg.norm(two_T) <= np.linalg.norm(one_T) + 1e-9


def test_the_target_that_is_a_source_needs_that_source_alone() -> None:
    heads_KT, _ = heads()
    heads_KT = heads_KT / np.linalg.norm(heads_KT, axis=0)
    assert least_l1(heads_KT, heads_KT[:, 7]) == pytest.approx(np.eye(TASKS)[7], abs=1e-9)


def test_of_as_many_sources_as_dimensions_there_is_one_mix() -> None:
    heads_KT, target_K = heads(tasks=RANK)
    assert least_l1(heads_KT, target_K) == pytest.approx(least_l2(heads_KT, target_K), abs=1e-8)


def test_turning_the_subspace_leaves_relevance_as_it_is() -> None:
    heads_KT, target_K = heads()
    turn = np.linalg.qr(np.random.default_rng(1).standard_normal((RANK, RANK)))[0]
    for rule in (least_l1, least_l2, lambda w, t: lasso_relevance(w, t, 0.1)):
        assert rule(turn @ heads_KT, turn @ target_K) == pytest.approx(rule(heads_KT, target_K), abs=1e-7)


def test_the_lasso_is_that_of_coordinate_descent_and_tends_to_the_linear_programme() -> None:
    heads_KT, target_K = heads()
    by_descent = Lasso(alpha=0.1 / RANK, fit_intercept=False, tol=1e-10, max_iter=100_000).fit(heads_KT, target_K)
    assert lasso_relevance(heads_KT, target_K, 0.1) == pytest.approx(by_descent.coef_, abs=1e-6)
    assert lasso_relevance(heads_KT, target_K, 1e-7) == pytest.approx(least_l1(heads_KT, target_K), abs=1e-5)
    assert not lasso_relevance(heads_KT, target_K, float(np.abs(heads_KT.T @ target_K).max())).any()


class World:
    """Unit heads of `TASKS` sources in `RANK` of `WIDTH` dimensions, a target that mixes three, noise 1."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.basis_DK = torch.linalg.qr(self.drawn(WIDTH, RANK)).Q
        self.heads_KT = torch.nn.functional.normalize(self.drawn(RANK, TASKS), dim=0)
        self.target_K = torch.nn.functional.normalize(self.heads_KT[:, :3].sum(dim=1), dim=0)

    def drawn(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64)

    def rows(self, head_K: Tensor, count: int, noise: float = 1.0) -> Rows:
        x_ND = self.drawn(count, WIDTH)
        return x_ND, x_ND @ self.basis_DK @ head_K + noise * self.drawn(count)

    def sources(self, counts: list[int], noise: float = 1.0) -> list[Rows]:
        return [self.rows(self.heads_KT[:, task], count, noise) for task, count in enumerate(counts)]

    def missed(self, basis_DK: Tensor) -> float:
        """Squared distance of the target from a subspace."""
        target_D = self.basis_DK @ self.target_K
        return float((target_D - basis_DK @ (basis_DK.T @ target_D)).square().sum())


def test_without_noise_the_subspace_and_the_heads_are_found() -> None:
    world = World(0)
    # Fewer rows than columns, so that no task alone tells its head.
    tasks = world.sources([12] * TASKS, noise=0)
    found = shared_subspace(TaskMoments.of(tasks), RANK, steps=1000, tolerance=1e-12)
    assert found.loss < 1e-5
    assert world.missed(found.basis_DK) < 1e-6
    assert torch.allclose(found.basis_DK.T @ found.basis_DK, torch.eye(RANK, dtype=torch.float64), atol=1e-12)
    turned = found.basis_DK @ found.head_of(*world.rows(world.target_K, 12, noise=0))
    assert torch.allclose(turned, world.basis_DK @ world.target_K, atol=1e-3)


def test_it_starts_from_solutions_that_weigh_as_the_roots_of_their_rows() -> None:
    generator = torch.Generator().manual_seed(0)
    many, few = (torch.randn(rows, 3, generator=generator) for rows in (400, 16))
    tasks = TaskMoments.of([(many, many[:, 0]), (few, 4 * few[:, 1])])  # lengths of 20 and of 16
    found = shared_subspace(tasks, 1, steps=0)
    torch.testing.assert_close(found.basis_DK.abs(), torch.eye(3).double()[:, :1], rtol=0, atol=1e-6)


def test_the_loss_is_that_of_the_rows_and_falls_with_every_step() -> None:
    tasks = World(1).sources([30] * TASKS)
    losses = []
    for steps in (0, 1, 2, 5, 20):
        found = shared_subspace(TaskMoments.of(tasks), RANK, steps, tolerance=0)
        rest = [(x @ found.basis_DK @ found.heads_KT[:, t] - y).square().sum() for t, (x, y) in enumerate(tasks)]
        assert found.loss == pytest.approx(float(sum(rest)))
        losses.append(found.loss)
    assert losses == sorted(losses, reverse=True)


def test_many_columns_are_fitted_by_gradients_to_the_same_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = TaskMoments.of(World(2).sources([30] * TASKS))
    at_once = shared_subspace(tasks, RANK, 30, 0).loss
    monkeypatch.setattr("lightspan.selection.task_relevance.SOLVED_AT_ONCE", 0)
    assert shared_subspace(tasks, RANK, 30, 0).loss == pytest.approx(at_once, rel=1e-6)


def test_fewer_tasks_than_dimensions_and_one_row_a_task_have_an_answer() -> None:
    world = World(3)
    for counts in ([30, 30], [1] * TASKS):
        found = shared_subspace(TaskMoments.of(world.sources(counts)), RANK)
        assert found.basis_DK.shape == (WIDTH, RANK)
        assert found.heads_KT.isfinite().all()
    zeros = [(torch.zeros(5, WIDTH), torch.zeros(5))] * 3
    assert shared_subspace(TaskMoments.of(zeros), RANK).loss == 0


def missed(rule: Rule, pilot: int, targets: int, seed: int, known: bool = False, budget: int = 4000) -> float:
    """How far the target is from the subspace that a budget finds."""
    world = World(seed)
    tasks, own = world.sources([pilot] * TASKS), world.rows(world.target_K, targets)
    fit = PilotFit.of(tasks, own, RANK)
    if known:
        fit = PilotFit(world.heads_KT.numpy(), world.target_K.numpy())
    counts = allocated(spending(fit, rule, 1e-3), budget, pilot)
    more = world.sources([int(count) - pilot for count in counts])
    joined = [(torch.cat([a[0], b[0]]), torch.cat([a[1], b[1]])) for a, b in zip(tasks, more, strict=True)]
    return world.missed(shared_subspace(TaskMoments.of(joined), RANK).basis_DK)


def test_with_known_heads_a_budget_by_l1_finds_the_target_best() -> None:
    mean = {
        r: np.mean([missed(r, 5, 50, s, known=True, budget=1000) for s in range(6)]) for r in ("l1", "l2", "uniform")
    }
    assert mean["l1"] <= 0.75 * mean["l2"]
    assert mean["l1"] <= 0.4 * mean["uniform"]


@pytest.mark.sample(1)
@pytest.mark.parametrize(("pilot", "targets", "helps"), [(50, 500, True), (25, 50, False)])
def test_a_pilot_that_is_too_small_misleads_the_budget_by_l1_and_its_check_says_so(
    pilot: int, targets: int, helps: bool
) -> None:
    """The case in which the method loses: l1 after the smaller pilot is no better than even spending, and the default
    mix keeps most of the gain.
    """
    mean = {rule: np.mean([missed(rule, pilot, targets, s) for s in range(10)]) for rule in ("l1", "mix", "uniform")}
    world = [World(seed) for seed in range(10)]
    rest = [cross_checked(w.sources([pilot] * TASKS), w.rows(w.target_K, targets), RANK, strength=1e-2) for w in world]
    assert bool(np.median(rest) < 0.75) is helps
    assert bool(mean["l1"] < 0.8 * mean["uniform"]) is helps
    assert mean["mix"] < mean["uniform"]


def features(seed: int = 0, noise: float = 0.1, dtype: torch.dtype = torch.float32) -> Features:
    """A target of 40 rows and six sources of 60, of which the first asks the same."""
    world = World(seed)
    all_heads = [world.target_K, world.target_K, *world.heads_KT.T[:5]]
    rows = [world.rows(head, 60 if task else 40, noise) for task, head in enumerate(all_heads)]
    x, y = (torch.cat(column) for column in zip(*rows, strict=True))
    task = torch.arange(7).repeat_interleave(torch.tensor([40, *[60] * 6]))
    return Features(x.to(dtype), index_N=torch.arange(400), fields={"task": task, "target": y.float()})


def of(count: int) -> NamedSamples:
    return NamedSamples(count, "0" * 32, (count,))


BUDGET: dict[str, Any] = {"budget": 160, "rank": 5, "pilot": 20, "constant": False}


def bought(found: Any, given: Features) -> list[int]:
    return np.bincount(given.fields["task"][found.selection().index_n], minlength=7).tolist()


def test_a_budget_is_spent_by_the_size_of_the_l1_mix_the_square_of_the_l2_mix_or_evenly() -> None:
    heads_KT, target_K = heads(tasks=8)
    pilot = PilotFit(heads_KT, target_K)
    one_T, two_T = np.abs(pilot.relevance(0.01)), (np.linalg.pinv(heads_KT) @ target_K) ** 2
    assert spending(pilot, "l1", 0.01) == pytest.approx(one_T / one_T.sum())
    assert spending(pilot, "l2", 0.01) == pytest.approx(two_T / two_T.sum())
    assert spending(pilot, "uniform", 0.01) == pytest.approx(np.full(8, 1 / 8))
    assert spending(pilot, "mix", 0.01) == pytest.approx(one_T / one_T.sum() / 2 + 1 / 16)


def test_the_source_that_asks_the_same_is_bought_first_and_floors_and_budget_hold() -> None:
    given = features()
    for rule in ("l1", "mix", "l2"):
        counts = bought(TaskBudget(**BUDGET, rule=rule).fit(given, of(400)), given)  # type: ignore[arg-type]
        assert counts[0] == 40
        assert sum(counts[1:]) == 160
        assert min(counts[1:]) >= 20
        assert counts[1] == max(counts[1:])
    assert bought(TaskBudget(**BUDGET, rule="uniform").fit(given, of(400)), given)[1:] == [27, 27, 27, 27, 26, 26]


def test_answers_that_are_not_bought_yet_are_not_read() -> None:
    given = features()
    budget = TaskBudget(**BUDGET | {"budget": 120})  # the pilot alone
    pilot = budget.fit(given, of(400)).selection().index_n
    hidden = given.fields["target"].clone()
    left = np.setdiff1d(np.arange(400), pilot)
    hidden[left] = 1e6
    unread = Features(given.x, index_N=given.index_N, fields={**given.fields, "target": hidden})
    one, two = (TaskBudget(**BUDGET).fit(f, of(400)) for f in (given, unread))
    assert np.array_equal(one.selection().index_n, two.selection().index_n)


def test_a_larger_budget_keeps_what_was_bought() -> None:
    given = features()
    small, large = (TaskBudget(**BUDGET | {"budget": b}).fit(given, of(400)).selection().index_n for b in (130, 200))
    assert set(small) <= set(large)


def test_figures_say_whether_relevance_can_be_trusted() -> None:
    sure = TaskBudget(**BUDGET | {"pilot": 50, "budget": 320}).fit(features(), of(400))
    assert sure.measured["relevance can be trusted"] == 1
    noise = TaskBudget(**BUDGET).fit(features(noise=30.0), of(400))
    assert noise.measured["relevance can be trusted"] == 0
    assert noise.picture("t") is not None
    assert len(sure.shares) >= 7


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_features_of_zeros_and_answers_of_zeros_are_spent_on_evenly(dtype: torch.dtype) -> None:
    given = features(dtype=dtype)
    nothing = Features(given.x, index_N=given.index_N, fields={**given.fields, "target": torch.zeros(400)})
    blank = Features(torch.zeros_like(given.x), index_N=given.index_N, fields=given.fields)
    for wrong in (nothing, blank):
        assert bought(TaskBudget(**BUDGET).fit(wrong, of(400)), given)[1:] == [27, 27, 27, 27, 26, 26]


def test_questions_ask_each_image_once_and_answer_yes_for_its_class() -> None:
    data = YesNoTasks({"as": Digits(), "turned": Derived(Digits(), quarter_turns=1)})
    data.setup("fit")
    digits = Digits()
    digits.setup("fit")
    labels = digits.train.labels()  # type: ignore[union-attr]
    assert len(data.train) == 2 * len(labels)  # type: ignore[arg-type]
    seen = [data.bank.sample(i, 0) for i in (*range(300), *range(len(labels), len(labels) + 300))]
    for sample in seen:
        turned, asked = divmod(int(sample["task"]), 10)
        number = int(sample["index"]) - turned * len(labels)
        assert (labels[number] == asked) == (sample["target"] == 1)
    assert torch.equal(seen[0]["image"].shape and seen[0]["image"], digits.bank.sample(0, 0)["image"])
    assert 200 < sum(float(sample["target"] == 1) for sample in seen) < 400


X = features()


def changed(**fields: Tensor) -> Features:
    return Features(X.x, index_N=X.index_N, fields={**X.fields, **fields})


NAN = float("nan")


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda: TaskBudget(0), "budget=0"),
        (lambda: TaskBudget(9, pilot=1), "pilot=1"),
        (lambda: TaskBudget(9, rank=0), "rank=0"),
        (lambda: TaskBudget(9, target=-1), "target=-1"),
        (lambda: TaskBudget(9, strength=1.0), "strength=1.0"),
        (lambda: TaskBudget(9, components=0), "components=0"),
        (lambda: TaskBudget(9, seed=-1), "seed=-1"),
        (lambda: TaskBudget(9, rule="guess"), "rule='guess'"),  # type: ignore[arg-type]
        (lambda: TaskBudget(**BUDGET | {"budget": 119}).fit(X, of(400)), "budget=119 is less than the floor=20"),
        (lambda: TaskBudget(**BUDGET | {"budget": 361}).fit(X, of(400)), "budget=361 is more than the 360 rows"),
        (lambda: TaskBudget(**BUDGET | {"pilot": 61}).fit(X, of(400)), "pilot=61 is more than the 60 rows of task 1"),
        (lambda: TaskBudget(**BUDGET | {"rank": 21}).fit(X, of(400)), "rank=21"),
        (lambda: TaskBudget(**BUDGET, target=9).fit(X, of(400)), "target=9 has 0 rows"),
        (lambda: TaskBudget(**BUDGET).fit(changed(task=torch.zeros(400).long()), of(400)), "0 other tasks"),
        (lambda: TaskBudget(**BUDGET).fit(changed(task=torch.ones(400)), of(400)), "the field `task`"),
        (lambda: TaskBudget(**BUDGET).fit(Features(X.x), of(400)), "the field `task`"),
        (lambda: TaskBudget(**BUDGET).fit(changed(target=torch.ones(400).long()), of(400)), "the field `target`"),
        (lambda: TaskBudget(**BUDGET).fit(changed(target=NAN * torch.ones(400)), of(400)), "finite"),
        (lambda: least_l1(np.eye(3)[:, :2], np.eye(3)[2]), "outside the span"),
        (lambda: lasso_relevance(np.eye(2), np.ones(2), 0.0), "strength=0.0"),
        (lambda: least_l2(np.eye(2) * NAN, np.ones(2)), "finite heads"),
        (lambda: least_l2(np.eye(2), np.ones(3)), r"heads \[K, T\]"),
        (lambda: TaskMoments.of([]), "0 tasks"),
        (lambda: YesNoTasks({}), "YesNoTasks needs sets"),
        (lambda: YesNoTasks({"a": Digits()}, ask_seed=-1), "ask_seed=-1"),
    ],
)
def test_bad_input_is_refused_with_its_name(wrong: Any, said: str) -> None:
    with pytest.raises(UserError, match=said):
        wrong()
