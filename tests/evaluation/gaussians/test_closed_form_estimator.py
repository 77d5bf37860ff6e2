"""The ensemble with texts, learning task by task, and the recipes of both on features of digits."""

import pytest
import torch

from lightspan.core.errors import UserError
from lightspan.evaluation.features.features import Features
from lightspan.evaluation.features.stream import FeatureStream
from lightspan.evaluation.gaussians.closed_form import (
    DECADES,
    GDA,
    NMC,
    ClassIncremental,
    Discriminant,
    GDAWithText,
    IncrementalAccuracy,
)

D, C = 8, 4


def features(count: int = 40, noise: float = 1.0, seed: int = 0) -> Features:
    generator = torch.Generator().manual_seed(seed)
    label = torch.arange(count) % C
    return Features(2 * torch.eye(C, D)[label] + noise * torch.randn(count, D, generator=generator), label)


def test_texts_that_know_everything_or_nothing_are_trusted_as_they_deserve() -> None:
    bank, val, query = features(), features(seed=1), features(400, seed=2)
    alone = GDA().fit(bank, query).accuracy
    wise, foolish = Features(torch.eye(C, D), torch.arange(C)), Features(torch.eye(C, D).roll(1, 0), torch.arange(C))
    with_wise, with_foolish = (GDAWithText(scale=10.0).fit(bank, val, query, text) for text in (wise, foolish))
    assert with_wise.image_accuracy == with_foolish.image_accuracy == alone
    assert with_wise.text_accuracy > 0.5 > with_foolish.text_accuracy
    assert with_wise.accuracy >= alone - 0.01
    assert with_foolish.alpha == max(DECADES)


def test_texts_of_a_class_are_averaged_at_length_one() -> None:
    bank, val, query = features(), features(seed=1), features(seed=2)
    texts = Features(torch.cat([5 * torch.eye(C, D), torch.eye(C, D) + 0.5]), torch.arange(C).repeat(2))
    result = GDAWithText().fit(bank, val, query, texts)
    mean = (torch.eye(C, D) + torch.nn.functional.normalize(torch.eye(C, D) + 0.5, dim=1)).double()
    prototypes = torch.nn.functional.normalize(mean, dim=1)
    right = (query.x.double() @ prototypes.T).argmax(dim=1) == query.classes()
    assert result.text_accuracy == pytest.approx(right.double().mean().item())


def test_a_class_without_a_text_is_refused() -> None:
    bank = features()
    with pytest.raises(UserError, match="the bank has 4 classes and the texts describe 3, not the same ones"):
        GDAWithText().fit(bank, bank, bank, Features(torch.eye(3, D), torch.arange(3)))


@pytest.mark.parametrize("rule", [None, Discriminant()])
def test_after_the_last_task_a_stream_knows_what_a_learner_of_all_data_knows(rule: Discriminant | None) -> None:
    bank, query = features(), features(200, seed=2)
    stream = FeatureStream.by_class(bank, query, ((2, 0), (3,), (1,)))
    result = ClassIncremental(rule).fit(stream)
    joint = (NMC() if rule is None else GDA()).fit(bank, query)
    assert result.after_task()[-1] == pytest.approx(joint.accuracy)
    assert result.rows == (100, 50, 50)
    assert [len(right) for right in result.correct] == [1, 2, 3]


def test_incremental_accuracy_and_forgetting_by_hand() -> None:
    result = IncrementalAccuracy(correct=((8,), (6, 15), (7, 5, 10)), rows=(10, 20, 10))
    assert result.after_task() == pytest.approx([0.8, 21 / 30, 22 / 40])
    assert result.forgetting() == pytest.approx(((8 - 7) / 10 + (15 - 5) / 20) / 2)
    assert IncrementalAccuracy(((3,),), (4,)).forgetting() == 0
    improved_first = IncrementalAccuracy(correct=((5,), (8, 10), (6, 10, 3)), rows=(10, 20, 10))
    assert improved_first.forgetting() == pytest.approx((8 - 6) / 10 / 2)


def test_sessions_of_the_same_classes_add_up_in_any_order() -> None:
    banks, queries = (features(), features(120, seed=3)), (features(40, seed=2), features(60, seed=4))
    both = Features(torch.cat([bank.x for bank in banks]), torch.cat([bank.classes() for bank in banks]))
    seen, turned = ClassIncremental().fit(FeatureStream(banks, queries)), FeatureStream(banks[::-1], queries[::-1])
    assert seen.rows == (40, 60)
    for query, right, other in zip(
        queries, seen.correct[-1], ClassIncremental().fit(turned).correct[-1][::-1], strict=True
    ):
        assert right == other == pytest.approx(NMC().fit(both, query).scores["accuracy"] * len(query))


def test_a_task_without_samples_is_named() -> None:
    some = features()
    for tasks, told in ((((0, 1), (9,)), r"each task needs .* number \[\(20, 20\), \(0, 0\)\]"), ((), r"number \[\]")):
        with pytest.raises(UserError, match=told):
            ClassIncremental().fit(FeatureStream.by_class(some, some, tasks))
