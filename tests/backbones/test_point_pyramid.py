"""Transformers on points by levels, and their decoder: what tokens may depend on, other clouds, sizes."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightspan.backbones.point_pyramid import PointPyramid
from lightspan.core.errors import UserError
from lightspan.nn.decoders.pyramid_decoder import PyramidDecoder
from lightspan.nn.masking.guided_masks import GuidedMasks, hidden_at_levels
from lightspan.nn.points.groups import NestedGroups

COUNTS = 40, 60, 9


def small() -> PointPyramid:
    torch.manual_seed(0)
    sizes = {"groups": (16, 10, 6), "sizes": (5, 4, 3), "widths": (8, 12, 16), "depths": (1, 2, 1)}
    return PointPyramid(**sizes, heads=2, drop_path=0.0, point_widths=(6, 8, 10)).eval()


def batch(counts: tuple[int, ...] = COUNTS, seed: int = 0) -> tuple[Tensor, Tensor]:
    xyz = torch.randn(sum(counts), 3, generator=torch.Generator().manual_seed(seed))
    return xyz, torch.tensor([0, *np.cumsum(counts).tolist()])


def masked(net: PointPyramid, xyz: Tensor, offsets: Tensor) -> tuple[tuple[NestedGroups, ...], list[Tensor]]:
    levels = net.grouped(xyz, offsets)
    clouds = len(offsets) - 1
    return levels, hidden_at_levels(GuidedMasks(0.5).draw(torch.ones(clouds, 6), 0, torch.arange(clouds)), levels)


def test_features_are_the_largest_of_the_coarsest_tokens_whatever_the_order_of_points_and_the_other_clouds() -> None:
    net, (xyz, offsets) = small(), batch()
    features = net(xyz, offsets)
    tokens = net.tokens(net.grouped(xyz, offsets))
    assert [level.shape for level in tokens] == [(3, 16, 8), (3, 10, 12), (3, 6, 16)]
    assert torch.equal(features, tokens[-1].amax(1))
    for row, cloud in enumerate(xyz.split(COUNTS)):
        mixed = cloud[torch.randperm(len(cloud), generator=torch.Generator().manual_seed(1))]
        torch.testing.assert_close(net(mixed, torch.tensor([0, len(mixed)]))[0], features[row], rtol=1e-4, atol=1e-5)


def test_tokens_of_a_cloud_do_not_depend_on_how_many_are_seen_of_others() -> None:
    net, (xyz, offsets) = small(), batch()
    levels, hidden = masked(net, xyz, offsets)
    assert len({*(~hidden[0]).sum(1).tolist()}) > 1  # so that there is padding
    together = net.tokens(levels, hidden)
    for row in range(3):
        alone = net.tokens([NestedGroups(*(part[row : row + 1] for part in level)) for level in levels],
                           [level[row : row + 1] for level in hidden])  # fmt: skip
        for ours, theirs in zip(alone, together, strict=True):
            torch.testing.assert_close(ours[0], theirs[row], rtol=1e-4, atol=1e-5)


def test_nothing_is_seen_of_hidden_groups_and_their_tokens_are_zero() -> None:
    net, (xyz, offsets) = small(), batch()
    levels, hidden = masked(net, xyz, offsets)
    before = net.tokens(levels, hidden)
    for tokens, hide in zip(before, hidden, strict=True):
        assert not tokens[hide].any()
        assert (tokens[~hide] != 0).any(1).all()
    changed = [
        level._replace(
            centre_BG3=level.centre_BG3 + hide[..., None], near_BGK3=level.near_BGK3 + 5 * hide[..., None, None]
        )
        for level, hide in zip(levels, hidden, strict=True)
    ]
    for ours, theirs in zip(net.tokens(changed, hidden), before, strict=True):
        assert torch.equal(ours, theirs)
    net.train()  # norms take no statistics of them either
    one, other = (net.tokens(given, hidden)[-1] for given in (levels, changed))
    assert torch.equal(one, other)


def test_masks_that_hide_nothing_change_nothing() -> None:
    net, (xyz, offsets) = small(), batch()
    levels = net.grouped(xyz, offsets)
    hidden = [torch.zeros(3, count, dtype=torch.bool) for count in net.groups]
    for ours, theirs in zip(net.tokens(levels, hidden), net.tokens(levels), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_clouds_without_points_have_features_of_zero_and_single_or_equal_points_finite_ones() -> None:
    net = small()
    xyz, offsets = batch((20, 0, 1))
    features = net(torch.cat([xyz, torch.full((7, 3), 2.0)]), torch.cat([offsets, offsets[-1:] + 7]))
    assert not features[1].any()
    assert features.isfinite().all()
    assert net(torch.zeros(0, 3), torch.zeros(1, dtype=torch.int64)).shape == (0, 16)
    assert net.bfloat16()(xyz, offsets).isfinite().all()


def test_the_papers_networks_have_the_sizes_that_they_say() -> None:
    with torch.device("meta"):
        net, decoder = PointPyramid(), PyramidDecoder()
    drops = [getattr(block.drop_path1, "drop_prob", 0.0) for block in net.feature_modules]  # type: ignore[union-attr]
    np.testing.assert_allclose(drops, np.linspace(0, 0.1, 15))
    blocks = {width: 12 * width**2 + 10 * width for width in (96, 192, 384)}  # keys, queries and values have no bias
    places = {width: 4 * width + width**2 + width for width in blocks}
    first = 3 * 128 + 3 * 128 + 128 * 256 + 256 + 512 * 512 + 3 * 512 + 512 * 96 + 96
    merged = {(c, w): 2 * (c * c + c) + 2 * c + 2 * c * w + w + 2 * w + w * w + w for c, w in ((96, 192), (192, 384))}
    encoder = first + sum(merged.values()) + 5 * sum(blocks.values()) + sum(places.values()) + 2 * 384
    assert sum(p.numel() for p in net.parameters()) == encoder
    up = (576 * 192 + 192 + 2 * 192) + 2 * (192 * 192 + 192 + 2 * 192)
    rest = sum(blocks[width] + places[width] for width in (384, 192)) + 384 + 2 * 2 * 192
    assert sum(p.numel() for p in decoder.parameters()) == up + rest
    assert not any(isinstance(module, nn.Dropout) and module.p for module in net.modules())


def test_the_decoder_reads_what_was_seen_and_centres_alone() -> None:
    net, (xyz, offsets) = small(), batch()
    torch.manual_seed(1)
    decoder = PyramidDecoder((16, 12), (1, 1), 2, drop_path=0.0).eval()
    levels, hidden = masked(net, xyz, offsets)
    tokens, centres = net.tokens(levels, hidden), [level.centre_BG3 for level in levels]
    before = decoder(tokens, centres, hidden)
    assert before.shape == (3, 10, 12)
    other = [
        torch.where(hide[..., None], torch.randn_like(level), level) for level, hide in zip(tokens, hidden, strict=True)
    ]
    other[0] += 1
    assert torch.equal(decoder(other, centres, hidden), before)
    for level in (1, 2):
        other = [*tokens]
        other[level] = torch.where(hidden[level][..., None], tokens[level], 1 - 2 * tokens[level].flip(2))
        assert not torch.allclose(decoder(other, centres, hidden), before)
        moved = [*centres]
        moved[level] = centres[level] + 1
        assert not torch.allclose(decoder(tokens, moved, hidden), before)


def test_sizes_that_do_not_fit_are_refused() -> None:
    for make, said in (
        (lambda: PointPyramid(groups=(8, 4)), "groups="),
        (lambda: PointPyramid((), (), (), ()), "groups="),
        (lambda: PointPyramid(groups=(8, 4, 0)), "groups"),
        (lambda: PointPyramid(sizes=(8, 4, 1)), "sizes"),
        (lambda: PointPyramid(heads=5), "heads=5"),
        (lambda: PointPyramid(drop_path=1.0), "drop_path"),
        (lambda: PointPyramid(mlp_ratio=0.0), "mlp_ratio"),
        (lambda: PyramidDecoder((384, 192), (1,)), "depths"),
        (lambda: PyramidDecoder((384, 190), (1, 1)), "heads=6"),
        (lambda: PyramidDecoder(up_blocks=-1), "up_blocks"),
    ):
        with pytest.raises(UserError, match=said):
            make()
