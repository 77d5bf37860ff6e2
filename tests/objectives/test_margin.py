"""The margin loss against two loops over pairs, and where it has no pair."""

import pytest
import torch
from torch import Tensor

from lightspan.core.unit_length import unit_length
from lightspan.objectives.margin import LEAST_SQUARE, margin_loss

LABELS, CLUSTERS = torch.tensor([0, 1, 0, 2, 1, 0, 2, 2, 1]), torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, 0])


def rows(count: int = 9, dtype: torch.dtype = torch.float64) -> Tensor:
    return unit_length(torch.randn(count, 4, generator=torch.Generator().manual_seed(0), dtype=dtype))


def by_loops(
    z: Tensor, label: Tensor, cluster: Tensor, boundary: float = 1.2, margin: float = 0.2, cutoff: float = 0.5
) -> Tensor:
    terms = []
    for i in range(len(z)):
        others = [j for j in range(len(z)) if j != i and cluster[j] == cluster[i]]
        apart = {j: ((z[i] - z[j]).square().sum() + LEAST_SQUARE).sqrt() for j in others}
        positives = [j for j in others if label[j] == label[i]]
        negatives = sorted((d for j, d in apart.items() if label[j] != label[i] and d >= cutoff), key=float)
        terms += [apart[j] - boundary + margin for j in positives]
        terms += [boundary - d + margin for d in negatives[: len(positives)]]
    active = [term for term in terms if term > 0]
    return torch.stack(active).mean() if active else z.sum() * 0


@pytest.mark.parametrize("settings", [{}, {"boundary": 0.8, "margin": 0.4, "cutoff": 1.0}, {"cutoff": 0.0}])
def test_it_is_the_mean_of_two_loops_over_pairs(settings: dict[str, float]) -> None:
    expected = by_loops(rows(), LABELS, CLUSTERS, **settings)
    torch.testing.assert_close(margin_loss(rows(), LABELS, CLUSTERS, **settings), expected, rtol=0, atol=1e-12)
    assert expected > 0


def test_by_hand() -> None:
    # On a circle: positives a quarter turn apart, the negative half a turn from one and a quarter from the other.
    z = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    loss = margin_loss(z, torch.tensor([0, 0, 1]), torch.zeros(3, dtype=torch.int64))
    # Both anchors of class 0 are too far from their positive; 2 and sqrt 2 are far enough from the negative.
    torch.testing.assert_close(loss, torch.tensor(2**0.5 - 1.0))


def test_its_gradient_is_that_of_the_loops() -> None:
    z = rows().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: margin_loss(x, LABELS, CLUSTERS), z)


def test_the_order_of_rows_and_the_numbers_of_classes_and_clusters_do_not_matter() -> None:
    mixed = torch.randperm(9, generator=torch.Generator().manual_seed(1))
    expected = margin_loss(rows(), LABELS, CLUSTERS)
    torch.testing.assert_close(margin_loss(rows()[mixed], LABELS[mixed], CLUSTERS[mixed]), expected)
    torch.testing.assert_close(margin_loss(rows(), 7 - LABELS, 3 * CLUSTERS + 2), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("label", "cluster", "what"),
    [
        ([0, 1, 2, 3], [0, 0, 0, 0], "no positive, so no negative either"),
        ([0, 0, 1, 1], [0, 1, 0, 1], "nobody to meet in the cluster"),
        ([], [], "no row"),
        ([0], [0], "one row"),
    ],
)
def test_without_a_pair_the_loss_and_its_gradient_are_zero(
    dtype: torch.dtype, label: list[int], cluster: list[int], what: str
) -> None:
    z = rows(len(label), torch.float32).to(dtype).requires_grad_()
    loss = margin_loss(z, torch.tensor(label, dtype=torch.int64), torch.tensor(cluster, dtype=torch.int64))
    loss.backward()
    assert loss == 0
    assert not z.grad.any()


def test_a_single_class_is_drawn_together_and_equal_rows_have_a_finite_gradient() -> None:
    one, none = torch.zeros(9, dtype=torch.int64), torch.zeros(9, dtype=torch.int64)
    z = rows().requires_grad_()
    margin_loss(z, one, none).backward()
    assert z.grad.any()
    equal = torch.ones(9, 4).requires_grad_()
    margin_loss(equal, LABELS, none).backward()
    assert equal.grad.isfinite().all()


def test_autocast_rounds_no_distance() -> None:
    z = rows(dtype=torch.float32)
    exact = margin_loss(z, LABELS, CLUSTERS)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(margin_loss(z, LABELS, CLUSTERS), exact)
