"""SVE and LSVR: at their ends, by hand, against numpy, and centred in three ways."""

import math

import numpy as np
import pytest
import torch

from lightspan.core.errors import UserError
from lightspan.evaluation.features.features import Features
from lightspan.evaluation.geometry.feature_spread import SpectrumSpread


def rows(count: int, width: int) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize(("count", "width"), [(4, 9), (9, 4)])
def test_orthonormal_rows_or_columns_spread_evenly_and_equal_rows_do_not(count: int, width: int) -> None:
    few = min(count, width)
    frame = torch.eye(few).repeat(max(1, count // few), 1)[:count]
    found = SpectrumSpread("none").fit(Features(torch.nn.functional.pad(frame, (0, width - few))))
    if count == 4:
        assert found.sve == pytest.approx(math.log(few))
        assert found.lsvr == pytest.approx(math.log(few))
    equal = SpectrumSpread("none").fit(Features(torch.ones(count, width)))
    assert equal.sve == pytest.approx(0, abs=1e-6)
    assert equal.lsvr == pytest.approx(0, abs=1e-6)
    assert SpectrumSpread("rows").fit(Features(torch.ones(count, width))).sve == 0


def test_they_are_those_of_the_authors_script() -> None:
    x = rows(30, 6)
    normal = (x / x.norm(dim=1, keepdim=True)).numpy()
    for centre, taken in (
        ("features", normal - normal.mean(axis=1, keepdims=True)),
        ("rows", normal - normal.mean(axis=0)),
        ("none", normal),
    ):
        values = np.linalg.svd(taken, compute_uv=False)
        share = values / values.sum()
        found = SpectrumSpread(centre).fit(Features(x))  # type: ignore[arg-type]
        there = share[share > 1e-12]
        assert found.sve == pytest.approx(-(there * np.log(there)).sum())
        assert found.lsvr == pytest.approx(-math.log(share[0]))
        assert found.shares == pytest.approx(share.tolist(), abs=1e-12)
        assert found.rows == 30
        assert len(found.table()) == len(found.shares) == 6


def test_noise_that_fills_all_directions_raises_both() -> None:
    signal = rows(200, 3) @ rows(3, 20)
    clean, noisy = (SpectrumSpread().fit(Features(signal + noise * rows(200, 20))) for noise in (0.0, 1.0))
    assert noisy.sve > clean.sve
    assert noisy.lsvr > clean.lsvr


def test_another_centre_is_refused() -> None:
    with pytest.raises(UserError, match="SpectrumSpread centre='mean' must be features, rows or none"):
        SpectrumSpread("mean")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="needs finite features of at least one row"):
        SpectrumSpread().fit(Features(torch.zeros(0, 3)))
