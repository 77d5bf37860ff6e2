"""Views: ranges, sizes, and that each setting does what it says and nothing else."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.v2 import functional as F

from lightspan.core.errors import UserError
from lightspan.datamodules.image.augment.rendering import Drawn
from lightspan.datamodules.image.augment.views import (
    MultiCrop,
    NestedCrops,
    Plain,
    RandomViews,
    Repeated,
    TwoViews,
    Views,
    seeded,
)

# Nothing random at all: each test switches on one thing.
STILL = {"scale": (1.0, 1.0), "ratio": (1.0, 1.0), "flip": 0.0, "jitter": 0.0}


@pytest.fixture
def picture() -> Tensor:
    return torch.rand(3, 12, 10, generator=torch.Generator().manual_seed(0))


def test_a_seeded_block_is_a_function_of_its_seed_and_leaves_the_generator_as_it_was() -> None:
    before = torch.get_rng_state()
    with seeded(5):
        first = torch.rand(3)
    assert torch.equal(before, torch.get_rng_state())
    torch.rand(1)
    with seeded(5):
        assert torch.equal(first, torch.rand(3))
    before = torch.get_rng_state()
    with pytest.raises(RuntimeError), seeded(6):
        raise RuntimeError
    assert torch.equal(before, torch.get_rng_state())
    with seeded(2**63 - 1):
        assert not torch.equal(first, torch.rand(3))


def test_plain_repeats_the_image() -> None:
    image = torch.tensor([[[0, 255], [51, 102]]], dtype=torch.uint8)
    views = Plain(3)(image)
    assert len(views) == 3
    assert all(torch.allclose(view, torch.tensor([[[0.0, 1.0], [0.2, 0.4]]])) for view in views)


@settings(deadline=None, max_examples=60)
@given(
    channels=st.sampled_from([1, 3]),
    height=st.integers(4, 30),
    width=st.integers(4, 30),
    seed=st.integers(0, 2**40),
    whole=st.booleans(),
)
def test_views_keep_size_and_range_for_any_image(
    channels: int, height: int, width: int, seed: int, whole: bool
) -> None:
    views = TwoViews(
        scale=(0.05, 1.0), degrees=45, saturation=0.8, hue=0.5, grey=0.5, blur=0.5, blur_sigma=(0.1, 9.0), jitter=1.0
    )
    with seeded(seed):
        image = torch.rand(channels, height, width)
        image = (image * 255).to(torch.uint8) if whole else image
        before = image.clone()
        made = views(image)
    assert [(view.shape, view.dtype) for view in made] == [((channels, height, width), torch.float32)] * 2
    assert all(0 <= view.min() <= view.max() <= 1 for view in made)
    assert torch.equal(image, before)


def test_with_everything_switched_off_the_image_comes_back(picture: Tensor) -> None:
    for view in TwoViews(**STILL)(picture):
        assert torch.allclose(view, picture, atol=1e-6)


def test_the_two_views_are_drawn_independently(picture: Tensor) -> None:
    with seeded(0):
        first, second = TwoViews()(picture)
    assert not torch.equal(first, second)


def test_a_mirror_turns_left_and_right(picture: Tensor) -> None:
    for view in TwoViews(**STILL | {"flip": 1.0})(picture):
        assert torch.allclose(view, picture.flip(2), atol=1e-6)


def test_a_crop_keeps_the_share_of_the_area_it_is_given() -> None:
    """A ramp tells where the crop was taken: its slope falls by the side of the crop."""
    ramp = torch.linspace(0, 1, 40).expand(1, 40, 40).clone()
    views = TwoViews(**STILL | {"scale": (0.25, 0.25)})
    with seeded(1):
        spans = torch.stack([view.max() - view.min() for _ in range(20) for view in views(ramp)])
    assert torch.allclose(spans, torch.tensor(19 / 39), atol=0.02)


def test_crops_reach_every_corner() -> None:
    image = torch.zeros(1, 8, 8)
    image[0, 0, 0] = image[0, 0, 7] = image[0, 7, 0] = image[0, 7, 7] = 1
    views = TwoViews(**STILL | {"scale": (0.25, 0.25)})
    with seeded(2):
        made = torch.stack([view for _ in range(300) for view in views(image)])
    corners = [made[:, 0, 0, 0], made[:, 0, 0, 7], made[:, 0, 7, 0], made[:, 0, 7, 7]]
    assert all((corner > 0.5).any() for corner in corners)


def test_a_turn_keeps_the_middle_and_lets_black_in_at_the_corners() -> None:
    with seeded(3):
        made = [view for _ in range(10) for view in TwoViews(**STILL | {"degrees": 45.0})(torch.ones(1, 21, 21))]
    assert all(view[0, 10, 10] == pytest.approx(1) for view in made)
    assert min(view[0, 0, 0] for view in made) < 0.01
    assert len({float(view.mean()) for view in made}) > 10


def test_brightness_scales_and_contrast_pulls_towards_the_mean() -> None:
    image = torch.tensor([0.2, 0.4]).repeat(1, 4, 2)
    with seeded(4):
        for view in TwoViews(**STILL | {"jitter": 1.0, "brightness": 0.5, "contrast": 0.0})(image):
            assert torch.allclose(view / image, (view / image)[0, 0, 0])
            assert 0.5 <= (view / image)[0, 0, 0] <= 1.5
        for view in TwoViews(**STILL | {"jitter": 1.0, "brightness": 0.0, "contrast": 0.5})(image):
            assert view.mean() == pytest.approx(0.3, abs=1e-6)
            assert 0.05 <= view.max() - view.mean() <= 0.15


def test_colour_settings_act_on_colour_and_leave_grey_images_alone(picture: Tensor) -> None:
    colour = STILL | {"jitter": 1.0, "brightness": 0.0, "contrast": 0.0, "saturation": 0.9, "hue": 0.5, "grey": 1.0}
    with seeded(5):
        for view in TwoViews(**colour)(picture):
            assert torch.allclose(view[0], view[1])
            assert torch.allclose(view[0], view[2])
        for view in TwoViews(**colour)(picture[:1]):
            assert torch.allclose(view, picture[:1], atol=1e-6)


def test_blur_lowers_the_spread_and_keeps_a_flat_image(picture: Tensor) -> None:
    views = TwoViews(**STILL | {"blur": 1.0, "blur_sigma": (2.0, 2.0)})
    assert all(view.std() < picture.std() / 2 for view in views(picture))
    flat = torch.full((1, 8, 8), 0.5)
    assert all(torch.allclose(view, flat) for view in views(flat))


def test_one_setting_does_not_shift_the_draws_of_another(picture: Tensor) -> None:
    with seeded(6):
        plain = TwoViews(jitter=0.0, flip=0.0)(picture)
    with seeded(6):
        mirrored = TwoViews(jitter=0.0, flip=1.0)(picture)
    assert all(torch.equal(a, b.flip(2)) for a, b in zip(plain, mirrored, strict=True))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scale": (0.0, 1.0)}, r"scale=\[0.0, 1.0\] must be two numbers with 0 < least <= most <= 1"),
        ({"scale": (0.5, 1.5)}, r"scale=\[0.5, 1.5\] must be"),
        ({"ratio": (2.0, 1.0)}, r"ratio=\[2.0, 1.0\] must be two numbers with 0 < least <= most$"),
        ({"flip": 1.5}, r"TwoViews flip=1.5 is outside \[0, 1\]"),
        ({"hue": 0.6}, r"TwoViews hue=0.6 is outside \[0, 0.5\]"),
        ({"degrees": -1.0}, r"TwoViews degrees=-1.0 is outside \[0, 180\]"),
    ],
)
def test_settings_out_of_range_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        TwoViews(**arguments)


def test_no_view_is_too_few() -> None:
    with pytest.raises(UserError, match="count=0"):
        Plain(0)


def test_views_is_abstract() -> None:
    with pytest.raises(TypeError, match="abstract"):
        Views()  # type: ignore[abstract]


def test_crops_of_several_sizes_come_in_the_order_of_their_parts(picture: Tensor) -> None:
    large, small = RandomViews(count=2, size=8, scale=(0.5, 1.0)), RandomViews(count=3, size=4, scale=(0.1, 0.4))
    with seeded(0):
        made = MultiCrop([large, small, Plain(1)])(picture)
    assert [view.shape[1:] for view in made] == [(8, 8)] * 2 + [(4, 4)] * 3 + [(12, 10)]
    with seeded(0):
        assert torch.equal(torch.stack(made[:2]), torch.stack(large(picture)))
        assert torch.equal(torch.stack(made[2:5]), torch.stack(small(picture)))
    assert all(view.min() >= 0 and view.max() <= 1 for view in made)


def test_two_views_are_two_random_views_of_the_images_own_size(picture: Tensor) -> None:
    with seeded(3):
        two = TwoViews(blur=0.5)(picture)
    with seeded(3):
        assert torch.equal(torch.stack(two), torch.stack(RandomViews(blur=0.5)(picture)))


def test_solarising_inverts_what_is_bright_and_grain_has_the_deviation_asked_for(picture: Tensor) -> None:
    solarised = RandomViews(count=1, **STILL | {"solarise": 1.0})(picture)[0]
    torch.testing.assert_close(solarised, torch.where(picture >= 0.5, 1 - picture, picture))
    grey = torch.full((1, 50, 50), 0.5)
    with seeded(0):
        grainy = RandomViews(count=1, **STILL | {"grain": 0.1})(grey)[0]
    assert grainy.std().item() == pytest.approx(0.1, rel=0.05)


def test_kinds_of_views_that_give_none_are_refused() -> None:
    with pytest.raises(UserError, match="parts is an empty list"):
        MultiCrop([])
    with pytest.raises(UserError, match="count=0"):
        RandomViews(count=0)
    with pytest.raises(UserError, match=r"RandomViews grain=-1 is outside \[0, inf\]"):
        RandomViews(grain=-1)


def boxes(drawn: list[Drawn]) -> Tensor:
    """Top, left, bottom and right of each view, as shares of the image."""
    table = torch.tensor([numbers.parameters[:4] for numbers in drawn], dtype=torch.float64)
    return torch.cat([table[:, :2], table[:, :2] + table[:, 2:]], dim=1)


def shapes_of_crops(views: RandomViews, height: int, width: int) -> Tensor:
    """Width over height in pixels of many crops of such an image."""
    with seeded(0):
        table = [views.draw((3, height, width))[0].parameters for _ in range(2000)]
    return torch.tensor([p.width * width / (p.height * height) for p in table], dtype=torch.float64)


@pytest.mark.parametrize("sides", [(375, 500), (500, 375), (300, 300)])
def test_crops_of_a_square_view_have_the_shapes_of_torchvisions(sides: tuple[int, int]) -> None:
    found = shapes_of_crops(RandomViews(count=1, size=224, scale=(0.08, 1.0)), *sides)
    with seeded(0):
        image = torch.empty(3, *sides, device="meta")
        crops = [RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(2000)]
    expected = torch.tensor([width / height for _, _, height, width in crops], dtype=torch.float64)
    places = torch.tensor([0.1, 0.25, 0.5, 0.75, 0.9], dtype=torch.float64)
    torch.testing.assert_close(found.quantile(places), expected.quantile(places), rtol=0, atol=0.06)
    assert 0.75 - 0.03 < found.min() < found.max() < 4 / 3 + 0.03  # pixels are whole


def test_a_crop_that_does_not_fit_is_the_largest_of_its_shape_that_does() -> None:
    panorama = shapes_of_crops(RandomViews(count=1, size=224), 100, 500)
    assert 0.75 - 0.02 < panorama.min() < panorama.max() < 4 / 3 + 0.02
    (whole,) = RandomViews(count=1, size=224, scale=(1.0, 1.0), ratio=(1.0, 1.0)).draw((3, 100, 500))
    assert (whole.parameters.height, whole.parameters.width) == (1.0, 0.2)


def test_without_a_size_a_crop_is_shaped_like_its_image() -> None:
    same = RandomViews(count=1, scale=(0.3, 1.0))
    tall, square = shapes_of_crops(same, 1000, 500), shapes_of_crops(same, 1000, 1000)
    torch.testing.assert_close(tall, square / 2, rtol=0.01, atol=0)


def test_inner_crops_lie_in_the_outer_one_and_keep_the_share_of_it_that_they_are_given() -> None:
    views = NestedCrops(
        RandomViews(count=1, scale=(0.1, 1.0)), RandomViews(count=2, scale=(0.3, 0.6), ratio=(1.0, 1.0))
    )
    with seeded(0):
        drawn = [boxes(views.draw((3, 300, 400))) for _ in range(2000)]
    outer, inner = torch.stack(drawn).split([1, 2], dim=1)
    eps = 1e-9
    assert (inner[..., :2] >= outer[..., :2] - eps).all()
    assert (inner[..., 2:] <= outer[..., 2:] + eps).all()
    share = ((inner[..., 2:] - inner[..., :2]) / (outer[..., 2:] - outer[..., :2])).prod(dim=-1)
    assert share.min() > 0.3 - 0.02  # pixels are whole
    assert share.max() < 0.6 + 0.02
    assert share.std() > 0.05


def test_nested_crops_show_what_the_same_crops_of_the_image_show(picture: Tensor) -> None:
    views = NestedCrops(RandomViews(count=1, size=9, **STILL | {"scale": (0.5, 0.5)}), RandomViews(size=4, jitter=0.0))
    with seeded(4):
        made = views(picture)
    with seeded(4):
        drawn = views.draw((3, 12, 10))
    assert [view.shape[1:] for view in made] == [(9, 9), (4, 4), (4, 4)]
    for view, numbers, size in zip(made, drawn, (9, 4, 4), strict=True):
        top, left, bottom, right = (boxes([numbers])[0] * torch.tensor([12, 10, 12, 10])).round().int().tolist()
        crop = F.resize_image(picture[:, top:bottom, left:right], [size, size], antialias=True)
        torch.testing.assert_close(view, crop.flip(2) if numbers.parameters.mirrored else crop)


def test_the_first_of_nested_views_is_what_it_would_be_alone(picture: Tensor) -> None:
    outer = RandomViews(count=1)
    with seeded(0):
        first = NestedCrops(outer, RandomViews())(picture)[0]
    with seeded(0):
        assert torch.equal(first, outer(picture)[0])
    with pytest.raises(UserError, match=r"NestedCrops outer.count=2; inner crops lie in one"):
        NestedCrops(RandomViews(), RandomViews())


def test_repeated_views_are_drawn_once(picture: Tensor) -> None:
    first, second = Repeated(RandomViews(count=1, grain=0.1))(picture)
    assert torch.equal(first, second)
    with pytest.raises(UserError, match="times=0"):
        Repeated(RandomViews(), 0)


@pytest.mark.parametrize("settings", [{}, {"degrees": 9.0}, {"size": 7, "solarise": 0.4, "grain": 0.1, "blur": 0.5}])
def test_drawing_consumes_what_rendering_did_before_they_were_apart(settings: dict, picture: Tensor) -> None:
    """The generator ends where 14 numbers a view, one for solarising and a number a pixel for grain leave it."""
    views = RandomViews(**settings)
    with seeded(1):
        views(picture)
        after = torch.rand(3)
    with seeded(1):
        for _ in range(2):
            torch.rand(14)
            if views.solarise:
                torch.rand(())
            if views.grain:
                torch.randn(3, 7, 7)
        assert torch.equal(after, torch.rand(3))


def test_what_was_left_out_has_the_value_that_changes_nothing() -> None:
    drawn = RandomViews(count=40, jitter=0.5, saturation=0.5, hue=0.3, grey=0.5, blur=0.5).draw((3, 8, 8))
    table = [numbers.parameters for numbers in drawn]
    assert {p.angle for p in table} == {0.0}
    assert {p.mirrored for p in table} == {p.grey for p in table} == {0.0, 1.0}
    still = [p for p in table if p.brightness == 1]
    assert 5 < len(still) < 35
    assert all((p.contrast, p.saturation, p.hue) == (1, 1, 0) for p in still)
    assert 5 < sum(p.blur == 0 for p in table) < 35
    grey = RandomViews(count=20, jitter=1.0, saturation=0.5, hue=0.3, grey=0.5).draw((1, 8, 8))
    assert {(p.saturation, p.hue, p.grey) for p, _ in grey} == {(1, 0, 0)}
