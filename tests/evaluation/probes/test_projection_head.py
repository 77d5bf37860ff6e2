"""Features before a head and behind it: probes, singular values, and what is refused."""

import pytest
import torch

from lightspan.core.errors import UserError
from lightspan.evaluation.features.features import Features
from lightspan.evaluation.probes.probes import LinearProbe
from lightspan.evaluation.probes.projection_head import CompareHead
from lightspan.nn.heads.reweighting import ReweightingHead


def features(rows: int = 80, seed: int = 0) -> Features:
    generator = torch.Generator().manual_seed(seed)
    label = torch.arange(rows) % 2
    x = torch.randn(rows, 5, generator=generator)
    x[:, 4] += 2 * label
    return Features(x, label)


def behind(of: Features, kappa: float) -> Features:
    return Features(ReweightingHead(5, kappa)(of.x), of.label_N)


def test_without_a_head_both_sides_are_those_of_the_probe() -> None:
    bank, query = features(), features(seed=1)
    found = CompareHead().fit(bank, query, bank, query)
    assert found.accuracy_before == found.accuracy_behind == LinearProbe().fit(bank, query).accuracy > 0.7
    assert found.rank_before == found.rank_behind
    assert found.spread_before == found.spread_behind > 0
    assert found.values_before == found.values_behind


def test_a_head_that_squares_singular_values_doubles_their_spread() -> None:
    """Of features whose right singular vectors are the axes."""
    frame = torch.linalg.qr(torch.randn(80, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).Q
    frame = torch.linalg.qr(frame - frame.mean(dim=0)).Q  # centred columns
    values = torch.tensor([1.0, 0.5, 0.25, 0.125], dtype=torch.float64)
    label = torch.arange(80) % 2
    sides = [Features(frame * values**power, label) for power in (1, 2)]
    found = CompareHead().fit(sides[0], sides[0], sides[1], sides[1])
    assert found.spread_before / found.spread_behind == pytest.approx(0.5)
    assert found.values_behind == pytest.approx([value**2 for value in values.tolist()])
    assert found.rank_behind < found.rank_before


def test_what_the_head_scales_down_the_probe_may_still_read_but_counts_less() -> None:
    bank, query = features(), features(seed=1)
    found = CompareHead().fit(bank, query, behind(bank, 3.0), behind(query, 3.0))
    assert found.rank_behind < found.rank_before
    assert found.spread_behind > found.spread_before


def test_constant_features_have_no_spread_and_numbers_are_refused() -> None:
    constant, bank = Features(torch.ones(80, 5), torch.arange(80) % 2), features()
    found = CompareHead().fit(bank, bank, constant, constant)
    assert (found.rank_behind, found.spread_behind) == (0, 0)
    numbers = Features(bank.x, torch.linspace(0, 1, 80))
    with pytest.raises(UserError, match="CompareHead compares accuracies, and these labels are no classes"):
        CompareHead().fit(numbers, numbers, numbers, numbers)
