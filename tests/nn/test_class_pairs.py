"""Partners of classes: a function of seed, step and batch, with the right frequencies."""

from pathlib import Path

import numpy as np
import pytest
import torch

from lightspan.core.errors import UserError
from lightspan.nn.class_pairs import Arbitrary, ByDistance, ClassPairs, Distinct, Identical

LABEL_N = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3, 0, 0, 1, 2])
TABLE = [[float(abs(i - j)) for j in range(4)] for i in range(4)]
KINDS: list[ClassPairs] = [Identical(), Arbitrary(5), Distinct(4, 5), ByDistance(TABLE, 1.0, 5)]
DRAWN = KINDS[1:]


@pytest.mark.parametrize("pairs", KINDS, ids=lambda pairs: type(pairs).__name__)
def test_partners_are_labels_of_the_batchs_form_also_of_one_class_one_row_and_none(pairs: ClassPairs) -> None:
    for label_N in (LABEL_N, LABEL_N[:1], LABEL_N[:0], torch.full((5,), 2)):
        partner_N = pairs.partners(label_N, 3)
        assert partner_N.shape == label_N.shape
        assert partner_N.dtype == torch.int64
        assert set(partner_N.tolist()) <= ({0, 1, 2, 3} if isinstance(pairs, Distinct) else set(label_N.tolist()))


@pytest.mark.parametrize("pairs", DRAWN, ids=lambda pairs: type(pairs).__name__)
def test_draws_depend_on_seed_step_and_micro_batch_alone(pairs: ClassPairs) -> None:
    torch.manual_seed(0)
    drawn = pairs.partners(LABEL_N, 3, 1)
    state = torch.get_rng_state()
    assert torch.equal(pairs.partners(LABEL_N, 3, 1), drawn)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(pairs.partners(LABEL_N, 4, 1), drawn)
    assert not torch.equal(pairs.partners(LABEL_N, 3, 2), drawn)
    assert torch.equal(pairs.draw(LABEL_N, np.random.default_rng((5, 3, 1))), drawn)
    assert not torch.equal(pairs.draw(LABEL_N, np.random.default_rng((6, 3, 1))), drawn)


def test_arbitrary_partners_are_a_permutation() -> None:
    for step in range(5):
        assert torch.equal(Arbitrary().partners(LABEL_N, step).sort().values, LABEL_N.sort().values)


def test_distinct_partners_are_uniform_over_the_other_classes() -> None:
    label_N = torch.arange(4).repeat(3000)
    partner_N = Distinct(4).partners(label_N, 0)
    counts = np.histogram2d(label_N.numpy(), partner_N.numpy(), bins=4)[0]
    assert not np.diag(counts).any()
    assert counts[~np.eye(4, dtype=bool)] == pytest.approx(np.full(12, 1000), abs=150)


@pytest.mark.parametrize("alpha", [0.0, 1.0, 3.0])
def test_near_classes_are_drawn_as_often_as_their_weight_says(alpha: float) -> None:
    label_N = torch.tensor([0, 0, 1, 2, 3]).repeat(800)  # class 0 twice as often
    partner_N = ByDistance(TABLE, alpha).partners(label_N, 0)
    share = np.array([2, 1, 1, 1]) * (1 + np.array(TABLE)) ** -alpha
    share /= share.sum(axis=1, keepdims=True)
    for label in range(4):
        found = np.bincount(partner_N[label_N == label].numpy(), minlength=4)
        assert found / found.sum() == pytest.approx(share[label], abs=0.06)


def test_distances_come_from_a_file_too(tmp_path: Path) -> None:
    np.save(tmp_path / "d.npy", np.array(TABLE))
    expected = ByDistance(TABLE, 2.0).partners(LABEL_N, 1)
    assert torch.equal(ByDistance(str(tmp_path / "d.npy"), 2.0).partners(LABEL_N, 1), expected)
    np.save(tmp_path / "objects.npy", np.array([{}]), allow_pickle=True)
    for wrong in ("objects.npy", "missing.npy"):
        with pytest.raises(UserError, match=r"cannot be read as a table of numbers"):
            ByDistance(str(tmp_path / wrong))


@pytest.mark.parametrize("wrong", [[[0.0, 1.0]], [[-1.0]], [], [[float("nan")]]])
def test_distances_that_are_no_square_table_of_numbers_from_zero_up_are_refused(wrong: list[list[float]]) -> None:
    with pytest.raises(UserError, match=r"a row and a column for each class, of numbers from 0 up"):
        ByDistance(wrong)


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(UserError, match="seed=-1 must"):
        Arbitrary(-1)
    with pytest.raises(UserError, match="num_classes=1 must"):
        Distinct(1)
    with pytest.raises(UserError, match=r"alpha=nan must"):
        ByDistance([[0.0]], alpha=float("nan"))
    with pytest.raises(UserError, match=r"alpha=-0.5 must"):
        ByDistance(TABLE, -0.5)


@pytest.mark.parametrize("pairs", [Distinct(4), ByDistance(TABLE)], ids=lambda pairs: type(pairs).__name__)
def test_labels_that_a_table_has_no_row_for_are_refused(pairs: ClassPairs) -> None:
    for label, said in ((4, "from 0 to 4"), (-1, "from -1 to 3")):
        with pytest.raises(UserError, match=rf"labels {said} do not fit {type(pairs).__name__} of 4 classes"):
            pairs.partners(torch.cat([LABEL_N, torch.tensor([label])]), 0)
