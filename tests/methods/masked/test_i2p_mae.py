"""I2P-MAE: what its two losses are, what they may depend on, ragged clouds, and settings that do not fit."""

import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from method_runs import fit
from scipy.spatial import cKDTree
from torch import Tensor, nn
from torch.nn import functional as F

from lightspan.backbones.point_pyramid import PointPyramid
from lightspan.backbones.timm_networks import timm_network
from lightspan.core.errors import UserError
from lightspan.methods.masked.i2p_mae import I2PMAE
from lightspan.nn.decoders.pyramid_decoder import PyramidDecoder
from lightspan.nn.masking.guided_masks import GuidedMasks, hidden_at_levels
from lightspan.nn.points.depth_maps import depth_maps
from lightspan.nn.points.groups import places_in_cloud
from lightspan.nn.points.projection import AXIS_ORDERS, projected
from lightspan.nn.teachers.image_guide import ImageGuide

COUNTS = 30, 50, 9
VIT = {"img_size": 16, "patch_size": 4, "embed_dim": 8, "depth": 1, "num_heads": 2}


def method(**settings: Any) -> I2PMAE:
    torch.manual_seed(0)
    sizes = {"groups": (16, 10, 6), "sizes": (5, 4, 3), "widths": (8, 12, 16), "depths": (1, 1, 1)}
    backbone = PointPyramid(**sizes, heads=2, drop_path=0.0, point_widths=(6, 8, 10))
    decoder = PyramidDecoder((16, 12), (1, 1), 2, drop_path=0.0)
    guide = ImageGuide(timm_network("vit_tiny_patch16_224", num_classes=0, **VIT), 16)
    given = {"optimizer": partial(torch.optim.AdamW, lr=3e-3), "masks": GuidedMasks(0.5)} | settings
    return I2PMAE(backbone, decoder, guide, **{"spread": 3} | given)


def batch(counts: tuple[int, ...] = COUNTS, seed: int = 0) -> dict[str, Tensor]:
    xyz = torch.randn(sum(counts), 3, generator=torch.Generator().manual_seed(seed))
    offsets = torch.tensor([0, *np.cumsum(counts).tolist()])
    return {"xyz": xyz, "offsets": offsets, "index": torch.arange(len(counts)) + 7}


def losses_of(model: I2PMAE, given: dict[str, Any]) -> dict[str, Tensor]:
    found = dict[str, Tensor]()
    model.log_training = lambda figures, **options: found.update(figures)  # type: ignore[method-assign]
    loss = model.training_step(given, 0)
    return found | {"train/loss": loss}


def test_the_losses_are_those_of_loops_over_clouds_groups_points_and_maps() -> None:
    model, given = method(image_weight=0.5).eval(), batch()
    levels = model.backbone.grouped(given["xyz"], given["offsets"])
    saliency, targets = torch.zeros(3, 6), dict[tuple[int, int, int, int], Tensor]()
    for cloud, points in enumerate(given["xyz"].split(COUNTS)):
        alone = torch.tensor([0, len(points)])
        for view, order in enumerate(AXIS_ORDERS):
            at = projected(points[:, order], alone, 16, 3)
            seen = model.guide(depth_maps(points[:, order], alone, at))
            large = F.interpolate(seen.features_VDhw, (16, 16), mode="bicubic")[0].flatten(1)
            attention = F.interpolate(seen.saliency_Vhw[:, None], (16, 16), mode="bicubic").flatten()
            for group, places in enumerate(places_in_cloud(levels, 1)[cloud]):
                for number, place in enumerate(places):
                    targets[cloud, group, number, view] = large[:, at.pixel_N[place]]
            for group, centre in enumerate(places_in_cloud(levels, 2)[cloud, :, 0]):
                saliency[cloud, group] += attention[at.pixel_N[centre]] / 3
    torch.testing.assert_close(model.saliency(*model.guided(given["xyz"], given["offsets"]), levels), saliency)
    hidden = hidden_at_levels(model.masks.draw(saliency, 0, given["index"]), levels)
    decoded = model.decoded(levels, hidden).detach()
    apart, wrong = list[float](), list[float]()
    for cloud, group in np.ndindex(3, 10):
        if hidden[1][cloud, group]:
            truth = levels[1].near_BGK3[cloud, group].numpy()
            guess = model.points_head(decoded[cloud, group]).detach().view(4, 3).numpy()
            ways = (cKDTree(a).query(b)[0] for a, b in ((truth, guess), (guess, truth)))
            apart.append(sum(np.square(way).mean() for way in ways))
        else:
            guesses = model.image_head(decoded[cloud, group]).detach().view(4, 3, 8)
            for number, view in np.ndindex(4, 3):
                wrong += (guesses[number, view] - targets[cloud, group, number, view]).square().tolist()
    found = losses_of(model, given)
    assert found["train/points"].item() == pytest.approx(np.mean(apart), rel=1e-4)
    assert found["train/image"].item() == pytest.approx(np.mean(wrong), rel=1e-4)
    assert found["train/loss"].item() == pytest.approx(np.mean(apart) + 0.5 * np.mean(wrong), rel=1e-4)


def test_only_points_count_with_an_image_weight_of_zero_and_the_guide_never_learns(tmp_path: Path) -> None:
    model = method(image_weight=0.0)
    before = {name: tensor.clone() for name, tensor in model.guide.state_dict().items()}
    head = model.image_head.weight.clone()
    fit(model, [batch(seed=seed) for seed in range(2)], tmp_path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.guide.state_dict().items())
    assert torch.allclose(model.image_head.weight, head, rtol=1e-3)  # but for its decay


def test_features_are_those_of_the_backbone_and_layers_are_read_on_the_way() -> None:
    model, given = method().eval(), batch()
    assert torch.equal(model.features(given), model.backbone(given["xyz"], given["offsets"]))
    first, last = model.token_features(given, (0, -1))
    assert (first.tokens_BTD.shape, last.tokens_BTD.shape) == ((3, 16, 8), (3, 6, 16))


def test_what_the_guide_sees_does_not_depend_on_place_and_size() -> None:
    model, given = method().eval(), batch()
    before = model.guided(given["xyz"], given["offsets"])[1]
    after = model.guided(3 * given["xyz"] + 2, given["offsets"])[1]
    torch.testing.assert_close(after.features_VDhw, before.features_VDhw, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(after.saliency_Vhw, before.saliency_Vhw, rtol=1e-4, atol=1e-5)


def test_pictures_show_each_map_and_the_centres_of_visible_and_hidden_groups() -> None:
    model, given = method(), batch((40, 0, 9))
    pictures = model.pictures(given)
    sides = ["x right, y down", "z right, x down", "y right, z down"]
    assert [*pictures] == [f"{side}; red: salient" for side in sides]
    for picture in pictures.values():
        assert picture.shape == (3, 3, 16, 16)
        assert 0 <= picture.amin() <= picture.amax() <= 1
        for colour in ((0, 1, 0), (0, 0, 1)):
            assert (picture[0] == torch.tensor(colour).view(3, 1, 1)).all(0).any()


def test_points_of_seen_groups_are_those_around_the_centres_that_are_drawn_green() -> None:
    model, given = method(), batch((40, 0, 9))
    seen_N = model.seen_points(given)
    levels = model.backbone.grouped(given["xyz"], given["offsets"])
    maps, guidance = model.guided(given["xyz"], given["offsets"])
    finest = hidden_at_levels(model.drawn_masks(given, maps, guidance, levels), levels)[0]
    for cloud, (first, end) in {0: (0, 40), 2: (40, 49)}.items():
        expected = {*places_in_cloud(levels, 0)[cloud, ~finest[cloud]].flatten().tolist()}
        assert {*seen_N[first:end].nonzero().flatten().tolist()} == expected
    assert 0 < seen_N.sum() < 49


def test_clouds_without_points_or_with_one_add_nothing_or_little() -> None:
    model = method().eval()
    whole, ragged = batch((30, 50)), batch((30, 50))
    ragged["offsets"] = torch.tensor([0, 30, 30, 80])
    ragged["index"] = torch.tensor([7, 99, 8])
    for name, loss in losses_of(model, ragged).items():
        torch.testing.assert_close(loss, losses_of(model, whole)[name])
    assert not model.features(ragged)[1].any()
    nothing = {"xyz": torch.zeros(0, 3), "offsets": torch.zeros(3, dtype=torch.int64), "index": torch.arange(2)}
    assert losses_of(model, nothing)["train/loss"] == 0
    for given in (batch((1, 1)), batch((40,)) | {"xyz": torch.full((40, 3), 2.0)}):
        loss = losses_of(method().train(), given)["train/loss"]
        loss.backward()
        assert loss.isfinite()


def test_it_learns_points_and_what_the_guide_sees(tmp_path: Path) -> None:
    grid = torch.stack(torch.meshgrid(*[torch.linspace(-1, 1, 8)] * 2, indexing="ij"), -1).reshape(-1, 2)
    flat = torch.cat([grid, grid[:, :1] * 0.3], 1)
    model, given = method(), batch((64,) * 4) | {"xyz": flat.repeat(4, 1)}
    before = losses_of(model, given)
    fit(model, [given] * 40, tmp_path)
    after = losses_of(model, given)
    assert after["train/points"] < 0.35 * before["train/points"]
    assert after["train/image"] < 0.7 * before["train/image"]


def test_a_single_level_and_a_decoder_of_all_levels_train_too() -> None:
    guide = method().guide
    for levels in (1, 3):
        groups, sizes, widths = (16, 10, 6)[:levels], (5, 4, 3)[:levels], (8, 12, 16)[:levels]
        backbone = PointPyramid(groups, sizes, widths, (1,) * levels, 2, drop_path=0.0, point_widths=(6, 8, 10))
        decoder = PyramidDecoder(widths[::-1], (1,) * levels, 2, drop_path=0.0)
        settings = {"masks": GuidedMasks(0.5), "spread": 3, "optimizer": torch.optim.SGD}
        model = I2PMAE(backbone, decoder, guide, **settings)
        losses_of(model, batch())["train/loss"].backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_settings_that_do_not_fit_are_refused() -> None:
    free = {"optimizer": torch.optim.SGD}
    model = method()
    parts = model.backbone, model.decoder, model.guide
    other = PyramidDecoder((16, 8), (1, 1), 2)
    for make, said in (
        (lambda: I2PMAE(parts[0], other, parts[2], **free), "decoder.widths"),
        (lambda: I2PMAE(*parts, image_weight=-1.0, **free), "image_weight"),
        (lambda: I2PMAE(*parts, image_weight=math.nan, **free), "image_weight"),
        (lambda: I2PMAE(*parts, spread=4, **free), "spread=4"),
        (lambda: I2PMAE(*parts, spread=17, **free), "spread=17"),
        (lambda: I2PMAE(*parts, GuidedMasks(0.05), spread=3, **free), "ratio"),
        (lambda: losses_of(model, batch() | {"xyz": None}), "I2PMAE"),
        (lambda: ImageGuide(nn.Identity(), 16), "Identity"),
    ):
        with pytest.raises(UserError, match=said):
            make()
