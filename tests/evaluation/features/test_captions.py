"""Features of texts: of a data set's captions or a file's lines, in order, each text once; and of ragged data."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from lightspan.backbones.text import MeanTokens, TextTransformer
from lightspan.backbones.tokenizers import HashedWords
from lightspan.core.errors import UserError
from lightspan.datamodules.loading.found_sets import FoundSamples, KeptSamples
from lightspan.datamodules.points.data import PointSets
from lightspan.datamodules.points.shapes import Shape
from lightspan.evaluation.features.captions import Captions, TextLines
from lightspan.evaluation.features.encoded import Encoded
from lightspan.evaluation.features.store import FeatureStore

TEXTS = ["a red brick", "a plate", "a red brick", "a very long and winding title of a part"]


def network() -> TextTransformer:
    torch.manual_seed(0)
    return TextTransformer(vocab_size=64, width=8, depth=1, heads=2, context=16)


class Bricks(PointSets):
    """Triangles of several sizes, the last of which validates."""

    def blank(self) -> None:
        return None

    def find(self) -> FoundSamples[Shape]:
        shapes = [Shape((size + 1) * np.eye(3, dtype=np.float32)[None]) for size in range(len(TEXTS))]
        self.captions, self.val_captions = TEXTS[:3], TEXTS[3:]
        return FoundSamples(KeptSamples(shapes), np.arange(3), np.arange(3, 4), (), "triangles")


def test_texts_come_in_order_and_equal_ones_are_equal_to_the_last_bit(tmp_path: Path) -> None:
    store, encoder, words = FeatureStore(tmp_path), network(), HashedWords(64)
    data = Bricks(points=8)
    found, held = (Captions(encoder, words, data, split).load(store) for split in ("bank", "val"))
    assert found.x.shape == (3, 8)
    assert torch.equal(found.x[0], found.x[2])
    assert not torch.equal(found.x[0], found.x[1])
    assert encoder.training
    assert found.index_N is not None
    assert found.index_N.tolist() == [0, 1, 2]
    assert len(held) == 1
    (tmp_path / "lines.txt").write_bytes("\ufeffa red brick\r\na plate\r\na red brick\r\n".encode())
    lines = TextLines(encoder, words, str(tmp_path / "lines.txt"))
    assert torch.equal(lines.load(store).x, found.x)
    assert lines.outlook(store) == "features of 3 texts, to be computed"
    short = TextLines(encoder, words, str(tmp_path / "lines.txt"), length=1).load(store)
    assert torch.equal(short.x[0], short.x[1]) or short.x.shape == (3, 8)


def test_texts_that_are_not_there_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    for name, message in (("gone", "no texts at"), ("empty", "has no line"), ("latin", "not UTF-8")):
        with pytest.raises(UserError, match=message):
            TextLines(network(), HashedWords(64), str(tmp_path / f"{name}.txt")).texts()
    data = Bricks(points=8)
    data.setup()
    data.val_captions = []
    with pytest.raises(UserError, match="Bricks has no captions of the split val"):
        Captions(network(), HashedWords(64), data, "val").texts()
    with pytest.raises(UserError, match="TextLines length=0 must be at least 1"):
        TextLines(network(), HashedWords(64), "lines.txt", length=0)


def test_a_mean_over_tokens_knows_no_padding_and_is_of_an_encoder() -> None:
    torch.manual_seed(0)
    config = BertConfig(vocab_size=30, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    bert = BertModel(config, add_pooling_layer=False).eval()
    encoder = MeanTokens(bert)
    tokens, mask = torch.tensor([[3, 4, 5, 0, 0]]), torch.tensor([[1, 1, 1, 0, 0]])
    states = bert(input_ids=tokens[:, :3], attention_mask=mask[:, :3]).last_hidden_state
    torch.testing.assert_close(encoder(tokens, mask), states.mean(dim=1))
    assert encoder.num_features == 8
    with pytest.raises(UserError, match="MeanTokens needs an encoder of transformers"):
        MeanTokens(nn.Linear(2, 2))


class Extent(nn.Module):
    """The longest edge of the box around each cloud, [B 1]."""

    def forward(self, xyz_N3: Tensor, offsets: Tensor) -> Tensor:
        clouds = xyz_N3.split(offsets.diff().tolist())
        return torch.stack([(cloud.amax(dim=0) - cloud.amin(dim=0)).amax()[None] for cloud in clouds])


def test_a_network_is_called_with_all_fields_that_its_data_declare_as_read(tmp_path: Path) -> None:
    data = Bricks(points=400, normalise=False, batch_size=2)
    found = Encoded(Extent(), data).load(FeatureStore(tmp_path))
    assert found.x[:, 0].tolist() == pytest.approx([1, 2, 3], rel=0.2)
    with pytest.raises(UserError, match="transforms change one field, and Extent is called with xyz, offsets"):
        Encoded(Extent(), data, transforms=[nn.Identity()]).load(FeatureStore(tmp_path))
