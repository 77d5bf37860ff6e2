"""Precision of float32 products, however it was set."""

import pytest
import torch
from torch import nn

from lightspan.core.devices import float32_precision
from lightspan.optim.muon import Muon


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_it_is_what_was_set_for_all_backends(monkeypatch: pytest.MonkeyPatch, precision: str) -> None:
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: precision)
    assert float32_precision() == precision


@pytest.mark.parametrize(
    ("backend", "said", "expected"),
    [("cuda", "tf32", "high"), ("cuda", "ieee", "highest"), ("mkldnn", "bf16", "medium"), ("mkldnn", "tf32", "high")],
)
def test_where_backends_were_set_one_by_one_it_is_that_of_the_least_exact(
    backend: str, said: str, expected: str
) -> None:
    """torch.get_float32_matmul_precision raises there (torch 2.13), and a step must not."""
    products = getattr(torch.backends, backend).matmul
    weight, before = nn.Parameter(torch.eye(4)), products.fp32_precision
    weight.grad = torch.ones(4, 4)
    assert float32_precision() == "highest"
    products.fp32_precision = said
    try:
        assert float32_precision() == expected
        Muon([weight]).step()
    finally:
        products.fp32_precision = before
    assert float32_precision() == "highest"
