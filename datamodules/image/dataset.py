"""A dataset of Hugging Face or torch, or anything with a length and numbered items, as a data module."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2 import functional as F

from lightspan.core.errors import UserError
from lightspan.datamodules.image.data import Found, PictureData, held_out
from lightspan.datamodules.image.packed import Fit, fitted
from lightspan.datamodules.shards.decoders import decode_image, rgb
from lightspan.datamodules.shards.headers import UNDECODABLE


class PictureDataset(PictureData):
    """The items of a map-style dataset, decoded when they are read; nothing is cached, imported or downloaded here.

    An item is a mapping (Hugging Face: {"image": ..., "label": ...}) or a tuple (torchvision: image, label). A picture
    is a PIL image, encoded bytes, {"bytes": ...} as Hugging Face stores them, or an array or tensor [H W], [H W C] or
    [C H W]: uint8, or float in [0, 1]. All become RGB of `size` x `size`. An item must be the same whenever it is read.

    In a recipe the dataset is a `class_path` like any other: one that is allowed, or `--allow-module`.

    Args:
        dataset: has `len()` and `[number]`.
        val_dataset: for validation; None holds out `val_share` of `dataset`.
        image, label: keys of a mapping, or places in a tuple; label None means that there is none.
        classes: names of the classes; None takes them from the dataset if it has `classes` (torchvision) or
            `features[label].names` (Hugging Face).
        fit, background: as in `ImageFolder`.
        settings: those of `PictureData`.

    Raises: UserError for an item that is not as described, naming it.
    """

    moment_pictures = 500  # each has to be decoded for it

    def __init__(
        self,
        dataset: Dataset,
        val_dataset: Dataset | None = None,
        image: str | int = "image",
        label: str | int | None = "label",
        classes: list[str] | None = None,
        fit: Fit = "crop",
        background: int = 255,
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        for name, one in (("dataset", dataset), ("val_dataset", val_dataset)):
            if one is not None and not (hasattr(one, "__len__") and hasattr(one, "__getitem__")):
                raise UserError(
                    f"{name} is a {type(one).__name__}, which has no length or no numbered items; give a map-style "
                    "dataset (of a stream, write shards with `lightspan data pack`)"
                )
        self.datasets: list[Any] = [dataset] if val_dataset is None else [dataset, val_dataset]
        self.image, self.label, self.fit, self.background = image, label, fit, background
        self.given_classes = classes

    def find(self) -> Found:
        counts = [len(one) for one in self.datasets]
        if not counts[0]:
            raise UserError("the dataset is empty; give one with pictures")
        if len(counts) == 1:
            # By number alone: labels may only be known when a picture is decoded.
            names = [str(number) for number in range(counts[0])]
            validates = held_out(names, np.zeros(counts[0], np.int64), self.val_share)
            train, val = np.flatnonzero(~validates), np.flatnonzero(validates)
        else:
            train, val = np.arange(counts[0]), counts[0] + np.arange(counts[1])
        digest = hashlib.sha256(np.asarray(counts).tobytes())
        for number in np.unique(np.linspace(0, len(train) - 1, 16).astype(int)):
            pixels, label = self.read(int(train[number]))
            digest.update(pixels.tobytes() + label.to_bytes(8, "little"))
        return Found(self, train, val, self.label is not None, self._classes(), digest.hexdigest()[:32])

    def read(self, number: int) -> tuple[np.ndarray, int]:
        """(uint8 [3, size, size], label) of an item; those of `val_dataset` follow those of `dataset`."""
        first = len(self.datasets[0])
        dataset, at = (self.datasets[0], number) if number < first else (self.datasets[1], number - first)
        item = dataset[at]
        try:
            image = _as_rgb(self._part(item, self.image), self.background)
            label = 0 if self.label is None else int(self._part(item, self.label))
        except (*UNDECODABLE, LookupError) as error:
            raise UserError(f"item {at} of the dataset has no picture or label that can be read: {error}") from error
        if not 0 <= label < 2**63:
            raise UserError(f"item {at} of the dataset has label {label}; labels are whole numbers from 0 up")
        return fitted(image, self.size, self.fit, self.background).numpy(), label

    def _part(self, item: Any, key: str | int) -> Any:
        if isinstance(item, Mapping):
            if key not in item:
                raise KeyError(f"it has {', '.join(map(str, item))}, but not {key}; set data.init_args.image and label")
            return item[key]
        place = {"image": 0, "label": 1}.get(key, key) if isinstance(key, str) else key
        return item[place]

    def _classes(self) -> Sequence[str]:
        if self.label is None:
            return []
        dataset = self.datasets[0]
        feature = getattr(dataset, "features", None)
        feature = feature.get(self.label) if isinstance(feature, Mapping) else None
        names = self.given_classes or getattr(dataset, "classes", None) or getattr(feature, "names", None)
        return [str(name) for name in names or ()]


def _as_rgb(picture: Any, background: int) -> Tensor:
    """uint8 [3, H, W]. Raises: ValueError or TypeError for what is not a picture."""
    if isinstance(picture, Mapping):
        picture = picture.get("bytes")
    if isinstance(picture, bytes):
        return decode_image(picture, background)
    if isinstance(picture, Image.Image):
        return rgb(picture, background)
    tensor = torch.as_tensor(np.asarray(picture)) if not isinstance(picture, Tensor) else picture
    if tensor.ndim == 2:
        tensor = tensor[None]
    if tensor.ndim != 3 or not tensor.numel():
        raise ValueError(f"a picture of shape {list(tensor.shape)} is not [H W], [H W C] or [C H W]")
    if tensor.shape[0] not in (1, 3, 4) and tensor.shape[2] in (1, 3, 4):
        tensor = tensor.permute(2, 0, 1)
    if tensor.shape[0] not in (1, 3, 4):
        raise ValueError(f"a picture of shape {list(tensor.shape)} has neither 1, 3 nor 4 channels")
    if tensor.is_floating_point():
        if not (tensor.isfinite().all() and tensor.min() >= 0 and tensor.max() <= 1):
            raise ValueError("a picture of floats must be in [0, 1], before any standardisation")
        tensor = (255 * tensor).round().to(torch.uint8)
    elif tensor.dtype != torch.uint8:
        raise ValueError(f"a picture of {tensor.dtype} is neither uint8 nor float")
    if tensor.shape[0] == 4:
        alpha = tensor[3:].float() / 255
        tensor = (alpha * tensor[:3] + (1 - alpha) * background).round().to(torch.uint8)
    return F.grayscale_to_rgb_image(tensor) if tensor.shape[0] == 1 else tensor
