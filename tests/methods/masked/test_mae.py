"""MAE: its loss by hand and in transformers, and what a guess may depend on."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from method_runs import fit
from torch import Tensor, nn

from lightspan.backbones.vision import SmallConvNet
from lightspan.backbones.vit import vit
from lightspan.core.errors import UserError
from lightspan.methods.masked.mae import MAE
from lightspan.nn.decoders.mask_decoder import MaskDecoder
from lightspan.nn.masking.block_masks import BlockMasks
from lightspan.nn.masking.mask_samplers import RandomMasks, seen_and_hidden
from lightspan.nn.sequences.positions import sincos


def method(optimizer: Any = torch.optim.SGD, channels: int = 1, **settings: Any) -> MAE:
    torch.manual_seed(0)
    backbone = vit(16, 2, 2, img_size=12, patch_size=3, in_chans=channels)
    decoder = MaskDecoder(16, 9 * channels, width=8, depth=1, heads=2)
    return MAE(backbone, decoder, **{"optimizer": partial(optimizer, lr=0.1)} | settings)


def batch(rows: int = 6, seed: int = 1, channels: int = 1) -> dict[str, Any]:
    views = [torch.randn(rows, channels, 12, 12, generator=torch.Generator().manual_seed(seed))]
    return {"views": views, "label": torch.zeros(rows, dtype=torch.int64), "index": torch.arange(rows) + 10 * seed}


def places(model: MAE, given: dict[str, Any]) -> tuple[Tensor, Tensor]:
    return seen_and_hidden(model.masks.draw((4, 4), 0, given["index"].tolist()))


@pytest.mark.parametrize("normalise", [True, False])
def test_the_loss_is_that_of_the_hidden_patches_in_plain_numpy(normalise: bool) -> None:
    model, given = method(channels=2, normalise=normalise), batch(channels=2)
    seen, hidden = places(model, given)
    assert (seen.shape, hidden.shape) == ((6, 4), (6, 12))
    guess, errors = model.guess(given["views"][0], seen, hidden).detach().numpy(), []
    for row, image in enumerate(given["views"][0].numpy()):
        for number, place in enumerate(hidden[row].tolist()):
            y, x = 3 * (place // 4), 3 * (place % 4)
            patch = image[:, y : y + 3, x : x + 3].transpose(1, 2, 0).ravel()
            target = (patch - patch.mean()) / np.sqrt(patch.var(ddof=1) + 1e-6) if normalise else patch
            errors.append(((guess[row, number] - target) ** 2).mean())
    assert float(model.training_step(given, 0)) == pytest.approx(np.mean(errors), rel=1e-5)


def test_guesses_do_not_depend_on_hidden_pixels_and_do_on_visible_ones() -> None:
    model, given = method(), batch()
    (image,), (seen, hidden) = given["views"], places(model, given)
    is_hidden = torch.zeros(6, 16, dtype=torch.bool).scatter(1, hidden, True).view(6, 1, 4, 1, 4, 1)
    guess = model.guess(image, seen, hidden)
    split = image.view(6, 1, 4, 3, 4, 3)
    torch.testing.assert_close(
        model.guess(torch.where(is_hidden, 7.0, split).view_as(image), seen, hidden), guess, rtol=0, atol=1e-6
    )
    assert not torch.allclose(model.guess(torch.where(is_hidden, split, 7.0).view_as(image), seen, hidden), guess)


@pytest.mark.sweep  # for the time that the import takes
def test_encoder_decoder_and_loss_are_those_of_transformers() -> None:
    peers = pytest.importorskip("transformers")
    config = peers.ViTMAEConfig(
        image_size=12, patch_size=3, num_channels=2, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64, decoder_hidden_size=8, decoder_num_hidden_layers=1, decoder_num_attention_heads=2,
        decoder_intermediate_size=32, layer_norm_eps=1e-6, norm_pix_loss=True, hidden_act="gelu",
    )  # fmt: skip
    peer, model, given = peers.ViTMAEForPreTraining(config).eval(), method(channels=2).eval(), batch(channels=2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.3)
    network, decoder = model.backbone.network, model.decoder
    ours = {
        "vit.embeddings.cls_token": network.cls_token, "decoder.mask_token": decoder.sequence.mask_token,
        # Fixed tables that transformers fills only when it loads published weights.
        "vit.embeddings.position_embeddings": network.pos_embed,
        "decoder.decoder_pos_embed": sincos((4, 4), 8, prefix=1),
    }  # fmt: skip
    pairs = {
        "vit.embeddings.patch_embeddings.projection": network.patch_embed.proj, "vit.layernorm": network.norm,
        "decoder.decoder_embed": decoder.sequence.embed, "decoder.decoder_norm": decoder.norm,
        "decoder.decoder_pred": decoder.head,
    }  # fmt: skip
    stacks = [(f"vit.layers.{i}", block) for i, block in enumerate(network.blocks)]
    for at, block in [*stacks, *((f"decoder.decoder_layers.{i}", block) for i, block in enumerate(decoder.blocks))]:
        pairs |= {
            f"{at}.attention.o_proj": block.attn.proj, f"{at}.layernorm_before": block.norm1,
            f"{at}.layernorm_after": block.norm2, f"{at}.mlp.fc1": block.mlp.fc1, f"{at}.mlp.fc2": block.mlp.fc2,
        }  # fmt: skip
        for part, weight, bias in zip("qkv", block.attn.qkv.weight.chunk(3), block.attn.qkv.bias.chunk(3), strict=True):
            ours |= {f"{at}.attention.{part}_proj.weight": weight, f"{at}.attention.{part}_proj.bias": bias}
    for name, module in pairs.items():
        ours |= {f"{name}.{own}": parameter for own, parameter in module.named_parameters()}
    theirs = peer.state_dict()
    state = {name: tensor.reshape(theirs[name].shape) for name, tensor in ours.items()}
    peer.load_state_dict(state)
    seen, _ = places(model, given)
    noise = torch.ones(6, 16).scatter(1, seen, 0.0)
    expected = peer(pixel_values=given["views"][0], noise=noise).loss
    torch.testing.assert_close(model.training_step(given, 0), expected, rtol=1e-5, atol=1e-6)


def test_every_weight_is_trained_and_positions_are_not() -> None:
    model = method()
    model.training_step(batch(), 0).backward()
    still = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert still == {"backbone.network.pos_embed"}


def test_each_step_has_masks_of_its_own_and_probes_read_the_encoder(tmp_path: Path) -> None:
    model, seen = method(), []
    guess = model.guess

    def watched(*given: Tensor) -> Tensor:
        seen.append(given[1])
        return guess(*given)

    model.guess = watched  # type: ignore[method-assign]
    fit(model, [batch()] * 3, tmp_path)
    for step, places_BK in enumerate(seen):
        drawn = model.masks.draw((4, 4), step, batch()["index"].tolist())
        assert torch.equal(places_BK, seen_and_hidden(drawn)[0])
    (image,) = batch()["views"]
    assert torch.equal(model.features({"image": image}), model.backbone(image))
    assert torch.equal(model.features(batch()), model.backbone(image))
    assert len(model.token_features({"image": image}, [0, -1])) == 2


def test_where_nothing_is_hidden_there_is_no_loss(tmp_path: Path) -> None:
    model = method(masks=RandomMasks(0.0))
    assert fit(model, [batch(3)] * 2, tmp_path) == [0, 0]
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_training_lowers_the_loss(tmp_path: Path) -> None:
    given = batch(16)
    given["views"] = [given["views"][0].cumsum(dim=3)]  # what hidden patches show can be guessed
    losses = fit(method(partial(torch.optim.AdamW, weight_decay=0.0)), [given] * 30, tmp_path)
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])


def test_parts_that_do_not_fit_are_refused() -> None:
    backbone = vit(16, 2, 2, img_size=12, patch_size=3, in_chans=1)
    sgd: Any = {"optimizer": torch.optim.SGD}
    with pytest.raises(UserError, match=r"decoder\.out_features=5, and a patch of 3 x 3 pixels with 1 channels has 9"):
        MAE(backbone, MaskDecoder(16, 5, 8, 1, 2), **sgd)
    with pytest.raises(UserError, match=r"decoder\.in_features=12"):
        MAE(backbone, MaskDecoder(12, 9, 8, 1, 2), **sgd)
    with pytest.raises(UserError, match="MAE needs a backbone with tokens and a grid"):
        MAE(SmallConvNet(), MaskDecoder(16, 9, 8, 1, 2), **sgd)
    with pytest.raises(UserError, match="MAE needs 1 view of"):
        method().training_step({"views": [torch.zeros(1, 1, 12, 12)] * 2, "index": torch.tensor([0])}, 0)
    with pytest.raises(UserError, match=r"hold .* patches; indices need one count"):
        method(masks=BlockMasks(0.5)).training_step(batch(12), 0)


def test_the_network_may_be_any_that_keeps_the_contract() -> None:
    model = method(masks=BlockMasks(1.0, (0.5, 0.5)))
    assert isinstance(model.backbone, nn.Module)
    assert places(model, batch())[1].shape == (6, 8)
    assert model.training_step(batch(), 0).isfinite()
