"""Images of two domains from shards: image and mask changed alike, pairs that are exact, and what is refused."""

import io
import json
import tarfile
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from shard_files import add_members, damage, mask_of, masked_shard, png_of
from torch import Tensor

from lightspan.core.errors import UserError
from lightspan.datamodules.image.augment.views import MultiCrop, RandomViews
from lightspan.datamodules.loading.loader import ExactLoader
from lightspan.datamodules.shards.domains import DomainPairs, DomainShards
from lightspan.datamodules.shards.index import scan

PLAIN: dict[str, Any] = {"num_classes": 5, "batch_size": 4, "mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
CROP = RandomViews(count=1, size=8, scale=(1 / 3, 1 / 3), ratio=(1.0, 1.0), brightness=0.0, contrast=0.0)
"""Of 8 x 8 of the 12 x 16 pixels, as they are, and mirrored every other time."""


@pytest.fixture
def shards(tmp_path: Path) -> list[list[str]]:
    """Source, target and validation: two shards of 5 and 3 pictures, one of 6 without masks, and one of 4."""
    source = [masked_shard(tmp_path / "s0.tar", range(5)), masked_shard(tmp_path / "s1.tar", range(5, 8))]
    target = [masked_shard(tmp_path / "t.tar", range(20, 26), masks=False)]
    return [source, target, [masked_shard(tmp_path / "v.tar", range(30, 34))]]


def opened(shards: list[list[str]], **settings: Any) -> DomainShards:
    data = DomainShards(*shards, **PLAIN | settings)
    data.setup()
    return data


def classes_shown(image_BCHW: Tensor) -> Tensor:
    """What the pictures of `masked_shard` have as their classes, -1 where they are blue."""
    return (25.5 * image_BCHW[:, 0]).round().long().masked_fill(image_BCHW[:, 2] > 0.5, -1)


def numbers_shown(image_BCHW: Tensor) -> list[int]:
    return (255 * image_BCHW[:, 1, 0, 0]).round().long().tolist()


# Image and mask


def test_crop_and_mirror_are_those_of_image_and_mask_and_a_pixel_without_a_class_is_minus_one(
    shards: list[list[str]],
) -> None:
    data = opened(shards, view=CROP)
    assert data.train is not None
    seen = [data.train.sample(3, seed) for seed in range(20)]
    for sample in seen:
        assert sample["semantic"].shape == (8, 8)
        assert torch.equal(classes_shown(sample["image"][None])[0], sample["semantic"])
    assert min(int(sample["semantic"].min()) for sample in seen) == -1
    assert len({sample["semantic"].numpy().tobytes() for sample in seen}) > 15  # crops and mirrors
    again = data.train.sample(3, 7)["semantic"]
    assert torch.equal(again, seen[7]["semantic"])
    whole = torch.from_numpy(mask_of(3).astype(np.int64)).masked_fill(torch.from_numpy(mask_of(3) == 255), -1)
    windows = whole.unfold(0, 8, 1).unfold(1, 8, 1).reshape(-1, 64)
    cut = [
        any((flat == w.reshape(-1)).all() for flat in windows for w in (s["semantic"], s["semantic"].flip(1)))
        for s in seen
    ]
    assert all(cut)


def test_colours_change_the_image_alone(shards: list[list[str]]) -> None:
    bright = RandomViews(
        count=1, scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=0.0, brightness=0.5, contrast=0.0, jitter=1.0
    )
    plain, changed = (opened(shards, view=view) for view in (None, bright))
    assert plain.train is not None
    assert changed.train is not None
    one, other = plain.train.sample(2, 1), changed.train.sample(2, 1)
    assert torch.equal(one["semantic"], other["semantic"])
    assert not torch.allclose(one["image"], other["image"], atol=0.02)


def test_without_a_view_images_are_scaled_to_the_sides_and_masks_take_the_nearest_pixel(
    shards: list[list[str]],
) -> None:
    data = opened(shards, view=CROP, sides=(24, 48))
    for loader, prefix in ((data.val_dataloader(), "target_"), (data.bank_dataloader(), "")):
        batch = next(iter(loader))  # type: ignore[arg-type]
        assert batch.keys() == {f"{prefix}image", f"{prefix}semantic", "index"}
        assert batch[f"{prefix}image"].shape == (4, 3, 24, 48)
        for row, number in enumerate(numbers_shown(batch[f"{prefix}image"])):
            mask = torch.from_numpy(mask_of(number).astype(np.int64))
            enlarged = mask.repeat_interleave(2, 0).repeat_interleave(3, 1)
            assert torch.equal(batch[f"{prefix}semantic"][row], enlarged.masked_fill(enlarged == 255, -1))


def test_masks_may_be_grey_of_16_bits_or_have_a_palette(tmp_path: Path) -> None:
    numbers = np.array([[0, 1], [299, 65535]], np.uint16)
    with_palette = Image.fromarray(np.array([[0, 1], [2, 255]], np.uint8), mode="P")
    with_palette.putpalette([200, 10, 10] * 256)
    saved = io.BytesIO()
    with_palette.save(saved, "PNG")
    for mask, expected, settings in (
        (png_of(numbers), [[0, 1], [299, -1]], {"num_classes": 300, "ignore_label": 65535}),
        (saved.getvalue(), [[0, 1], [2, -1]], {}),
    ):
        path = tmp_path / "one.tar"
        with tarfile.open(path, "w") as archive:
            add_members(archive, "a", {"png": png_of(np.zeros((2, 2, 3), np.uint8)), "mask.png": mask})
        data = opened([[str(path)], [str(path)]], batch_size=1, **settings)
        (batch,) = data.train_dataloader()
        assert batch["semantic"].tolist() == [expected]


# Pairs


def loaders(data: DomainShards, ranks: int, num_workers: int = 0) -> list[ExactLoader]:
    """What each of several ranks would be given."""
    assert data.train is not None
    assert data.target is not None
    pairs = DomainPairs(data.train, data.target)
    order = pairs.order(data.window)
    return [
        ExactLoader(pairs, data.batch_size, data.seed, rank, ranks, num_workers=num_workers, order=order)
        for rank in range(ranks)
    ]


def steps(ranks: list[ExactLoader], count: int) -> list[list[tuple[int, int, bytes]]]:
    """(source, target, what both show) of each sample of each step over all ranks, as many epochs as that takes."""
    seen = []
    for loader in ranks:
        own: list[list[tuple[int, int, bytes]]] = []
        while len(own) < count:
            for batch in loader:
                content = torch.cat(
                    [batch[name].flatten(1).float() for name in sorted(batch) if name != "index"], dim=1
                )
                shown = numbers_shown(batch["image"]), numbers_shown(batch["target_image"])
                assert shown[0] == batch["index"].tolist()
                own.append(list(zip(*shown, (row.numpy().tobytes() for row in content), strict=True)))
                if len(own) == count:
                    break
        seen.append(own)
    return [list(chain.from_iterable(parts)) for parts in zip(*seen, strict=True)]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_ranks_and_workers_see_every_source_image_once_in_each_epoch_with_the_same_partners(
    shards: list[list[str]], num_workers: int
) -> None:
    data = opened(shards, view=CROP, target_view=CROP, window=1, seed=1)
    alone = steps(loaders(data, 1), 6)
    assert steps(loaders(data, 2, num_workers), 6) == alone
    assert steps(loaders(data, 4), 6) == alone
    flat = list(chain.from_iterable(alone))
    for epoch in range(3):
        assert sorted(source for source, _, _ in flat[8 * epoch : 8 * epoch + 8]) == list(range(8))
    assert {target for _, target, _ in flat} == set(range(20, 26))
    assert len({pair[:2] for pair in flat}) > 15  # partners are drawn anew


def test_a_run_stopped_at_any_step_goes_on_with_the_next_pair_on_any_ranks(shards: list[list[str]]) -> None:
    data = opened(shards, view=CROP, target_view=CROP, window=1)
    straight = steps(loaders(data, 1), 5)
    for stop, saved, resumed in ((1, 1, 2), (2, 2, 4), (3, 2, 1)):  # in an epoch, at its end, in the next one
        first, rest = loaders(data, saved), loaders(data, resumed)
        assert steps(first, stop) == straight[:stop]
        for loader in rest:
            loader.load_state_dict(first[0].state_dict())
        assert steps(rest, 5 - stop) == straight[stop:]


def test_the_crops_of_a_pair_are_drawn_apart(shards: list[list[str]], tmp_path: Path) -> None:
    """Of the same picture on both sides, which one seed for both would cut alike."""
    same = [masked_shard(tmp_path / "one.tar", [3])]
    data = opened([same, same], view=CROP, target_view=CROP, target_masks=True, batch_size=1)
    batches = [batch for _ in range(8) for batch in data.train_dataloader()]
    assert sum(torch.equal(batch["semantic"], batch["target_semantic"]) for batch in batches) < 4


def test_another_target_is_other_data(shards: list[list[str]], tmp_path: Path) -> None:
    state = loaders(opened(shards), 1)[0].state_dict()
    other = [shards[0], [masked_shard(tmp_path / "t2.tar", range(26, 32))]]
    with pytest.raises(UserError, match=r"data content .* restore the data that it had, or"):
        loaders(opened(other), 1)[0].load_state_dict(state)


def test_a_damaged_picture_of_either_side_is_named_or_another_pair_takes_its_place(
    shards: list[list[str]], tmp_path: Path
) -> None:
    for shard in (shards[0][0], shards[1][0]):
        index = scan(Path(shard), shard, 2**20)[0]
        Path(f"{shard}.index.json").write_text(index.to_json())
        damage(shard, json.loads(index.to_json())["starts"][2] + 530)
    with pytest.raises(UserError, match=r"sample 2 at byte \d+ is damaged.*skip_damaged=true"):
        steps(loaders(opened(shards), 1), 12)
    data = opened(shards, skip_damaged=True)
    alone = loaders(data, 1)
    flat = list(chain.from_iterable(steps(alone, 12)))
    assert 2 not in {source for source, _, _ in flat}
    assert {target for _, target, _ in flat} == {20, 21, 23, 24, 25}
    assert {replaced.damaged for replaced in alone[0].replaced} > {2}
    assert list(chain.from_iterable(steps(loaders(data, 2), 12))) == flat


def test_masks_of_the_target_are_read_where_they_are_asked_for(shards: list[list[str]], tmp_path: Path) -> None:
    assert next(iter(opened(shards).train_dataloader())).keys() == {"image", "semantic", "target_image", "index"}
    masked = [shards[0], [masked_shard(tmp_path / "m.tar", range(40, 46))]]
    batch = next(iter(opened(masked, target_masks=True).train_dataloader()))
    assert torch.equal(classes_shown(batch["target_image"]), batch["target_semantic"])
    assert opened(masked).val_dataloader() == []


def test_without_a_shard_a_plan_has_two_pairs(tmp_path: Path) -> None:
    absent = [[str(tmp_path / name)] for name in ("s.tar", "t.tar")]
    view = RandomViews(count=1, size=8)
    batch = DomainShards(*absent, view=view, target_view=view).stand_in()
    assert batch is not None
    assert {name: tuple(field.shape) for name, field in batch.items()} == {
        "image": (2, 3, 8, 8), "semantic": (2, 8, 8), "target_image": (2, 3, 8, 8), "index": (2,),
    }  # fmt: skip
    masks = DomainShards(*absent, sides=(4, 6), target_masks=True).stand_in()
    assert masks is not None
    assert masks["target_semantic"].shape == (2, 4, 6)
    assert DomainShards([masked_shard(tmp_path / "s.tar", [1])], absent[1]).stand_in() is None


# What is refused

GREY, IMAGE = np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3), np.uint8)


def jpeg(array: np.ndarray) -> bytes:
    saved = io.BytesIO()
    Image.fromarray(array).save(saved, "JPEG")
    return saved.getvalue()


@pytest.mark.parametrize(
    ("members", "said"),
    [
        ({}, r"sample a has no \.mask\.png member for semantic; it has png"),
        (
            {"mask.png": png_of(GREY[:, :3])},
            "sample a has a mask of 4 x 3 pixels and an image of 4 x 4; make them of one",
        ),
        ({"mask.png": png_of(GREY + 5)}, r"has a pixel of class 5, and num_classes=5 has classes from 0 to 4 .*=255"),
        ({"mask.png": png_of(GREY + 254)}, "has a pixel of class 254"),
        (
            {"mask.png": png_of(IMAGE)},
            r"\.mask\.png member cannot be decoded: it has 3 channels \(RGB\), and a mask has",
        ),
        ({"mask.png": jpeg(GREY)}, "it is a JPEG, and a mask is a PNG, which keeps numbers as they are"),
        ({"mask.png": png_of(GREY)[:40]}, r"its \.mask\.png member cannot be decoded"),
    ],
)
def test_a_mask_that_does_not_fit_its_image_or_the_classes_is_named(
    members: dict[str, bytes], said: str, tmp_path: Path
) -> None:
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as archive:
        add_members(archive, "a", {"png": png_of(IMAGE), **members})
    data = opened([[str(path)], [str(path)]], batch_size=1)
    with pytest.raises(UserError, match=f"shard .*x.tar: sample a.*{said.removeprefix('sample a ')}"):
        next(iter(data.train_dataloader()))


class Own(RandomViews):
    def __call__(self, image: Tensor) -> list[Tensor]:
        return [image]


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: DomainShards(["a.tar"], []), "target_shards is an empty list"),
        (lambda: DomainShards(["a.tar"], ["t.tar", "t.tar"]), "target_shards names t.tar 2 times"),
        (lambda: DomainShards(["a.tar"], ["t.tar"], num_classes=1), "num_classes=1 must be at least 2"),
        (lambda: DomainShards(["a.tar"], ["t.tar"], ignore_label=7), "ignore_label=7 none of the classes from 0 to 18"),
        (lambda: DomainShards(["a.tar"], ["t.tar"], sides=(0, 4)), r"sides=\[0, 4\] must be two numbers"),
        (lambda: DomainShards(["a.tar"], ["t.tar"], view=RandomViews()), "view must make one view .* RandomViews"),
        (lambda: DomainShards(["a.tar"], ["t.tar"], target_view=Own(1)), "target_view must make one view .*not Own"),
        (lambda: DomainShards(["a.tar"], ["t.tar"], view=MultiCrop([Own(1)])), "not MultiCrop"),
    ],
)
def test_settings_that_cannot_work_are_refused(make: Callable[[], Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        make()
