"""Pairs of pictures and captions: drawn scenes, stamps, and shards."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from shard_files import pair_shard

from lightspan.backbones.tokenizers import HashedWords
from lightspan.core.errors import UserError
from lightspan.datamodules.image.augment.views import RandomViews, TwoViews
from lightspan.datamodules.image_text.pairs import ImageTextShards
from lightspan.datamodules.image_text.scenes import (
    COLOURS,
    RELATIONS,
    SHAPES,
    SIZES,
    TEMPLATES,
    THINGS,
    Scenes,
    draw,
    factors,
    unseen_things,
)
from lightspan.datamodules.image_text.stamps import Stamps, caption_of
from lightspan.datamodules.text.tokenized import tokenized

WORDS = HashedWords()


def scenes(**settings: object) -> Scenes:
    return Scenes(**{"tokenizer": WORDS, "size": 288, "length": 20} | settings)  # type: ignore[arg-type]


def test_scenes_are_a_function_of_the_seed_and_the_two_parts_share_none() -> None:
    one, again, other = (scenes(draw_seed=seed).load() for seed in (0, 0, 1))
    for part in (0, 1):
        assert np.array_equal(one[part].images, again[part].images)
        assert one[part].captions == again[part].captions
        assert not np.array_equal(one[part].images, other[part].images)
    assert not {bytes(image) for image in one[0].images} & {bytes(image) for image in one[1].images}
    assert np.bincount(one[0].labels).tolist() == [4] * 72


def test_a_caption_says_what_the_scene_shows_and_where() -> None:
    first, second = np.repeat(np.arange(72), 6), np.tile(np.arange(72), 6)
    images, captions = draw(first, second, 0.0, (0.0, 0.0), np.random.default_rng(0))
    paints = np.array([*COLOURS.values()])
    y, x = np.mgrid[: images.shape[2], : images.shape[3]]
    right = 0
    for image, caption, a, b in zip(images.astype(float), captions, first, second, strict=True):
        relation = next(name for name in RELATIONS if f" {name} a " in caption)
        one, other = caption.split(f" {relation} a ")
        assert one.endswith(THINGS[a])
        assert other == THINGS[b]
        if factors(np.array([a]))[0, 1] == factors(np.array([b]))[0, 1]:
            right += 1
            continue  # of one colour they cannot be told apart here
        lit = image.sum(axis=0) > 120
        pixel = image / np.linalg.norm(image, axis=0).clip(1)
        alike = np.einsum("kc,chw->khw", paints / np.linalg.norm(paints, axis=1)[:, None], pixel).argmax(axis=0)
        at = []
        for thing in (a, b):
            here = lit & (alike == factors(np.array([thing]))[0, 1])
            at.append(np.array([x[here].mean(), y[here].mean()]))
        right += int(((at[0] - at[1]) @ np.array(RELATIONS[relation])) > 5)
    assert right > 0.98 * len(captions)


def test_sizes_and_templates_are_those_named() -> None:
    images, captions = draw(np.arange(72), np.full(72, -1), 0.0, (0.0, 0.0), np.random.default_rng(0))
    area = (images.sum(axis=1) > 120).mean(axis=(1, 2)).reshape(len(SIZES), len(COLOURS), len(SHAPES))
    assert (area[1] > 2 * area[0]).all()
    assert all(any(c == t.format(name) for t in TEMPLATES) for c, name in zip(captions, THINGS, strict=True))


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5])
def test_unseen_things_are_in_no_training_scene_and_all_of_the_others_factors_are(share: float) -> None:
    unseen = unseen_things(share)
    assert len(unseen) == round(share * 72)
    seen = factors(np.setdiff1d(np.arange(72), unseen)).T
    assert [len(set(column)) for column in seen] == [2, 6, 6]
    training, test = scenes(unseen=share, pairs=1.0).load()
    assert not any(THINGS[thing] in caption for thing in unseen for caption in training.captions)
    assert set(test.labels) == (set(unseen) or set(range(72)))


def test_shuffled_captions_are_the_same_ones_on_other_scenes() -> None:
    plain, shuffled = scenes().load()[0], scenes(shuffled=True).load()[0]
    assert np.array_equal(plain.images, shuffled.images)
    assert sorted(plain.captions) == sorted(shuffled.captions)
    assert sum(a == b for a, b in zip(plain.captions, shuffled.captions, strict=True)) < 30


def test_pairs_stay_pairs_when_they_are_split_and_few_of_each_class_are_kept() -> None:
    data = scenes(train_classes=[3, 40], train_size=4, val_size=72)
    data.setup()
    assert np.bincount(data.train.images.data.labels).tolist() == [0] * 3 + [2] + [0] * 36 + [2]
    training = scenes().load()[0]
    place = {bytes(image): i for i, image in enumerate(training.images)}
    for part in (data.train, data.val):
        for image, tokens in zip(part.images.data.images, part.tokens, strict=True):
            said = training.captions[place[bytes(image)]]
            assert tokens.tolist() == tokenized(WORDS, [said], 20)[0][0].tolist()
    assert len(data.val) == 72
    assert set(data.test.images.data.labels) == set(range(72))


def test_an_image_may_have_one_view_and_no_more() -> None:
    data = scenes(view=RandomViews(count=1, flip=0.0))
    data.setup()
    sample = data.train.sample(0, seed=1)
    assert sample.keys() == {"image", "label", "index", "tokens", "mask"}
    assert torch.equal(sample["image"], data.train.sample(0, seed=1)["image"])
    assert not torch.equal(sample["image"], data.train.sample(0, seed=2)["image"])
    with pytest.raises(UserError, match=r"pairs have one view of each image, but view gives 2"):
        scenes(view=TwoViews())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"length": 2}, "length=2 leaves no room"),
        ({"size": 287}, "size=287 must be at least 288"),
        ({"unseen": 0.6}, r"unseen=0.6 in \[0, 0.5\]"),
        ({"ground": (0.5, 0.1)}, r"ground=\[0.5, 0.1\] two numbers"),
        ({"train_classes": [72]}, r"train_classes=\[72\] must name classes of Scenes, from 0 to 71"),
        ({"train_size": 0}, "train_size=0 leaves nothing to train on"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        scenes(**settings)


def test_more_pairs_than_there_are_are_refused() -> None:
    with pytest.raises(UserError, match=r"leave only 4 training pairs of Scenes"):
        scenes(train_classes=[5], train_size=5).setup()


def stamp(folder: Path, name: str, caption: str | None, box: tuple[int, int, int, int] = (4, 4, 20, 12)) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    picture = Image.new("RGBA", (40, 30), (0, 0, 0, 0))
    picture.paste((200, 0, 0, 255), box)
    picture.save(folder / f"{name}.png")
    if caption is not None:
        (folder / f"{name}.txt").write_text(f"{caption}\nfr.utf8=autre chose\n", encoding="utf-8")


def test_stamps_are_those_with_a_caption_and_one_caption_is_on_one_side(tmp_path: Path) -> None:
    for i in range(40):
        stamp(tmp_path / "animals" / "birds", f"bird{i:02}", f"Bird {i // 2}.")
    stamp(tmp_path / "food", "untold", None)
    stamp(tmp_path / "food", "empty", "")
    stamp(tmp_path / "food", "cake_mirror", "A cake.")
    training, test = Stamps(root=str(tmp_path), tokenizer=WORDS).load()
    assert len(training.captions) + len(test.captions) == 40
    assert len(test.captions) == 8
    assert not set(training.captions) & set(test.captions)
    assert set(training.labels) == {0}
    assert caption_of(tmp_path / "food" / "empty.png") is None
    picture = training.images[0]
    assert picture.shape == (3, 32, 32)
    assert picture[:, 16, 16].tolist() == [200, 0, 0]  # cropped to what it shows, across the whole picture
    assert picture[:, 0, 0].tolist() == [255, 255, 255]


def test_a_folder_without_stamps_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has 0 stamps with captions; install the system package tuxpaint"):
        Stamps(root=str(tmp_path), tokenizer=WORDS).load()


def test_shards_give_pairs_for_training_and_classes_for_validation(tmp_path: Path) -> None:
    shards = [pair_shard(tmp_path / f"{ending}.tar", ending) for ending in ("txt", "cls")]
    view = RandomViews(count=1, size=4)
    data = ImageTextShards(shards[:1], WORDS, shards[1:], length=6, view=view, batch_size=4)
    data.setup()
    batch = next(iter(data.train_dataloader()))
    tokens, mask = tokenized(WORDS, [f"picture number {i}" for i in batch["index"].tolist()], 6)
    assert batch["tokens"].tolist() == tokens.tolist()
    assert batch["mask"].tolist() == mask.tolist()
    assert batch["image"].shape == (4, 3, 4, 4)
    held_out = next(iter(data.val_dataloader()))
    assert held_out.keys() == {"image", "label", "index"}
    assert held_out["label"].tolist() == [0, 1, 2, 3]
    assert next(iter(data.bank_dataloader()))["image"].shape == (4, 3, 4, 6)


def test_a_stand_in_has_the_form_of_a_batch() -> None:
    stand_in = ImageTextShards(["absent.tar"], WORDS, length=7, view=RandomViews(count=1, size=8)).stand_in()
    assert stand_in is not None
    assert {name: tuple(x.shape) for name, x in stand_in.items()} == {
        "image": (2, 3, 8, 8),
        "tokens": (2, 7),
        "mask": (2, 7),
        "index": (2,),
    }
