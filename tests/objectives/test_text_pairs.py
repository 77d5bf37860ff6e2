"""Losses of pairs of texts: CoSENT by two loops, and divergences by torch's distributions, whole one first."""

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, kl_divergence
from torch.nn import functional as F

from lightspan.objectives.text_pairs import coordinate_divergence, cosent_loss, document_ranking_loss, score_divergence

GENERATOR = torch.Generator().manual_seed(0)
QUERY, DOCUMENT = torch.randn(2, 6, 4, generator=GENERATOR, dtype=torch.float64)
SCORE = torch.tensor([0.0, 2.0, 2.0, 5.0, 1.0, 3.5])


def cosent_by_loops(query: Tensor, document: Tensor, score: Tensor, temperature: float) -> float:
    cosine = F.cosine_similarity(query, document).tolist()
    terms = [
        math.exp((cosine[j] - cosine[i]) / temperature)
        for i in range(len(score))
        for j in range(len(score))
        if score[i] > score[j]
    ]
    return math.log(1 + sum(terms))


def test_cosent_is_what_two_loops_give() -> None:
    for temperature in (0.05, 0.5):
        expected = cosent_by_loops(QUERY, DOCUMENT, SCORE, temperature)
        assert float(cosent_loss(QUERY, DOCUMENT, SCORE, temperature)) == pytest.approx(expected, rel=1e-9)
    assert float(cosent_loss(QUERY[:1], DOCUMENT[:1], SCORE[:1])) == 0
    assert float(cosent_loss(QUERY, DOCUMENT, SCORE * 0)) == 0


def test_a_pair_whose_score_is_no_number_orders_nothing_in_cosent() -> None:
    query, document = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0))
    score = torch.tensor([1.0, torch.nan, 3.0, 2.0, torch.nan])
    known = score.isfinite()
    found, expected = cosent_loss(query, document, score), cosent_loss(query[known], document[known], score[known])
    torch.testing.assert_close(found, expected)


def test_cosent_is_small_where_pairs_that_are_more_alike_have_the_larger_cosine() -> None:
    angle = torch.tensor([1.5, 1.0, 0.5])
    query = torch.tensor([[1.0, 0.0]]).expand(3, 2)
    document = torch.stack([angle.cos(), angle.sin()], dim=1)
    score = torch.tensor([0.0, 1.0, 2.0])
    assert cosent_loss(query, document, score) < 1e-2
    assert cosent_loss(query, document, -score) > 10


@pytest.mark.parametrize("divergence", [score_divergence, coordinate_divergence])
def test_a_divergence_is_that_of_the_teachers_distribution_from_the_students(divergence: object) -> None:
    student, teacher = QUERY.clone().requires_grad_(), (3 * DOCUMENT).requires_grad_()
    found: Tensor = divergence(student, teacher)  # type: ignore[operator]
    expected = kl_divergence(Categorical(logits=teacher), Categorical(logits=student)).mean()
    torch.testing.assert_close(found, expected)
    found.backward()
    assert student.grad is not None
    assert student.grad.abs().sum() > 0
    assert teacher.grad is None
    assert float(divergence(DOCUMENT, DOCUMENT)) == pytest.approx(0, abs=1e-12)  # type: ignore[operator]


def test_documents_of_all_queries_are_ranked_by_products_over_the_temperature() -> None:
    documents = torch.stack([DOCUMENT, DOCUMENT.flip(0)], dim=1)
    expected = F.cross_entropy(QUERY @ documents.flatten(0, 1).T / 2, 2 * torch.arange(6))
    torch.testing.assert_close(document_ranking_loss(QUERY, documents, 2.0, cosine=False), expected)


def test_half_precision_is_widened() -> None:
    query, document = QUERY.bfloat16(), DOCUMENT.bfloat16()
    wide = query.float(), document.float()
    for half, single in (
        (cosent_loss(query, document, SCORE), cosent_loss(*wide, SCORE)),
        (score_divergence(query, document), score_divergence(*wide)),
        (coordinate_divergence(query, document), coordinate_divergence(*wide)),
        (document_ranking_loss(query, document[:, None]), document_ranking_loss(wide[0], wide[1][:, None])),
    ):
        assert half.dtype == torch.float32
        torch.testing.assert_close(half, single)
