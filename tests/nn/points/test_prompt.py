"""Clouds as pictures: edges against loops and torch's norm, views as cameras, and what a picture may depend on."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck
from torch.nn import functional as F

from lightspan.core.errors import UserError
from lightspan.nn.points.edges import EdgeEncoder, RaggedGroupNorm
from lightspan.nn.points.projection import projected, seen_along
from lightspan.nn.points.prompt import PointPrompt
from lightspan.nn.points.views import ViewsFromAbove

COUNTS = 9, 0, 1, 30
OFFSETS = torch.tensor([0, *np.cumsum(COUNTS).tolist()])


def clouds(dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(40, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def encoder(neighbours: int = 5) -> EdgeEncoder:
    torch.manual_seed(0)
    made = EdgeEncoder(8, 4, neighbours, groups=2)
    for parameter in made.parameters():  # norms that do something, of either sign
        nn.init.normal_(parameter)
    return made


def test_the_norm_of_one_cloud_is_that_of_torch_and_clouds_do_not_see_one_another() -> None:
    own, theirs = RaggedGroupNorm(2, 6), nn.GroupNorm(2, 6)
    theirs.load_state_dict({name: torch.randn_like(tensor) for name, tensor in theirs.state_dict().items()})
    own.load_state_dict(theirs.state_dict())
    x_NKC = torch.randn(40, 3, 6) * 3 + 1
    found = own(x_NKC, OFFSETS).split(COUNTS)
    for cloud, mine in zip(x_NKC.split(COUNTS), found, strict=True):
        if len(cloud):
            torch.testing.assert_close(mine, theirs(cloud.permute(2, 0, 1)[None])[0].permute(1, 2, 0))
    torch.testing.assert_close(own(x_NKC[:, 0], OFFSETS), own(x_NKC[:, :1], OFFSETS)[:, 0])


def test_features_are_those_of_a_loop_over_points_and_their_neighbours() -> None:
    net, xyz = encoder(), clouds()
    for cloud, found in zip(xyz.split(COUNTS), net(xyz, OFFSETS).split(COUNTS), strict=True):
        if len(cloud) < 5:
            continue
        lifted, edges = net.lift(cloud), []
        for point in range(len(cloud)):
            near = (cloud - cloud[point]).norm(dim=1).argsort()[:5]
            edges.append(torch.stack([torch.cat([lifted[j] - lifted[point], lifted[point]]) for j in near]))
        raw = net.edge(torch.stack(edges)).permute(2, 0, 1)[None]
        normed = F.leaky_relu(F.group_norm(raw, 2, net.norm.weight, net.norm.bias), 0.2)
        torch.testing.assert_close(found, net.last(normed[0].amax(2).T), rtol=1e-4, atol=1e-5)


def test_features_move_with_their_points_and_know_no_other_cloud() -> None:
    net, xyz = encoder(), clouds()
    whole, order = net(xyz, OFFSETS), torch.randperm(30, generator=torch.Generator().manual_seed(1))
    alone = net(xyz[10:][order], torch.tensor([0, 30]))
    torch.testing.assert_close(alone, whole[10:][order], rtol=1e-4, atol=1e-5)


def test_gradients_of_features_are_right() -> None:
    net, xyz = encoder().double(), clouds(torch.float64)[:10].requires_grad_()
    offsets = torch.tensor([0, 8, 10])
    assert gradcheck(
        lambda x, w: torch.func.functional_call(net, {"edge.weight": w}, (x, offsets)), (xyz, net.edge.weight)
    )


def test_few_equal_and_no_points_give_finite_features_in_any_precision() -> None:
    net = encoder(neighbours=32)
    for xyz in (torch.full((40, 3), 2.0), clouds() * 1e-30, clouds()):
        for dtype in (torch.float32, torch.bfloat16):
            found = net.to(dtype)(xyz.to(dtype), OFFSETS)
            assert found.isfinite().all()
            assert found.dtype == dtype
        net.float()
    assert net(torch.zeros(0, 3), torch.zeros(3, dtype=torch.int64)).shape == (0, 8)


def test_views_are_those_of_a_camera_that_looks_at_the_cloud() -> None:
    right, down, away = ViewsFromAbove().axes(torch.tensor([0.0]), torch.tensor([30.0]))[0]
    torch.testing.assert_close(right, torch.tensor([0.0, 1, 0]))  # from x, y is to the right
    torch.testing.assert_close(down, torch.tensor([0.5, 0, -(3**0.5) / 2]))
    torch.testing.assert_close(away, torch.tensor([-(3**0.5) / 2, 0, -0.5]))
    for up in ("x", "y", "z", "-x", "-y", "-z"):
        axes = ViewsFromAbove(up=up).axes(torch.linspace(0, 350, 12), torch.linspace(-90, 90, 12))
        torch.testing.assert_close(axes @ axes.mT, torch.eye(3).expand(12, 3, 3), rtol=0, atol=1e-6)
        torch.testing.assert_close(torch.linalg.det(axes), torch.ones(12))
        pointing = torch.eye(3)["xyz".index(up[-1])] * (-1 if up[0] == "-" else 1)
        shown = axes @ pointing  # what points up is above its foot, and never to a side
        torch.testing.assert_close(shown[:, 0], torch.zeros(12), rtol=0, atol=1e-6)
        assert (shown[1:-1, 1] < 0).all()


def test_views_of_evaluation_are_spread_over_the_azimuths_and_at_all_heights() -> None:
    views = ViewsFromAbove(azimuth=(0, 300))
    sides, heights = torch.arange(10) * 30.0 + 15, torch.tensor([18.0, 30, 42, 54])
    expected = views.axes(sides.repeat(4), heights.repeat_interleave(10))
    torch.testing.assert_close(views.around(10, 4), expected)
    torch.testing.assert_close(views.around(2, 1), views.axes(torch.tensor([75.0, 225]), torch.tensor([36.0, 36])))


def test_draws_are_functions_of_seed_step_and_cloud_within_their_ranges() -> None:
    views, index = ViewsFromAbove(azimuth=(0, 360), stretch=(0.5, 2)), torch.arange(500)
    drawn = views.drawn(index, 3)
    assert torch.equal(views.drawn(index[7:9], 3), drawn[7:9])
    assert not torch.equal(views.drawn(index, 4), drawn)
    assert not torch.equal(ViewsFromAbove(azimuth=(0, 360), stretch=(0.5, 2), seed=1).drawn(index, 3), drawn)
    stretch = drawn.norm(dim=2)
    assert (stretch[:, 2] - 1).abs().max() < 1e-6
    assert 0.5 <= stretch[:, :2].min() < 0.51
    assert 1.99 < stretch[:, :2].max() <= 2
    assert abs(np.corrcoef(stretch[:, 0], stretch[:, 1])[0, 1]) < 0.2
    elevation = (-drawn[:, 2, 2]).asin().rad2deg()
    assert 18 <= elevation.min() < 19
    assert 53 < elevation.max() <= 54.001


def test_pictures_are_coloured_sums_and_the_rest_is_of_one_colour() -> None:
    torch.manual_seed(0)
    prompt, xyz = PointPrompt(encoder(), side=24).eval(), clouds()
    views = ViewsFromAbove().drawn(torch.arange(4), 0)
    found = prompt(xyz, OFFSETS, views)
    sums = projected(seen_along(xyz, OFFSETS, views), OFFSETS, 24).scattered(prompt.encoder(xyz, OFFSETS))
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    torch.testing.assert_close(found * std + mean, prompt.colour(sums).sigmoid())
    assert (found[1, :, 4:-4, 4:-4] == found[1, :, 4:5, 4:5]).all()  # the cloud without points, off the padded edge
    assert found.shape == (4, 3, 24, 24)


def test_pictures_keep_still_when_only_the_view_is_moved_scaled_or_the_points_are_in_another_order() -> None:
    torch.manual_seed(0)
    prompt, xyz = PointPrompt(encoder(), side=24).eval(), clouds()
    views = ViewsFromAbove(stretch=(1, 1)).drawn(torch.arange(4), 0)
    found, x_NC = prompt(xyz, OFFSETS, views), prompt.encoder(xyz, OFFSETS)
    torch.testing.assert_close(prompt.pictures(x_NC, xyz * 4, OFFSETS, views), found)
    torch.testing.assert_close(prompt.pictures(x_NC, xyz, OFFSETS, views / 2), found)
    order = torch.cat([torch.arange(10), 10 + torch.randperm(30, generator=torch.Generator().manual_seed(1))])
    torch.testing.assert_close(prompt(xyz[order], OFFSETS, views), found, rtol=1e-4, atol=1e-4)


def test_settings_that_do_not_fit_are_refused() -> None:
    for make, said in (
        (lambda: EdgeEncoder(6, groups=4), "groups=4"),
        (lambda: EdgeEncoder(neighbours=0), "neighbours=0"),
        (lambda: PointPrompt(side=3), "side=3"),
        (lambda: PointPrompt(spread=2), "spread=2"),
        (lambda: PointPrompt(std=(1.0, 0.0, 1.0)), "std"),
        (lambda: ViewsFromAbove(elevation=(60, 30)), "elevation"),
        (lambda: ViewsFromAbove(elevation=(0, 100)), "elevation"),
        (lambda: ViewsFromAbove(stretch=(0, 1)), "stretch"),
    ):
        with pytest.raises(UserError, match=said):
            make()
