"""NT-Xent, pairs of encoders, soft targets and queues: by loops, against lightly, and against one another."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from lightspan.core.errors import UserError
from lightspan.objectives.info_nce import (
    gated_cosine,
    multi_positive_info_nce,
    nt_xent,
    paired_info_nce,
    queued_info_nce,
    soft_info_nce,
)
from lightspan.objectives.supcon import supcon


def rows(count: int, width: int = 5, seed: int = 0) -> Tensor:
    return torch.randn(count, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def by_loops(z1: Tensor, z2: Tensor, temperature: float) -> float:
    """Equation 1 of SimCLR, one anchor at a time."""
    z = F.normalize(torch.cat([z1, z2]), dim=1)
    total, count = 0.0, len(z)
    for i in range(count):
        scores = {k: float(z[i] @ z[k]) / temperature for k in range(count) if k != i}
        total += math.log(sum(map(math.exp, scores.values()))) - scores[(i + len(z1)) % count]
    return total / count


@settings(max_examples=30, deadline=None)
@given(count=st.integers(1, 9), width=st.integers(1, 6), seed=st.integers(0, 99))
def test_nt_xent_is_the_mean_over_both_views_of_every_image(count: int, width: int, seed: int) -> None:
    z1, z2 = rows(count, width, seed), rows(count, width, seed + 100)
    assert nt_xent(z1, z2, 0.3).item() == pytest.approx(by_loops(z1, z2, 0.3), rel=1e-9, abs=1e-12)


def test_two_images_by_hand() -> None:
    """Views of an image are equal and those of the two images orthogonal: one positive at 1, two negatives at 0."""
    z = torch.eye(2, dtype=torch.float64)
    assert nt_xent(z, z, 0.5).item() == pytest.approx(math.log(1 + 2 * math.exp(-2)), rel=1e-12)
    assert paired_info_nce(z, z, 0.5).item() == pytest.approx(math.log(1 + math.exp(-2)), rel=1e-12)


def test_nt_xent_is_supcon_with_a_class_for_each_image() -> None:
    z1, z2, label = rows(6), rows(6, seed=1), torch.arange(6)
    torch.testing.assert_close(nt_xent(z1, z2, 0.2), supcon(torch.cat([z1, z2]), label.repeat(2), 0.2))


def test_nt_xent_does_not_depend_on_the_order_of_views_or_images_or_on_lengths() -> None:
    z1, z2, order = rows(6), rows(6, seed=1), torch.randperm(6, generator=torch.Generator().manual_seed(2))
    loss = nt_xent(z1, z2)
    for other in (nt_xent(z2, z1), nt_xent(z1[order], z2[order]), nt_xent(3 * z1, 0.1 * z2)):
        torch.testing.assert_close(other, loss, rtol=1e-12, atol=0)


def test_lightly_has_the_same_loss_and_gradient() -> None:
    peers = pytest.importorskip("lightly.loss", reason="the extra `peers` is not installed")
    z1, z2 = rows(7).requires_grad_(), rows(7, seed=1).requires_grad_()
    ours, theirs = nt_xent(z1, z2, 0.3), peers.NTXentLoss(temperature=0.3)(z1, z2)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=0)
    for a, b in zip(torch.autograd.grad(ours, (z1, z2)), torch.autograd.grad(theirs, (z1, z2)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-12)


def test_lightly_has_the_same_loss_with_a_queue() -> None:
    peers = pytest.importorskip("lightly.loss", reason="the extra `peers` is not installed")
    query, key = rows(4).float(), rows(4, seed=1).float()
    theirs = peers.NTXentLoss(temperature=0.2, memory_bank_size=(8, 5))
    theirs(query, key)  # makes the bank
    queue_KD = theirs.memory_bank.bank.clone()
    torch.testing.assert_close(queued_info_nce(query, key, queue_KD, 0.2), theirs(query, key), rtol=1e-5, atol=1e-6)


def test_identical_embeddings_give_the_logarithm_of_the_number_of_keys() -> None:
    z = torch.ones(6, 4, dtype=torch.float64)
    assert paired_info_nce(z, z).item() == pytest.approx(math.log(6), rel=1e-12)
    assert nt_xent(z, z).item() == pytest.approx(math.log(11), rel=1e-12)
    assert queued_info_nce(z, z, z[:3]).item() == pytest.approx(math.log(4), rel=1e-12)
    assert queued_info_nce(z, z, z[:0]).item() == 0


def test_pairs_by_torchs_cross_entropy_and_with_shares_of_any_size() -> None:
    query, key = rows(5), rows(5, seed=1)
    logits = F.normalize(query, dim=1) @ F.normalize(key, dim=1).T / 0.1
    torch.testing.assert_close(paired_info_nce(query, key, 0.1), F.cross_entropy(logits, torch.arange(5)))
    share = rows(5, seed=2).softmax(dim=1)
    torch.testing.assert_close(paired_info_nce(query, key, 0.1, share), F.cross_entropy(logits, share))


def test_one_positive_a_row_is_the_form_of_many_positives_too() -> None:
    query, key, queue = rows(5), rows(5, seed=1), rows(9, seed=2)
    logits = gated_cosine(query, torch.cat([key, queue])) / 0.2
    positive = torch.eye(5, 14, dtype=torch.bool)
    negative = torch.zeros_like(positive)
    negative[:, 5:] = True
    torch.testing.assert_close(
        queued_info_nce(query, key, queue, 0.2), multi_positive_info_nce(logits, positive, negative)
    )


def test_an_anchor_without_a_target_has_no_say_and_unseen_keys_none_in_the_denominator() -> None:
    logits = rows(3, 4).requires_grad_()
    target = torch.tensor([[0, 1.0, 0, 0], [0, 0, 0, 0], [0.5, 0, 0.5, 0]], dtype=torch.float64)
    seen = torch.tensor([[1, 1, 1, 0]] * 3).bool()
    log_share = logits[:, :3].log_softmax(dim=1)
    expected = -(log_share[0, 1] + (log_share[2, 0] + log_share[2, 2]) / 2) / 2
    loss = soft_info_nce(logits, target, seen)
    torch.testing.assert_close(loss, expected)
    (slope,) = torch.autograd.grad(loss, logits)
    assert not slope[1].any()
    assert not slope[:, 3].any()
    assert soft_info_nce(logits, torch.zeros_like(target), ~seen & False).item() == 0


def test_gradients_are_those_of_differences_through_both_sides_and_the_temperature() -> None:
    z1, z2, queue, t = rows(4).requires_grad_(), rows(4, seed=1).requires_grad_(), rows(3, seed=2), torch.tensor(0.4)
    t = t.double().requires_grad_()
    for loss in (nt_xent, paired_info_nce, lambda a, b, t: queued_info_nce(a, b, queue, t)):
        assert torch.autograd.gradcheck(loss, (z1, z2, t))


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.inf, math.nan])
def test_a_temperature_that_is_none_is_refused(temperature: float) -> None:
    for loss in (nt_xent, paired_info_nce, lambda a, b, t: queued_info_nce(a, b, a, t)):
        with pytest.raises(UserError, match=r"temperature=\S+ must be above 0 and finite"):
            loss(rows(2), rows(2), temperature)
