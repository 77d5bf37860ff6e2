"""Scenes: labels agree with the pixels, with one another and with the sentences, in every style."""

import re
from typing import Any

import numpy as np
import pytest

from lightspan.core.errors import UserError
from lightspan.datamodules.rendered import scenes
from lightspan.datamodules.rendered.scenes import (
    COLOURS,
    FARTHEST,
    SHAPES,
    SIZES,
    TAGS,
    WORDS,
    DrawnScenes,
    SceneLayout,
    SceneSpace,
    Style,
    captions,
    depths,
    seen,
    semantics,
    tags,
)
from lightspan.datamodules.rendered.textures import PALETTE, TEXTURES

PLAIN = Style(texture=0.0, grain=0.0)
FANCY = Style(hue=0.3, texture=0.7, shade=0.2, grain=0.1, blur=0.8, grey=True, inverted=True)


def drawn(space: SceneSpace, count: int, style: Style = PLAIN, seed: int = 0) -> tuple[SceneLayout, DrawnScenes]:
    index = np.arange(count)
    layout = space.layout(seed, index)
    return layout, space.draw(layout, seed, index, style)


def one_object(space: SceneSpace, **fields: Any) -> SceneLayout:
    """A layout of one scene with one large object in the middle, changed by `fields`."""
    plain = {"shape": 0, "colour": 0, "texture": 0, "size": 1, "radius": 10.0, "angle": 0.0, "depth": 2.0}
    centre = np.float32([[[space.width / 2 - 0.5, space.height / 2 - 0.5]]])
    values = {name: np.array([[value]]) for name, value in (plain | fields).items()}
    values = {n: v.astype(np.float32 if n in ("radius", "angle", "depth") else np.int64) for n, v in values.items()}
    return SceneLayout(**values, centre=centre)


@pytest.mark.parametrize("style", [Style(), FANCY], ids=["plain", "fancy"])
def test_a_scene_has_the_same_bits_in_any_batch(style: Style) -> None:
    space, index = SceneSpace(37, 29), np.array([3, 99, 0, 2**33 + 5, *range(200, 240)])
    layout = space.layout(1, index)
    together = space.draw(layout, 1, index, style)
    for row in (0, 3, 17, 43):
        own = space.layout(1, index[[row]])
        alone = space.draw(own, 1, index[[row]], style)
        assert all(np.array_equal(a[row], b[0]) for a, b in zip(layout, own, strict=True))
        assert all(np.array_equal(a[row], b[0]) for a, b in zip(together, alone, strict=True))


def test_styles_change_pictures_and_no_label() -> None:
    space, index = SceneSpace(), np.arange(20)
    layout = space.layout(0, index)
    one, other = (space.draw(layout, 0, index, style) for style in (PLAIN, FANCY))
    assert not np.array_equal(one.images, other.images)
    assert all(np.array_equal(a, b) for a, b in zip(one[1:], other[1:], strict=True))
    assert (other.images[:, 0] == other.images[:, 1]).all()


def test_masks_agree_with_the_pixels() -> None:
    layout, scene = drawn(SceneSpace(), 200)
    paint = np.array([*PALETTE.values()])
    inner = np.zeros(len(COLOURS), dtype=int)
    right = np.zeros(len(COLOURS), dtype=int)
    for image, instances, colour in zip(scene.images.astype(float), scene.instances, layout.colour, strict=True):
        # Pixels whose neighbours belong to the same object: its colour alone, up to its shade.
        same = np.ones_like(instances, dtype=bool)
        for axis in (0, 1):
            for shift in (-1, 1):
                same &= np.roll(instances, shift, axis) == instances
        same[[0, -1]], same[:, [0, -1]] = False, False
        brightest = image.max(axis=0)
        assert (brightest[same & (instances == 0)] < 255 * 0.36).mean() > 0.99  # but for thin tips
        for k in np.unique(instances[same & (instances > 0)]):
            pixels = image[:, same & (instances == k)]
            assert (pixels.max(axis=0) > 255 * 0.4).all()
            alike = (pixels / np.linalg.norm(pixels, axis=0)).T @ (paint / np.linalg.norm(paint, axis=1)[:, None]).T
            inner[colour[k - 1]] += pixels.shape[1]
            right[colour[k - 1]] += (alike.argmax(axis=1) == colour[k - 1]).sum()
    assert (inner > 500).all()
    assert (right > 0.95 * inner).all()


@pytest.mark.parametrize("shape", range(len(SHAPES)))
def test_a_mask_has_the_area_and_the_place_of_its_shape(shape: int) -> None:
    space = SceneSpace(101, 101, most=1)
    areas = {"disc": np.pi * 0.81, "ring": np.pi * (0.95**2 - 0.55**2), "square": 1.5**2, "bar": 4 * 0.3}
    areas |= {"cross": 2 * 4 * 0.95 * 0.25 - 4 * 0.25**2, "triangle": 3 * 3**0.5 * 0.25}
    layout = one_object(space, shape=shape, radius=30.0, angle=0.4)
    mask = space.draw(layout, 0, np.zeros(1, int), PLAIN).instances[0]
    if SHAPES[shape] in areas:
        assert mask.sum() == pytest.approx(areas[SHAPES[shape]] * 900, rel=0.02)
    if SHAPES[shape] not in ("half disc", "triangle"):
        y, x = np.nonzero(mask)
        assert (x.mean(), y.mean()) == pytest.approx((50, 50), abs=0.2)


def test_the_nearer_object_hides_the_farther() -> None:
    layout, scene = drawn(SceneSpace(fewest=4), 120)
    assert (np.diff(layout.depth, axis=1) > 0).all()
    depth = depths(layout, scene.instances)
    assert depth.max() == FARTHEST
    partly = 0
    for k in range(4):
        # Drawn alone, an object covers all that it covers in the scene, and more wherever a nearer one hides it.
        alone = SceneLayout(*(field[:, [k]] for field in layout))
        mask = SceneSpace(most=1).draw(alone, 0, np.arange(120), PLAIN).instances == 1
        assert (mask | (scene.instances != k + 1)).all()
        others = mask & (scene.instances != k + 1)
        assert (scene.instances[others] <= k).all()
        assert (depth[mask] <= np.broadcast_to(layout.depth[:, k, None, None], mask.shape)[mask]).all()
        area, left = mask.sum(axis=(1, 2)), (scene.instances == k + 1).sum(axis=(1, 2))
        assert np.allclose(scene.visible[:, k], left / np.maximum(area, 1))
        partly += ((left > 0) & (left < area)).sum()
        for nearer in range(k):
            hidden = (others & (scene.instances == nearer + 1)).any(axis=(1, 2))
            assert (scene.hides[:, nearer, k] >= hidden).all()
        assert (scene.hides[:, k, : k + 1] == 0).all()
    assert partly > 40
    assert (scene.visible[:, 0] > 0).all()
    assert (scene.visible[:, 0] == 1).all()


def test_semantics_are_the_shapes_of_the_objects() -> None:
    layout, scene = drawn(SceneSpace(), 50)
    found = semantics(layout, scene.instances)
    for row in range(50):
        for k in range(4):
            assert (found[row][scene.instances[row] == k + 1] == layout.shape[row, k] + 1).all()
        assert (found[row][scene.instances[row] == 0] == 0).all()


THING = re.compile(rf"a ({'|'.join(SIZES)}) ({'|'.join(COLOURS)}) ({'|'.join(WORDS.values())}) ({'|'.join(SHAPES)})")
RELATIONS = {"left of": (0, -1), "right of": (0, 1), "above": (1, -1), "below": (1, 1)}


def test_a_sentence_and_tags_say_what_can_be_seen() -> None:
    layout, scene = drawn(SceneSpace(fewest=0), 400)
    shown, words = seen(layout, scene), [*WORDS.values()]
    kinds, known = set(), tags(layout, shown)
    for row, sentence in enumerate(captions(layout, scene, shown)):
        things = [m.groups() for m in THING.finditer(sentence)]
        which = np.flatnonzero(shown[row])
        assert things == [
            (
                [*SIZES][layout.size[row, k]],
                COLOURS[layout.colour[row, k]],
                words[layout.texture[row, k]],
                SHAPES[layout.shape[row, k]],
            )
            for k in which
        ]
        plain = {name for thing in things for name in thing}
        names = {{word: name for name, word in WORDS.items()}.get(name, name) for name in plain}
        assert {TAGS[i] for i in np.flatnonzero(known[row])} == names
        for name, (axis, sign) in RELATIONS.items():
            if f" {name} a " in sentence:
                gap = layout.centre[row, which[0]] - layout.centre[row, which[1]]
                assert sign * gap[axis] == np.abs(gap).max()
                kinds.add(name)
        if " in front of " in sentence:
            assert scene.hides[row, which[0], which[1]]
            kinds.add("in front of")
        if not things:
            assert sentence == "nothing"
            kinds.add("nothing")
    assert kinds == {*RELATIONS, "in front of", "nothing"}


def test_an_object_that_is_hidden_is_not_named() -> None:
    space = SceneSpace(most=2)
    near, far = one_object(space, radius=14.0), one_object(space, radius=5.0, depth=3.0, shape=3)
    layout = SceneLayout(*(np.concatenate(pair, axis=1) for pair in zip(near, far, strict=True)))
    scene = space.draw(layout, 0, np.zeros(1, int), PLAIN)
    assert scene.visible.tolist() == [[1.0, 0.0]]
    assert captions(layout, scene, seen(layout, scene)) == ["a large red plain disc"]


def test_shade_tells_the_angle_of_a_disc() -> None:
    space, index = SceneSpace(33, 33, most=1), np.zeros(1, int)
    turned = [one_object(space, angle=angle) for angle in (0.0, np.pi / 2)]
    upright, across = (
        space.draw(layout, 0, index, Style(texture=0, grain=0, shade=1)).images[0, 0] for layout in turned
    )
    assert int(upright[16, 10]) > int(upright[16, 22]) + 100  # darker to the right
    assert abs(int(upright[10, 16]) - int(upright[22, 16])) <= 2
    assert int(across[10, 16]) > int(across[22, 16]) + 100
    without = [space.draw(layout, 0, index, PLAIN).images for layout in turned]
    assert np.abs(without[0].astype(int) - without[1]).max() <= 1


def test_inverted_swaps_dark_and_bright_and_blur_keeps_the_sum() -> None:
    _, plain = drawn(SceneSpace(), 5)
    _, inverted = drawn(SceneSpace(), 5, Style(texture=0, grain=0, inverted=True))
    assert np.abs(plain.images.astype(int) + inverted.images - 255).max() <= 1
    _, soft = drawn(SceneSpace(), 5, Style(texture=0, grain=0, blur=1.5))
    sharp = np.abs(np.diff(plain.images.astype(int), axis=3)).max()
    assert np.abs(np.diff(soft.images.astype(int), axis=3)).max() < 0.6 * sharp


@pytest.mark.parametrize("side", [1, 2])
def test_a_picture_of_a_pixel_is_a_picture(side: int) -> None:
    layout, scene = drawn(SceneSpace(side, side, fewest=0), 40, FANCY)
    assert scene.images.shape == (40, 3, side, side)
    assert captions(layout, scene, seen(layout, scene))
    assert (scene.instances <= 4).all()


def test_no_scene_and_no_object_are_ordinary() -> None:
    layout, scene = drawn(SceneSpace(), 0)
    assert scene.images.shape == (0, 3, 48, 48)
    assert captions(layout, scene, seen(layout, scene)) == []
    layout, scene = drawn(SceneSpace(fewest=0), 60)
    empty = (layout.shape < 0).all(axis=1)
    assert empty.any()
    assert not scene.instances[empty].any()
    assert not tags(layout, seen(layout, scene))[empty].any()
    assert (scene.visible[empty] == 0).all()


def test_counts_shapes_and_colours_are_those_asked_for() -> None:
    layout = SceneSpace(fewest=2, most=3, shapes=2, colours=3).layout(0, np.arange(300))
    count = (layout.shape >= 0).sum(axis=1)
    assert set(count) == {2, 3}
    assert set(layout.shape.ravel()) == {-1, 0, 1}
    assert set(layout.colour.ravel()) == {-1, 0, 1, 2}
    assert set(layout.texture.ravel()) == {-1, *range(len(TEXTURES))}
    assert ((layout.shape < 0) == (layout.depth == 0)).all()


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: SceneSpace(0, 4), "height=0 and width=4"),
        (lambda: SceneSpace(fewest=5, most=4), "fewest=5 to most=4"),
        (lambda: SceneSpace(fewest=0, most=0), "most must be at least 1"),
        (lambda: SceneSpace(shapes=9), "shapes=9"),
        (lambda: Style(texture=1.5), r"texture=1.5 and shade=0.0 must be in \[0, 1\]"),
        (lambda: Style(grain=-1), "grain=-1"),
    ],
)
def test_numbers_out_of_range_are_refused(make: Any, said: str) -> None:
    with pytest.raises(UserError, match=said):
        make()


def test_chunks_do_not_show() -> None:
    whole = drawn(SceneSpace(), scenes.AT_ONCE + 1)[1]
    single = SceneSpace().draw(SceneSpace().layout(0, np.array([scenes.AT_ONCE])), 0, np.array([scenes.AT_ONCE]), PLAIN)
    assert np.array_equal(whole.images[-1], single.images[0])
