"""CAE: its loss by hand, who sees what, where gradients go, and its tokenizer."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from method_runs import fit
from timm.layers import DropPath
from torch import Tensor, nn

from lightspan.backbones.vit import vit
from lightspan.core.errors import UserError
from lightspan.methods.masked.cae import CAE
from lightspan.nn.clustering.patch_codes import PatchCodes
from lightspan.nn.decoders.latent_regressor import LatentDecoder, LatentRegressor
from lightspan.nn.masking.block_masks import BlockMasks
from lightspan.nn.masking.mask_samplers import RandomMasks, seen_and_hidden
from lightspan.nn.sequences.patches import patchify
from lightspan.nn.sequences.positions import sincos

GRID = (4, 4)


def parts(outputs: int) -> tuple[nn.Module, LatentRegressor, LatentDecoder]:
    torch.manual_seed(0)
    backbone = vit(16, 2, 2, img_size=12, patch_size=3, in_chans=1, layer_scale=0.1)
    return backbone, LatentRegressor(16, 2, 2, drop_path=0.0), LatentDecoder(16, outputs, 1, 2, drop_path=0.0)


def method(optimizer: Any = torch.optim.SGD, codes: int | None = 5, **settings: Any) -> CAE:
    tokenizer = None if codes is None else PatchCodes(codes, (3, 3), channels=1)
    settings = {"masks": BlockMasks(1.0, (0.5, 0.5)), "optimizer": partial(optimizer, lr=0.1)} | settings
    return CAE(*parts(codes or 9), tokenizer, **settings)


def batch(rows: int = 6, seed: int = 1) -> dict[str, Any]:
    views = [torch.randn(rows, 1, 12, 12, generator=torch.Generator().manual_seed(seed))]
    return {"views": views, "label": torch.zeros(rows, dtype=torch.int64), "index": torch.arange(rows) + 10 * seed}


def places(model: CAE, given: dict[str, Any]) -> tuple[Tensor, Tensor]:
    return seen_and_hidden(model.masks.draw(GRID, 0, given["index"].tolist()))


def close(a: Tensor, b: Tensor, **tolerance: float) -> None:
    torch.testing.assert_close(a, b, **{"rtol": 1e-5, "atol": 1e-6} | tolerance)


def painted(image: Tensor, where_BK: Tensor) -> Tensor:
    """The image with other pixels at these places."""
    is_there = torch.zeros(len(image), 16, dtype=torch.bool).scatter(1, where_BK, True).view(-1, 1, 4, 1, 4, 1)
    return torch.where(is_there, 7.0, image.view(-1, 1, 4, 3, 4, 3)).view_as(image)


def test_branches_of_regressor_and_decoder_are_dropped_ever_more_often_to_the_last_block() -> None:
    """As in the encoder; where both branches are dropped, a block of the regressor is its norm, and one of the decoder
    the identity."""
    regressor, decoder = LatentRegressor(16, 3, 2), LatentDecoder(16, 5, 3, 2)
    for blocks in (regressor.blocks, decoder.blocks):
        shares = [[each.drop_prob for each in block.modules() if isinstance(each, DropPath)] for block in blocks]
        assert [max(found, default=0) for found in shares] == pytest.approx([0, 0.05, 0.1])
    gone = type("Gone", (nn.Module,), {"forward": lambda self, x: 0 * x})()
    x, at = torch.randn(2, 5, 16), torch.randn(2, 5, 16)
    block = regressor.blocks[2]
    block.drop_path = gone
    assert torch.equal(block(x, x[:, :3], at, at[:, :3]), block.norm_mlp(x))
    block = decoder.blocks[2]
    block.drop_path1 = block.drop_path2 = gone
    assert torch.equal(block(x), x)
    with pytest.raises(UserError, match=r"LatentRegressor drop_path=1\.0"):
        LatentRegressor(16, 3, 2, drop_path=1.0)


@pytest.mark.parametrize("codes", [5, None])
def test_the_loss_is_the_papers_put_together_patch_by_patch(codes: int | None) -> None:
    model, given = method(codes=codes), batch()
    (image,), (seen, hidden) = given["views"], places(model, given)
    loss = model.training_step(given, 0)  # the first step learns the codes
    predicted = model.predict(image, seen, hidden)
    guess, patches, terms = model.decoder(predicted, hidden, GRID), patchify(image, (3, 3)), []
    for row in range(6):
        for number, place in enumerate(hidden[row]):
            patch = patches[row, place]
            if codes is None:
                target = (patch - patch.mean()) / (patch.var() + 1e-6).sqrt()
                terms.append((guess[row, number] - target).square().mean())
            else:
                code = (model.tokenizer.centres_Vd - patch).square().sum(dim=1).argmin()  # type: ignore[union-attr]
                terms.append(-guess[row, number].log_softmax(dim=0)[code])
    own = model.backbone.tokens(image, keep_BK=hidden)[:, 1:]  # type: ignore[operator]
    close(loss, torch.stack(terms).mean() + 2 * (predicted - own).square().mean())


def test_predictions_see_the_visible_patches_alone_and_their_targets_the_hidden_ones() -> None:
    model, given = method(), batch()
    (image,), (seen, hidden) = given["views"], places(model, given)
    close(model.predict(painted(image, hidden), seen, hidden), model.predict(image, seen, hidden), rtol=0, atol=1e-6)
    close(model.patch_features(painted(image, seen), hidden), model.patch_features(image, hidden), rtol=0, atol=1e-6)
    assert not torch.allclose(model.predict(painted(image, seen), seen, hidden), model.predict(image, seen, hidden))


def test_no_gradient_flows_through_the_features_that_predictions_are_aligned_with() -> None:
    model, given = method(), batch()
    (image,), (seen, hidden) = given["views"], places(model, given)
    model.training_step(given, 0).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    fixed = model.patch_features(image, hidden).detach().clone()
    model.zero_grad()
    predicted = model.predict(image, seen, hidden)
    target = model.target_loss(model.decoder(predicted, hidden, GRID), model.hidden(image, given["index"]))
    (target + 2 * (predicted - fixed).square().mean()).backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert gradients.keys() == trained
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            close(parameter.grad, gradients[name])  # type: ignore[arg-type]


def test_without_alignment_the_encoder_runs_once_and_the_loss_is_that_of_the_targets() -> None:
    model, given, calls = method(alignment_weight=0.0), batch(), []
    (image,), (seen, hidden) = given["views"], places(model, given)
    model.backbone.network.norm.register_forward_hook(lambda *call: calls.append(1))  # type: ignore[union-attr,operator]
    loss = model.training_step(given, 0)
    assert len(calls) == 1
    guess = model.decoder(model.predict(image, seen, hidden), hidden, GRID)
    close(loss, model.target_loss(guess, model.hidden(image, given["index"])))


def test_predictions_follow_their_places_and_hidden_patches_see_one_another() -> None:
    _, regressor, _ = parts(5)
    visible, seen, hidden = torch.randn(1, 3, 16), torch.tensor([[0, 7, 9]]), torch.tensor([[2, 5, 12, 4]])
    features, order = regressor(visible, seen, hidden, GRID), [2, 0, 3, 1]
    close(regressor(visible, seen, hidden[:, order], GRID), features[:, order])
    close(regressor(visible[:, [2, 0, 1]], seen[:, [2, 0, 1]], hidden, GRID), features)
    assert not torch.allclose(regressor(visible, seen, hidden[:, :2], GRID), features[:, :2], atol=1e-6)


def test_a_block_of_the_regressor_is_the_papers_in_plain_steps() -> None:
    block = parts(5)[1].blocks[0]
    query, visible, at = torch.randn(2, 4, 16), torch.randn(2, 3, 16), sincos(GRID, 16).expand(2, -1, -1)
    at_m, at_v = at[:, :4], at[:, 4:7]
    keys = torch.cat([visible + at_v, query + at_m], dim=1)
    values = torch.cat([visible, query], dim=1)
    attended = block.attention(block.norm_query(query + at_m), block.norm_key(keys), block.norm_value(values))
    y = block.norm_mlp(query + block.scale_attention.gamma * attended)
    close(block(query, visible, at_m, at_v), y + block.scale_mlp.gamma * block.mlp(y))
    assert block.attention.key.bias is None
    assert block.scale_mlp.gamma.eq(0.1).all()


def test_the_decoder_never_sees_the_visible_patches() -> None:
    model, given = method(), batch()
    (image,), (seen, hidden) = given["views"], places(model, given)
    for parameter in (model.regressor.norm.weight, model.regressor.norm.bias):
        nn.init.zeros_(parameter)
    guess = model.decoder(model.predict(image, seen, hidden), hidden, GRID)
    other = model.decoder(model.predict(image.flip(0) + 1, seen, hidden), hidden, GRID)
    close(guess, other, rtol=0, atol=0)
    assert not torch.allclose(guess[0, 0], guess[0, 1], atol=1e-4)  # positions remain


def test_masks_of_the_paper_hide_half_of_the_patches_by_blocks_of_sixteen() -> None:
    model = CAE(*parts(9), optimizer=torch.optim.SGD)
    assert model.masks == BlockMasks(1.0, (0.5, 0.5), least_block=16)
    assert model.masks.draw((14, 14), 0, range(50)).sum(axis=(1, 2)).tolist() == [98] * 50


def test_codes_are_of_the_nearest_centre_are_kept_and_are_saved() -> None:
    codes, first = PatchCodes(4, (2, 2), channels=1), torch.randn(3, 1, 8, 8)
    given = codes(first)
    centres = codes.centres_Vd.clone()
    apart = (patchify(first, (2, 2))[:, :, None] - centres).square().sum(dim=3)
    assert torch.equal(given, apart.argmin(dim=2))
    for code in range(4):  # centres are the means of what is nearest to them
        close(patchify(first, (2, 2))[given == code].mean(dim=0), centres[code], atol=1e-4)
    codes(torch.randn(3, 1, 8, 8))
    assert torch.equal(codes.centres_Vd, centres)
    loaded = PatchCodes(4, (2, 2), channels=1)
    loaded.load_state_dict(codes.state_dict())
    assert torch.equal(loaded(first), given)
    assert torch.equal(loaded.centres_Vd, centres)
    few = PatchCodes(40, (2, 2), channels=1)
    assert sorted(few(first[:1]).flatten().tolist()) == [*range(16)]  # each patch is its own code
    assert torch.equal(few.centres_Vd[16:32], few.centres_Vd[:16])
    with pytest.raises(UserError, match="patches of 4 numbers, and these have 8"):
        codes(torch.randn(3, 2, 8, 8))
    with pytest.raises(UserError, match="codes=1 must be at least 2"):
        PatchCodes(1, (2, 2))


@pytest.mark.parametrize("precision", ["32", "bf16-mixed"])
@pytest.mark.parametrize("kind", ["black from the start", "nothing hidden"])
@pytest.mark.filterwarnings("ignore:Number of distinct clusters")
def test_degenerate_batches_train_with_finite_weights(kind: str, precision: str, tmp_path: Path) -> None:
    given = batch(3)
    given["views"] = [view * (kind == "nothing hidden") for view in given["views"]]
    masks = {"masks": RandomMasks(0.0)} if kind == "nothing hidden" else {}
    model = method(torch.optim.AdamW, **masks)
    fit(model, [given] * 2, tmp_path, precision=precision)
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_probes_read_the_encoder() -> None:
    model, (image,) = method(), batch()["views"]
    assert torch.equal(model.features({"image": image}), model.backbone(image))
    assert torch.equal(model.features(batch()), model.backbone(image))


def test_parts_that_do_not_fit_are_refused() -> None:
    with pytest.raises(UserError, match=r"decoder\.out_features=4, and PatchCodes has 5 codes"):
        CAE(*parts(4), PatchCodes(5, (3, 3), 1), optimizer=torch.optim.SGD)
    with pytest.raises(UserError, match=r"decoder\.out_features=4, and a patch of 3 x 3"):
        CAE(*parts(4), optimizer=torch.optim.SGD)
    with pytest.raises(UserError, match=r"regressor\.width=8"):
        CAE(parts(9)[0], LatentRegressor(8, 1, 2), parts(9)[2], optimizer=torch.optim.SGD)
    with pytest.raises(UserError, match=r"alignment_weight=-1 must be"):
        method(alignment_weight=-1)
    with pytest.raises(UserError, match="LatentRegressor: width=10 must be a multiple of heads=4"):
        LatentRegressor(10, 1, 4)
    with pytest.raises(UserError, match="LatentDecoder: width=10 must be a multiple of heads=4"):
        LatentDecoder(10, 3, 1, 4)
