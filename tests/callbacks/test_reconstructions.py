"""Guesses of masked methods as pictures: what was seen stays as it is, and training goes on as without them."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import LightningModule, Trainer
from picture_files import write_pictures
from shard_files import posed_shard
from torch import Tensor, nn
from torch.optim import SGD

from lightspan.backbones.frames import FrameTransformer
from lightspan.backbones.placed_vit import GridViT
from lightspan.backbones.vit import TokenViT, vit
from lightspan.callbacks.pictures.reconstructions import GREY, Reconstructions, in_one_plane, shown, strips_of_slices
from lightspan.core.errors import UserError
from lightspan.datamodules.image.augment.views import RandomViews
from lightspan.datamodules.image.folder import ImageFolder
from lightspan.datamodules.rendered.pairs import ScenePairs
from lightspan.datamodules.rendered.speech import RenderedSpeech
from lightspan.datamodules.shards.decoders import decode_image
from lightspan.datamodules.shards.paired import PairedShards
from lightspan.datamodules.volume.phantoms import Phantoms
from lightspan.methods.masked.cae import CAE
from lightspan.methods.masked.croco import CroCo
from lightspan.methods.masked.cropmae import CropMAE, middle
from lightspan.methods.masked.mae import MAE
from lightspan.methods.masked.tera import TERA
from lightspan.nn.audio.log_mel import LogMel
from lightspan.nn.clustering.patch_codes import PatchCodes
from lightspan.nn.decoders.cross_decoder import CrossDecoder
from lightspan.nn.decoders.latent_regressor import LatentDecoder, LatentRegressor
from lightspan.nn.decoders.mask_decoder import MaskDecoder
from lightspan.nn.masking.hidden_patches import HiddenPatches, Reconstruction
from lightspan.nn.masking.mask_samplers import RandomMasks
from lightspan.nn.sequences.patches import at_places, patchify
from lightspan.training.method import Method

STEP = partial(SGD, lr=0.1)
BATCH = {"image": torch.randn(5, 3, 12, 12, generator=torch.Generator().manual_seed(1)), "index": torch.arange(5)}


def backbone() -> TokenViT:
    torch.manual_seed(0)
    return vit(16, 1, 2, img_size=12, patch_size=3)


def mae(**settings: Any) -> MAE:
    return MAE(backbone(), MaskDecoder(16, width=8, depth=1, heads=2), optimizer=STEP, **settings)


def cropmae(**settings: Any) -> CropMAE:
    decoder = CrossDecoder(16, width=8, depth=1, block=lambda width: Mixed())
    return CropMAE(backbone(), decoder, RandomMasks(0.75), optimizer=STEP, **settings)


def croco(**settings: Any) -> CroCo:
    network, decoder = backbone(), CrossDecoder(16, width=8, depth=1, block=lambda width: Mixed())
    return CroCo(network, decoder, RandomMasks(0.75), optimizer=STEP, **settings)


def cae(tokenizer: nn.Module | None = None) -> CAE:
    parts = LatentRegressor(16, 1, 2, drop_path=0.0), LatentDecoder(16, depth=1, heads=2, drop_path=0.0)
    return CAE(backbone(), *parts, tokenizer, RandomMasks(0.75), optimizer=STEP)


class Mixed(nn.Module):
    def forward(self, x_BLw: Tensor, other_BSw: Tensor) -> Tensor:
        return x_BLw + other_BSw.mean(dim=1, keepdim=True)


MADE = {
    "mae": mae,
    "pixels": partial(mae, normalise=False),
    "cropmae": cropmae,
    "outer": partial(cropmae, hidden_view=0),
    "cae": cae,
    "codes": lambda: cae(PatchCodes(4)),
}


def test_spectrograms_of_recordings_are_drawn_in_four_columns(tmp_path: Path) -> None:
    data = RenderedSpeech(seconds=0.3, shortest=0.2, size=8, val_size=4, test_size=4, batch_size=4)
    model = TERA(FrameTransformer(40, 8, 1, 2), LogMel(mels=40), optimizer=STEP)
    callback = Reconstructions(str(tmp_path), rows=3)
    settings: Any = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False, "max_steps": 1}
    Trainer(accelerator="cpu", callbacks=[callback], **settings).fit(model, datamodule=data)
    picture = decode_image((tmp_path / "reconstructions.png").read_bytes())
    assert picture.shape[2] / picture.shape[1] == pytest.approx(4 * 28 / (3 * 40), rel=0.15)


@pytest.mark.parametrize("kind", MADE)
def test_visible_patches_are_shown_as_they_are_and_the_others_as_guessed(kind: str) -> None:
    model: Any = MADE[kind]()
    if kind == "codes":
        model.tokenizer(BATCH["image"])  # learns what codes stand for
    with torch.no_grad():
        found = model.reconstruct(BATCH)
    image = middle(BATCH["image"]) if kind == "cropmae" else BATCH["image"]
    assert found.hidden_B1hw.shape == (5, 1, 12, 12)
    assert found.hidden_B1hw.sum(dim=(1, 2, 3)).tolist() == [12 * 9] * 5
    assert torch.equal(found.image_BChw, image)
    assert torch.equal(found.guess_BChw.masked_select(~found.hidden_B1hw), image.masked_select(~found.hidden_B1hw))
    guessed = at_places(patchify(found.guess_BChw, (3, 3)), hidden := model.hidden(image, BATCH["index"]).hide_BM)
    true = at_places(patchify(image, (3, 3)), hidden)
    if kind == "codes":
        assert (guessed[:, :, None] == model.tokenizer.centres_Vd).all(dim=3).any(dim=2).all()
    elif kind != "pixels":  # normalised: brightness is that of what was hidden
        with torch.no_grad():
            seen = model.hidden(image, BATCH["index"])
            whole = (BATCH["image"] if kind == "cropmae" else middle(BATCH["image"]),) if "cae" != kind != "mae" else ()
            guess = (
                model.decoder(model.predict(image, seen.see_BK, seen.hide_BM), seen.hide_BM, seen.grid)
                if kind == "cae"
                else model.guess(image, *whole, seen.see_BK, seen.hide_BM)
            )
        deviation = (true.var(dim=2, keepdim=True) + 1e-6).sqrt()
        torch.testing.assert_close(guessed, guess * deviation + true.mean(dim=2, keepdim=True))
    else:
        seen = model.hidden(image, BATCH["index"])
        torch.testing.assert_close(guessed, model.guess(image, seen.see_BK, seen.hide_BM))


@pytest.mark.parametrize("normalise", [True, False])
def test_of_a_pair_the_first_view_is_guessed_and_the_other_is_shown_as_it_is(normalise: bool) -> None:
    model, first = croco(normalise=normalise), BATCH["image"]
    given: Any = {"views": [first, first.flip(3)], "index": BATCH["index"]}
    with torch.no_grad():
        found, hidden = model.reconstruct(given), model.hidden(first, BATCH["index"])
        guess = model.guess(*given["views"], hidden.see_BK, hidden.hide_BM)
    assert torch.equal(found.image_BChw, first)
    assert found.other_BChw is not None
    assert torch.equal(found.other_BChw, first.flip(3))
    assert found.hidden_B1hw.sum(dim=(1, 2, 3)).tolist() == [12 * 9] * 5
    assert torch.equal(found.guess_BChw.masked_select(~found.hidden_B1hw), first.masked_select(~found.hidden_B1hw))
    true, guessed = hidden.pixels(), at_places(patchify(found.guess_BChw, (3, 3)), hidden.hide_BM)
    if normalise:
        guess = guess * (true.var(dim=2, keepdim=True) + 1e-6).sqrt() + true.mean(dim=2, keepdim=True)
    torch.testing.assert_close(guessed, guess)
    for wrong, said in (([first], "CroCo needs 2 views"), ([first, first[..., :6, :6]], "CroCo needs views of one")):
        with pytest.raises(UserError, match=said):
            model.reconstruct(given | {"views": wrong})


def test_a_perfect_guess_gives_the_picture_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model, image = mae(), BATCH["image"]
    hidden = model.hidden(image, BATCH["index"])  # type: ignore[arg-type]
    pixels = hidden.pixels()
    normalised = (pixels - pixels.mean(dim=2, keepdim=True)) / (pixels.var(dim=2, keepdim=True) + 1e-6).sqrt()
    monkeypatch.setattr(model, "guess", lambda *arguments: normalised)
    torch.testing.assert_close(model.reconstruct(BATCH).guess_BChw, image)  # type: ignore[arg-type]


def test_a_tokenizer_whose_codes_show_nothing_gives_no_picture() -> None:
    class Codes(nn.Module):
        codes = 3

    assert cae(Codes()).reconstruct(BATCH) is None  # type: ignore[arg-type]


def test_a_row_has_the_picture_what_is_seen_of_it_and_the_guess() -> None:
    image = torch.tensor([[0.0, 1.0], [0.25, 0.5]]).view(1, 1, 2, 2)
    hidden = torch.tensor([[True, False], [False, False]]).view(1, 1, 2, 2)
    bounds = torch.zeros(1, 1, 1), torch.ones(1, 1, 1)
    rows = shown(Reconstruction(image, hidden, image + 0.25), bounds)[:, 0, ::32, ::32]
    assert rows.flatten(1).tolist() == [[0, 1, 0.25, 0.5], [GREY, 1, 0.25, 0.5], [0.25, 1, 0.5, 0.75]]


def test_a_row_of_a_pair_has_the_other_view_before_the_guess_and_all_have_one_range() -> None:
    image = torch.tensor([[0.0, 4.0], [1.0, 2.0]]).view(1, 1, 2, 2)
    hidden = torch.tensor([[True, False], [False, False]]).view(1, 1, 2, 2)
    rows = shown(Reconstruction(image, hidden, 2 * image, image / 2), None)[:, 0, ::32, ::32].flatten(1)
    expected = torch.tensor([[0, 1, 0.25, 0.5], [GREY, 1, 0.25, 0.5], [0, 0.5, 0.12, 0.25], [0, 1, 0.5, 1]])
    torch.testing.assert_close(rows, expected, rtol=0, atol=0.01)


def train(folder: Path, model: LightningModule, *callbacks: Reconstructions, data: bool = True) -> Trainer:
    write_pictures(folder / "in", {"a": 8, "b": 8})
    views = RandomViews(count=1)
    module = ImageFolder(str(folder / "in"), size=12, batch_size=4, views=views, cache_dir=str(folder / "cache"))
    trainer = Trainer(
        default_root_dir=folder, max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0, callbacks=list(callbacks),
    )  # fmt: skip
    torch.manual_seed(2)
    trainer.fit(model, datamodule=module) if data else trainer.fit(model, [BATCH])
    return trainer


def test_training_goes_on_as_without_it(tmp_path: Path) -> None:
    watched, alone = mae(), mae()
    train(tmp_path, watched, Reconstructions(str(tmp_path), rows=9))
    random = torch.rand(3)
    train(tmp_path, alone)
    assert torch.equal(torch.rand(3), random)
    assert all(torch.equal(a, b) for a, b in zip(watched.parameters(), alone.parameters(), strict=True))
    picture = decode_image((tmp_path / "reconstructions.png").read_bytes())
    assert picture.shape == (3, 2 + 2 * 62, 2 + 3 * 62)  # two pictures validate, each 12 pixels enlarged five times


def train_on_pairs(folder: Path, model: LightningModule, data: Any) -> None:
    trainer = Trainer(
        default_root_dir=folder, max_steps=1, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[Reconstructions(str(folder))],
    )  # fmt: skip
    trainer.fit(model, datamodule=data)


def test_pairs_are_drawn_in_four_columns_and_pairs_that_none_validate_are_refused(tmp_path: Path) -> None:
    train_on_pairs(tmp_path, croco(), ScenePairs(12, 12, size=4, val_size=3, batch_size=4))
    picture = decode_image((tmp_path / "reconstructions.png").read_bytes())
    assert picture.shape == (3, 2 + 3 * 62, 2 + 4 * 62)
    with pytest.raises(UserError, match=r"PairedShards gives none; name some, such as data\.init_args\.val_shards"):
        train_on_pairs(tmp_path, croco(), PairedShards([posed_shard(tmp_path / "x.tar", renders=2)], batch_size=4))


class Silent(Method):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        raise AssertionError


def test_methods_without_guesses_and_bad_settings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"Silent has no reconstruct\(batch\), which Reconstructions calls"):
        train(tmp_path, Silent(optimizer=STEP), Reconstructions(str(tmp_path)))
    with pytest.raises(UserError, match=r"reads val_dataloader\(\) of the datamodule"):
        train(tmp_path, mae(), Reconstructions(str(tmp_path)), data=False)
    with pytest.raises(UserError, match="rows=0 must be at least 1"):
        Reconstructions(str(tmp_path), rows=0)


def test_nothing_hidden_leaves_pictures_alone() -> None:
    index = torch.arange(5)
    hidden = HiddenPatches.draw(backbone(), RandomMasks(0.0), BATCH["image"], index, 0)
    assert torch.equal(hidden.reconstruction(torch.zeros(5, 0, 27)).guess_BChw, BATCH["image"])
    assert not hidden.reconstruction(torch.zeros(5, 0, 27)).hidden_B1hw.any()


def test_slices_of_volumes_stand_side_by_side_evenly_spaced_if_there_are_many() -> None:
    volume = torch.randn(2, 1, 3, 4, 5)
    assert torch.equal(in_one_plane(volume), torch.cat([*volume.unbind(2)], dim=3))
    assert torch.equal(in_one_plane(volume[:, :, 0]), volume[:, :, 0])
    assert torch.equal(in_one_plane(volume[:, :, 0, 0]), volume[:, :, 0, :1])
    many = torch.arange(61.0).view(1, 1, 61, 1, 1).expand(1, 1, 61, 4, 1)
    assert torch.equal(in_one_plane(many)[0, 0, 0], torch.arange(0, 61, 4.0))
    clip_of_volumes = torch.randn(2, 1, 2, 3, 4, 5)
    assert torch.equal(in_one_plane(clip_of_volumes), in_one_plane(clip_of_volumes.flatten(2, 3)))


def test_of_volumes_what_is_seen_and_guessed_is_below_what_is_hidden_slice_by_slice_and_upright(tmp_path: Path) -> None:
    backbone = GridViT((2, 4, 4), in_chans=1, width=12, depth=1, heads=2)
    decoder = MaskDecoder(12, width=12, depth=1, heads=2)
    data = Phantoms(patients=4, val_size=2, cuts=8, side=16, size=8, batch_size=2)
    settings: Any = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False, "max_steps": 1}
    Trainer(accelerator="cpu", callbacks=[Reconstructions(str(tmp_path))], **settings).fit(
        MAE(backbone, decoder, optimizer=STEP), datamodule=data
    )
    picture = decode_image((tmp_path / "reconstructions.png").read_bytes())
    assert picture.shape[2] == pytest.approx(150 * (8 * 0.85 + 1.6), abs=2)
    tiles = torch.arange(2 * 3 * 2 * 4.0).view(6, 1, 1, 8).expand(6, 1, 4, 8)  # of two volumes of two slices
    first, second = strips_of_slices(tiles, ["as it is", "seen", "guessed"], torch.tensor([0, 15]), upright=True)
    assert (first.rows, first.columns) == (["as it is", "seen", "guessed"], ["1", "16"])
    assert torch.equal(second.pictures_RKCHW[2, 1, 0, 0], tiles[5, 0, 0, 4:].flip(0))
