"""Makes datamodules/assets/fashion_mnist_4k.npz from the full Fashion-MNIST.

    python tools/pack_fashion_mnist.py [FOLDER]

FOLDER holds the four idx files; by default that of the Debian package dataset-fashion-mnist. The first 300 images of
each class of the training set and the first 100 of each class of the test set are kept, in their order. The same input
gives the same bytes.
"""

import io
import sys
import zipfile
from pathlib import Path

import numpy as np

from lightspan.core.files.atomic import write_atomic
from lightspan.datamodules.image.sets.small import DEBIAN_FASHION_MNIST, FashionMNIST, Labelled

TARGET = Path(__file__).resolve().parents[1] / "datamodules" / "assets" / "fashion_mnist_4k.npz"


def first_of_each_class(data: Labelled, count: int) -> Labelled:
    chosen = np.sort(np.concatenate([np.flatnonzero(data.labels == label)[:count] for label in np.unique(data.labels)]))
    return Labelled(data.images[chosen], data.labels[chosen].astype(np.uint8))


def pack(train: Labelled, test: Labelled) -> bytes:
    """The npz. Not np.savez_compressed: that leaves zlib at level 6."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for part, data in (("train", train), ("test", test)):
            for kind, array in data._asdict().items():
                member = zipfile.ZipInfo(f"{part}_{kind}.npy")  # carries a fixed date
                member.compress_type = zipfile.ZIP_DEFLATED
                content = io.BytesIO()
                np.lib.format.write_array(content, array, allow_pickle=False)
                archive.writestr(member, content.getvalue(), compresslevel=9)
    return stream.getvalue()


def main() -> None:
    folder = sys.argv[1] if len(sys.argv) > 1 else str(DEBIAN_FASHION_MNIST)
    train, test = FashionMNIST(root=folder).load()
    content = pack(first_of_each_class(train, 300), first_of_each_class(test, 100))
    write_atomic(TARGET, content)
    print(f"{TARGET}: {len(content) / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
