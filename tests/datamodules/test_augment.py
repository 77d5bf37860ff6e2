"""Views made of a batch on the device are those made of single images, and both are torchvision's."""

import pytest
import torch
from host_reads import HostReads
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from lightspan.datamodules.image.augment.rendering import (
    NO_LABEL,
    WHOLE,
    Drawn,
    Rendering,
    blurred,
    hue_turned,
    resampled,
    turned,
    unit_float,
)
from lightspan.datamodules.image.augment.views import (
    DrawnViews,
    MultiCrop,
    NestedCrops,
    Plain,
    RandomViews,
    Repeated,
    Views,
    seeded,
)
from lightspan.datamodules.image.batch import ViewParameters
from lightspan.datamodules.image.variants.shifts import Shifted

EVERYTHING = {
    "degrees": 30.0,
    "jitter": 0.7,
    "brightness": 0.6,
    "contrast": 0.6,
    "saturation": 0.6,
    "hue": 0.3,
    "grey": 0.3,
    "blur": 0.5,
    "solarise": 0.3,
}
KINDS: dict[str, Views] = {
    "two views": RandomViews(),
    "everything": RandomViews(count=3, **EVERYTHING),
    "enlarged": RandomViews(size=31, scale=(0.05, 0.3), **EVERYTHING),
    "shrunk": RandomViews(size=7, scale=(0.6, 1.0)),
    "multi-crop": MultiCrop([RandomViews(size=16), RandomViews(count=2, size=8, scale=(0.1, 0.3)), Plain(1)]),
    "nested": NestedCrops(RandomViews(count=1, size=12), RandomViews(size=6, scale=(0.3, 0.6))),
    "repeated": Repeated(RandomViews(count=1)),
    "shifted": Shifted(3),
}


def colours(rows: int = 6, channels: int = 3, height: int = 20, width: int = 26) -> Tensor:
    """Random pictures with grey, black and white pixels among the others: [B C H W] uint8."""
    image = torch.randint(256, (rows, channels, height, width), generator=torch.Generator().manual_seed(0))
    image[:, :, :3], image[:, :, 3:5], image[:, :, 5:7] = 77, 0, 255
    return image.to(torch.uint8)


def drawn(views: DrawnViews, image: Tensor, first_seed: int = 0) -> list[list[Drawn]]:
    """The numbers of each row's views."""
    found = []
    for row in range(len(image)):
        with seeded(first_seed + row):
            found.append(views.draw(tuple(image.shape[1:])))
    return found


def batched(views: DrawnViews, image: Tensor, numbers: list[list[Drawn]]) -> list[Tensor]:
    table_BVP = torch.tensor([[one.parameters for one in row] for row in numbers])
    seed = torch.arange(len(image))
    return [
        rendering.many(unit_float(image), ViewParameters(*table_BVP[:, v].unbind(1)), seed, v)
        for v, rendering in enumerate(views.renderings)
    ]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("channels", [1, 3])
def test_a_batch_shows_what_single_images_show(kind: str, channels: int) -> None:
    views, image = KINDS[kind].drawn, colours(channels=channels)
    assert views is not None
    numbers = drawn(views, image)
    singly = [views.render(row, of_row) for row, of_row in zip(image, numbers, strict=True)]
    for v, view in enumerate(batched(views, image, numbers)):
        alone = torch.stack([row[v] for row in singly])
        assert view.shape == alone.shape
        torch.testing.assert_close(view, alone, atol=2e-5, rtol=0)


@pytest.mark.parametrize("mirrored", [0.0, 1.0])
@pytest.mark.parametrize("size", [None, 7, 40])
def test_labels_are_those_of_the_pixels_that_a_view_shows(size: int | None, mirrored: float) -> None:
    """Of two halves, the pixels of the view above a half are those of the brighter one."""
    label = (torch.arange(18) >= 10).long().expand(14, 18)
    drawn = Drawn(WHOLE._replace(top=3 / 14, left=2 / 18, height=9 / 14, width=12 / 18, mirrored=mirrored))
    rendering = Rendering(size)
    shown, found = rendering.one(label[None].float(), drawn)[0], rendering.labels(label, drawn)
    assert found.shape == shown.shape
    assert torch.equal(found, (shown > 0.5).long())
    assert 0 < found.float().mean() < 0.5  # four of twelve columns


def test_what_shows_nothing_of_the_image_has_no_label() -> None:
    label = torch.ones(12, 12, dtype=torch.uint8)
    turned = Rendering().labels(label, Drawn(WHOLE._replace(angle=45.0)))
    black = Rendering().one(label[None].float(), Drawn(WHOLE._replace(angle=45.0)))[0]
    assert turned.unique().tolist() == [NO_LABEL, 1]
    assert turned[0, 0] == turned[-1, -1] == NO_LABEL
    assert ((turned == 1) == (black > 0.5)).float().mean() > 0.9
    beyond = Rendering().labels(label, Drawn(WHOLE._replace(top=-0.25, left=0.5)))
    assert (beyond[:3] == NO_LABEL).all()
    assert (beyond[:, 6:] == NO_LABEL).all()
    assert (beyond[3:, :6] == 1).all()


def test_a_row_of_a_batch_does_not_depend_on_the_others() -> None:
    views, image = RandomViews(count=3, **EVERYTHING), colours()
    numbers = drawn(views, image)
    for whole, part in zip(batched(views, image, numbers), batched(views, image[:2], numbers[:2]), strict=True):
        torch.testing.assert_close(whole[:2], part)


def test_no_step_waits_for_the_device() -> None:
    views, image = RandomViews(size=9, grain=0.1, **EVERYTHING), colours(2)
    numbers = drawn(views, image)
    with HostReads() as reads:
        batched(views, image, numbers)
    assert reads.count == 0


@settings(deadline=None, max_examples=25)
@given(
    size=st.tuples(st.integers(1, 30), st.integers(1, 30)),
    target=st.tuples(st.integers(1, 30), st.integers(1, 30)),
    data=st.data(),
)
def test_resampling_is_torchvisions_crop_and_resize(
    size: tuple[int, int], target: tuple[int, int], data: st.DataObject
) -> None:
    height, width = (data.draw(st.integers(1, side)) for side in size)
    top, left = (data.draw(st.integers(0, side - kept)) for side, kept in zip(size, (height, width), strict=True))
    image = torch.rand(1, 2, *size, generator=torch.Generator().manual_seed(1))
    ours = resampled(image, torch.tensor([[top, left, height, width]]).float(), *target)
    theirs = F.resized_crop_image(image, top, left, height, width, list(target), antialias=True)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("angle", [-170.0, -33.3, 0.0, 45.0, 90.0, 179.0])
def test_turning_is_torchvisions(angle: float) -> None:
    image = unit_float(colours())
    theirs = F.rotate_image(image, angle, F.InterpolationMode.BILINEAR)
    torch.testing.assert_close(turned(image, torch.full([len(image)], angle)), theirs, atol=2e-5, rtol=0)


@pytest.mark.parametrize("turns", [-0.5, -0.2, 0.0, 0.1, 0.5])
def test_hue_is_torchvisions(turns: float) -> None:
    image = unit_float(colours())
    theirs = F.adjust_hue_image(image, turns)
    torch.testing.assert_close(hue_turned(image, turns), theirs, atol=1e-5, rtol=0)
    rows = torch.full([len(image), 1, 1, 1], turns)
    torch.testing.assert_close(hue_turned(image, rows), theirs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("deviation", [0.1, 0.5, 1.3, 40.0])
def test_blur_is_torchvisions_and_none_is_none(deviation: float) -> None:
    image = unit_float(colours())
    # torchvision has one radius for both sides, and so has a blur that the border limits.
    radius = min(int(-(-2 * deviation // 1)), image.shape[2] - 1)
    theirs = F.gaussian_blur_image(image, [2 * radius + 1] * 2, [deviation] * 2)
    torch.testing.assert_close(blurred(image, deviation, deviation), theirs, atol=1e-5, rtol=0)
    rows = torch.tensor([deviation, 0.0]).repeat(3)[:, None, None, None]
    mixed = blurred(image, rows, deviation)
    torch.testing.assert_close(mixed[0::2], theirs[0::2], atol=1e-5, rtol=0)
    assert torch.equal(mixed[1::2], image[1::2])


@pytest.mark.parametrize("channels", [1, 3])
def test_brightness_contrast_saturation_and_grey_are_torchvisions(channels: int) -> None:
    image = colours(1, channels)[0]
    for change, theirs in (
        ({"brightness": 1.4}, lambda x: F.adjust_brightness_image(x, 1.4)),
        ({"contrast": 0.3}, lambda x: F.adjust_contrast_image(x, 0.3)),
        ({"saturation": 1.7}, lambda x: F.adjust_saturation_image(x, 1.7)),
        ({"grey": 1.0}, lambda x: F.rgb_to_grayscale_image(x, num_output_channels=channels)),
        ({"solarised": 1.0}, lambda x: F.solarize_image(x, 0.5)),
    ):
        ours = Rendering().one(image, Drawn(WHOLE._replace(**change)))
        assert torch.equal(ours, theirs(unit_float(image)))


def test_images_of_other_than_three_channels_keep_their_colours() -> None:
    view = Rendering().one(colours(1, 5)[0], Drawn(WHOLE._replace(contrast=0.5, hue=0.3, grey=1.0, saturation=0.0)))
    x = unit_float(colours(1, 5)[0])
    torch.testing.assert_close(view, 0.5 * x + 0.5 * x.mean())


def test_grain_has_the_deviation_asked_for_in_each_row() -> None:
    grey = torch.full((2, 1, 60, 60), 0.5)
    p = ViewParameters(*torch.tensor([WHOLE._replace(grain=x) for x in (0.1, 0.0)]).unbind(1))
    view = Rendering(widest=WHOLE._replace(grain=0.1)).many(grey, p, torch.tensor([3, 4]), 0)
    assert view[0].std().item() == pytest.approx(0.1, rel=0.05)
    assert torch.equal(view[1], grey[1])
