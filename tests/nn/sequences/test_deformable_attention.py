"""Deformable attention along a sequence: plain attention as a special case, places slice by slice, any length."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightspan.core.errors import UserError
from lightspan.nn.sequences.deformable_attention import DeformableAttention, between


def attention(width: int = 8, heads: int = 2, **settings: float) -> DeformableAttention:
    torch.manual_seed(0)
    built = DeformableAttention(width, heads, **settings).double()  # type: ignore[arg-type]
    nn.init.normal_(built.offset.weight, std=2.0)
    return built


def steps(length: int = 9, rows: int = 3) -> Tensor:
    return torch.randn(rows, length, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def without_bias(built: DeformableAttention) -> DeformableAttention:
    nn.init.zeros_(built.bias[-1].weight)
    nn.init.zeros_(built.bias[-1].bias)
    return built


def test_with_a_key_at_every_step_and_no_bias_it_is_torchs_attention_of_grouped_maps() -> None:
    built, x = without_bias(attention(stride=1, kernel=1, reach=0.0)), steps()
    whole = [torch.block_diag(*layer.weight[..., 0].chunk(2)) for layer in (built.query, built.key, built.value)]
    expected, _ = F.multi_head_attention_forward(
        *([x.transpose(0, 1)] * 3), 8, 2, torch.cat(whole), None, None, None, False, 0.0,
        built.out.weight, built.out.bias, need_weights=False,
    )  # fmt: skip
    torch.testing.assert_close(built(x), expected.transpose(0, 1))


def test_it_is_the_equation_head_by_head_and_key_by_key() -> None:
    built, x = attention(stride=3, kernel=5, reach=1.5), steps(8)
    rows = []
    for row in x:
        heads = []
        for head in range(2):
            own = row[:, 4 * head : 4 * head + 4]
            q, k, v = (
                own @ layer.weight[4 * head : 4 * head + 4, :, 0].T for layer in (built.query, built.key, built.value)
            )
            padded = F.pad(q, (0, 0, 1, 3))
            scores, values = [], []
            for key in range(3):
                window = padded[3 * key : 3 * key + 5]
                around = F.gelu((window * built.around.weight[:, 0].T).sum(dim=0) + built.around.bias)
                moved = (built.offset.weight[0, :, 0] @ around).tanh().item()
                at = min(max(3 * key + 1 + 1.5 * 3 * moved, 0), 7)
                low, share = math.floor(at), at - math.floor(at)
                found_k, found_v = ((1 - share) * y[low] + share * y[min(low + 1, 7)] for y in (k, v))
                apart = torch.arange(8) - at
                bias = built.bias((apart.sign() * apart.abs().log1p())[:, None].double())[:, 0]
                scores.append(q @ found_k / 2 + bias)
                values.append(found_v)
            heads.append(torch.stack(scores, dim=1).softmax(dim=1) @ torch.stack(values))
        rows.append(built.out(torch.cat(heads, dim=1)))
    torch.testing.assert_close(built(x), torch.stack(rows))


def test_places_start_in_the_middle_of_their_steps_and_move_no_further_than_they_reach() -> None:
    still, queries = attention(stride=4, kernel=6, reach=0.0), steps(10).transpose(1, 2)[:, :4]
    torch.testing.assert_close(still.places(queries), torch.tensor([1.5, 5.5, 9.0]).double().expand(3, 3))
    moving = attention(stride=4, kernel=6, reach=0.5)
    moved = moving.places(queries) - still.places(queries)
    assert moved.abs().max() <= 2
    assert moved.any()
    assert ((moving.places(1e3 * queries) >= 0) & (moving.places(1e3 * queries) <= 9)).all()


@pytest.mark.parametrize("length", [1, 2, 5, 64])
def test_any_length_has_a_key_for_each_stride_and_gradients_reach_all_weights(length: int) -> None:
    built = attention(stride=4, kernel=6)
    assert built.places(torch.zeros(1, 4, length).double()).shape == (1, math.ceil(length / 4))
    built(steps(length)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in built.parameters())
    assert built(steps(length)[:0]).shape == (0, length, 8)
    half = built.bfloat16()(steps(length).bfloat16())
    assert half.dtype == torch.bfloat16
    assert half.isfinite().all()


def test_between_two_steps_values_and_the_gradient_of_a_place_are_those_of_the_line() -> None:
    x = torch.tensor([0.0, 1.0, 4.0, 9.0]).view(1, 1, 1, 4)
    at = torch.tensor([0.0, 0.5, 2.0, 2.5, 3.0]).view(1, 1, 5).requires_grad_()
    found = between(x, at)
    assert found.flatten().tolist() == [0, 0.5, 4, 6.5, 9]
    found.sum().backward()
    assert at.grad is not None
    assert at.grad.flatten().tolist() == [1, 1, 5, 5, 0]


def test_sizes_that_do_not_fit_are_refused() -> None:
    for settings in ({"stride": 0}, {"kernel": 3}, {"reach": -1.0}, {"heads": 3}):
        with pytest.raises(UserError, match=next(iter(settings))):
            DeformableAttention(**{"width": 8} | settings)  # type: ignore[arg-type]
