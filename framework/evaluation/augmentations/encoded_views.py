"""Features of several independent views of each image, for each of several augmentations."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from lightning import LightningDataModule
from torch import Tensor, nn

from lightspan.core.augmentation import Augmentation
from lightspan.core.errors import UserError
from lightspan.core.generators import drawn_from
from lightspan.core.noise import mixed_seed
from lightspan.core.ranges import require_in
from lightspan.evaluation.features.description import Description
from lightspan.evaluation.features.encoded import Encoded, Pool, Split, pooled, split_loader
from lightspan.evaluation.features.features import Features
from lightspan.evaluation.features.input import Input
from lightspan.evaluation.features.store import FeatureStore, Rows
from lightspan.evaluation.rows import spaced_rows


@dataclass(frozen=True)
class ViewFeatures:
    """Features [N V D] of V views of each sample, by the name of the augmentation."""

    presets: dict[str, Features]


class EncodedViews(Input):
    """What an encoder makes of views of images, from the feature store, or computed if it is not there.

    View v of an image comes from a call of its own, of whose views it is number v, counted round: views are independent
    of each other even where an augmentation draws those of one call together. They are functions of the seed and the
    image's index. Images that a data module has standardised (it has `bounds`) are put back into [0, 1] for the views,
    and standardised again.

    Args:
        encoder: as in `lightspan.evaluation.features.encoded.Encoded`.
        data: its batches have `image` and `index`.
        presets: augmentations by name, such as any of `lightspan.datamodules.image.augment.views`.
        views: of each image, V, at least 2.
        most: largest number of images, at least 2, evenly spaced.
        seed: of the views, at least 0.
        split, transforms, pool: as in `Encoded`; transforms come after the views.
    Raises: UserError for values out of range, or no preset.
    """

    def __init__(
        self,
        encoder: nn.Module,
        data: LightningDataModule,
        presets: Mapping[str, Augmentation],
        views: int = 4,
        most: int = 1000,
        seed: int = 0,
        split: Split = "bank",
        transforms: list[nn.Module] | None = None,
        pool: Pool = "mean",
    ) -> None:
        require_in("[2, inf)", views=views, most=most)
        require_in("[0, inf)", seed=seed)
        if not presets:
            raise UserError("EncodedViews presets is empty; give at least one")
        self.presets, self.views, self.most, self.seed = dict(presets), views, most, seed
        self.encoded = Encoded(encoder, data, split, "image", transforms, pool=pool)

    def load(self, store: FeatureStore) -> ViewFeatures:
        """Raises: UserError for data without that split, without images or without an index."""
        return ViewFeatures({name: self._of(name, store) for name in self.presets})

    def outlook(self, store: FeatureStore) -> str:
        return f"features of {self.views} views of at most {self.most} images by {', '.join(self.presets)}"

    def _of(self, name: str, store: FeatureStore) -> Features:
        loader = split_loader(self.encoded.data, self.encoded.split)
        said = Description(name, self.presets[name]).sha256
        key = {**self.encoded.key(loader), "preset": said, "views": self.views, "most": self.most, "seed": self.seed}
        return store.get(key, lambda done: self._rows(loader, self.presets[name], done, store.device))

    def _rows(self, loader: Any, preset: Augmentation, done: set[int], device: torch.device) -> Iterator[Rows]:
        chosen = set(spaced_rows(torch.arange(_samples(loader)), self.most).tolist())
        encoder, transforms = self.encoded.encoder, self.encoded.transforms
        modes = [(part, part.training) for part in encoder.modules()]
        for part in (encoder.eval(), *transforms):
            part.to(device)
        try:
            for batch in loader:
                if lacking := [field for field in ("image", "index") if field not in batch]:
                    raise UserError(f"a batch for EncodedViews has no {lacking[0]}: it contains {sorted(batch)}")
                left = [i for i, n in enumerate(batch["index"].tolist()) if n in chosen and n not in done]
                if not left:
                    continue
                images, index = batch["image"][left], batch["index"][left]
                with torch.no_grad():
                    parts = [self._encode(images, index, preset, v, device) for v in range(self.views)]
                rows = {"features": torch.stack(parts, dim=1), "index": index}
                yield rows | ({"label": batch["label"][left]} if "label" in batch else {})
        finally:
            for part, training in modes:
                part.training = training

    def _encode(self, images: Tensor, index: Tensor, preset: Augmentation, view: int, device: torch.device) -> Tensor:
        """Features [B D] of one view of each image."""
        bounds = getattr(self.encoded.data, "bounds", None)
        low, high = bounds if bounds is not None else (0.0, 1.0)
        made = []
        for image, seed in zip((images - low) / (high - low), mixed_seed(index, self.seed, view).tolist(), strict=True):
            with drawn_from(seed):
                drawn = preset(image.clamp(0, 1))
            made.append(drawn[view % len(drawn)])
        x = (torch.stack(made) * (high - low) + low).to(device)
        for transform in self.encoded.transforms:
            x = transform(x)
        features = getattr(self.encoded.encoder, "features", None)
        if callable(features) and not isinstance(features, nn.Module):
            x = features({"image": x, "index": index.to(device)})
        else:
            x = pooled(self.encoded.encoder, self.encoded.encoder(x), self.encoded.pool)
        if x.ndim != 2:
            raise UserError(f"EncodedViews needs a vector for each view, and got {list(x.shape)}; set pool")
        return x.float()


def _samples(loader: Any) -> int:
    dataset: Any = getattr(loader, "dataset", None)
    if not hasattr(dataset, "__len__"):
        raise UserError(
            f"EncodedViews takes images evenly from a whole set, and {type(dataset).__name__} has no length; make "
            "features of its views yourself, or take images that are files"
        )
    return len(dataset)
