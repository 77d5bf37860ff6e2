import pytest
import torch
from torch import Tensor

from lightspan.backbones.tokenizers import HashedWords
from lightspan.core.errors import UserError
from lightspan.evaluation.probes.zero_shot import class_rows, retrieval_at_1, zero_shot_accuracy


def encode(tokens: Tensor, mask: Tensor) -> Tensor:
    """How often each of 8 numbers is among the words of a text."""
    return torch.stack([((tokens % 8 == k) & (mask == 1) & (tokens > 2)).sum(dim=1) for k in range(8)], dim=1).float()


def test_a_class_is_the_mean_of_its_sentences_at_length_one() -> None:
    words, names = HashedWords(), ["red ring", "blue bar"]
    one, other = (class_rows(words, encode, names, [template]) for template in ("a {}", "see the {} there"))
    both = class_rows(words, encode, names, ["a {}", "see the {} there"])
    torch.testing.assert_close(both, torch.nn.functional.normalize(one + other, dim=1))
    torch.testing.assert_close(both.norm(dim=1), torch.ones(2))
    torch.testing.assert_close(class_rows(words, encode, names[::-1], ["a {}"]), one.flip(0))


def test_accuracy_is_the_share_of_nearest_classes_and_may_be_among_some() -> None:
    classes, label = torch.eye(3), torch.tensor([0, 1, 2, 2])
    image = torch.tensor([[2.0, 0, 1], [3, 2, 0], [0, 0, 1], [0, 1, 0]])
    assert zero_shot_accuracy(image, classes, label) == 0.5
    assert zero_shot_accuracy(image, classes, label, torch.tensor([1, 2])) == 0.5
    assert zero_shot_accuracy(image[1:3], classes, label[1:3], torch.tensor([1, 2])) == 1.0
    assert zero_shot_accuracy(image[:1].bfloat16(), classes.bfloat16(), label[:1]) == 1.0


def test_retrieval_shares_a_hit_among_equal_texts() -> None:
    text = torch.eye(4)
    assert retrieval_at_1(text, text) == 1.0
    assert retrieval_at_1(text, text.roll(1, dims=0)) == 0.0
    assert retrieval_at_1(torch.ones(4, 2), torch.ones(4, 2)) == 0.25
    assert retrieval_at_1(torch.zeros(4, 2), text[:, :2]) == 0.25
    twice = torch.eye(2)[[0, 0, 1]]
    assert retrieval_at_1(twice, twice) == pytest.approx(2 / 3)


def test_what_cannot_be_measured_is_refused() -> None:
    with pytest.raises(UserError, match=r"class names \(0 given\)"):
        class_rows(HashedWords(), encode, [])
    with pytest.raises(UserError, match=r"sentences with \{\} for the name"):
        class_rows(HashedWords(), encode, ["ring"], ["a ring"])
    with pytest.raises(UserError, match=r"got no image"):
        zero_shot_accuracy(torch.ones(0, 3), torch.eye(3), torch.ones(0, dtype=torch.int64))
    with pytest.raises(UserError, match=r"got 2 texts for 3 images"):
        retrieval_at_1(torch.eye(3), torch.eye(3)[:2])
