"""Inputs beside `Encoded`: sentences of classes, and one data set after the other."""

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.functional import normalize

from lightspan.backbones.dual_encoder import DualEncoder
from lightspan.backbones.text import TextTransformer
from lightspan.backbones.tokenizers import HashedWords
from lightspan.backbones.vision import SmallConvNet
from lightspan.core.errors import UserError
from lightspan.datamodules.image.sets.small import Digits
from lightspan.datamodules.image_text.scenes import THINGS, Scenes
from lightspan.evaluation.features.class_texts import ClassTexts
from lightspan.evaluation.features.encoded import Encoded
from lightspan.evaluation.features.features import Features
from lightspan.evaluation.features.store import FeatureStore
from lightspan.evaluation.features.stream import EncodedSessions
from lightspan.evaluation.probes.zero_shot import class_rows

TEMPLATES = ("a {}", "there is a {}")


def encoders() -> DualEncoder:
    torch.manual_seed(0)
    return DualEncoder(SmallConvNet(3, 4, 2), TextTransformer(512, 8, 1, 2, 16), width=8)


def scenes() -> Scenes:
    return Scenes(tokenizer=HashedWords(512), size=288, length=16, pairs=0.0)


def test_texts_of_classes_are_rows_whose_mean_is_the_zero_shot_head(tmp_path: Path) -> None:
    trained = encoders().train()
    texts = ClassTexts(trained, scenes(), TEMPLATES).load(FeatureStore(tmp_path))
    assert texts.x.shape == (len(TEMPLATES) * len(THINGS), 8)
    assert not texts.x.requires_grad
    torch.testing.assert_close(texts.x.norm(dim=1), torch.ones(len(texts)))
    mean_CD = torch.stack([texts.x[texts.classes() == label].mean(dim=0) for label in range(len(THINGS))])
    with torch.no_grad():
        expected = class_rows(HashedWords(512), trained.eval().encode_text, THINGS, TEMPLATES)
    torch.testing.assert_close(normalize(mean_CD, dim=1), expected)


def test_texts_of_classes_may_be_named_beside_data_without_names(tmp_path: Path) -> None:
    settings = {"class_names": ["cat", "dog"], "tokenizer": HashedWords(512)}
    texts = ClassTexts(encoders(), templates=TEMPLATES, **settings).load(FeatureStore(tmp_path))
    assert texts.classes().tolist() == [0, 1, 0, 1]
    for lacking in settings:
        with pytest.raises(UserError, match="class_names"):
            ClassTexts(encoders(), Digits(), **{name: value for name, value in settings.items() if name != lacking})


def test_images_of_a_dual_encoder_are_rows_of_the_same_space(tmp_path: Path) -> None:
    network, data = encoders(), scenes()
    images = Encoded(network, data, "test").load(FeatureStore(tmp_path))
    batch = next(iter(data.test_dataloader()))
    with torch.no_grad():
        expected = network.eval().encode_image(batch["image"])
    torch.testing.assert_close(images.x[: len(expected)], expected)


def test_sessions_are_the_features_of_one_data_set_after_the_other(tmp_path: Path) -> None:
    store, network = FeatureStore(tmp_path), nn.Flatten()
    sessions = [Digits(train_size=20), Digits(train_size=30)]
    stream = EncodedSessions(network, sessions).load(store)
    for split, found in (("bank", stream.banks), ("test", stream.queries)):
        for data, features in zip(sessions, found, strict=True):
            assert torch.equal(features.x[:], Encoded(network, data, split).load(store).x[:])
    assert [len(bank) for bank in stream.banks] == [20, 30]


def test_what_is_missing_is_named() -> None:
    with pytest.raises(UserError, match="encode_text, and Flatten"):
        ClassTexts(nn.Flatten(), scenes())
    with pytest.raises(UserError, match="ClassTexts needs class names and a tokenizer, and Digits"):
        ClassTexts(encoders(), Digits())
    with pytest.raises(UserError, match=r"EncodedSessions sessions=\[\]"):
        EncodedSessions(nn.Flatten(), [])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_classes_are_whole_numbers_of_any_size(dtype: torch.dtype) -> None:
    features = Features(torch.eye(4), torch.tensor([0, 2, 0, 2], dtype=dtype))
    assert features.classes().tolist() == [0, 2, 0, 2]
    assert features.moments(by_class=True).count_C.tolist() == [2, 0, 2]


@pytest.mark.parametrize(
    ("label", "found"),
    [
        (torch.tensor([0, -1]), "one label is -1; leave samples without a class out"),
        (torch.zeros(2), r"the labels are torch.float32 \[2\]"),
        (torch.zeros(2, 1, dtype=torch.uint8), r"the labels are torch.uint8 \[2, 1\]"),
        (torch.zeros(2, dtype=torch.bool), r"the labels are torch.bool \[2\]"),
        (None, "the labels are none"),
    ],
)
def test_labels_that_are_no_classes_are_refused(label: torch.Tensor | None, found: str) -> None:
    with pytest.raises(UserError, match=f"this needs the class of each sample as a whole number from 0, but {found}"):
        Features(torch.eye(2), label).classes()
