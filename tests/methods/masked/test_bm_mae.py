"""BM-MAE: MAE as a special case, what each loss and each guess may depend on, missing modalities, and sizes."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from method_runs import fit
from torch import Tensor
from torch.nn import functional as F

from lightspan.backbones.placed_vit import GridViT, ModalityViT
from lightspan.core.errors import UserError
from lightspan.methods.masked.bm_mae import BMMAE
from lightspan.methods.masked.mae import MAE
from lightspan.nn.decoders.mask_decoder import MaskDecoder
from lightspan.nn.decoders.modality_decoder import ModalityDecoder
from lightspan.nn.masking.mask_samplers import DirichletMasks, RandomMasks
from lightspan.nn.sequences.patches import patchify
from lightspan.objectives.masked import regression_by_modality

PATCH, N = (1, 2, 2), 16  # N places: volumes are 2 x 8 x 4


def method(modalities: int = 3, width: int = 12, **settings: Any) -> BMMAE:
    torch.manual_seed(0)
    backbone = ModalityViT(PATCH, modalities, width, depth=2, heads=2)
    decoder = ModalityDecoder(width, width=12, depth=1, heads=2, dropout=0.0)
    return BMMAE(backbone, decoder, **{"optimizer": partial(torch.optim.SGD, lr=0.1)} | settings)


def batch(rows: int = 6, modalities: int = 3) -> dict[str, Any]:
    volume = torch.randn(rows, modalities, 2, 8, 4, generator=torch.Generator().manual_seed(1))
    return {"volume": volume, "index": torch.arange(rows) + 7}


def figures(model: BMMAE, given: dict[str, Any]) -> dict[str, float]:
    logged: dict[str, float] = {}
    model.log_training = lambda of: logged.update({name: of[name].item() for name in of})  # type: ignore[method-assign]
    model.training_step(given, 0)
    return logged


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_one_modality_is_mae_on_volumes() -> None:
    ours = method(1, masks=RandomMasks(0.75))
    encoder = GridViT(PATCH, 1, 12, 2, 2, mlp_ratio=2.0)
    theirs = MAE(encoder, MaskDecoder(12, width=12, depth=1, heads=2), normalise=False, optimizer=torch.optim.SGD)
    state = {name.replace("patch_embed.parts.0.", "patch_embed."): w for name, w in ours.backbone.state_dict().items()}
    encoder.load_state_dict(state)
    with torch.no_grad():
        ours.decoder.code_Mw.zero_()
    theirs.decoder.load_state_dict({name: w for name, w in ours.decoder.state_dict().items() if name != "code_Mw"})
    given = batch(modalities=1)
    expected = theirs.training_step({"views": [given["volume"]], "index": given["index"]}, 0)
    # Places are counted over a grid with one more axis, on which RandomMasks draws alike.
    torch.testing.assert_close(ours.training_step(given, 0), expected, rtol=1e-5, atol=1e-6)
    close(ours.features(given), theirs.features({"image": given["volume"]}))


def test_the_loss_is_that_of_hidden_patches_in_plain_numpy_and_weighs_modalities_alike() -> None:
    model, given = method(), batch()
    hidden = model.hidden(given["volume"], given["index"])
    seen, hide = hidden.see_BK, hidden.hide_BM
    assert seen.shape == (6, 12)
    guess_BAn = model.guess(given["volume"], seen, hide)[:, 12:].detach().numpy()
    errors: list[list[float]] = [[], [], []]
    for row in range(6):
        for guess, place in zip(guess_BAn[row], hide[row].tolist(), strict=True):
            modality, d, h, w = np.unravel_index(place, (3, 2, 4, 2))
            patch = given["volume"][row, modality, d, 2 * h : 2 * h + 2, 2 * w : 2 * w + 2].numpy().ravel()
            errors[modality].append(float(((guess - patch) ** 2).mean()))
    assert len({*map(len, errors)}) > 1
    found = figures(model, given)
    assert [found[f"train/mse_{m}"] for m in range(3)] == pytest.approx([np.mean(own) for own in errors], rel=1e-5)
    assert found["train/loss"] == pytest.approx(sum(np.mean(own) for own in errors), rel=1e-5)


def test_neither_loss_nor_guesses_depend_on_what_they_must_not_see() -> None:
    model, given = method(), batch()
    hidden = model.hidden(given["volume"], given["index"])
    is_hidden = hidden.reconstruction(hidden.pixels()).hidden_B1hw[:, 0]
    guess = model.guess(given["volume"], hidden.see_BK, hidden.hide_BM)
    close(model.guess(given["volume"].masked_fill(is_hidden, 9.0), hidden.see_BK, hidden.hide_BM), guess)
    expected = figures(model, given)
    model.guess = lambda *ignored: guess  # type: ignore[method-assign]
    others = {**given, "volume": given["volume"].where(is_hidden, 9.0)}
    assert figures(model, others) == pytest.approx(expected, rel=1e-6)  # visible targets have no say


def test_modalities_in_another_order_are_the_same_with_their_weights() -> None:
    first, given, order = method(masks=RandomMasks(0.0)), batch(), [2, 0, 1]
    other = method(masks=RandomMasks(0.0))
    other.load_state_dict(first.state_dict())
    with torch.no_grad():
        for at, modality in enumerate(order):
            other.backbone.patch_embed.parts[at].load_state_dict(
                first.backbone.patch_embed.parts[modality].state_dict()
            )
        other.decoder.code_Mw.copy_(first.decoder.code_Mw[order])
    volume, present = given["volume"], torch.tensor([[True, False, True]] * 6)
    close(other.backbone(volume[:, order]), first.backbone(volume))
    close(other.synthesise(volume[:, order], present[:, order]), first.synthesise(volume, present)[:, order])


@torch.no_grad()
def test_tokens_of_the_modalities_that_there_are_are_those_of_an_encoder_that_has_no_others() -> None:
    model, volume = method(), batch()["volume"]
    for subset in ([0], [1], [0, 2], [0, 1, 2]):
        alone = method(len(subset)).backbone
        state = model.backbone.state_dict()
        for name in [name for name in state if "parts" in name]:
            weight = state.pop(name)
            _, _, modality, rest = name.split(".", 3)
            if int(modality) in subset:
                state[f"patch_embed.parts.{subset.index(int(modality))}.{rest}"] = weight
        alone.load_state_dict(state)
        expected = alone.tokens(volume[:, subset])
        places = torch.cat([m * N + torch.arange(N) for m in subset]).expand(6, -1)
        close(model.backbone.tokens(volume, keep_BK=places), expected)
        present = torch.zeros(6, 3, dtype=torch.bool)
        present[:, subset] = True
        spoilt = volume.where(present[:, :, None, None, None], 9.0)
        close(model.backbone.tokens(spoilt, present_BM=present)[:, 1:].gather(1, places[..., None].expand(-1, -1, 12)),
              expected[:, 1:])  # fmt: skip
        close(model.features({"volume": spoilt, "present": present}), alone(volume[:, subset]))


def test_what_is_missing_is_as_if_it_were_hidden_and_is_no_part_of_the_loss() -> None:
    model, given = method(), batch()
    present = torch.tensor([[True, False, True]] * 6)
    present[0] = True
    volume = given["volume"] * present[:, :, None, None, None]
    hidden = model.hidden(volume, given["index"])
    guess_BTn = model.guess(volume, hidden.see_BK, hidden.hide_BM, present)
    places_BT = torch.cat([hidden.see_BK, hidden.hide_BM], dim=1)
    for row in range(6):
        see = hidden.see_BK[row][present[row][hidden.see_BK[row] // N]]
        hide = torch.tensor(sorted({*range(3 * N)} - {*see.tolist()}))
        alone = model.guess(volume[row : row + 1], see[None], hide[None])[0]
        at = dict(zip([*see.tolist(), *hide.tolist()], alone, strict=True))
        close(guess_BTn[row], torch.stack([at[place] for place in places_BT[row].tolist()]))
    found = figures(model, {**given, "volume": volume, "present": present})
    others = volume.clone()
    others[1:, 1] = 5.0
    assert figures(model, {**given, "volume": others, "present": present}) == pytest.approx(found, rel=1e-5)
    others[1:, 1] = torch.nan
    assert figures(model, {**given, "volume": others, "present": present}) == pytest.approx(found, rel=1e-5)
    everything = {**given, "present": torch.ones_like(present)}
    assert figures(model, everything) == pytest.approx(figures(model, given), rel=1e-5)


@torch.no_grad()
def test_what_is_synthesised_is_guessed_from_all_that_is_there_alone() -> None:
    model, volume = method(), batch()["volume"]
    present = torch.tensor([[True, False, True]] * 6)
    found = model.synthesise(volume, present)
    assert torch.equal(found[:, ::2], volume[:, ::2])
    see, hide = (places.expand(6, -1) for places in (torch.cat([torch.arange(N), torch.arange(2 * N, 3 * N)]),
                                                     torch.arange(N, 2 * N)))  # fmt: skip
    close(patchify(found[:, 1:2], PATCH), model.guess(volume, see, hide)[:, 2 * N :])
    assert torch.equal(model.synthesise(volume, torch.ones_like(present)), volume)
    assert model.synthesise(volume, torch.zeros_like(present)).isfinite().all()
    lacking = volume.where(present[:, :, None, None, None], torch.nan)
    close(model.synthesise(lacking, present), found)


def test_the_loss_has_the_gradient_that_differences_say() -> None:
    generator = torch.Generator().manual_seed(0)
    guess, target = torch.randn(2, 3, 5, 2, dtype=torch.float64, generator=generator)
    modality, known = torch.tensor([[0, 1, 1, 0, 2]] * 3), torch.rand(3, 5, generator=generator) < 0.7
    assert torch.autograd.gradcheck(
        lambda x: regression_by_modality(x, target, modality, known, 4), guess.requires_grad_()
    )
    assert regression_by_modality(guess, target, modality, torch.zeros_like(known), 4).tolist() == [0] * 4
    half = regression_by_modality(guess.detach().bfloat16(), target.bfloat16(), modality, known, 4)
    assert half.dtype == torch.float32


def test_degenerate_volumes_train(tmp_path: Path) -> None:
    nothing = torch.zeros(2, 3, dtype=torch.bool)
    for given in (
        batch(1), {**batch(2), "volume": torch.full((2, 3, 2, 8, 4), 3.0)}, {**batch(2), "present": nothing},
        {**batch(2), "volume": torch.zeros(2, 3, 2, 8, 4), "present": torch.tensor([[True, False, False]] * 2)},
        {**batch(2), "volume": torch.full((2, 3, 2, 8, 4), torch.nan), "present": nothing},
    ):  # fmt: skip
        model = method()
        losses = fit(model, [given] * 2, tmp_path)
        assert np.isfinite(losses).all()
        assert all(parameter.isfinite().all() for parameter in model.parameters())
        assert model.features(given).isfinite().all()
    assert fit(method(masks=RandomMasks(0.0)), [batch()], tmp_path) == [0]
    half = method().bfloat16()
    given = {**batch(), "volume": batch()["volume"].bfloat16(), "present": torch.tensor([[True, False, False]] * 6)}
    assert half.features(given).isfinite().all()


def test_training_lowers_the_loss_and_every_weight_is_trained(tmp_path: Path) -> None:
    slope = torch.randn(16, 1, 1, 1, 1, generator=torch.Generator().manual_seed(2))
    given = {**batch(16), "volume": torch.cat([slope, -slope, 2 * slope], dim=1).expand(-1, -1, 2, 8, 4)}
    model = method(optimizer=partial(torch.optim.AdamW, lr=1e-2))
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    losses = fit(model, [given] * 40, tmp_path)
    assert losses[-1] < 0.5 * losses[0]
    assert not [name for name, weight in model.named_parameters() if torch.equal(weight, before[name])]
    # And a missing modality is nearer to the truth than its mean, 0, as the others tell it.
    present = torch.tensor([[True, True, False]] * 16)
    guess = model.synthesise(given["volume"], present)
    assert F.mse_loss(guess[:, 2], given["volume"][:, 2]) < 0.5 * given["volume"][:, 2].square().mean()


def test_validation_says_how_far_each_guess_of_a_missing_modality_is_off() -> None:
    model, given, logged = method(), batch(), dict[str, tuple[float, int]]()
    given["present"] = torch.tensor([[True, True, True], [True, False, True], [True, False, False]] * 2)
    model.log = lambda name, value, batch_size, **o: logged.update({name: (value.item(), batch_size)})  # type: ignore[method-assign]
    model.validation_step(given, 0)
    assert {name: rows for name, (_, rows) in logged.items()} == {
        "val/missing_mse_0": 4, "val/missing_mse_1": 2, "val/missing_mse_2": 4
    }  # fmt: skip
    others = given["present"] & torch.tensor([True, False, True])
    guess = model.synthesise(given["volume"], others)[::3, 1]
    expected = F.mse_loss(guess, given["volume"][::3, 1]).item()
    assert logged["val/missing_mse_1"][0] == pytest.approx(expected, rel=1e-5)
    logged.clear()
    one = method(1)
    one.log = model.log  # type: ignore[method-assign]
    one.validation_step(batch(modalities=1), 0)
    assert logged == {}


def test_parts_and_batches_that_do_not_fit_are_refused() -> None:
    sgd: Any = {"optimizer": torch.optim.SGD}
    with pytest.raises(UserError, match=r"decoder\.in_features=6"):
        BMMAE(ModalityViT(PATCH, 3, 12, 1, 2), ModalityDecoder(6, 12, 1, 2), **sgd)
    with pytest.raises(UserError, match=r"decoder\.axes=2 must be 3"):
        BMMAE(ModalityViT(PATCH, 3, 12, 1, 2), ModalityDecoder(12, 12, 1, 2, axes=2), **sgd)
    for width, axes in ((16, 3), (12, 0), (12, 4)):
        with pytest.raises(UserError, match=f"width={width} must be a multiple of .* axes={axes}"):
            ModalityDecoder(12, width, 1, 2, axes=axes)
    with pytest.raises(UserError, match=r"dropout=1\.0 must lie in \[0, 1\)"):
        ModalityDecoder(12, 12, 1, 2, dropout=1.0)
    model, given = method(), batch()
    for present in (torch.ones(6, 2, dtype=torch.bool), torch.ones(6, 3), [True] * 3):
        with pytest.raises(UserError, match=r"BMMAE needs to know of each channel .* bool \[6, 3\]"):
            model.training_step({**given, "present": present}, 0)
    with pytest.raises(UserError, match="does not fit ModalityViT for in_chans=3"):
        model.training_step(batch(modalities=2), 0)
    with pytest.raises(UserError, match="2 x 7 x 4 cannot be cut into patches"):
        model.training_step({**given, "volume": given["volume"][:, :, :, :7]}, 0)


def test_masks_are_those_of_the_source_by_default() -> None:
    assert method().masks == DirichletMasks(ratio=0.75, concentration=1.0, seed=0)
