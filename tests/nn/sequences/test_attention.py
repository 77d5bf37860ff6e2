"""Attention with a learned bias: a plain loop, gradients of every part, and batches without rows."""

import math

import torch

from lightspan.nn.sequences.attention import biased_attention


def test_a_learned_bias_has_the_gradient_of_plain_softmax_and_hides_where_it_is_minus_infinity() -> None:
    torch.manual_seed(0)
    parts = [torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    bias = torch.randn(3, 4, 4, dtype=torch.float64, requires_grad=True)
    hidden = torch.ones(4, 4, dtype=torch.bool).triu(1)

    def plain() -> torch.Tensor:
        q, k, v = parts
        return ((q @ k.mT / math.sqrt(5) + bias.masked_fill(hidden, -math.inf)).softmax(dim=-1)) @ v

    found = biased_attention(*parts, bias.masked_fill(hidden, -math.inf))
    torch.testing.assert_close(found, plain())
    weight = torch.randn_like(found)
    ours, theirs = (torch.autograd.grad((each * weight).sum(), [*parts, bias]) for each in (found, plain()))
    torch.testing.assert_close(ours, theirs)


def test_without_rows_the_bias_has_a_gradient_of_zero() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        q, k, v = torch.zeros(3, 0, 2, 4, 3, dtype=dtype, requires_grad=True).unbind()
        bias = torch.randn(2, 4, 4).to(dtype).requires_grad_()
        hidden = torch.eye(4, dtype=torch.bool)
        biased_attention(q, k, v, bias.masked_fill(hidden, -math.inf)).sum().backward()
        assert bias.grad is not None
        assert not bias.grad.any()
