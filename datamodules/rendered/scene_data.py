"""Data modules of rendered scenes: with all their labels, in two styles, as classes of single objects, and as poses.

Shapes: B samples, K places for objects, C H W picture, G tags, P parameters.
"""

import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import default_collate
from transformers import PreTrainedTokenizerBase

from lightspan.core.errors import UserError
from lightspan.core.ranges import require_numbers
from lightspan.datamodules.image.augment.fields import ImageFields
from lightspan.datamodules.image.augment.views import Views
from lightspan.datamodules.image.batch import DomainsBatch, ViewsBatch
from lightspan.datamodules.image.sets.small import ImageData, Labelled
from lightspan.datamodules.rendered.batch import CaptionedSceneBatch, SceneBatch, SceneViewsBatch
from lightspan.datamodules.rendered.data import MOST, PARTS, SEEDS, ChannelMoments, RenderedSamples, RenderedSets
from lightspan.datamodules.rendered.draws import Draws
from lightspan.datamodules.rendered.scenes import (
    COLOURS,
    SHAPES,
    SIZES,
    TAGS,
    SceneLayout,
    SceneSpace,
    Style,
    captions,
    depths,
    seen,
    semantics,
    tags,
)
from lightspan.datamodules.rendered.textures import TEXTURES
from lightspan.datamodules.text.tokenized import require_length, tokenized

FACTORS = {"shape": SHAPES, "colour": COLOURS, "texture": TEXTURES, "size": tuple(SIZES)}


def require_shares(**shares: float) -> None:
    """Raises: UserError for a share outside [0, 1]."""
    for name, share in shares.items():
        if not 0 <= share <= 1:
            raise UserError(f"{name}={share} is a share of the samples; it must be in [0, 1]")


@dataclass(frozen=True)
class Known:
    """What a method may read of a training sample, as shares of all: the rest of the labels are there to judge by.

    Args:
        labels, captions: samples with a label, and with a caption.
        tags: tags that hold and are told; those that do not hold cannot be told from those that are left out.
        wrong_tags: tags, whether they hold or not, that are told to be the other way round.
    """

    labels: float = 1.0
    captions: float = 1.0
    tags: float = 1.0
    wrong_tags: float = 0.0

    def __post_init__(self) -> None:
        require_shares(labels=self.labels, captions=self.captions, tags=self.tags, wrong_tags=self.wrong_tags)


class SceneSamples(RenderedSamples):
    """Samples of `SceneBatch`, with views of `SceneViewsBatch`, or with a tokenizer of `CaptionedSceneBatch`."""

    def __init__(
        self,
        first: int,
        count: int,
        space: SceneSpace,
        style: Style,
        draw_seed: int,
        moments: ChannelMoments,
        known: Known,
        tokenizer: PreTrainedTokenizerBase | None,
        length: int,
        views: Views | None,
    ) -> None:
        super().__init__(first, count)
        self.space, self.style, self.draw_seed, self.moments = space, style, draw_seed, moments
        self.known, self.tokenizer, self.length, self.views = known, tokenizer, length, views

    @property
    def batch_type(self) -> type:
        if self.views is not None:
            return SceneViewsBatch
        return SceneBatch if self.tokenizer is None else CaptionedSceneBatch

    def without_views(self) -> "SceneSamples":
        """The same samples, as they are."""
        plain = copy.copy(self)
        plain.views = None
        return plain

    def draw(self, numbers: np.ndarray, seeds: np.ndarray) -> dict[str, Any]:
        layout = self.space.layout(self.draw_seed, numbers)
        drawn = self.space.draw(layout, self.draw_seed, numbers, self.style)
        shown = seen(layout, drawn)
        told, hidden = Draws(self.draw_seed, numbers, 2), tags(layout, shown)
        label_known, caption_known = (
            np.array([[self.known.labels], [self.known.captions]], np.float32) > told.uniform(2).T
        )
        tags_known = (hidden == 0) | (told.uniform(len(TAGS)) < np.float32(self.known.tags))
        wrong = told.uniform(len(TAGS)) < np.float32(self.known.wrong_tags)
        fields = {
            "instances": drawn.instances,
            "semantic": semantics(layout, drawn.instances),
            "depth": depths(layout, drawn.instances),
            "shape": layout.shape,
            "colour": layout.colour,
            "texture": layout.texture,
            "size": layout.size,
            "pose": np.concatenate([layout.centre, layout.radius[..., None], layout.angle[..., None]], axis=2),
            "visible": drawn.visible,
            "hides": drawn.hides,
            "tags": hidden ^ wrong,
            "tags_known": tags_known.astype(np.int64),
            "label": labels(layout, drawn.instances),
            "label_known": label_known.astype(np.int64),
        }
        if self.tokenizer is not None:
            tokens, mask = tokenized(self.tokenizer, captions(layout, drawn, shown), self.length)
            fields |= {"tokens": tokens, "mask": mask, "caption_known": caption_known.astype(np.int64)}
        tensors = {name: torch.from_numpy(np.ascontiguousarray(field)) for name, field in fields.items()}
        return {"image": self.moments.standardised(drawn.images), **tensors, **self._views(drawn.images, seeds)}

    def _views(self, images: np.ndarray, seeds: np.ndarray) -> dict[str, Any]:
        """Of each image by its seed; none without rows, whose number of views nobody knows."""
        if self.views is None or not len(images):
            return {}
        made = ImageFields(*self.moments, self.views)
        pairs = zip(images, seeds, strict=True)
        return default_collate([made(torch.from_numpy(image), int(seed)) for image, seed in pairs])


def labels(layout: SceneLayout, instances: np.ndarray) -> np.ndarray:
    """The shape of the object of which the most pixels can be seen, of several the nearest: int64 [B]; the number of
    shapes if no pixel shows an object.
    """
    K = layout.shape.shape[1]
    areas = np.stack([(instances == k + 1).sum(axis=(1, 2)) for k in range(K)], axis=1)
    largest = areas.argmax(axis=1)[:, None]
    shape = np.where(
        np.take_along_axis(areas, largest, axis=1) > 0, np.take_along_axis(layout.shape, largest, 1), len(SHAPES)
    )
    return shape[:, 0]


class RenderedScenes(RenderedSets):
    """Scenes with all their labels: batches of `SceneBatch`, or with a tokenizer of `CaptionedSceneBatch`.

    What a method may read (`known`) is limited in training alone, and only training samples have `views`, beside the
    fields that all have (`SceneViewsBatch`); the bank's have none.

    Args:
        space: which scenes there are; None is `SceneSpace()`.
        style: how they are painted; None is `Style()`.
        known: shares of labels, captions and tags that a method may read; None is all.
        tokenizer: turns a caption into tokens, special tokens included; None leaves captions out.
        length: T, tokens of a caption that are read, special ones included, at least 3.
        views: makes the views of a training image, anew in each epoch; None makes none.
        settings: those of `RenderedSets`.
    """

    num_classes = len(SHAPES) + 1
    num_tags = len(TAGS)

    def __init__(
        self,
        space: SceneSpace | None = None,
        style: Style | None = None,
        known: Known | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        length: int = 48,
        views: Views | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        require_length(length)
        self.space, self.style, self.known = space or SceneSpace(), style or Style(), known or Known()
        self.tokenizer, self.length, self.views = tokenizer, length, views

    def setup(self, stage: str | None = None) -> None:
        """As `RenderedSets.setup`; the bank then has no views."""
        if self.train is None:
            super().setup(stage)
            assert isinstance(self.train, SceneSamples)
            self.bank = self.train.without_views()

    def pictures(self, numbers: np.ndarray) -> np.ndarray:
        return painted(self.space, self.draw_seed, numbers, self.style)

    def samples(self, first: int, count: int, moments: ChannelMoments) -> SceneSamples:
        training = first == PARTS["training"]
        known, views = (self.known, self.views) if training else (Known(), None)
        return SceneSamples(
            first, count, self.space, self.style, self.draw_seed, moments, known, self.tokenizer, self.length, views
        )


def painted(space: SceneSpace, seed: int, numbers: np.ndarray, style: Style) -> np.ndarray:
    """The pictures alone, uint8 [B, 3, H, W]."""
    return space.draw(space.layout(seed, numbers), seed, numbers, style).images


class DomainSamples(RenderedSamples):
    """Samples of `DomainsBatch`. The target's scenes are as far behind the source's as a set may be large."""

    batch_type = DomainsBatch

    def __init__(
        self,
        first: int,
        count: int,
        space: SceneSpace,
        styles: tuple[Style, Style],
        draw_seed: int,
        moments: ChannelMoments,
    ) -> None:
        super().__init__(first, count)
        self.space, self.styles, self.draw_seed, self.moments = space, styles, draw_seed, moments

    def draw(self, numbers: np.ndarray, seeds: np.ndarray) -> dict[str, Any]:
        fields = {}
        for prefix, style, behind in (("", self.styles[0], 0), ("target_", self.styles[1], TARGETS)):
            layout = self.space.layout(self.draw_seed, numbers + behind)
            drawn = self.space.draw(layout, self.draw_seed, numbers + behind, style)
            fields[f"{prefix}image"] = self.moments.standardised(drawn.images)
            fields[f"{prefix}semantic"] = torch.from_numpy(semantics(layout, drawn.instances))
        return fields


TARGETS = len(PARTS) * MOST


class TwoDomains(RenderedSets):
    """Scenes for learning to label pixels in one style and doing so in another: batches of `DomainsBatch`.

    The two styles differ in nothing but the style. A sample has a scene of each, and no scene comes in both.

    Args:
        space: which scenes there are, in both styles; None is `SceneSpace(32, 32)`.
        source: the style with labels; None is one without textures and almost without grain.
        target: the style in which a method is judged; None has turned hues, textures and strong grain.
        settings: those of `RenderedSets`.
    """

    num_classes = len(SHAPES) + 1  # of a pixel

    def __init__(
        self,
        space: SceneSpace | None = None,
        source: Style | None = None,
        target: Style | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        self.space = space or SceneSpace(32, 32)
        self.styles = source or Style(texture=0.0, grain=0.02), target or Style(hue=0.3, texture=1.0, grain=0.1)

    def pictures(self, numbers: np.ndarray) -> np.ndarray:
        return painted(self.space, self.draw_seed, numbers, self.styles[0])

    def samples(self, first: int, count: int, moments: ChannelMoments) -> DomainSamples:
        return DomainSamples(first, count, self.space, self.styles, self.draw_seed, moments)


class RenderedObjects(ImageData):
    """Pictures of one object each whose class is some of its factors; the others vary freely inside a class.

    Classes come as often as they are drawn. `factors(labels)` takes a class apart.

    Args:
        classes: factors that make the class, of shape, colour, texture and size, in this order.
        size: training pictures, >= 4; a quarter as many are drawn for testing, of other numbers.
        side: of a picture, in pixels.
        style: how they are painted; None is `Style()`.
        draw_seed: of the pictures, in [0, 2**63). `seed` is that of their order.
        settings: those of `ImageData`.
    """

    def __init__(
        self,
        classes: tuple[str, ...] = ("shape", "colour"),
        size: int = 8000,
        side: int = 32,
        style: Style | None = None,
        draw_seed: int = 0,
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        if not classes or len(set(classes)) < len(classes) or not set(classes) <= set(FACTORS):
            raise UserError(f"classes={[*classes]} must name some of {[*FACTORS]}, each once")
        if size < 4 or not 0 <= draw_seed < SEEDS:
            raise UserError(f"size={size} must be at least 4, and draw_seed={draw_seed} in [0, 2**63)")
        require_numbers(3 * size * side**2, size=size, side=side)
        self.space, self.style = SceneSpace(side, side, fewest=1, most=1), style or Style()
        self.classes, self.size, self.draw_seed = tuple(classes), size, draw_seed
        self.image_shape = (3, side, side)  # type: ignore[misc]
        self.num_classes = int(np.prod(self._counts()))  # type: ignore[misc]

    def _counts(self) -> tuple[int, ...]:
        return tuple(len(FACTORS[name]) for name in self.classes)

    def factors(self, labels: np.ndarray) -> np.ndarray:
        """The factors of classes, int64 [N, number of `classes`]."""
        return np.stack(np.unravel_index(labels, self._counts()), axis=1)

    def load(self) -> tuple[Labelled, Labelled]:
        return self._drawn(self.size, PARTS["training"]), self._drawn(self.size // 4, PARTS["test"])

    def _drawn(self, count: int, first: int) -> Labelled:
        numbers = first + np.arange(count)
        layout = self.space.layout(self.draw_seed, numbers)
        kinds = tuple(getattr(layout, name)[:, 0] for name in self.classes)
        images = self.space.draw(layout, self.draw_seed, numbers, self.style).images
        return Labelled(images, np.ravel_multi_index(kinds, self._counts()).astype(np.int64))


POSE = ("cos", "sin", "x", "y", "scale", "hue_cos", "hue_sin")
"""Columns of the parameters of a posed view: angle; place from the middle and radius, in shorter sides; hue."""


class PosedSamples(RenderedSamples):
    """Samples of `ViewsBatch` with the columns `POSE`."""

    batch_type = ViewsBatch

    def __init__(
        self,
        first: int,
        count: int,
        space: SceneSpace,
        views: int,
        fresh: bool,
        draw_seed: int,
        moments: ChannelMoments,
    ) -> None:
        super().__init__(first, count)
        self.space, self.views, self.fresh, self.draw_seed, self.moments = space, views, fresh, draw_seed, moments

    def draw(self, numbers: np.ndarray, seeds: np.ndarray) -> dict[str, Any]:
        seeds = seeds if self.fresh else np.zeros_like(seeds)
        images, poses = zip(
            *(posed(self.space, self.draw_seed, numbers, view, seeds) for view in range(self.views)), strict=True
        )
        return {
            "views": [self.moments.standardised(view) for view in images],
            "parameters": torch.from_numpy(np.stack(poses, axis=1)),
            "label": torch.from_numpy(self.space.layout(self.draw_seed, numbers).shape[:, 0]),
        }


def posed(
    space: SceneSpace, seed: int, numbers: np.ndarray, view: int, seeds: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Views of objects in random poses and hues: (uint8 [B, 3, H, W], float32 [B, P], columns `POSE`).

    An object has its shape and texture from its number; the rest is a function of number, view and seed.
    """
    own, draws = space.layout(seed, numbers), Draws(seed, numbers, 3, view, seeds)
    x, y, scale, angle, hue = draws.uniform(5).T
    side, turn = np.float32(min(space.height, space.width)), np.float32(2 * np.pi)
    place = np.float32(0.36) * (np.stack([x, y], axis=1) - np.float32(0.5))
    radius = side * (np.float32(0.22) + np.float32(0.1) * scale)
    layout = own._replace(
        colour=np.zeros_like(own.colour),  # red, which the hue then turns
        centre=(np.array([space.width - 1, space.height - 1], np.float32) / 2 + side * place)[:, None],
        radius=radius[:, None],
        angle=(turn * angle)[:, None],
    )
    images = space.draw(layout, seed, draws.integers(2**31), Style(texture=0.35, shade=0.6), hue).images
    round_trip = (np.cos(turn * angle), np.sin(turn * angle)), (np.cos(turn * hue), np.sin(turn * hue))
    return images, np.stack([*round_trip[0], place[:, 0], place[:, 1], radius / side, *round_trip[1]], axis=1)


class PosedViews(RenderedSets):
    """Objects of eight shapes, each in several views of known pose and hue: batches of `ViewsBatch`, all sets alike.

    `label` is the shape, the columns of `parameters` are `POSE`. An object is shaded from one side to the other, so
    that its angle can be seen whatever its shape.

    Args:
        views: V, of an object, at least 1.
        side: of a picture, in pixels.
        fresh: whether a training object has other views in each epoch, or always the same.
        settings: those of `RenderedSets`.
    """

    num_classes = len(SHAPES)

    def __init__(self, views: int = 2, side: int = 32, fresh: bool = True, **settings: Any) -> None:
        super().__init__(**settings)
        if views < 1:
            raise UserError(f"views={views} of each object; at least 1 is needed")
        require_numbers(3 * views * side**2, views=views, side=side)
        self.views, self.fresh, self.space = views, fresh, SceneSpace(side, side, fewest=1, most=1)

    def pictures(self, numbers: np.ndarray) -> np.ndarray:
        return posed(self.space, self.draw_seed, numbers, 0, np.zeros_like(numbers))[0]

    def samples(self, first: int, count: int, moments: ChannelMoments) -> PosedSamples:
        fresh = self.fresh and first == PARTS["training"]
        return PosedSamples(first, count, self.space, self.views, fresh, self.draw_seed, moments)
