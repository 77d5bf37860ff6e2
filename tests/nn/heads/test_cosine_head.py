"""Logits of directions: CLIP's zero-shot classifier, whatever the length of a feature."""

import pytest
import torch

from lightspan.nn.heads.cosine_head import CosineHead


def test_logits_are_cosines_times_the_length_of_a_classs_row_whatever_the_length_of_the_feature() -> None:
    torch.manual_seed(0)
    head, x = CosineHead(5, 3, bias=False).double(), torch.randn(4, 5, dtype=torch.float64)
    cosines = torch.nn.functional.cosine_similarity(x[:, None], head.weight, dim=2)
    torch.testing.assert_close(head(x), cosines * head.weight.norm(dim=1))
    torch.testing.assert_close(head(7.5 * x), head(x))
    with torch.no_grad():
        head.weight.copy_(100 * head.weight / head.weight.norm(dim=1, keepdim=True))
    torch.testing.assert_close(head(x), 100 * cosines)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_feature_of_zeros_has_the_biases_and_no_gradient(dtype: torch.dtype) -> None:
    head, x = CosineHead(5, 3).to(dtype), torch.zeros(2, 5, dtype=dtype, requires_grad=True)
    logits = head(x)
    assert logits.dtype == dtype
    assert torch.equal(logits, head.bias.expand(2, 3))
    logits.sum().backward()
    assert x.grad is not None
    assert not x.grad.any()
