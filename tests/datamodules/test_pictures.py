"""The user's own pictures: which files, what becomes of each kind, the split, the cache, ranks and resume."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from picture_files import pixels, write_every_kind, write_pictures
from PIL import Image

from lightspan.core.errors import UserError
from lightspan.core.files.caches import isolated_caches
from lightspan.datamodules.image.augment.views import TwoViews
from lightspan.datamodules.image.data import held_out
from lightspan.datamodules.image.dataset import PictureDataset
from lightspan.datamodules.image.folder import ImageFolder
from lightspan.datamodules.image.packed import Decoder, fitted
from lightspan.datamodules.image.picture_files import find_pictures
from lightspan.datamodules.loading.loader import ExactLoader
from lightspan.datamodules.loading.order import Order


def opened(folder: Path, **settings: object) -> ImageFolder:
    settings = {"size": 8, "batch_size": 4, "cache_dir": str(folder.parent / "cache"), **settings}
    data = ImageFolder(str(folder), **settings)  # type: ignore[arg-type]
    data.setup()
    return data


# Files


def test_sub_folders_are_classes_and_pictures_are_found_at_any_depth(tmp_path: Path) -> None:
    folder = write_pictures(tmp_path / "in", {"cat": 2, "bird/small": 1, "bird": 1})
    found = find_pictures(folder)
    assert found.classes == ["bird", "cat"]
    assert found.names == ["bird/000.png", "bird/small/000.png", "cat/000.png", "cat/001.png"]
    assert found.labels.tolist() == [0, 0, 1, 1]
    assert find_pictures(folder, labels="none").classes == []


@pytest.mark.parametrize("classes", [{"": 3}, {"only": 3}, {"": 1, "cat": 1, "bird": 1}])
def test_without_two_class_folders_for_all_pictures_there_are_no_labels(classes: dict, tmp_path: Path) -> None:
    found = find_pictures(write_pictures(tmp_path / "in", classes))
    assert found.classes == []
    assert found.labels.tolist() == [0, 0, 0]


def test_one_class_folder_is_a_class_where_the_user_says_so(tmp_path: Path) -> None:
    folder = write_pictures(tmp_path / "in", {"only": 3})
    assert find_pictures(folder, labels="folders").classes == ["only"]
    write_pictures(folder, {"": 1})
    with pytest.raises(UserError, match=r"1 are in none, such as 000\.png"):
        find_pictures(folder, labels="folders")


def test_a_folder_of_splits_is_not_taken_for_one_of_classes(tmp_path: Path) -> None:
    folder = write_pictures(tmp_path, {"train/cat": 2, "train/dog": 2, "val/cat": 1, "val/dog": 1})
    with pytest.raises(UserError, match=r"train, val, which are splits and not classes; set .*folder=.*/train and "):
        ImageFolder(str(folder), cache_dir=str(tmp_path / "cache")).setup()
    assert find_pictures(folder, labels="folders").classes == ["train", "val"]
    assert find_pictures(folder, labels="none").classes == []
    assert find_pictures(write_pictures(tmp_path / "in", {"test": 1, "train": 1, "cat": 1})).classes[0] == "cat"


def test_a_folder_says_whether_it_found_labels(tmp_path: Path) -> None:
    for classes, labelled in (({"": 4}, False), ({"a": 2, "b": 2}, True)):
        data = ImageFolder(str(write_pictures(tmp_path / str(labelled), classes)), cache_dir=str(tmp_path / "cache"))
        assert data.labelled is None  # of a folder that nobody has read
        data.setup()
        assert data.labelled is labelled


def test_links_are_skipped_and_counted_or_followed_but_never_in_circles(tmp_path: Path) -> None:
    elsewhere = write_pictures(tmp_path / "elsewhere", {"": 2})
    folder = write_pictures(tmp_path / "in", {"a": 1, "b": 1})
    (folder / "c").symlink_to(elsewhere)
    (folder / "a" / "up").symlink_to(folder)
    (folder / "a" / "z.png").symlink_to(folder / "b" / "000.png")
    skipped, followed = find_pictures(folder), find_pictures(folder, links="follow")
    assert skipped.names == ["a/000.png", "b/000.png"]
    assert skipped.remarks == ["3 links were left out (data.init_args.links=follow reads them)"]
    assert followed.names == ["a/000.png", "a/z.png", "b/000.png", "c/000.png", "c/001.png"]


def test_other_and_hidden_files_are_left_out_and_the_others_counted(tmp_path: Path) -> None:
    folder = write_pictures(tmp_path / "in", {"": 1, ".thumbs": 1})
    for name in ("a.txt", "b.txt", "c.svg", "README", ".hidden.png"):
        (folder / name).write_bytes(b"x")
    found = find_pictures(folder)
    assert found.names == ["000.png"]
    assert found.remarks == ["4 other files were left out: 2 .txt, 1 .svg, 1 without an ending"]


def test_folders_without_pictures_say_what_is_in_them(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="the folder is empty"):
        find_pictures(tmp_path / "empty")
    (tmp_path / "empty" / "a.txt").write_text("x")
    with pytest.raises(UserError, match=r"1 other files were left out: 1 \.txt; name a folder of pictures"):
        find_pictures(tmp_path / "empty")
    with pytest.raises(UserError, match="does not exist"):
        find_pictures(tmp_path / "none")
    with pytest.raises(UserError, match="is a file"):
        find_pictures(tmp_path / "empty" / "a.txt")


def test_a_folder_that_may_not_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, scandir = write_pictures(tmp_path / "in", {"a": 1, "b": 1}), os.scandir

    def refuse(path: str) -> object:
        if str(path).endswith("/b"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)  # file modes do not stop root
    with pytest.raises(UserError, match=r"b cannot be read \(Permission denied\)"):
        find_pictures(folder)


# Pictures


def test_every_kind_of_picture_becomes_the_same_upright_rgb(tmp_path: Path) -> None:
    expected = torch.tensor([0, 255]).repeat_interleave(8)[:, None].expand(16, 8)
    decode = Decoder(16, "pad", background=255)
    for name, path in write_every_kind(tmp_path).items():
        image = decode(path)
        assert image.shape == (3, 16, 16), name
        assert image.dtype == torch.uint8
        assert (image[:, :, 4:12].int() - expected).abs().max() <= 8, name
        assert (image[:, :, :4] == 255).all(), name  # padded by the background


def test_what_is_transparent_shows_the_background(tmp_path: Path) -> None:
    paths = write_every_kind(tmp_path)
    for name in ("alpha.png", "grey_alpha.png", "palette_alpha.png"):
        assert (Decoder(8, "crop", background=100)(paths[name])[:, 7] == 100).all(), name


def test_cropping_scales_the_shorter_side_and_padding_the_longer() -> None:
    image = torch.arange(12).repeat_interleave(4).reshape(1, 12, 4).to(torch.uint8)
    assert torch.equal(fitted(image, 4, "crop", 0)[0, :, 0], torch.arange(4, 8).to(torch.uint8))
    padded = fitted(image, 12, "pad", 99)
    assert torch.equal(padded[:, :, 4:8], image)
    assert (padded[:, :, :4] == 99).all()
    assert fitted(torch.zeros(3, 1, 1000, dtype=torch.uint8), 8, "pad", 0).shape == (3, 8, 8)
    assert fitted(torch.zeros(3, 1000, 1, dtype=torch.uint8), 8, "crop", 0).shape == (3, 8, 8)


def test_a_large_jpeg_is_decoded_smaller_and_looks_the_same(tmp_path: Path) -> None:
    ramp = np.linspace(0, 255, 800).astype(np.uint8)[:, None].repeat(800, axis=1)
    Image.fromarray(ramp).save(tmp_path / "ramp.jpg", quality=95)
    Image.fromarray(ramp).save(tmp_path / "ramp.png")
    decode = Decoder(16, "crop", 255)
    difference = decode(tmp_path / "ramp.jpg").int() - decode(tmp_path / "ramp.png").int()
    assert difference.abs().max() <= 3


def test_batches_are_as_documented(tmp_path: Path) -> None:
    data = opened(write_pictures(tmp_path / "in", {"a": 6, "b": 6}), views=TwoViews())
    batch = next(iter(data.train_dataloader()))
    assert set(batch) == {"views", "parameters", "label", "index"}
    assert [view.shape for view in batch["views"]] == [(4, 3, 8, 8)] * 2
    bank = torch.cat([batch["image"] for batch in data.bank_dataloader()])
    torch.testing.assert_close(bank.mean(dim=(0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(bank.std(dim=(0, 2, 3), correction=0), torch.ones(3), atol=1e-5, rtol=0)
    black, white = data.bounds
    assert (black <= bank.amin(dim=(0, 2, 3))[:, None, None] + 1e-6).all()
    assert (white >= bank.amax(dim=(0, 2, 3))[:, None, None] - 1e-6).all()
    assert data.labelled
    assert data.classes == ("a", "b")


def test_pictures_are_standardised_as_a_pretrained_network_had_them_where_the_user_says_how(tmp_path: Path) -> None:
    folder = write_pictures(tmp_path / "in", {"a": 3, "b": 3})
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    plain = opened(folder, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    told = opened(folder, mean=tuple(mean.tolist()), std=tuple(std.tolist()))
    for own, pixel in ((told.bank, plain.bank), (told.val, plain.val)):
        for number in range(len(own)):
            image = (pixel.sample(number, 0)["image"] - mean[:, None, None]) / std[:, None, None]
            torch.testing.assert_close(own.sample(number, 0)["image"], image)
    for given in ({"mean": (0.5, 0.5, 0.5)}, {"std": (0.5, 0.5, 0.5)}, {"mean": (0, 0, 0), "std": (1, 0, 1)}):
        with pytest.raises(UserError, match="std="):
            opened(folder, **given)


def test_constant_pictures_become_zero(tmp_path: Path) -> None:
    for number in range(4):
        Image.new("RGB", (9, 9), (7, 7, 7)).save(tmp_path / f"{number}.png")
    data = opened(tmp_path, cache_dir=str(tmp_path / ".cache"), batch_size=2)
    assert all((batch["image"] == 0).all() for batch in data.bank_dataloader())


# Split


def test_the_split_is_of_each_class_and_nearly_the_same_when_pictures_are_added() -> None:
    names, labels = [f"{number}.png" for number in range(300)], np.arange(300) % 3
    before = held_out(names, labels, 0.1)
    assert np.bincount(labels[before]).tolist() == [10, 10, 10]
    more = held_out([*names, "new.png"], np.append(labels, 0), 0.1)
    assert (before != more[:-1]).sum() <= 1


def test_a_class_of_one_picture_trains_and_of_two_validates_one() -> None:
    labels = np.array([0, 1, 1, 2, 2, 2])
    chosen = held_out(list("abcdef"), labels, 0.01)
    assert [int(chosen[labels == label].sum()) for label in range(3)] == [0, 1, 1]
    assert held_out(list("abcdef"), labels, 0.99).sum() == 3  # one of each class remains


def test_a_validation_folder_has_the_training_folders_numbers(tmp_path: Path) -> None:
    write_pictures(tmp_path / "train", {"a": 3, "b": 3, "c": 3})
    write_pictures(tmp_path / "val", {"b": 1, "c": 2})
    data = opened(tmp_path / "train", val_folder=str(tmp_path / "val"))
    assert len(data.train) == 9  # type: ignore[arg-type]
    assert torch.cat([batch["label"] for batch in data.val_dataloader()]).tolist() == [1, 2, 2]
    shown = next(iter(data.val_dataloader()))["image"][0] * data.val.std + data.val.mean
    image = torch.from_numpy(pixels(0)).permute(2, 0, 1)
    torch.testing.assert_close(255 * shown, fitted(image, 8, "crop", 255).float(), atol=1e-3, rtol=0)
    write_pictures(tmp_path / "val", {"d": 1})
    with pytest.raises(UserError, match=r"has d, which is no class of .*train; its classes are a, b, c"):
        opened(tmp_path / "train", val_folder=str(tmp_path / "val"))


def test_one_picture_is_too_few(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no readable pictures are left for val: 1 for train, 0 for val"):
        opened(write_pictures(tmp_path / "in", {"": 1}))
    with pytest.raises(UserError, match="no readable pictures are left for val: 2 for train"):
        opened(write_pictures(tmp_path / "two", {"a": 1, "b": 1}))


# Damage


def damaged_folder(tmp_path: Path) -> Path:
    folder = write_pictures(tmp_path / "in", {"a": 6, "b": 6})
    (folder / "a" / "x\nodd \udcff.png").write_bytes(b"no picture")
    whole = (folder / "a" / "000.png").read_bytes()
    (folder / "b" / "cut.png").write_bytes(whole[: len(whole) // 2])
    (folder / "b" / "empty.jpg").write_bytes(b"")
    (folder / "b" / "gone.png").symlink_to(tmp_path / "nowhere")
    os.mkfifo(folder / "b" / "pipe.png")
    return folder


def test_damaged_files_are_all_named_and_counted_and_skipped_only_with_leave(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = damaged_folder(tmp_path)
    with pytest.raises(UserError, match="5 of 17 pictures cannot be read") as refused:
        opened(folder, links="follow")
    said = str(refused.value)
    for name, why in (
        (r"x\nodd \udcff.png", "it is not a JPEG, PNG, WebP, BMP, GIF or TIFF image"),
        ("cut.png", ""),
        ("empty.jpg", "it is empty"),
        ("gone.png", "cannot be read"),
        ("pipe.png", "is a named pipe"),
    ):
        [line] = [line for line in said.splitlines() if name in line]
        assert why in line
    assert "data.init_args.skip_damaged=true" in said
    data = opened(folder, links="follow", skip_damaged=True)
    assert "5 of 17 pictures cannot be read and are left out" in capsys.readouterr().out
    assert len(data.train) + len(data.val) == 12  # type: ignore[arg-type]


def test_folders_of_damaged_files_alone_are_refused_in_any_case(tmp_path: Path) -> None:
    for name in ("a.png", "b.jpg"):
        (tmp_path / name).write_bytes(b"no picture")
    for skip in (False, True):
        with pytest.raises(UserError, match=r"none of the 2 pictures can be read:(.|\n)*a\.png(.|\n)*b\.jpg"):
            opened(tmp_path, cache_dir=str(tmp_path / ".cache"), skip_damaged=skip)


def test_an_unreadable_file_is_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_pictures(tmp_path / "in", {"": 3})
    before = os.open

    def refuse(path: str | Path, *more: int, **settings: int) -> int:
        if Path(path).name == "001.png":
            raise PermissionError(13, "Permission denied", str(path))
        return before(path, *more, **settings)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(UserError, match=r"1 of 3 pictures cannot be read:\n.*001\.png: it cannot be opened"):
        opened(folder)


# Cache


def test_pictures_are_decoded_once_until_a_file_or_a_setting_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, decoded = write_pictures(tmp_path / "in", {"": 4}), []
    call = Decoder.__call__
    monkeypatch.setattr(Decoder, "__call__", lambda self, path: decoded.append(path) or call(self, path))
    opened(folder)
    opened(folder)
    assert len(decoded) == 4
    opened(folder, size=4)
    assert len(decoded) == 8
    Image.fromarray(pixels(99)).save(folder / "000.png")
    opened(folder)
    assert len(decoded) == 12


def test_the_cache_keeps_its_limit_by_dropping_what_was_used_longest_ago(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    gib = 2.9 * 4 * 3 * 8 * 8 / 2**30  # two packs and what is noted of one
    for number in range(3):
        opened(write_pictures(tmp_path / f"in{number}", {"": 4}), cache_dir=str(cache), cache_gib=gib)
        for pack in cache.glob("*/*/"):
            if pack.stat().st_mtime > 2000:
                os.utime(pack, (1000 + number, 1000 + number))
    assert len(list(cache.glob("*/*/pixels.npy"))) == 2
    assert not any(pack.stat().st_mtime == 1000 for pack in cache.glob("*/*/"))
    with pytest.raises(UserError, match=r"4 pictures of 99 x 99 take 0\.0 GiB decoded, above cache_gib="):
        opened(tmp_path / "in0", cache_dir=str(cache), cache_gib=gib, size=99)


def test_the_cache_deletes_nothing_that_it_has_not_written(tmp_path: Path) -> None:
    """Not even what looks like one of its packs, beside them or where a stranger expects them."""
    cache, gib = tmp_path / "home", 1.1 * 4 * 3 * 8 * 8 / 2**30
    mine = [cache / "thesis", cache / ("0" * 32), cache / ("a" * 32) / ("b" * 32)]
    for folder in mine:
        folder.mkdir(parents=True)
        (folder / "about.json").write_text("{}")
        os.utime(folder, (1, 1))
    for number in range(2):
        opened(write_pictures(tmp_path / f"in{number}", {"": 4}), cache_dir=str(cache), cache_gib=gib)
        for pack in cache.glob("*/*/pixels.npy"):
            os.utime(pack.parent, (1, 1))
    assert len(list(cache.glob("*/*/pixels.npy"))) == 1
    assert all((folder / "about.json").exists() for folder in mine)


def test_a_dry_run_reads_the_pack_that_is_there_and_writes_others_elsewhere(tmp_path: Path) -> None:
    first = write_pictures(tmp_path / "in0", {"": 4})
    opened(first, cache_dir=str(tmp_path / "cache"))
    (pack,) = (tmp_path / "cache").glob("*/*/")
    os.utime(pack, (1, 1))
    before = sorted((tmp_path / "cache").rglob("*"))
    with isolated_caches(tmp_path / "apart"):
        again = opened(first, cache_dir=str(tmp_path / "cache"))
        other = opened(write_pictures(tmp_path / "in1", {"": 5}), cache_dir=str(tmp_path / "cache"))
    assert (len(again.train), len(other.train)) == (3, 4)
    assert sorted((tmp_path / "cache").rglob("*")) == before
    assert pack.stat().st_mtime == 1
    assert len(list((tmp_path / "apart").glob("pictures/*/*/pixels.npy"))) == 1


def test_workers_decode_and_fetch_the_same_pictures(tmp_path: Path) -> None:
    folder = write_pictures(tmp_path / "in", {"a": 5, "b": 6})
    alone = opened(folder, views=TwoViews())
    helped = opened(folder, views=TwoViews(), num_workers=2, cache_dir=str(tmp_path / "other"))
    for one, other in zip(alone.train_dataloader(), helped.train_dataloader(), strict=True):
        assert torch.equal(one["index"], other["index"])
        assert all(map(torch.equal, one["views"], other["views"]))


# Ranks and resume


def test_ranks_share_out_what_one_would_see_and_a_resumed_run_goes_on_with_the_next_picture(tmp_path: Path) -> None:
    data = opened(write_pictures(tmp_path / "in", {"": 30}), views=TwoViews())
    assert data.train is not None

    def loader(rank: int, ranks: int) -> ExactLoader:
        order = Order((len(data.train),), content=data._content)  # type: ignore[arg-type]
        return ExactLoader(data.train, 4, 0, rank, ranks, order=order)  # type: ignore[arg-type]

    whole = list(loader(0, 1))
    halves = [list(loader(rank, 2)) for rank in range(2)]
    for at, batch in enumerate(whole):
        assert torch.cat([half[at]["index"] for half in halves]).tolist() == batch["index"].tolist()
    stopped = loader(0, 1)
    for _ in zip(range(2), stopped, strict=False):
        pass
    resumed = [loader(rank, 2) for rank in range(2)]
    for one in resumed:
        one.load_state_dict(stopped.state_dict())
    assert torch.cat([next(iter(one))["index"] for one in resumed]).tolist() == whole[2]["index"].tolist()


def test_other_pictures_of_the_same_number_do_not_continue_a_run(tmp_path: Path) -> None:
    before = opened(write_pictures(tmp_path / "in", {"": 6})).train_dataloader().state_dict()
    Image.fromarray(pixels(99)).save(tmp_path / "in" / "000.png")
    Image.fromarray(pixels(98)).save(tmp_path / "in" / "001.png")
    with pytest.raises(UserError, match="the checkpoint has data content"):
        opened(tmp_path / "in").train_dataloader().load_state_dict(before)


# Datasets


class Items(torch.utils.data.Dataset):
    def __init__(self, items: list) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, number: int) -> object:
        return self.items[number]


def datasets() -> dict[str, Items]:
    """The same eight pictures in every form that an item may have."""
    arrays = [pixels(number, 8, 8) for number in range(8)]
    tensors = [torch.from_numpy(array).permute(2, 0, 1) for array in arrays]
    images = [Image.fromarray(array) for array in arrays]
    return {
        "torchvision": Items([(image, number % 2) for number, image in enumerate(images)]),
        "tensors": Items([(tensor, torch.tensor(number % 2)) for number, tensor in enumerate(tensors)]),
        "floats": Items([(tensor / 255, number % 2) for number, tensor in enumerate(tensors)]),
        "mapping": Items([{"image": image, "label": number % 2} for number, image in enumerate(images)]),
        "arrays": Items([{"image": array, "label": number % 2} for number, array in enumerate(arrays)]),
        "alpha": Items([(image.convert("RGBA"), number % 2) for number, image in enumerate(images)]),
    }


def test_every_form_of_an_item_gives_the_same_batches() -> None:
    batches = {}
    for name, dataset in datasets().items():
        data = PictureDataset(dataset, size=8, batch_size=4, val_share=0.25)
        data.setup()
        batches[name] = next(iter(data.train_dataloader()))
        assert data.labelled
        assert len(data.val) == 2
    for name, batch in batches.items():
        assert torch.equal(batch["label"], batches["torchvision"]["label"]), name
        torch.testing.assert_close(batch["image"], batches["torchvision"]["image"])


def test_stored_bytes_other_keys_and_no_labels_are_read(tmp_path: Path) -> None:
    Image.fromarray(pixels(0, 8, 8)).save(tmp_path / "a.png")
    content = (tmp_path / "a.png").read_bytes()
    items = Items([{"photo": {"bytes": content, "path": None}, "kind": 3} for _ in range(4)])
    data = PictureDataset(items, image="photo", label="kind", size=8, batch_size=2)
    data.setup()
    batch = next(iter(data.train_dataloader()))
    assert batch["label"].tolist() == [3, 3]
    unlabelled = PictureDataset(items, items, image="photo", label=None, size=8, batch_size=2)
    unlabelled.setup()
    assert not unlabelled.labelled
    assert len(unlabelled.val) == 4


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([], "the dataset is empty"),
        ([("text", 0)] * 3, "item 1 of the dataset has no picture or label"),
        ([(torch.zeros(5, 7, 9, dtype=torch.uint8), 0)] * 3, r"shape \[5, 7, 9\] has neither 1, 3 nor 4 channels"),
        ([(torch.full((3, 4, 4), 1.5), 0)] * 3, r"floats must be in \[0, 1\]"),
        ([(torch.zeros(3, 4, 4, dtype=torch.int32), 0)] * 3, "torch.int32 is neither uint8 nor float"),
        ([(torch.zeros(3, 4, 4), -1)] * 3, "has label -1"),
        ([{"picture": 1}] * 3, "it has picture, but not image"),
        ([(torch.zeros(3, 4, 4), 0)], "no readable pictures are left for val"),
    ],
)
def test_items_that_are_not_pictures_are_refused_by_number(items: list, message: str) -> None:
    with pytest.raises(UserError, match=message):
        PictureDataset(Items(items), size=8, batch_size=2).setup()


def test_a_stream_is_no_map_style_dataset() -> None:
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self) -> object:
            return iter(())

    with pytest.raises(UserError, match="dataset is a Stream, which has no length"):
        PictureDataset(Stream())
