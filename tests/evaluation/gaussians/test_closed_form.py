"""Closed-form classifiers: scikit-learn's answers, the published formula, and independence of the order of rows."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.neighbors import NearestCentroid
from torch import Tensor

from lightspan.core.errors import UserError
from lightspan.evaluation.gaussians.closed_form import Discriminant, EmpiricalBayes, NearestMean, PseudoInverse
from lightspan.evaluation.geometry.moments import Moments
from lightspan.evaluation.rows import unit_rows

D, C = 6, 3


def rows(count: int = 30, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    label = torch.arange(count) % C
    mixed = torch.randn(count, D, generator=generator, dtype=torch.float64) @ torch.randn(
        D, D, generator=torch.Generator().manual_seed(9), dtype=torch.float64
    )
    return mixed + 2 * torch.eye(C, D, dtype=torch.float64)[label], label


def predicted(rule: NearestMean | Discriminant, x: Tensor, label: Tensor, query: Tensor) -> np.ndarray:
    head = rule.head(Moments.of(x, label))
    return head.class_C[head.scores(query).argmax(dim=1)].numpy()


def test_the_nearest_mean_is_scikit_learns_and_so_is_the_largest_cosine() -> None:
    (x, label), (query, _) = rows(), rows(200, seed=1)
    theirs = NearestCentroid().fit(x.numpy(), label.numpy())
    assert np.array_equal(predicted(NearestMean(), x, label, query), theirs.predict(query.numpy()))
    cosine = unit_rows(query) @ unit_rows(torch.from_numpy(theirs.centroids_)).T
    assert np.array_equal(predicted(NearestMean(cosine=True), x, label, query), cosine.argmax(dim=1).numpy())


def test_without_shrinkage_and_with_equal_classes_it_is_linear_discriminant_analysis() -> None:
    digits = load_digits()
    label = digits.target
    chosen = np.concatenate([np.flatnonzero(label == c)[:60] for c in range(10)])
    x = torch.from_numpy(digits.data)
    theirs = LinearDiscriminantAnalysis(solver="lsqr", priors=np.full(10, 0.1)).fit(digits.data[chosen], label[chosen])
    ours = predicted(Discriminant(PseudoInverse()), x[chosen], torch.from_numpy(label[chosen]).long(), x)
    assert np.array_equal(ours, theirs.predict(digits.data))


@pytest.mark.parametrize("count", [30, 5])  # also fewer rows than features
def test_weights_are_those_of_the_published_formula(count: int) -> None:
    x, label = rows(count)
    mean = torch.stack([x[label == c].mean(dim=0) for c in range(C)])
    s = torch.cov((x - mean[label]).T)
    p = D * torch.linalg.pinv((count - 1) * s + s.trace() * torch.eye(D))
    head = Discriminant().head(Moments.of(x[:2], label[:2]) + Moments.of(x[2:], label[2:]))
    torch.testing.assert_close(EmpiricalBayes().matrix(Moments.of(x, label)), p)
    torch.testing.assert_close(head.weight_DC, p @ mean.T)
    bias = np.log(1 / C) - 0.5 * ((mean @ p) * mean).sum(dim=1)
    torch.testing.assert_close(head.bias_C, bias)
    assert torch.linalg.eigvalsh(p).min() > 0


def test_no_order_of_rows_or_tasks_changes_the_head_and_learners_add_up() -> None:
    x, label = rows()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(3))
    in_tasks = [Moments.of(x[label == c], label[label == c]) for c in (2, 0, 1)]
    for rule in (NearestMean(), Discriminant()):
        whole = rule.head(Moments.of(x, label))
        for moments in (
            Moments.of(x[order[:11]], label[order[:11]]) + Moments.of(x[order[11:]], label[order[11:]]),
            in_tasks[0] + in_tasks[1] + in_tasks[2],
        ):
            other = rule.head(moments)
            torch.testing.assert_close(other.weight_DC, whole.weight_DC, rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(other.bias_C, whole.bias_C, rtol=1e-9, atol=1e-9)


def test_a_new_class_does_not_change_the_score_of_the_others() -> None:
    x, label = rows()
    old = label < 2
    before = NearestMean().head(Moments.of(x[old], label[old])).scores(x)
    after = NearestMean().head(Moments.of(x, label)).scores(x)
    torch.testing.assert_close(after[:, :2], before, rtol=1e-12, atol=1e-12)


def test_moving_all_features_leaves_the_decisions() -> None:
    (x, label), (query, _), shift = rows(), rows(100, 1), torch.linspace(-3, 5, D, dtype=torch.float64)
    before = predicted(Discriminant(), x, label, query)
    assert np.array_equal(predicted(Discriminant(), x + shift, label, query + shift), before)


def test_one_row_a_class_falls_back_to_the_nearest_mean() -> None:
    x, label = rows(3)
    for bank, of in ((x, label), (x.repeat(10, 1), label.repeat(10))):
        nearest, discriminant = (rule.head(Moments.of(bank, of)) for rule in (NearestMean(), Discriminant()))
        torch.testing.assert_close(discriminant.weight_DC, nearest.weight_DC)
        torch.testing.assert_close(discriminant.bias_C, nearest.bias_C - np.log(3))


def test_classes_without_rows_are_never_named_and_their_rows_count_as_wrong() -> None:
    x, label = rows()
    head = NearestMean().head(Moments.of(x[label != 1], label[label != 1] * 5, classes=40))
    assert head.class_C.tolist() == [0, 10]
    assert head.correct(x, torch.full((30,), 3)) == 0
    assert head.correct(x[:0], label[:0]) == 0


def test_what_is_no_row_of_the_head_is_refused() -> None:
    head = NearestMean().head(Moments.of(*rows()))
    with pytest.raises(UserError, match="rows of 2 features do not fit a head of 6"):
        head.scores(torch.ones(1, 2))
    with pytest.raises(UserError, match="NaN or infinite"):
        head.scores(torch.full((1, D), torch.inf))
    with pytest.raises(UserError, match="needs a row with a feature"):
        Discriminant().head(Moments.of(torch.zeros(0, D)))
