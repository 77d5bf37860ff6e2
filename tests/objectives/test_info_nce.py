"""Contrast of class pairs: worked by hand, against plain loops, and blind to what a gate or a mask leaves out."""

import math

import pytest
import torch
from host_reads import HostReads
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from lightspan.core.errors import UserError
from lightspan.objectives.info_nce import class_pair_loss, class_pair_masks, gated_cosine, multi_positive_info_nce


def double(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def by_loops(z: Tensor, label: list[int], partner: list[int], gate: Tensor, temperature: float) -> tuple[float, int]:
    """The card's equations, one pair at a time, and the number of pairs."""
    terms = []
    for b in range(len(z)):
        s = [float(F.cosine_similarity(z[b] * gate[b], z[k] * gate[b], dim=0)) / temperature for k in range(len(z))]
        negatives = sum(math.exp(s[n]) for n in range(len(z)) if label[n] not in (label[b], partner[b]))
        terms += [math.log(math.exp(s[p]) + negatives) - s[p] for p in range(len(z)) if label[p] == partner[b]]
    return sum(terms) / max(len(terms), 1), len(terms)


@given(rows=st.integers(1, 12), width=st.integers(1, 6), classes=st.integers(1, 5), seed=st.integers(0, 99))
def test_loss_is_the_mean_over_all_pairs_of_an_anchor_and_a_positive(
    rows: int, width: int, classes: int, seed: int
) -> None:
    z, gate = double(rows, width, seed=seed), double(rows, width, seed=seed + 1).sigmoid()
    label, partner = torch.randint(classes, (2, rows), generator=torch.Generator().manual_seed(seed))
    expected, pairs = by_loops(z, label.tolist(), partner.tolist(), gate, 0.1)
    loss = class_pair_loss(z, label, partner, gate, 0.1)
    assert loss.item() == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert int(class_pair_masks(label, partner, label)[0].sum()) == pairs


def test_two_rows_of_two_classes_by_hand() -> None:
    # Cosines 1 with itself, its one positive, and 0 with the other row, its one negative.
    z, label = torch.eye(2, dtype=torch.float64), torch.tensor([4, 7])
    assert class_pair_loss(z, label, label, None, 0.5).item() == pytest.approx(math.log(1 + math.exp(-2)), rel=1e-12)
    # Paired with the other class there is a positive at cosine 0 and no negative.
    assert class_pair_loss(z, label, label.flip(0), None, 0.5).item() == 0


def test_an_open_gate_on_identical_pairs_has_an_anchor_itself_and_a_denominator_for_each_positive() -> None:
    z, label, temperature = double(9, 5), torch.tensor([0, 1, 2, 0, 1, 2, 0, 1, 1]), 0.1
    unit = z / z.norm(dim=1, keepdim=True)
    terms = []
    for i in range(9):
        others = torch.stack([unit[i] @ unit[a] / temperature for a in range(9) if label[a] != label[i]])
        for p in range(9):
            if label[p] == label[i]:
                s = unit[i] @ unit[p] / temperature
                terms.append(-(s.exp() / (s.exp() + others.exp().sum())).log())
    expected = torch.stack(terms).mean()
    for gate in (None, torch.ones(9, 5, dtype=torch.float64)):
        torch.testing.assert_close(class_pair_loss(z, label, label, gate, temperature), expected, rtol=1e-12, atol=0)
    narrow = class_pair_loss(z.float(), label, label, torch.ones(9, 5), temperature)
    torch.testing.assert_close(narrow, expected.float(), rtol=1e-6, atol=1e-6)


def test_the_gated_cosine_is_that_of_gated_rows_without_forming_them() -> None:
    z, key, gate = double(7, 6), double(11, 6, seed=1), double(7, 6, seed=2).sigmoid()
    formed = F.cosine_similarity((z * gate)[:, None], key[None] * gate[:, None], dim=2)
    torch.testing.assert_close(gated_cosine(z, key, gate), formed, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(gated_cosine(z.float(), key.float(), gate.float()), formed.float(), rtol=0, atol=1e-6)
    torch.testing.assert_close(gated_cosine(1e3 * z, 1e-3 * key, 10 * gate), formed, rtol=1e-12, atol=1e-14)


def test_nothing_of_the_size_of_rows_by_rows_by_width_is_kept_for_the_backward_pass() -> None:
    z, gate, label = torch.randn(32, 48, requires_grad=True), torch.rand(32, 48), torch.arange(32) % 5
    sizes: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        class_pair_loss(z, label, label.flip(0), gate)
    assert max(sizes) == 32 * 48


def test_a_gate_of_zeros_and_ones_makes_the_loss_blind_to_the_other_dimensions() -> None:
    label = torch.tensor([0, 1, 2, 0, 1, 2, 3])
    gate = torch.tensor([1.0, 0, 1, 0]).expand(7, 4)
    z = double(7, 4).float().requires_grad_()
    loss = class_pair_loss(z, label, label.flip(0), gate)
    loss.backward()
    assert z.grad is not None
    assert not z.grad[:, [1, 3]].any()
    assert z.grad[:, [0, 2]].any()
    elsewhere = z.detach().clone()
    elsewhere[:, [1, 3]] = 1e4 * double(7, 2, seed=1).float()
    assert torch.equal(class_pair_loss(elsewhere, label, label.flip(0), gate), loss)


def test_rows_of_either_class_of_a_pair_are_no_negatives_and_get_no_gradient() -> None:
    # Anchor 0 of class 0 is paired with class 1; of its keys, row 1 is of class 0, rows 2 and 3 are positives.
    label, key = torch.tensor([0, 0, 1, 1, 2]), double(5, 3).requires_grad_()
    masks = class_pair_masks(label[:1], torch.tensor([1]), label)
    assert torch.equal(masks[0], torch.tensor([[False, False, True, True, False]]))
    assert torch.equal(masks[1], torch.tensor([[False, False, False, False, True]]))
    multi_positive_info_nce(gated_cosine(double(1, 3, seed=1), key) / 0.1, *masks).backward()
    assert key.grad is not None
    assert not key.grad[:2].any()
    assert key.grad[2:].all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_negatives_or_without_positives_the_loss_is_exactly_zero(dtype: torch.dtype) -> None:
    one, two = torch.zeros(6, dtype=torch.int64), torch.tensor([0, 1, 0, 1, 0, 1])
    cases = {
        "one class": (one, one),
        "both classes of each pair": (two, 1 - two),
        "a partner class that is absent": (two, torch.full_like(two, 9)),
    }
    for label, partner in cases.values():
        z, gate = (double(6, 4, seed=seed).to(dtype).requires_grad_() for seed in (0, 1))
        loss = class_pair_loss(z, label, partner, gate.sigmoid(), 0.1)
        loss.backward()
        assert loss.item() == 0
        for leaf in (z, gate):
            assert leaf.grad is not None
            assert not leaf.grad.any()


def test_an_anchor_whose_partner_class_is_absent_changes_nothing_but_what_it_is_to_others() -> None:
    label, partner = torch.tensor([0, 1, 2, 3]), torch.tensor([1, 0, 9, 9])
    z, gate = double(4, 3), double(4, 3, seed=1).sigmoid()
    other = gate.clone()
    other[2:] = 0.5
    assert torch.equal(class_pair_loss(z, label, partner, gate), class_pair_loss(z, label, partner, other))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("temperature", [1e-3, 0.1, 100.0])
def test_low_temperatures_and_zero_rows_stay_finite(temperature: float, dtype: torch.dtype) -> None:
    label = torch.tensor([0, 1, 2, 0, 1, 2])
    for gate_row in (torch.rand(4), torch.zeros(4), torch.full((4,), 1e-30)):
        z = double(6, 4).to(dtype)
        z[1], z[2] = 0, 1e-20
        z.requires_grad_()
        loss = class_pair_loss(z, label, label.flip(0), gate_row.expand(6, 4).to(dtype), temperature)
        loss.backward()
        assert loss.isfinite()
        assert z.grad is not None
        assert z.grad.isfinite().all()
        assert not z.grad[1].any()


def test_at_a_low_temperature_the_loss_is_the_largest_negative_less_the_positive() -> None:
    z, label = torch.tensor([[1.0, 0], [0.6, 0.8], [0.0, 1]]), torch.tensor([0, 0, 1])
    logits = gated_cosine(z[:1], z) / 1e-4
    masks = torch.tensor([[False, True, False]]), torch.tensor([[False, False, True]])
    assert multi_positive_info_nce(logits, *masks).item() == 0  # 0.6 against 0
    masks = class_pair_masks(label[:1], label[2:], label)  # class 1 is the partner: its row at 0, no negative left
    assert multi_positive_info_nce(logits, *masks).item() == 0
    swapped = torch.tensor([[False, False, True]]), torch.tensor([[False, True, False]])
    assert multi_positive_info_nce(logits, *swapped).item() == pytest.approx(6000, rel=1e-6)


def test_gradients_pass_gradcheck_through_anchors_keys_gates_and_temperature() -> None:
    label, partner = torch.tensor([0, 1, 2, 0, 1]), torch.tensor([1, 1, 0, 2, 0])
    z, gate = double(5, 3).requires_grad_(), double(5, 3, seed=1).sigmoid().requires_grad_()
    temperature = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *x: class_pair_loss(x[0], label, partner, *x[1:]), (z, gate, temperature))
    assert torch.autograd.gradcheck(lambda x: class_pair_loss(x, label, partner), z)


def test_the_order_of_the_batch_and_the_names_of_the_classes_do_not_matter() -> None:
    label, partner, order = torch.tensor([0, 1, 2, 0, 1]), torch.tensor([1, 1, 0, 2, 0]), torch.tensor([4, 2, 0, 1, 3])
    z, gate = double(5, 3), double(5, 3, seed=1).sigmoid()
    expected = class_pair_loss(z, label, partner, gate)
    mixed = class_pair_loss(z[order], label[order], partner[order], gate[order])
    torch.testing.assert_close(mixed, expected, rtol=1e-12, atol=0)
    assert torch.equal(class_pair_loss(z, 2**40 - label, 2**40 - partner, gate), expected)


def test_autocast_does_not_narrow_the_cosines_and_nothing_waits_for_the_device() -> None:
    z, gate, label = double(6, 4).float(), double(6, 4, seed=1).float().sigmoid(), torch.tensor([0, 1, 2, 0, 1, 2])
    expected = class_pair_loss(z, label, label.flip(0), gate)
    with torch.autocast("cpu", dtype=torch.bfloat16), HostReads() as reads:
        loss = class_pair_loss(z.requires_grad_(), label, label.flip(0), gate)
        loss.backward()
    assert torch.equal(loss, expected)
    assert reads.count == 0


def test_a_temperature_of_zero_is_refused() -> None:
    with pytest.raises(UserError, match=r"temperature=0.0 must be above 0"):
        class_pair_loss(double(2, 2), torch.arange(2), torch.arange(2), None, 0.0)
