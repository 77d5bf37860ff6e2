"""Index sets of an exact size."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightspan.core.errors import UserError
from lightspan.subspaces.masks.top_k import count_at, top_k, top_k_of_all

SCORES = st.lists(st.sampled_from([-1.0, 0.0, 0.5, 2.0, math.inf, -math.inf, math.nan]), min_size=1, max_size=12)


@settings(derandomize=True, max_examples=100, deadline=None)
@given(scores=SCORES, data=st.data())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_exactly_the_first_of_a_stable_sort_are_chosen(
    dtype: torch.dtype, scores: list[float], data: st.DataObject
) -> None:
    count = data.draw(st.integers(0, len(scores)))
    ranked = sorted(range(len(scores)), key=lambda i: -(-math.inf if math.isnan(scores[i]) else scores[i]))
    chosen = top_k(torch.tensor(scores, dtype=dtype), count)
    assert chosen.nonzero().flatten().tolist() == sorted(ranked[:count])


def test_tensors_compete_in_one_ranking() -> None:
    scores = {"a": torch.tensor([[3.0, 1.0]]), "b": torch.tensor([2.0, 1.0, 4.0], dtype=torch.float64)}
    chosen = top_k_of_all(scores, 4)
    assert {name: mask.tolist() for name, mask in chosen.items()} == {"a": [[True, True]], "b": [True, False, True]}
    assert not top_k_of_all(scores, 1)["a"].any()
    assert top_k_of_all({}, 0) == {}


def test_a_density_leaves_a_rounded_count_and_at_least_one() -> None:
    assert [count_at(d, 10) for d in (1.0, 0.25, 0.24, 1e-9)] == [10, 3, 2, 1]
    assert count_at(0.5, 0) == 0


@pytest.mark.parametrize("density", [0.0, -0.1, 1.01, math.nan])
def test_a_density_out_of_range_is_refused(density: float) -> None:
    with pytest.raises(UserError, match=rf"density={density} must be above 0 and at most 1"):
        count_at(density, 10)
