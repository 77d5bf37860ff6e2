"""Transfer, average and last over domains that were learned one after the other."""

from pathlib import Path

import pytest
import torch
from picture_files import write_pictures

from lightspan.backbones.dual_encoder import DualEncoder
from lightspan.backbones.text import TextTransformer
from lightspan.backbones.tokenizers import HashedWords
from lightspan.backbones.vision import SmallConvNet
from lightspan.core.errors import UserError
from lightspan.datamodules.image.folder import ImageFolder
from lightspan.evaluation.features.class_texts import ClassTexts
from lightspan.evaluation.features.encoded import Encoded
from lightspan.evaluation.features.features import Features
from lightspan.evaluation.features.stages import EncodedStages, TextStages
from lightspan.evaluation.features.store import FeatureStore
from lightspan.evaluation.probes.cross_domain import CrossDomain, CrossDomainAccuracy


def test_the_three_figures_by_hand() -> None:
    result = CrossDomainAccuracy(("a", "b", "c"), ((0.9, 0.2, 0.4), (0.8, 0.7, 0.6), (0.5, 0.6, 1.0)))
    assert result.transfer() == pytest.approx((0.2 + (0.4 + 0.6) / 2) / 2)
    assert result.average() == pytest.approx(5.7 / 9)
    assert result.last() == pytest.approx(0.7)
    assert [figure.name for figure in result.figures()] == ["last", "average", "transfer", "domains"]
    assert len(result.table()) == 9
    assert result.picture("x-tail")
    one = CrossDomainAccuracy(("a",), ((0.5,),))
    assert one.transfer() is None
    assert [figure.name for figure in one.figures()] == ["last", "average", "domains"]


def test_an_image_may_be_taken_for_a_class_of_another_domain() -> None:
    """Two domains of two classes; after the second, the text of class 2 lies where images of class 0 are."""
    axes = torch.eye(4)
    queries = (Features(axes[[0, 1]], torch.tensor([0, 1])), Features(axes[[2, 3, 3]], torch.tensor([2, 3, 3])))
    texts = (Features(axes, torch.arange(4)), Features(axes[[3, 1, 0, 2]], torch.arange(4)))
    found = CrossDomain().fit(TextStages(("first", "second"), texts, (queries, queries)))
    assert found.accuracy == ((1.0, 1.0), (0.5, 0.0))
    for stages in (TextStages(("first", "second"), texts[:1], (queries,)), TextStages((), (), ())):
        with pytest.raises(UserError, match="give an encoder after each domain"):
            CrossDomain().fit(stages)


def test_stages_are_the_features_of_each_encoder_with_labels_through_all_domains(tmp_path: Path) -> None:
    folders = {"birds": {"red_robin": 2, "wren": 2}, "cars": {"van": 2, "bus": 2, "sports_car": 2}}
    domains = {
        name: ImageFolder(
            folder=str(write_pictures(tmp_path / name / "train", classes)),
            val_folder=str(write_pictures(tmp_path / name / "test", classes)),
            size=16,
            cache_dir=str(tmp_path / "cache"),
        )
        for name, classes in folders.items()
    }
    words, stages = HashedWords(512), []
    for seed in (0, 1):
        torch.manual_seed(seed)
        stages.append(DualEncoder(SmallConvNet(3, 4, 2), TextTransformer(512, 8, 1, 2, 16), width=8))
    templates = {"birds": "a {}, a bird", "cars": "a {} on a road"}
    store = FeatureStore(tmp_path / "store")
    found = EncodedStages(stages, domains, templates, words).load(store)
    assert found.names == ("birds", "cars")
    for encoders, text, queries in zip(stages, found.texts, found.queries, strict=True):
        assert text.classes().tolist() == [0, 1, 2, 3, 4]
        names = [["red robin", "wren"], ["bus", "sports car", "van"]]
        own = [ClassTexts(encoders, None, (templates[name],), names[i], words) for i, name in enumerate(templates)]
        assert torch.equal(text.x, torch.cat([each.load(store).x for each in own]))
        assert [sorted(set(query.classes().tolist())) for query in queries] == [[0, 1], [2, 3, 4]]
        for query, data in zip(queries, domains.values(), strict=True):
            assert torch.equal(query.x, Encoded(encoders, data, "test").load(store).x)
    assert not torch.equal(found.texts[0].x, found.texts[1].x)
    assert len(CrossDomain().fit(found).table()) == 4
    with pytest.raises(UserError, match="templates are of"):
        EncodedStages(stages, domains, {"birds": "a {}"}, words)
