"""SparK: its loss by hand, counts of cells, the decoder's densified maps, and what does not fit."""

from functools import partial
from pathlib import Path
from typing import Any

import method_runs
import numpy as np
import pytest
import torch
from method_runs import fit
from timm.models.convnext import ConvNeXt
from torch import Tensor, nn

from lightspan.backbones.vision import SmallConvNet
from lightspan.backbones.vit import vit
from lightspan.core.errors import UserError
from lightspan.methods.masked.spark import SparK
from lightspan.nn.decoders.unet_decoder import UNetDecoder
from lightspan.nn.masking.mask_samplers import RandomMasks
from lightspan.nn.masking.sparse_convs import ActiveCells
from lightspan.nn.sequences.patches import at_places, patchify
from lightspan.objectives.masked import denormalised_patches, patch_regression


def decoder(**settings: Any) -> UNetDecoder:
    return UNetDecoder(**{"channels": [32, 16, 8], "in_chans": 1, "width": 16, "cell": 8} | settings)


def method(optimizer: Any = torch.optim.SGD, backbone: nn.Module | None = None, **settings: Any) -> SparK:
    torch.manual_seed(0)
    return SparK(backbone or SmallConvNet(1, 4, 4), decoder(), **{"optimizer": partial(optimizer, lr=0.1)} | settings)


def batch(rows: int = 4, side: int = 24, seed: int = 1) -> dict[str, Any]:
    image = torch.randn(rows, 1, side, side, generator=torch.Generator().manual_seed(seed))
    return {"views": [image], "label": torch.zeros(rows, dtype=torch.int64), "index": torch.arange(rows) + 10 * seed}


@pytest.mark.parametrize("normalise", [True, False])
def test_the_loss_is_that_of_hidden_cells_in_plain_numpy(normalise: bool) -> None:
    model, given = method(normalise=normalise).eval(), batch()
    hidden = model.hidden(given["views"][0], given["index"])
    active = ActiveCells((3, 3), hidden.see_BK)
    guess = model.decoder(model.maps(given["views"][0], active), active).detach().numpy()
    errors = []
    for row in range(4):
        for place in hidden.hide_BM[row].tolist():
            y, x = 8 * (place // 3), 8 * (place % 3)
            cell = given["views"][0][row, 0, y : y + 8, x : x + 8].numpy()
            target = (cell - cell.mean()) / np.sqrt(cell.var(ddof=1) + 1e-6) if normalise else cell
            errors.append(((guess[row, 0, y : y + 8, x : x + 8] - target) ** 2).mean())
    assert float(model.training_step(given, 0)) == pytest.approx(np.mean(errors), rel=1e-5)


def test_the_loss_ignores_guesses_of_active_cells() -> None:
    model, given = method().eval(), batch()
    hidden = model.hidden(given["views"][0], given["index"])
    seen = ActiveCells((3, 3), hidden.see_BK).mask((24, 24))
    loss, decode = model.training_step(given, 0), model.decoder.forward
    model.decoder.forward = lambda *a: decode(*a).where(~seen, 99.0)  # type: ignore[method-assign]
    torch.testing.assert_close(model.training_step(given, 0), loss)
    model.decoder.forward = lambda *a: decode(*a).where(seen, 99.0)  # type: ignore[method-assign]
    assert model.training_step(given, 0) > 2 * loss


@pytest.mark.parametrize(("side", "ratio", "kept"), [(7, 0.6, 20), (4, 0.6, 6), (3, 0.6, 4), (3, 0.0, 9), (1, 0.6, 1)])
def test_the_nearest_whole_number_of_cells_is_kept(side: int, ratio: float, kept: int) -> None:
    masks = RandomMasks(ratio, nearest=True)
    assert (~masks.draw((side, side), 0, range(5))).sum(axis=(1, 2)).tolist() == [kept] * 5
    assert SparK.__init__.__defaults__ == (None, True)
    assert method().masks == RandomMasks(0.6, nearest=True)


def test_guesses_depend_on_visible_pixels_alone() -> None:
    model, given = method(), batch()
    image, index = given["views"][0], given["index"]
    hidden = model.hidden(image, index)
    seen, guess = ActiveCells((3, 3), hidden.see_BK).mask((24, 24)), model.guess(hidden)
    torch.testing.assert_close(model.guess(model.hidden(image.where(seen, 7.0), index)), guess, rtol=0, atol=1e-6)
    assert not torch.allclose(model.guess(model.hidden(image.where(~seen, 7.0), index)), guess, atol=1e-3)


@pytest.mark.parametrize("norm", ["batch", "layer"])
def test_a_map_is_normalised_over_active_positions_and_filled_with_its_token(norm: Any) -> None:
    made, x = decoder(norm=norm), torch.randn(2, 16, 6, 6) + 3
    active = ActiveCells((3, 3), torch.tensor([[0, 4], [2, 7]]))
    mask, filled = active.mask((6, 6)).expand_as(x), made.filled(1, x, active)
    assert torch.equal(filled[~mask], made.mask_tokens[1].expand_as(x)[~mask])
    rows = filled.movedim(1, -1)[active.mask((6, 6))[:, 0]]  # active positions by channels
    torch.testing.assert_close(
        rows.mean(dim=0 if norm == "batch" else 1).abs().max(), torch.tensor(0.0), atol=1e-5, rtol=0
    )
    assert made.projections[0].kernel_size == (1, 1)
    assert made.projections[1].kernel_size == (3, 3)
    assert isinstance(decoder(width=32).projections[0], nn.Identity)


def test_the_decoder_adds_maps_from_coarse_to_fine_and_doubles_the_sides() -> None:
    made, active = decoder().eval(), ActiveCells((3, 3), torch.tensor([[0, 4], [2, 7]]))
    maps = [torch.randn(2, channels, side, side) for channels, side in ((32, 3), (16, 6), (8, 12))]
    dense = [made.projections[level](made.filled(level, x, active)) for level, x in enumerate(maps)]
    x = made.blocks[1](made.blocks[0](dense[0]) + dense[1]) + dense[2]
    torch.testing.assert_close(made(maps, active), made.head(made.blocks[2](x)))
    assert made(maps, active).shape == (2, 1, 24, 24)
    assert [block[-1].num_features for block in made.blocks] == [8, 4, 2]


def test_the_decoders_weights_start_as_in_the_authors_code() -> None:
    made = decoder(channels=[64, 32, 16], width=64)
    for layer in made.modules():
        if isinstance(layer, nn.ConvTranspose2d):  # Kaiming's deviation, fan_out by torch's count
            deviation = (2 / (layer.weight.shape[0] * 16)) ** 0.5
        elif isinstance(layer, nn.Conv2d):
            deviation = 0.02
        else:
            continue
        if layer.weight.numel() > 2000:
            assert float(layer.weight.std()) == pytest.approx(deviation, rel=0.1)
        assert layer.bias is None or not layer.bias.any()


def test_every_weight_is_trained_but_those_behind_the_last_map() -> None:
    model = method()
    model.training_step(batch(), 0).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    torch.manual_seed(0)
    backbone = ConvNeXt(in_chans=1, num_classes=0, depths=(1, 1, 1, 1), dims=(4, 8, 8, 16))
    model = SparK(backbone, decoder(channels=[16, 8, 8, 4], width=32, cell=32, norm="layer"), optimizer=torch.optim.SGD)
    assert backbone.training
    model.training_step(batch(2, 64), 0).backward()
    still = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert still == {"backbone.head.norm.weight", "backbone.head.norm.bias"}
    assert not any(model.get_parameter(name).requires_grad for name in still)


def test_probes_read_the_network_as_a_dense_one() -> None:
    model, given = method().eval(), batch()
    assert torch.equal(model.features(given), model.backbone(given["views"][0]))
    model.training_step(given, 0)
    assert torch.equal(model.features(given), model.backbone(given["views"][0]))


def test_each_step_has_cells_of_its_own(tmp_path: Path) -> None:
    model, seen = method(), list[Tensor]()
    guess = model.guess
    model.guess = lambda hidden: (seen.append(hidden.see_BK), guess(hidden))[1]  # type: ignore[method-assign]
    fit(model, [batch()] * 3, tmp_path)
    assert not torch.equal(seen[0], seen[1])


def test_a_reconstruction_is_the_picture_but_for_what_is_hidden() -> None:
    model, given = method(), batch()
    image = given["views"][0]
    found = model.reconstruct({"image": image, "label": given["label"], "index": given["index"]})
    assert torch.equal(found.guess_BChw.where(~found.hidden_B1hw, 0), image.where(~found.hidden_B1hw, 0))
    assert found.hidden_B1hw.float().mean() == pytest.approx(5 / 9)
    # A guess of normalised pixels gets the brightness and contrast of what was hidden.
    hidden = model.hidden(image, given["index"])
    cells = at_places(patchify(found.guess_BChw, (8, 8)), hidden.hide_BM)
    expected = denormalised_patches(model.guess(hidden), hidden.pixels())
    torch.testing.assert_close(cells, expected, rtol=1e-4, atol=1e-4)


def test_where_nothing_is_hidden_there_is_no_loss_and_images_alone_train(tmp_path: Path) -> None:
    assert fit(method(masks=RandomMasks(0.0)), [batch()] * 2, tmp_path) == [0.0, 0.0]
    assert fit(method(), [batch(2, side=8)], tmp_path) == [0.0]  # one cell
    method_runs.stays_finite(method(), [batch(1)] * 2, tmp_path, precision="bf16-mixed")
    with pytest.raises(UserError, match="sees a single active position"):
        fit(method(masks=RandomMasks(0.6, nearest=True)), [batch(1, side=8)], tmp_path)


def test_the_loss_of_equal_pictures_is_finite() -> None:
    assert patch_regression(torch.zeros(1, 2, 4), torch.full((1, 2, 4), 3.0)).isfinite()


def test_parts_that_do_not_fit_are_refused() -> None:
    with pytest.raises(UserError, match=r"decoder\.channels=\[16, 8\].*have channels \[32, 16\]"):
        SparK(SmallConvNet(1, 4, 4), decoder(channels=[16, 8]), optimizer=torch.optim.SGD)
    with pytest.raises(UserError, match=r"decoder\.cell=16.* \[2, 4, 8\] positions along a cell"):
        SparK(SmallConvNet(1, 4, 4), decoder(cell=16), optimizer=torch.optim.SGD)
    with pytest.raises(UserError, match="cannot be made sparse"):
        SparK(nn.Sequential(vit(16, 1, 2, 8, 2, 1)).get_submodule("0").network, decoder(), optimizer=torch.optim.SGD)
    with pytest.raises(UserError, match="25 x 25 cannot be cut into patches of 8 x 8"):
        method().training_step(batch(side=25), 0)
    with pytest.raises(UserError, match="SparK needs 1 view of"):
        method().training_step({"views": [torch.zeros(1, 1, 24, 24)] * 2, "index": torch.tensor([0])}, 0)
    for wrong in ({"cell": 12}, {"width": 20}, {"channels": [4] * 4}, {"channels": []}, {"cell": 1}):
        with pytest.raises(UserError, match=r"UNetDecoder: cell=.* must be a power of 2 above 1"):
            decoder(**wrong)
    with pytest.raises(UserError, match=r"norm='group' batch or layer"):
        decoder(norm="group")


def test_a_network_that_does_not_see_one_cell_is_refused() -> None:
    deep = ConvNeXt(in_chans=1, depths=(1, 1, 1, 1), dims=(4, 8, 8, 16), num_classes=0)
    with pytest.raises(UserError, match=r"ConvNeXt does not see an image of one cell, 4 x 4 .*; set decoder\.cell"):
        SparK(deep, decoder(channels=[8, 8], cell=4), optimizer=torch.optim.SGD)
    with pytest.raises(UserError, match=r"with 3 channels .*; set .* decoder\.in_chans to the channels that it takes"):
        SparK(SmallConvNet(1, 4, 4), decoder(channels=[32, 16], in_chans=3, cell=4), optimizer=torch.optim.SGD)
