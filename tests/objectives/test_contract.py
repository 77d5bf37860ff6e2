"""What every objective keeps: half precision, and batches of nothing, of one sample, of equal ones, of one class."""

from itertools import product

import pytest
import torch
from objective_cases import CASES, PARTS, public_functions
from torch import Tensor

from lightspan.core.errors import UserError

LABEL_B, MIXED_B = torch.tensor([1, 3, 3, 1, 3, 4, 1]), torch.arange(7).flip(0)


def rows(count: int = 7) -> Tensor:
    return torch.randn(count, 4, generator=torch.Generator().manual_seed(0))


def weight(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(4, 4, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()


BATCHES: dict[str, tuple[Tensor, Tensor]] = {
    "zeros": (torch.zeros(7, 4), LABEL_B),
    "equal rows": (torch.ones(7, 4), LABEL_B),
    "one class": (rows(), torch.full((7,), 3)),
    "one sample": (rows(1), LABEL_B[:1]),
    "no sample": (rows(0), LABEL_B[:0]),
}


def test_every_objective_is_held_to_it() -> None:
    assert len(CASES) > 5
    assert CASES.keys() | PARTS == public_functions()
    assert not CASES.keys() & PARTS


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gives_the_loss_of_its_numbers_in_float32(name: str, dtype: torch.dtype) -> None:
    w, x = weight(dtype), rows().to(dtype)
    loss = CASES[name].loss(x, w, LABEL_B, MIXED_B)
    loss.backward()
    expected = CASES[name].loss(x.double(), w.detach().double(), LABEL_B, MIXED_B)
    assert loss.dtype == torch.float32
    assert w.grad is not None
    assert w.grad.isfinite().all()
    torch.testing.assert_close(loss.double(), expected, rtol=0.05, atol=0.02)  # of products with eight bits


@pytest.mark.parametrize("name", CASES)
def test_degenerate_batches_give_a_finite_loss_and_gradient_or_say_what_is_missing(name: str) -> None:
    for batch, dtype in product(BATCHES, [torch.float32, torch.bfloat16]):
        w, (x, label_B), case = weight(dtype), BATCHES[batch], f"{batch} in {dtype}"
        try:
            loss = CASES[name].loss(x.to(dtype), w, label_B, torch.arange(len(x)).flip(0))
        except UserError as error:
            assert batch in ("one sample", "no sample"), case
            assert "batch_size" in str(error), case  # noqa: PT017
            continue
        loss.backward()
        assert loss.ndim == 0, case
        assert loss.isfinite(), case
        assert w.grad is not None, case
        assert w.grad.isfinite().all(), case
