"""Attention of a sequence to itself: torch's own layer, causal, in chunks, with padding, with turned positions."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightspan.core.errors import UserError
from lightspan.nn.sequences.self_attention import SelfAttention

WIDTH = 8


def layer(**settings: Any) -> SelfAttention:
    torch.manual_seed(0)
    return SelfAttention(WIDTH, 2, **settings).double()


def values(length: int = 11) -> Tensor:
    return torch.randn(3, length, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def by_torch(built: SelfAttention, x: Tensor, blocked: Tensor | None) -> Tensor:
    """nn.MultiheadAttention with the same weights. blocked: True where a query may not look."""
    other = nn.MultiheadAttention(WIDTH, 2, batch_first=True).double()
    weights = {"in_proj_weight": built.qkv.weight, "in_proj_bias": built.qkv.bias}
    weights |= {"out_proj.weight": built.out.weight, "out_proj.bias": built.out.bias}
    other.load_state_dict(weights)
    return other(x, x, x, attn_mask=blocked, need_weights=False)[0]


def beside(length: int, window: int, causal: bool) -> Tensor:
    """True where a query's chunk and a key's are neighbours or one, [L L]; of causal ones, not behind the query."""
    place = torch.arange(length)
    chunk = place // window
    seen = (chunk[:, None] - chunk).abs() <= 1
    return seen & (place <= place[:, None]) if causal else seen


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [None, 1, 2, 3, 5, 11, 40])
@pytest.mark.parametrize("length", [1, 2, 11])
def test_it_is_torchs_attention_among_the_steps_that_may_be_seen(length: int, window: int | None, causal: bool) -> None:
    built, x = layer(causal=causal, window=window), values(length)
    blocked = ~beside(length, window or length, causal)
    torch.testing.assert_close(built(x), by_torch(built, x, blocked), atol=1e-12, rtol=0)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [None, 4])
def test_what_is_not_a_sequences_own_has_no_effect(window: int | None, causal: bool) -> None:
    built, x = layer(causal=causal, window=window, turns=True), values()
    length_B = torch.tensor([11, 6, 1])
    own = torch.arange(11) < length_B[:, None]
    scribbled = x.where(own[:, :, None], 1e3)
    given = built(scribbled, own)
    torch.testing.assert_close(given[own], built(x, own)[own], atol=1e-12, rtol=0)
    for row, length in enumerate(length_B.tolist()):
        alone = built(x[row : row + 1, :length])
        torch.testing.assert_close(given[row : row + 1, :length], alone, atol=1e-12, rtol=0)


@pytest.mark.parametrize("window", [None, 4])
def test_a_sequence_without_any_step_is_finite_with_its_gradients(window: int | None) -> None:
    built, x = layer(window=window), values().requires_grad_()
    own = torch.zeros(3, 11, dtype=torch.bool)
    own[0] = True
    given = built(x, own)
    given[own].sum().backward()
    assert given.isfinite().all()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    assert not x.grad[1:].any()


def test_turned_by_positions_a_shifted_sequence_has_the_same_states_and_a_permuted_one_has_not() -> None:
    built, x = layer(turns=True), values()
    own = torch.arange(11) < 5
    shifted = x.roll(3, dims=1)
    given = built(x, own.expand(3, 11))[:, :5]
    moved = built(shifted, own.roll(3).expand(3, 11))[:, 3:8]
    torch.testing.assert_close(moved, given, atol=1e-6, rtol=0)  # the table of angles is float32
    order = torch.tensor([2, 0, 1, 3, 4])
    assert (built(x[:, :5][:, order]) - built(x[:, :5])[:, order]).abs().max() > 1e-3
    plain = layer()
    torch.testing.assert_close(plain(x[:, :5][:, order]), plain(x[:, :5])[:, order], atol=1e-12, rtol=0)


def test_chunks_call_torchs_attention_once_each(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, attend = [], nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        nn.functional,
        "scaled_dot_product_attention",
        lambda q, k, v, **options: (calls.append((q, k, v)), attend(q, k, v, **options))[1],
    )
    layer(window=3)(values())
    assert [(q.shape[2], k.shape[2]) for q, k, _ in calls] == [(3, 6), (3, 9), (3, 8), (2, 5)]
    assert len({x.untyped_storage().data_ptr() for part in calls for x in part}) == 1  # views of one product


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_half_types_pass(dtype: torch.dtype) -> None:
    given = layer(turns=True, window=4).to(dtype)(values().to(dtype))
    assert given.dtype == dtype
    assert given.isfinite().all()
    assert layer().to(dtype)(values()[:0].to(dtype)).shape == (0, 11, WIDTH)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [({"heads": 3}, "must split into heads=3 parts"), ({"window": 0}, "window=0 must be at least 1")],
)
def test_settings_out_of_range_are_refused(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        SelfAttention(**{"width": 8, "heads": 2, **wrong})
    with pytest.raises(UserError, match="of even size"):
        SelfAttention(6, 2, turns=True)
