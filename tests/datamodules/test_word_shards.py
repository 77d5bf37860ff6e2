"""Pictures of words from shards: their letters, one size, views of training alone, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from shard_files import partial_shard

from lightspan.core.errors import UserError
from lightspan.datamodules.image.augment.views import RandomViews
from lightspan.datamodules.shards.words import WordShards


def opened(folder: Path, words: list[str], **settings: Any) -> WordShards:
    shards = [partial_shard(folder / f"{part}.tar", [{"txt": word} for word in words]) for part in ("train", "val")]
    given: dict[str, Any] = {"alphabet": "abc", "longest": 4, "sides": (4, 8), "batch_size": len(words)}
    made = WordShards([shards[0]], [shards[1]], **given | settings)
    made.setup()
    return made


def test_a_word_is_its_letters_and_nothing_behind_them_and_every_picture_has_one_size(tmp_path: Path) -> None:
    made = opened(tmp_path, ["cab", "a b\n", "\u00e4"])
    for loader in (made.train_dataloader(), made.bank_dataloader(), made.val_dataloader()):
        (batch,) = loader
        assert batch.keys() == {"image", "characters", "index"}
        assert batch["image"].shape == (3, 3, 4, 8)
        right = torch.tensor([[3, 1, 2, 0], [1, 2, 0, 0], [1, 0, 0, 0]])
        assert torch.equal(batch["characters"], right[batch["index"]])
        red = (255 * (0.5 * batch["image"][:, 0] + 0.5)).round()
        assert torch.equal(red, batch["index"][:, None, None].expand(-1, 4, 8).float())


def test_views_change_the_pictures_of_training_and_keep_their_size(tmp_path: Path) -> None:
    view = RandomViews(count=1, flip=0.0, scale=(0.9, 1.0), brightness=0.5, jitter=1.0)
    made = opened(tmp_path, ["a", "b"], view=view)
    assert made.train is not None
    seen = [made.train.sample(1, seed)["image"] for seed in range(9)]
    assert seen[3].shape == (3, 4, 8)
    assert torch.equal(seen[3], made.train.sample(1, 3)["image"])
    assert len({image.numpy().tobytes() for image in seen}) > 2
    assert made.bank.sample(1, 3)["image"][2].eq(1).all()  # as it is


def test_the_alphabet_is_the_94_printable_characters_unless_it_is_named(tmp_path: Path) -> None:
    made = opened(tmp_path, ["!~"], alphabet=None)
    assert made.val is not None
    assert made.val.sample(0, 0)["characters"].tolist() == [1, 94, 0, 0]


def test_without_a_shard_a_plan_has_two_pictures(tmp_path: Path) -> None:
    batch = WordShards([str(tmp_path / "none.tar")], alphabet="xy", longest=3).stand_in()
    assert batch is not None
    assert batch["image"].shape == (2, 3, 32, 128)
    assert batch["characters"].tolist() == [[1, 0, 0]] * 2
    assert opened(tmp_path, ["a"]).stand_in() is None


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("abcab", "'abcab' has 5 letters, more than longest=4"),
        ("ad", "'ad' has 'd', outside of the alphabet 'abc'"),
        ("\u6f22", "has the word '\u6f22', of which no letter of ASCII is left"),
        ("", "has the word '', of which no letter"),
    ],
)
def test_a_word_that_cannot_be_spelled_is_named_or_left_out(word: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"sample 0001(:.*)? {said}.*skip_damaged=true takes another"):
        next(iter(opened(tmp_path, ["a", word, "b"]).train_dataloader()))
    (batch,) = opened(tmp_path, ["a", word, "b"], skip_damaged=True).train_dataloader()
    assert {*batch["index"].tolist()} <= {0, 2}


def test_settings_that_cannot_work_are_refused() -> None:
    for settings, said in (
        ({"longest": 0}, "longest=0 and both of sides"),
        ({"sides": (0, 8)}, r"sides=\[0, 8\] must be at least 1"),
        ({"alphabet": "aa"}, "alphabet='aa' must name at least one letter, each once"),
    ):
        with pytest.raises(UserError, match=said):
            WordShards(["a.tar"], **settings)  # type: ignore[arg-type]
