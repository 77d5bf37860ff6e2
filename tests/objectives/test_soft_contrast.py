"""Soft contrast: the similarities of tags, and what their term asks for."""

import pytest
import torch
from sklearn.metrics.pairwise import cosine_similarity
from torch.nn import functional as F

from lightspan.core.errors import UserError
from lightspan.objectives.info_nce import paired_info_nce
from lightspan.objectives.soft_contrast import soft_contrast, tag_similarity


def drawn(rows: int = 6, tags: int = 4, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    query, key = torch.randn(2, rows, 5, generator=generator, dtype=torch.float64)
    hold = torch.rand(rows, tags, generator=generator) < 0.5
    hold[:, 0] |= ~hold.any(dim=1)  # each has one at least
    return query.requires_grad_(), key, hold


def test_the_similarity_of_tags_is_scikit_learns_cosine_of_multi_hot_rows() -> None:
    _, _, hold = drawn(30)
    similarity = tag_similarity(hold, hold)
    torch.testing.assert_close(similarity, torch.from_numpy(cosine_similarity(hold.float())).float())
    torch.testing.assert_close(similarity, similarity.T)
    torch.testing.assert_close(similarity.diagonal(), torch.ones(30))
    assert similarity.min() >= 0
    everything = torch.ones(40, 40).tril() > 0
    assert tag_similarity(everything, everything).max() == 1


def test_scenes_of_one_tag_each_all_different_are_like_themselves_alone() -> None:
    assert torch.equal(tag_similarity(torch.eye(5) > 0, torch.eye(5) > 0), torch.eye(5))


def test_the_soft_term_is_the_mean_binary_cross_entropy_of_all_pairs() -> None:
    query, key, hold = drawn()
    nats = []
    for q, own in zip(query, hold, strict=True):
        for k, other in zip(key, hold, strict=True):
            share = float((own & other).sum()) / float(own.sum() * other.sum()) ** 0.5
            p = torch.sigmoid(F.cosine_similarity(q, k, dim=0) / 0.3)
            nats.append(-(share * p.log() + (1 - share) * (1 - p).log()))
    torch.testing.assert_close(soft_contrast(query, key, hold, 0.3).soft, torch.stack(nats).mean(), rtol=1e-6, atol=0)


def test_the_instance_term_is_info_nce_whatever_the_tags() -> None:
    query, key, hold = drawn()
    instance = soft_contrast(query, key, hold, 0.3).instance
    torch.testing.assert_close(instance, paired_info_nce(query, key, 0.3))
    torch.testing.assert_close(soft_contrast(query, key, ~hold, 0.3).instance, instance)


def test_pairs_that_are_as_similar_as_their_tags_have_no_gradient() -> None:
    # Orthogonal rows of temperature 1: sigmoid(0) = 1/2. Tags share one of two each: a cosine of 1/2.
    query, key = torch.eye(4)[:2].requires_grad_(), torch.eye(4)[2:]
    hold = torch.tensor([[1, 1, 0, 0], [1, 0, 1, 0]]) > 0
    _, soft = soft_contrast(query, key, hold, 1.0)
    (gradient,) = torch.autograd.grad(soft, query)
    ours = gradient[[0, 1], [3, 2]]  # towards the other image's key
    torch.testing.assert_close(ours, torch.zeros(2))
    assert (gradient[[0, 1], [2, 3]] < 0).all()  # towards its own, which has all its tags


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_images_without_tags_have_no_part_in_the_soft_term(dtype: torch.dtype) -> None:
    query, key, hold = drawn()
    query, key = query.detach().to(dtype).requires_grad_(), key.to(dtype)
    hold[2:] = False
    _, soft = soft_contrast(query, key, hold)
    torch.testing.assert_close(soft, soft_contrast(query[:2], key[:2], hold[:2]).soft)
    (gradient,) = torch.autograd.grad(soft, query)
    assert gradient[:2].abs().sum() > 0
    assert not gradient[2:].any()
    none = soft_contrast(query, key, torch.zeros_like(hold))
    assert none.soft == 0
    assert none.instance > 0


def test_zero_rows_have_finite_gradients_and_a_bad_temperature_is_refused() -> None:
    query, key, hold = drawn()
    zero = torch.zeros_like(query).requires_grad_()
    (gradient,) = torch.autograd.grad(sum(soft_contrast(zero, key, hold)), zero)
    assert gradient.isfinite().all()
    with pytest.raises(UserError, match="temperature=0"):
        soft_contrast(query, key, hold, 0.0)
