"""Classes without images, from their texts and the images of others."""

import pytest
import torch
from torch.nn.functional import normalize

from lightspan.core.errors import UserError
from lightspan.evaluation.features.features import Features
from lightspan.evaluation.gaussians.closed_form import EmpiricalBayes, GDAWithText, new_class_head
from lightspan.evaluation.geometry.moments import Moments
from lightspan.evaluation.probes.base_to_new import GDABaseToNew

D, C = 6, 4


def features(count: int = 60, noise: float = 0.3, seed: int = 0) -> Features:
    generator = torch.Generator().manual_seed(seed)
    label = torch.arange(count) % C
    return Features(torch.eye(C, D)[label] + noise * torch.randn(count, D, generator=generator), label)


def test_the_head_of_new_classes_is_that_of_their_neighbours_around_the_text() -> None:
    rows = normalize(features(20).x.double(), dim=1)
    texts = normalize(torch.eye(2, D).double() + 0.1, dim=1)
    head = new_class_head(rows, texts, torch.tensor([5, 7]), neighbours=3, copies=2)
    means, precisions = [], []
    for text in texts:
        near = rows[(rows @ text).sort(descending=True).indices[:3]]
        means.append((near.sum(dim=0) + 2 * text) / 5)
        covariance = (near - text).T @ (near - text) / 2
        precisions.append(D * torch.linalg.inv(2 * covariance + covariance.trace() * torch.eye(D)))
    mean, precision = torch.stack(means), sum(precisions) / 2
    torch.testing.assert_close(head.weight_DC.T, mean @ precision)
    expected = -torch.tensor(2.0).double().log() - (mean @ precision * mean).sum(dim=1) / 2
    torch.testing.assert_close(head.bias_C, expected)
    assert head.class_C.tolist() == [5, 7]


def test_images_that_are_the_text_itself_leave_the_text() -> None:
    texts = torch.eye(2, D).double()
    head = new_class_head(texts.repeat(5, 1), texts, torch.tensor([0, 1]), neighbours=5)
    torch.testing.assert_close(head.weight_DC.T, texts @ EmpiricalBayes().matrix(Moments.of(texts[:1])))


def test_base_classes_are_classified_as_with_texts_alone_of_them() -> None:
    text = Features(torch.eye(C, D), torch.arange(C))
    bank, val, query = features().of_classes([0, 1]), features(seed=1), features(200, seed=2)
    both = GDABaseToNew(scale=10.0).fit(bank, val, query, text)
    of_base = [each.of_classes([0, 1]) for each in (val, query, text)]
    alone = GDAWithText(scale=10.0).fit(bank, *of_base)
    assert (both.base, both.base_text, both.alpha) == (alone.accuracy, alone.text_accuracy, alone.alpha)
    assert (both.base_rows, both.new_rows) == (100, 100)
    assert both.new > 0.9


def test_without_a_new_class_or_a_text_it_is_refused() -> None:
    text, few = Features(torch.eye(C, D), torch.arange(C)), Features(torch.eye(C, D)[1:], torch.arange(1, C))
    with pytest.raises(UserError, match="the texts describe no class beside those of the bank"):
        GDABaseToNew().fit(features(), features(), features(), text)
    with pytest.raises(UserError, match="the bank has 2 classes and the texts describe 1, not the same"):
        GDABaseToNew().fit(features().of_classes([0, 1]), features(), features(), few)
