"""Images with a class, a text, both or neither, from shards of any such sets."""

from pathlib import Path
from typing import Any

import pytest
import torch
from shard_files import partial_shard

from lightspan.backbones.tokenizers import HashedWords
from lightspan.core.errors import UserError
from lightspan.datamodules.image.augment.views import RandomViews
from lightspan.datamodules.image_text.partial import PartlyLabelledShards
from lightspan.datamodules.text.tokenized import tokenized

SAID = [{"cls": "4"}, {"txt": "a red ring"}, {"cls": "2", "txt": "blue"}, {}]


def data(folder: Path, said: list[dict[str, str]], **settings: Any) -> PartlyLabelledShards:
    shards = [partial_shard(folder / f"{number}.tar", [one]) for number, one in enumerate(said)]
    return PartlyLabelledShards(shards, HashedWords(), length=6, batch_size=len(said), **settings)


def test_a_sample_says_what_it_has_and_shards_of_several_sets_are_one(tmp_path: Path) -> None:
    made = data(tmp_path, SAID)
    made.setup()
    (batch,) = made.bank_dataloader()
    assert batch["label"].tolist() == [4, 0, 2, 0]
    assert batch["label_known"].tolist() == [1, 0, 1, 0]
    assert batch["caption_known"].tolist() == [0, 1, 1, 0]
    tokens, mask = tokenized(HashedWords(), ["", "a red ring", "blue", ""], 6)
    assert torch.equal(batch["tokens"], torch.from_numpy(tokens))
    assert torch.equal(batch["mask"], torch.from_numpy(mask))


def test_a_view_takes_the_place_of_the_training_image(tmp_path: Path) -> None:
    made = data(tmp_path, SAID, view=RandomViews(1, size=4))
    made.setup()
    (batch,) = made.train_dataloader()
    assert batch["image"].shape == (4, 3, 4, 4)
    assert "views" not in batch


def test_damage_is_named_and_a_plan_without_shards_has_a_batch(tmp_path: Path) -> None:
    made = data(tmp_path, [{"cls": "ring"}])
    made.setup()
    with pytest.raises(UserError, match=r"sample 0000: its \.cls member cannot be decoded: 'ring' is not a class"):
        next(iter(made.bank_dataloader()))
    batch = PartlyLabelledShards([str(tmp_path / "none.tar")], HashedWords()).stand_in()
    assert batch is not None
    assert batch["label_known"].tolist() == batch["caption_known"].tolist() == [0, 0]
