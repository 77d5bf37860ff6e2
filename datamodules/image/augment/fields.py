"""What an image of a data set becomes in a batch: itself, or its views, made in the workers or on the device.

Shapes: B samples, C channels, H W image, V views, P parameters.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from lightning import LightningDataModule
from torch import Tensor

from lightspan.core.errors import UserError
from lightspan.datamodules.image.augment.rendering import Drawn, unit_float
from lightspan.datamodules.image.augment.views import DrawnViews, Views, seeded
from lightspan.datamodules.image.batch import DrawnViewsBatch, ImageBatch, ViewParameters, ViewsBatch
from lightspan.datamodules.loading.on_device import finish_on_device

Place = Literal["workers", "device"]


@dataclass(frozen=True)
class ImageFields:
    """Makes the fields of a sample from its image, a function of image and seed.

    On the device, views are made of whole batches, once `attach` has told the data module. Until then a sample has its
    image as it is, the numbers of its views, drawn here as they are for the workers, and the seed of their grain. That
    it is finished elsewhere changes neither what is random nor what a resumed run sees.

    Args:
        mean, std: of the channels in [0, 1], for standardising, [C, 1, 1].
        views: makes the views; None gives the image itself.
        made_on: where.

    Raises: UserError for views on the device that are not drawn ones.
    """

    mean: Tensor
    std: Tensor
    views: Views | None = None
    made_on: Place = "workers"

    def __post_init__(self) -> None:
        if self.made_on == "device" and (self.views is None or self.views.drawn is None):
            what = "no views" if self.views is None else f"{type(self.views).__name__}, made one image at a time"
            raise UserError(
                f"views_on=device with {what}; set data.init_args.views to views that are drawn first, such as "
                "RandomViews, or data.init_args.views_on=workers"
            )

    @property
    def batch_type(self) -> type:
        return self.one_of(ImageBatch, ViewsBatch)

    def one_of(self, single: type, views: type) -> type:
        """The type of batches of which the first has an image, and the second its views."""
        if self.views is None:
            return single
        return DrawnViewsBatch if self.made_on == "device" else views

    def __call__(self, image: Tensor, seed: int) -> dict[str, Any]:
        """Fields of one sample from its image, uint8 or, in [0, 1], float32 [C, H, W], or, of drawn views, from frames
        [T, C, H, W] that get the same view.
        """
        if self.views is None:
            return {"image": self._standardised(unit_float(image))}
        kind = self.views.drawn
        with seeded(seed):
            if kind is None:
                return {"views": [self._standardised(view) for view in self.views(image)]}
            drawn = kind.draw(tuple(image.shape[-3:]))
        if self.made_on == "device":
            # Whole numbers, because mixed or low precision rounds all others before they are on the device.
            bits_VP = _table(drawn).view(torch.int32)
            return {"image": image, "drawn": bits_VP, "seed": torch.tensor(seed)}
        views = [self._standardised(view) for view in kind.render(image, drawn)]
        return {"views": views, "parameters": _table(drawn)}

    def attach(self, data: LightningDataModule) -> None:
        """Lets `data` finish its batches when they are on the device, if that is where views are made."""
        if self.made_on == "device":
            finish_on_device(data, partial(_finished, self.device_views()))

    def device_views(self) -> "DeviceViews":
        """What makes the views of images that are on their device."""
        assert self.views is not None
        assert self.views.drawn is not None
        return DeviceViews(self.views.drawn, self.mean.flatten().tolist(), self.std.flatten().tolist())

    def _standardised(self, image: Tensor) -> Tensor:
        return (image - self.mean) / self.std


@dataclass(frozen=True)
class DeviceViews:
    """Makes the views of images that are on their device. `means` and `stds` are those of the C channels."""

    views: DrawnViews
    means: list[float]
    stds: list[float]

    def __call__(self, image_BCHW: Tensor, drawn_BVP: Tensor, seed_B: Tensor) -> list[Tensor]:
        """The V views, each [B C h w] and standardised.

        Args:
            image_BCHW: bytes, or in [0, 1].
            drawn_BVP: the bits of their parameters, int32.
            seed_B: int64, of the grain.
        """
        image_BCHW, parameters_BVP = unit_float(image_BCHW), drawn_BVP.view(torch.float32)
        mean_C11, std_C11 = (_filled(values, image_BCHW.device) for values in (self.means, self.stds))
        views = []
        for number, rendering in enumerate(self.views.renderings):
            p = ViewParameters(*parameters_BVP[:, number].unbind(1))
            views.append((rendering.many(image_BCHW, p, seed_B, number) - mean_C11) / std_C11)
        return views


def _finished(made: DeviceViews, batch: Mapping[str, Any]) -> dict[str, Any]:
    """The batch with views in place of image, numbers and seed."""
    rest = {name: value for name, value in batch.items() if name not in ("image", "drawn", "seed")}
    views = made(batch["image"], batch["drawn"], batch["seed"])
    return {"views": views, "parameters": batch["drawn"].view(torch.float32), **rest}


def _filled(values: list[float], device: torch.device) -> Tensor:
    """[C, 1, 1] on a device, without a copy, before which the host would wait for all that the device has to do."""
    return torch.stack([torch.full((1, 1), value, device=device) for value in values])


def _table(drawn: list[Drawn]) -> Tensor:
    return torch.tensor([numbers.parameters for numbers in drawn], dtype=torch.float32)
