"""Loki as a module: the labels of the equation, its gradient, and what is refused."""

import pytest
import torch

from lightspan.core.errors import UserError
from lightspan.evaluation.label_spaces.label_metrics import ring
from lightspan.evaluation.label_spaces.loki import frechet_labels
from lightspan.nn.heads.loki import LokiHead

OBSERVED = torch.tensor([0, 3, 7])


def head(temperature: float = 1.0) -> LokiHead:
    return LokiHead(ring(10).squared(OBSERVED), temperature)


def test_behind_logits_it_gives_the_labels_of_the_equation() -> None:
    logits = 3 * torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    found = torch.nn.Sequential(torch.nn.Identity(), head(0.5))(logits).argmax(dim=1)
    assert torch.equal(found, frechet_labels((logits / 0.5).softmax(dim=1), OBSERVED, ring(10)))
    assert len(found.unique()) > 3


def test_a_small_temperature_is_argmax_and_a_large_one_the_middle() -> None:
    logits = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(head(1e-3)(logits).argmax(dim=1), OBSERVED[logits.argmax(dim=1)])
    middle = frechet_labels(torch.ones(1, 3), OBSERVED, ring(10))
    assert (head(1e6)(logits).argmax(dim=1) == middle).all()


def test_it_has_the_gradient_of_its_equation_and_scores_half_precision_in_float32() -> None:
    logits = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(head(0.7), logits)
    scores = head()(logits.detach().bfloat16())
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, head()(logits.detach().bfloat16().float()))
    with torch.autocast("cpu", torch.bfloat16):
        assert head()(logits.detach().float()).dtype == torch.float32


def test_distances_of_neighbours_do_not_become_equal_in_half_precision() -> None:
    observed, logits = torch.tensor([0, 33, 66]), torch.randn(200, 3, generator=torch.Generator().manual_seed(0))
    exact = LokiHead(ring(100).squared(observed))
    for dtype in (torch.bfloat16, torch.float16):
        kept = torch.nn.Sequential(LokiHead(ring(100).squared(observed))).to(dtype)
        assert torch.equal(kept(logits), exact(logits))
        assert torch.equal(kept.float()[0].squared_KN, exact.squared_KN)
    assert exact.to("meta").to_empty(device="cpu").squared_KN.shape == (3, 100)


def test_it_has_widths_and_a_state_and_no_weights() -> None:
    assert (head().in_features, head().out_features) == (3, 10)
    assert [*head().parameters()] == []
    assert [*head().state_dict()] == ["squared_KN"]


def test_what_is_no_head_is_refused() -> None:
    for squared in (
        torch.ones(3),
        torch.ones(0, 2),
        -torch.ones(1, 2),
        torch.full((1, 2), torch.nan),
        torch.tensor([[0, 1e40]]).double(),
    ):
        with pytest.raises(UserError, match=r"LokiHead squared_KN .* must be finite squares"):
            LokiHead(squared)
    with pytest.raises(UserError, match="temperature=0 must be above 0"):
        LokiHead(torch.ones(1, 2), 0)
