"""Point-MAE: what its loss is, what tokens and features may depend on, ragged clouds, and sizes."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from method_runs import fit
from scipy.spatial import cKDTree
from torch import Tensor, nn

from lightspan.backbones.point_vit import MiniPointNet, PointViT
from lightspan.core.errors import UserError
from lightspan.methods.masked.point_mae import PointMAE
from lightspan.nn.decoders.point_decoder import PointDecoder
from lightspan.nn.masking.mask_samplers import RandomMasks, seen_and_hidden

COUNTS = 30, 50, 9


def method(**settings: Any) -> PointMAE:
    torch.manual_seed(0)
    backbone = PointViT(groups=10, size=6, width=12, depth=2, heads=2, drop_path=0.0, point_widths=(8, 8, 16))
    decoder = PointDecoder(12, depth=1, heads=2, drop_path=0.0)
    return PointMAE(backbone, decoder, **{"optimizer": partial(torch.optim.AdamW, lr=3e-3)} | settings)


def batch(counts: tuple[int, ...] = COUNTS, seed: int = 0) -> dict[str, Tensor]:
    xyz = torch.randn(sum(counts), 3, generator=torch.Generator().manual_seed(seed))
    offsets = torch.tensor([0, *np.cumsum(counts).tolist()])
    return {"xyz": xyz, "offsets": offsets, "index": torch.arange(len(counts)) + 7}


def loss_of(model: PointMAE, given: dict[str, Any]) -> Tensor:
    model.log_training = lambda figures, **options: None  # type: ignore[method-assign]
    return model.training_step(given, 0)


def test_the_loss_is_the_chamfer_distance_of_hidden_groups_from_seen_ones() -> None:
    model, given = method(), batch()
    groups = model.backbone.grouped(given["xyz"], given["offsets"])
    masks = model.masks.draw((10,), 0, [7, 8, 9])
    assert masks.sum(1).tolist() == [6, 6, 6]
    see, hide = seen_and_hidden(masks)
    guess = model.guess(groups, see, hide).detach().numpy()
    expected = []
    for cloud in range(3):
        for place, group in enumerate(hide[cloud].tolist()):
            truth, points = groups.near_BGK3[cloud, group].numpy(), guess[cloud, place]
            ways = (cKDTree(a).query(b)[0] for a, b in ((truth, points), (points, truth)))
            expected.append(sum(np.square(apart).mean() for apart in ways))
    assert float(loss_of(model, given)) == pytest.approx(np.mean(expected), rel=1e-5)


def test_points_that_are_seen_are_those_of_seen_groups() -> None:
    model, given = method().eval(), batch((30, 0, 50))
    seen_N = model.seen_points(given)
    groups = model.backbone.grouped(given["xyz"], given["offsets"])
    see, _ = seen_and_hidden(model.drawn_masks(given))
    expected = set()
    for cloud, first in ((0, 0), (2, 30)):
        near = (groups.centre_BG3[cloud, see[cloud], None] + groups.near_BGK3[cloud, see[cloud]]).flatten(0, 1)
        apart = torch.cdist(near, given["xyz"][first : (30, 0, 80)[cloud]])
        expected |= {first + place for place in apart.argmin(1).tolist()}
    assert {*seen_N.nonzero().flatten().tolist()} == expected
    assert 0 < len(expected) < 80


def test_guesses_depend_on_seen_groups_and_on_the_centres_of_hidden_ones_alone() -> None:
    model, given = method().eval(), batch()
    groups = model.backbone.grouped(given["xyz"], given["offsets"])
    see, hide = seen_and_hidden(model.masks.draw((10,), 0, [7, 8, 9]))
    before = model.guess(groups, see, hide)
    rows = torch.arange(3)[:, None]
    other = groups.near_BGK3.clone()
    other[rows, hide] = 5
    assert torch.equal(model.guess(groups._replace(near_BGK3=other), see, hide), before)
    other[rows, see] = 5
    assert not torch.allclose(model.guess(groups._replace(near_BGK3=other), see, hide), before)
    moved = groups.centre_BG3.clone()
    moved[rows, hide] += 1
    assert not torch.allclose(model.guess(groups._replace(centre_BG3=moved), see, hide), before)


def test_features_are_maximum_and_mean_of_tokens_whatever_the_order_of_points_and_the_other_clouds() -> None:
    model, given = method().eval(), batch()
    features = model.features(given)
    tokens = model.backbone.tokens(model.backbone.grouped(given["xyz"], given["offsets"]))
    torch.testing.assert_close(features, torch.cat([tokens.amax(1), tokens.mean(1)], 1))
    assert features.shape == (3, model.backbone.num_features)
    clouds = given["xyz"].split(COUNTS)
    for row, cloud in enumerate(clouds):
        mixed = cloud[torch.randperm(len(cloud), generator=torch.Generator().manual_seed(1))]
        alone = {"xyz": mixed, "offsets": torch.tensor([0, len(mixed)])}
        torch.testing.assert_close(model.features(alone)[0], features[row], rtol=1e-4, atol=1e-5)


def test_layers_of_tokens_are_read_on_the_way() -> None:
    first, last = method().eval().token_features(batch(), (0, -1))
    assert first.tokens_BTD.shape == last.tokens_BTD.shape == (3, 10, 12)


def test_clouds_without_points_or_with_one_add_nothing_or_little() -> None:
    model = method().eval()
    whole, ragged = batch((30, 50)), batch((30, 50))
    ragged["offsets"] = torch.tensor([0, 30, 30, 80])
    ragged["index"] = torch.tensor([7, 99, 8])
    torch.testing.assert_close(loss_of(model, ragged), loss_of(model, whole))
    assert not model.features(ragged)[1].any()
    nothing = {"xyz": torch.zeros(0, 3), "offsets": torch.zeros(3, dtype=torch.int64), "index": torch.arange(2)}
    assert loss_of(model, nothing) == 0
    for given in (batch((1, 1)), batch((40,)) | {"xyz": torch.full((40, 3), 2.0)}):
        loss = loss_of(method().train(), given)
        loss.backward()
        assert loss.isfinite()


def test_it_learns_to_tell_where_points_are(tmp_path: Path) -> None:
    grid = torch.stack(torch.meshgrid(*[torch.linspace(-1, 1, 8)] * 2, indexing="ij"), -1).reshape(-1, 2)
    flat = torch.cat([grid, torch.zeros(64, 1)], 1)
    given = [batch((64,) * 4) | {"xyz": flat.repeat(4, 1)} for _ in range(40)]
    losses = fit(method(), given, tmp_path)
    assert np.mean(losses[-5:]) < 0.35 * np.mean(losses[:5])


def test_the_order_of_points_in_a_group_says_nothing() -> None:
    torch.manual_seed(0)
    net, groups = MiniPointNet(12), torch.randn(5, 6, 3)
    torch.testing.assert_close(net(groups), net(groups[:, torch.tensor([3, 1, 0, 5, 4, 2])]))


def test_the_papers_encoder_has_the_size_that_it_says() -> None:
    with torch.device("meta"):
        backbone = PointViT()
    assert (backbone.groups, backbone.size, len(backbone.blocks), backbone.num_features) == (64, 32, 12, 768)
    drops = [getattr(block.drop_path1, "drop_prob", 0.0) for block in backbone.blocks]
    np.testing.assert_allclose(drops, np.linspace(0, 0.1, 12))
    # 12 blocks of 12 D^2 + 10 D (keys have no bias), the mini-PointNet, positions and a norm
    blocks = 12 * (12 * 384**2 + 10 * 384)
    points = 3 * 128 + 128 + 2 * 128 + 128 * 256 + 256 + 512 * 512 + 512 + 2 * 512 + 512 * 384 + 384
    places = 3 * 128 + 128 + 128 * 384 + 384
    assert sum(p.numel() for p in backbone.parameters()) == blocks + points + places + 2 * 384
    assert not any(isinstance(m, nn.Dropout) and m.p for m in backbone.modules())


def test_settings_that_do_not_fit_are_refused() -> None:
    backbone, free = PointViT(4, 3, 12, 1, 2), {"optimizer": torch.optim.SGD}
    for make, said in (
        (lambda: PointMAE(backbone, PointDecoder(16, depth=1, heads=2), **free), "decoder.in_features=16"),
        (lambda: PointMAE(backbone, PointDecoder(12, 5, depth=1, heads=2), **free), "decoder.out_features=5"),
        (lambda: PointViT(width=10, heads=4), "heads=4"),
        (lambda: PointViT(size=1), "size=1"),
        (lambda: PointViT(groups=0), "groups=0"),
        (lambda: PointViT(point_widths=(8, 0, 8)), "point_widths"),
        (lambda: PointViT(drop_path=1.0), "drop_path"),
        (lambda: PointDecoder(10, heads=4), "heads=4"),
        (
            lambda: loss_of(PointMAE(backbone, PointDecoder(12, depth=1, heads=2), RandomMasks(0.0), **free), batch()),
            "masks",
        ),
    ):
        with pytest.raises(UserError, match=said):
            make()
