"""TIFFs, folders of them, scenes cut into blocks, shards of pictures and of series, and what is said of bad ones."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from picture_files import write_tiffs
from shard_files import array_shard

from lightspan.core.errors import UserError
from lightspan.datamodules.multispectral.bands import Bands
from lightspan.datamodules.multispectral.folder import TiffFolder
from lightspan.datamodules.multispectral.resampling import SpectralCrops
from lightspan.datamodules.multispectral.scene import SceneBlocks, corners
from lightspan.datamodules.multispectral.shards import MultispectralShards
from lightspan.datamodules.multispectral.tiffs import bands_first, read_tiff
from lightspan.datamodules.shards.decoders import DECODERS, damage_of

tifffile = pytest.importorskip("tifffile")
XY = Bands(["x", "y"])


def tiff(pixels: np.ndarray, **options: object) -> bytes:
    content = io.BytesIO()
    tifffile.imwrite(content, pixels, photometric="minisblack", **options)
    return content.getvalue()


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int16, np.float32])
def test_bands_are_found_however_a_tiff_orders_them(dtype: type) -> None:
    pixels = np.random.default_rng(0).integers(0, 99, (4, 6, 5)).astype(dtype)
    planar = tiff(pixels, planarconfig="separate")
    interleaved = tiff(np.ascontiguousarray(np.moveaxis(pixels, 0, 2)), planarconfig="contig")
    pages = tiff(pixels)
    for content in (planar, interleaved, pages):
        made = read_tiff(content, 4)
        assert made.dtype == dtype
        np.testing.assert_array_equal(made, pixels)
    # As pages [H W S], which only the number of bands tells.
    np.testing.assert_array_equal(
        read_tiff(tiff(np.ascontiguousarray(np.moveaxis(pixels, 0, 2))), 4)[:, :, 0], pixels[:, :, 0]
    )
    np.testing.assert_array_equal(read_tiff(tiff(pixels[0]), 1), pixels[:1])
    np.testing.assert_array_equal(DECODERS["tif"](planar).numpy(), pixels)


def test_the_axis_of_the_bands_is_never_guessed() -> None:
    square = np.zeros((3, 3, 3))
    with pytest.raises(ValueError, match="could be the first or the last axis"):
        bands_first(square, 3)
    with pytest.raises(ValueError, match="neither the first nor the last axis has 4 bands"):
        bands_first(square, 4)
    with pytest.raises(ValueError, match="nothing says which axis"):
        bands_first(square, None)
    with pytest.raises(ValueError, match="is not that of bands and two sides"):
        bands_first(np.zeros((2, 2, 2, 2)), 2)
    marked = np.arange(27).reshape(3, 3, 3)
    assert bands_first(marked, 3, interleaved=True)[1, 0, 0] == 1
    assert bands_first(marked, 3, interleaved=False)[1, 0, 0] == 9


def test_what_is_no_tiff_is_damage() -> None:
    assert "no TIFF" in str(damage_of("tif", b"GIF89a", True))
    whole = tiff(np.zeros((64, 64), np.uint16))
    assert damage_of("tiff", whole, True) is None
    assert damage_of("tiff", whole[:40], True) is not None
    with pytest.raises(ValueError, match="complex64"):
        read_tiff(tiff(np.zeros((4, 4), np.complex64)), 1)


def test_a_folder_of_tiffs_has_its_folders_as_classes(tmp_path: Path) -> None:
    write_tiffs(tmp_path, {"forest": 10, "lake": 10})
    data = TiffFolder(str(tmp_path), Bands(["x", "y"], ["y"], scale=1e-4), batch_size=4)
    data.setup()
    assert (data.classes, len(data.train), len(data.val)) == (("forest", "lake"), 18, 2)
    album, numbers = data.train.album, data.train.numbers
    read = np.stack([album.read(int(number))[0] for number in numbers])
    made = np.stack([data.train.sample(index, 0)["image"].numpy() for index in range(18)])
    # Moments are those of the training rows alone.
    np.testing.assert_allclose(made, (read - read.mean()) / read.std(), rtol=1e-3, atol=1e-4)
    raw = tifffile.imread(tmp_path / album.names[numbers[0]])
    np.testing.assert_allclose(read[0, 0], raw[1] * 1e-4, rtol=1e-6)
    assert [data.train.sample(i, 0)["label"].item() for i in (0, 17)] == [0, 1]


def test_a_folder_has_series_of_as_many_dates_as_it_says(tmp_path: Path) -> None:
    for number in range(12):
        values = np.arange(4 * 8 * 9, dtype=np.uint16).reshape(4, 8, 9) + number
        tifffile.imwrite(tmp_path / f"{number}.tif", values, planarconfig="separate", photometric="minisblack")
    single, double = (
        TiffFolder(str(tmp_path), Bands([*names]), size=8, dates=dates) for names, dates in (("wxyz", 1), ("xy", 2))
    )
    plain = TiffFolder(str(tmp_path), Bands([*"wxyz"]), size=8)
    for data in (single, double, plain):
        data.setup()
    assert single.train is not None
    assert double.train is not None
    assert plain.train is not None
    assert torch.equal(single.train.sample(0, 0)["image"][:, 0], plain.train.sample(0, 0)["image"])
    album = plain.train.album
    first, _, _ = album.read(0)  # bands w x of the first date and y z of the second are x y of both
    series, valid, _ = double.train.album.read(0)
    np.testing.assert_array_equal(series, np.moveaxis(first.reshape(2, 2, 8, 8), 1, 0))
    assert valid.shape == (2, 2, 8, 8)
    with pytest.raises(UserError, match="dates=0 must be at least 1"):
        TiffFolder(str(tmp_path), XY, dates=0)


def test_a_picture_without_any_valid_pixel_stays_a_sample_and_counts_for_no_statistics(tmp_path: Path) -> None:
    write_tiffs(tmp_path, {"a": 12})
    empty = sorted((tmp_path / "a").iterdir())[0]
    bands = Bands(["x", "y"], nodata=0)
    data = TiffFolder(str(tmp_path), bands, labels="none", val_share=0.1)
    data.setup()
    tifffile.imwrite(empty, np.zeros((2, 8, 8), np.uint16), planarconfig="separate", photometric="minisblack")
    other = TiffFolder(str(tmp_path), bands, labels="none", val_share=0.1)
    other.setup()
    number = other.train.album.names.index("a/0.tif")
    values, valid, _ = other.train.album.read(number)
    assert not values.any()
    assert not valid.any()
    if number in other.train.numbers:
        kept = [n for n in other.train.numbers if n != number]
        pixels = np.stack([other.train.album.read(int(n))[0] for n in kept])
        np.testing.assert_allclose(other.train.moments.mean, pixels.mean(axis=(0, 2, 3)), rtol=1e-5)
    assert other.classes == ()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "a" / "x.tif").write_bytes(b"no"), r"x.tif cannot be used: it is no TIFF"),
        (lambda f: tifffile.imwrite(f / "a" / "x.tif", np.zeros((2, 9, 9))), "x.tif is of 9 x 9 pixels, .* of 8 x 8"),
        (
            lambda f: tifffile.imwrite(f / "a" / "x.tif", np.zeros((5, 8, 8))),
            "neither the first nor the last axis has 2",
        ),
    ],
)
def test_a_bad_file_is_named(tmp_path: Path, spoil: Callable[[Path], object], message: str) -> None:
    write_tiffs(tmp_path, {"a": 3})
    spoil(tmp_path)
    with pytest.raises(UserError, match=message):
        TiffFolder(str(tmp_path), XY).setup()


@pytest.mark.parametrize("compression", ["zlib", "lzma"])
def test_a_compressed_file_that_is_cut_or_spoilt_is_named(tmp_path: Path, compression: str) -> None:
    write_tiffs(tmp_path, {"a": 3})
    pixels = np.random.default_rng(0).integers(0, 9_999, (2, 8, 8)).astype(np.uint16)
    whole = tiff(pixels, planarconfig="separate", compression=compression)
    (at,) = tifffile.TiffFile(io.BytesIO(whole)).pages[0].dataoffsets[:1]
    for content in (whole[: at + 30], whole[: at + 30] + bytes(20) + whole[at + 50 :]):
        (tmp_path / "a" / "x.tif").write_bytes(content)
        with pytest.raises(UserError, match=r"x\.tif cannot be used: it is (a damaged|no) TIFF"):
            TiffFolder(str(tmp_path), XY).setup()


def test_hidden_files_and_links_are_no_scenes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tiffs(tmp_path, {"a": 5, "b": 5, ".trash": 5})
    (tmp_path / "a" / "._0.tif").write_bytes(b"what macOS keeps beside a file")
    (tmp_path / "b" / "loop").symlink_to(tmp_path)
    data = TiffFolder(str(tmp_path), XY, val_share=0.2)
    data.setup()
    assert (len(data.train) + len(data.val), data.classes) == (10, ("a", "b"))
    assert "1 links were left out" in capsys.readouterr().out


def test_folders_that_cannot_be_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"TIFF folder .*none does not exist; name a folder of TIFF files"):
        TiffFolder(str(tmp_path / "none"), XY).setup()
    with pytest.raises(UserError, match=r"have no file that ends in \.tif, \.tiff; the folder is empty"):
        TiffFolder(str(tmp_path), XY).setup()
    tifffile.imwrite(tmp_path / "x.tif", np.zeros((2, 8, 8)))
    with pytest.raises(UserError, match=r"labels=folders wants each TIFF .*, but 1 are in none, such as x\.tif"):
        TiffFolder(str(tmp_path), XY, labels="folders").setup()
    with pytest.raises(UserError, match="no readable pictures are left for val: 1 for train"):
        TiffFolder(str(tmp_path), XY).setup()
    for settings, message in (({"size": 0}, "size=0"), ({"val_share": 1.0}, "val_share=1.0")):
        with pytest.raises(UserError, match=message):
            TiffFolder(str(tmp_path), XY, **settings)  # type: ignore[arg-type]


def test_pictures_of_several_sizes_get_one(tmp_path: Path) -> None:
    write_tiffs(tmp_path, {"a": 3})
    tifffile.imwrite(tmp_path / "a" / "x.tif", np.full((2, 9, 12), 7, np.uint16))
    data = TiffFolder(str(tmp_path), XY, size=4, crops=SpectralCrops(3), batch_size=2)
    data.setup()
    assert data.val.sample(0, 0)["image"].shape == (2, 4, 4)
    assert data.train.sample(0, 1)["image"].shape == (2, 3, 3)


@pytest.mark.parametrize("stride", [4, 8])
def test_no_pixel_of_a_scene_is_in_two_sets(tmp_path: Path, stride: int) -> None:
    write_tiffs(tmp_path, {"a": 1}, side=64)
    data = SceneBlocks(str(tmp_path / "a/0.tif"), XY, patch=8, block=16, stride=stride)
    data.setup()
    painted = np.zeros((3, 64, 64), bool)
    for layer, samples in zip(painted, (data.train, data.val, data.test), strict=True):
        for number in samples.numbers:
            top, left = samples.album.corners[number]
            layer[top : top + 8, left : left + 8] = True
    assert (painted.sum(axis=0) <= 1).all()
    assert all(layer.any() for layer in painted)
    assert len(corners((64, 64), 16, 8, 4)) == 16
    with pytest.raises(UserError, match="has 1 blocks of block=64"):
        SceneBlocks(str(tmp_path / "a/0.tif"), XY, block=64).setup()
    with pytest.raises(UserError, match="cannot be used"):
        SceneBlocks(str(tmp_path / "b.tif"), XY).setup()
    with pytest.raises(UserError, match="patch=32 must be at least 1 and at most block=16"):
        SceneBlocks("x", XY, block=16)


def shards(tmp_path: Path, arrays: list[np.ndarray], bands: Bands = XY, others: dict | None = None, **settings: object):
    path = array_shard(tmp_path / "s.tar", arrays, **(others or {}))
    data = MultispectralShards([path], bands, **settings)  # type: ignore[arg-type]
    data.setup()
    return data


def saved(array: np.ndarray) -> bytes:
    content = io.BytesIO()
    np.save(content, array)
    return content.getvalue()


def test_shards_measure_their_bands_over_what_clouds_do_not_hide(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    arrays = [rng.normal(5, 2, (8, 9, 2)) for _ in range(6)]  # interleaved
    clouds = [rng.random((8, 9)) < 0.4 for _ in arrays]
    members = {"clouds.npy": [saved(cloud) for cloud in clouds], "cls": [b"%d" % n for n in range(6)]}
    data = shards(tmp_path, arrays, others=members, batch_size=2)
    seen = np.concatenate([array[~cloud] for array, cloud in zip(arrays, clouds, strict=True)])
    np.testing.assert_allclose(data.decode.moments.mean, seen.mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(data.decode.moments.std, seen.std(axis=0), rtol=1e-5)
    sample = data.bank.sample(3, 0)
    assert torch.equal(sample["valid"], torch.from_numpy(~clouds[3]).long().expand(2, -1, -1))
    assert not sample["image"][sample["valid"] == 0].any()
    assert sample["label"].item() == 3


def test_series_keep_their_dates_in_order_and_crops_are_for_training_alone(tmp_path: Path) -> None:
    arrays = [np.stack([np.full((2, 8, 8), 10.0 * date) for date in range(3)]) + n for n in range(4)]
    data = shards(tmp_path, arrays, dates=3, mean=[0, 0], std=[1, 1], crops=SpectralCrops(4), batch_size=2)
    sample = data.train.sample(1, 7)
    assert sample["image"].shape == (2, 3, 4, 4)
    torch.testing.assert_close(sample["image"][0, :, 0, 0], torch.tensor([1.0, 11.0, 21.0]))
    assert data.bank.sample(1, 7)["image"].shape == (2, 3, 8, 8)


@pytest.mark.parametrize(
    ("array", "settings", "message"),
    [
        (np.zeros((3, 8, 8)), {}, "neither the first nor the last axis has 2 bands"),
        (np.zeros((2, 8, 2)), {}, "could be the first or the last axis"),
        (np.zeros((2, 8, 8)), {"dates": 3}, r"a series is \[T S H W\] of T=3 dates and S=2 bands"),
        (np.zeros((2, 8, 8)), {"others": {"clouds.npy": [saved(np.zeros((3, 3)))] * 2}}, r"clouds.npy is of \[3, 3\]"),
        (np.zeros((2, 8, 8)), {"others": {"cls": [b"x"] * 2}}, "is not a class"),
    ],
)
def test_a_bad_sample_of_a_shard_is_named(tmp_path: Path, array: np.ndarray, settings: dict, message: str) -> None:
    with pytest.raises(UserError, match=rf"s.tar: sample 0000 cannot be used: .*{message}"):
        shards(tmp_path, [array] * 2, **settings)


def test_settings_of_shards_that_do_not_fit_are_refused() -> None:
    for settings in ({"mean": [0.0], "std": [1.0]}, {"mean": [0.0, 0.0]}, {"mean": [0, 0], "std": [1, 0]}):
        with pytest.raises(UserError, match="must have a number for each of the 2 bands"):
            MultispectralShards(["a.tar"], XY, **settings)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="dates=0"):
        MultispectralShards(["a.tar"], XY, dates=0)


def test_a_plan_gets_empty_pictures_where_no_shard_is() -> None:
    data = MultispectralShards(["none.tar"], Bands("hls"), dates=3, image_size=224)
    batch = data.stand_in()
    assert batch is not None
    assert batch["image"].shape == (2, 6, 3, 224, 224)
    assert batch["valid"].all()
