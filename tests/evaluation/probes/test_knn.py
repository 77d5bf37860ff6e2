import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.neighbors import KNeighborsClassifier

from lightspan.core.errors import UserError
from lightspan.evaluation.geometry.moments import Moments
from lightspan.evaluation.probes.knn import knn_accuracy, recall_at_one
from lightspan.evaluation.probes.linear_probe import linear_probe_accuracy


def blobs(rows: int, seed: int, classes: int = 4, spread: float = 1.5) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    centres = 2 * torch.randn(classes, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels = torch.randint(classes, (rows,), generator=generator)
    return centres[labels] + spread * torch.randn(rows, 5, generator=generator, dtype=torch.float64), labels


@settings(max_examples=30)
@given(st.integers(0, 1000), st.integers(1, 40), st.sampled_from([None, 0.07, 1.0]), st.integers(1, 50))
def test_it_agrees_with_scikit_learn(seed, k, temperature, chunk):
    bank, bank_labels = blobs(40, seed)
    query, query_labels = blobs(30, seed + 1)
    weights = "uniform" if temperature is None else lambda distance: np.exp((1 - distance) / temperature)
    oracle = KNeighborsClassifier(k, weights=weights, metric="cosine", algorithm="brute").fit(bank, bank_labels)
    expected = (oracle.predict(query) == query_labels.numpy()).mean()
    ours = knn_accuracy(bank, bank_labels, query, query_labels, k=k, temperature=temperature, chunk=chunk)
    assert ours == pytest.approx(expected)


def test_votes_are_weighted_by_similarity_by_hand():
    bank = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.6, 0.8]])
    labels = torch.tensor([0, 1, 1])
    query = torch.tensor([[1.0, 0.0]])
    # exp(1/t) against 2 exp(0.6/t): the single nearest one wins only while t < 0.4 / ln 2 = 0.577.
    for temperature, winner in ((0.5, 0), (0.6, 1), (None, 1)):
        assert knn_accuracy(bank, labels, query, torch.tensor([winner]), k=3, temperature=temperature) == 1.0


def test_scales_do_not_matter_and_small_temperatures_do_not_overflow():
    bank, bank_labels = blobs(40, 0)
    query, query_labels = blobs(30, 1)
    plain = knn_accuracy(bank, bank_labels, query, query_labels, k=5)
    assert knn_accuracy(1e3 * bank, bank_labels, 1e-3 * query, query_labels, k=5) == plain
    nearest = knn_accuracy(bank, bank_labels, query, query_labels, k=1)
    assert knn_accuracy(bank, bank_labels, query, query_labels, k=5, temperature=1e-6) == nearest


def test_a_class_that_the_bank_lacks_is_never_right():
    bank, labels = blobs(10, 0)
    assert knn_accuracy(bank, labels, bank, labels + 100, k=1) == 0.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, r"knn k=0 is outside \[1, 10\]"),
        ({"k": 11}, r"knn k=11 is outside \[1, 10\], the rows in the bank; lower k or use a larger bank"),
        ({"k": 1, "temperature": 0.0}, "knn temperature=0.0 must be above 0, or null for equal votes"),
    ],
)
def test_settings_out_of_range_are_named(options, message):
    bank, labels = blobs(10, 0)
    with pytest.raises(UserError, match=message):
        knn_accuracy(bank, labels, bank, labels, **options)


def test_labels_may_be_numbered_in_any_way():
    bank, labels = blobs(10, 0)
    query, query_labels = blobs(10, 1)
    expected = knn_accuracy(bank, labels, query, query_labels, k=3)
    assert knn_accuracy(bank, labels * 10**15, query, query_labels * 10**15, k=3) == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda labels: labels - 9, "got the label -9; labels must be at least 0"),
        (lambda labels: labels[1:], r"got labels \[9\] for 10 rows"),
        (lambda labels: labels.double(), r"got labels of torch\.float64; they must be whole numbers"),
    ],
)
def test_labels_that_name_no_class_are_refused(change, message):
    bank, labels = blobs(10, 0)
    labels[0] = 0
    for sides in ((bank, change(labels), bank, labels), (bank, labels, bank, change(labels))):
        with pytest.raises(UserError, match=f"knn {message}"):
            knn_accuracy(*sides, k=1)
        with pytest.raises(UserError, match=f"linear probe {message}"):
            linear_probe_accuracy(*sides)


def test_far_too_many_classes_are_refused_where_each_takes_memory():
    bank, labels = blobs(10, 0)
    labels[3] = 10**9
    with pytest.raises(UserError, match="linear probe got the label 1000000000, which would take 1000000001 classes"):
        linear_probe_accuracy(bank, labels, bank, labels)
    with pytest.raises(UserError, match="moments by class got the label 1000000000"):
        Moments.of(bank, labels)


def test_diverged_features_and_empty_queries_are_named():
    bank, labels = blobs(10, 0)
    with pytest.raises(UserError, match=r"NaN or infinite .* the model has diverged"):
        knn_accuracy(bank, labels, bank * torch.nan, labels, k=1)
    with pytest.raises(UserError, match="no query rows"):
        knn_accuracy(bank, labels, bank[:0], labels[:0], k=1)


def test_recall_at_one_asks_the_nearest_other_row_also_among_equal_ones():
    rows = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9], [0.5, 0.6]])
    assert recall_at_one(rows, torch.tensor([0, 0, 1, 1, 0])) == pytest.approx(4 / 5)
    assert recall_at_one(3 * rows, torch.tensor([0, 0, 1, 1, 0]), chunk=2) == pytest.approx(4 / 5)
    assert recall_at_one(torch.ones(4, 2), torch.zeros(4, dtype=torch.int64)) == 1
    assert recall_at_one(torch.ones(4, 2), torch.arange(4)) == 0  # a row never finds itself
    with pytest.raises(UserError, match="recall of 1 row"):
        recall_at_one(torch.ones(1, 2), torch.zeros(1, dtype=torch.int64))
