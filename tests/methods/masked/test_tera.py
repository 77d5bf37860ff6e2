"""TERA: its loss by hand, what padding and unlabelled cells have no say in, and what is kept of it."""

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from method_runs import fit, stays_finite
from torch import Tensor

from lightspan.backbones.frames import FrameTransformer
from lightspan.core.errors import UserError
from lightspan.methods.masked.tera import TERA
from lightspan.nn.audio.log_mel import LogMel
from lightspan.nn.masking.spectrogram_alterations import SpectrogramAlterations
from lightspan.objectives.masked import hidden_absolute_error


def method(alterations: SpectrogramAlterations | None = None, dropout: float = 0.0, **settings: Any) -> TERA:
    torch.manual_seed(0)
    given = {"optimizer": partial(torch.optim.SGD, lr=0.05)}
    backbone = FrameTransformer(8, width=12, depth=2, heads=2, dropout=dropout)
    return TERA(backbone, LogMel(2_000, 8), alterations, **given | settings)


def batch(rows: int = 4, samples: int = 1200, seed: int = 0) -> dict[str, Tensor]:
    """Noise whose loudness changes, of several lengths."""
    generator = torch.Generator().manual_seed(seed)
    wave = torch.randn(rows, samples, generator=generator) * torch.rand(
        rows, 12, generator=generator
    ).repeat_interleave(samples // 12, 1)
    length = torch.linspace(samples, samples // 2, rows).long()
    wave = wave.masked_fill(torch.arange(samples) >= length[:, None], 0)
    return {"wave": wave, "length": length, "label": torch.zeros(rows).long(), "index": torch.arange(rows) + 10 * seed}


def test_the_loss_is_numpys_mean_error_over_labelled_cells() -> None:
    model, given = method(), batch()
    clean, altered, guess = model.guesses(given, 0)
    error = np.abs(guess.detach().double().numpy() - clean.frames_BTF.double().numpy())
    labelled = altered.labelled_BTF.numpy()
    assert 0 < labelled.mean() < 0.5
    assert float(model.training_step(given, 0).detach()) == pytest.approx(error[labelled].mean(), rel=1e-5)


def test_with_all_axes_off_the_clean_frames_are_seen_and_guessed_everywhere() -> None:
    model, given = method(SpectrogramAlterations(share=0.0, band=0.0)), batch()
    clean, altered, guess = model.guesses(given, 0)
    assert torch.equal(altered.frames_BTF, clean.frames_BTF)
    expected = (guess - clean.frames_BTF)[clean.valid_BT].abs().mean()
    torch.testing.assert_close(model.training_step(given, 0), expected)


def test_validation_is_the_loss_with_the_alterations_of_step_0_and_training_alters_anew() -> None:
    model, given = method(), batch()
    logged: dict[str, Tensor] = {}
    model.log = lambda name, value, **options: logged.update({name: value})  # type: ignore[method-assign, assignment]
    expected = model.training_step(given, 0)
    model._trainer = SimpleNamespace(global_step=3)  # type: ignore[assignment]
    model.log_training = lambda figures: None  # type: ignore[method-assign]
    model.validation_step(given, 0)
    torch.testing.assert_close(logged["val/loss"], expected)
    assert not torch.allclose(model.training_step(given, 0), expected)


def test_each_recording_is_altered_by_its_own_number() -> None:
    model, given = method(), batch()
    same = {name: field[:1].expand(4, *field.shape[1:]) for name, field in given.items()} | {"index": given["index"]}
    labelled = model.guesses(same, 0)[1].labelled_BTF
    assert len({tuple(row.flatten().tolist()) for row in labelled}) == 4


def test_padding_does_not_change_loss_or_features() -> None:
    model, given = method(), batch()
    longer = given | {"wave": torch.nn.functional.pad(given["wave"], (0, 500))}
    torch.testing.assert_close(model.training_step(longer, 0), model.training_step(given, 0))
    torch.testing.assert_close(model.features(longer), model.features(given), atol=1e-5, rtol=0)


def test_features_are_means_over_valid_frames_of_the_last_layer_without_the_head() -> None:
    model, given = method().eval(), batch()
    states, valid = model.backbone(*model.spectrogram(given)), model.spectrogram(given).valid_BT
    expected = torch.stack([row[of].mean(0) for row, of in zip(states, valid, strict=True)])
    torch.testing.assert_close(model.features(given), expected)
    first, last = model.token_features(given, (0, -1))
    torch.testing.assert_close(last.pooled(), expected)
    assert torch.equal(last.tokens_BTD, states)
    assert not torch.equal(first.pooled(), last.pooled())
    for parameter in model.head.parameters():
        parameter.data.fill_(9.0)
    torch.testing.assert_close(model.features(given), expected)


def test_a_step_without_any_label_has_no_loss_and_no_gradient(tmp_path: Path) -> None:
    model, given = method(SpectrogramAlterations(band=0.0)), batch(samples=240)  # too short for a block
    loss = model.training_step(given, 0)
    loss.backward()
    assert float(loss) == 0
    assert not any(parameter.grad.any() for parameter in model.parameters() if parameter.grad is not None)
    assert fit(method(SpectrogramAlterations(band=0.0)), [given], tmp_path) == [0.0]


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_silence_clipped_and_very_short_recordings_train(precision: str, tmp_path: Path) -> None:
    given = batch()
    given["wave"][0] = 0
    given["wave"][1] = given["wave"][1].sign()
    given["length"][2:] = torch.tensor([1, 30])
    stays_finite(method(SpectrogramAlterations(noise=1.0)), [given, batch(seed=1)], tmp_path, precision=precision)


def test_it_learns_to_guess_what_it_was_not_shown(tmp_path: Path) -> None:
    model, given = method(optimizer=partial(torch.optim.AdamW, lr=0.01)), batch(8)

    @torch.no_grad()
    def error() -> float:
        clean, altered, guess = model.guesses(given, 1_000)  # a step that does not train
        return float(hidden_absolute_error(guess, clean.frames_BTF, altered.labelled_BTF))

    before = error()
    fit(model, [given] * 60, tmp_path)
    assert error() < 0.9 * before


def test_pictures_are_clean_altered_and_guessed_with_low_frequencies_below() -> None:
    model, given = method(), batch()
    found, (clean, altered, guess) = model.reconstruct(given), model.guesses(given, 0)
    assert found.image_BChw.shape == (4, 1, 8, clean.frames_BTF.shape[1])
    assert torch.equal(found.image_BChw[:, 0, -1], clean.frames_BTF[..., 0])
    assert torch.equal(found.hidden_B1hw[:, 0, -1], altered.labelled_BTF[..., 0])
    assert found.other_BChw is not None
    assert torch.equal(found.other_BChw[:, 0, 0], altered.frames_BTF[..., -1])
    torch.testing.assert_close(found.guess_BChw[:, 0, -1][clean.valid_BT], guess[..., 0][clean.valid_BT])
    assert not found.guess_BChw[:, 0, 0][~clean.valid_BT].any()


def test_the_first_batch_is_seen_altered_and_what_is_guessed_is_red() -> None:
    model, given = method(), batch()
    seen, red = model.pictures(given).values()
    _, altered, _ = model.guesses(given, 0)
    labelled = altered.labelled_BTF.transpose(1, 2).flip(1).bool()
    for picture in (seen, red):
        assert picture.shape == (4, 3, *labelled.shape[1:])
        assert ((picture >= 0) & (picture <= 1)).all()
    assert torch.equal(seen[:, 0], seen[:, 2])
    assert torch.equal((seen != red).any(dim=1), labelled)
    assert seen[:, 0, -1].argmax() == altered.frames_BTF[..., 0].argmax()


def test_the_defaults_are_those_of_the_paper() -> None:
    model = TERA(FrameTransformer(), optimizer=torch.optim.SGD)
    assert (model.backbone.bands, model.backbone.num_features, len(model.backbone.blocks)) == (80, 768, 3)
    assert (model.front.rate, model.front.window, model.front.hop) == (16_000, 400, 160)
    assert [type(layer).__name__ for layer in model.head] == ["Linear", "GELU", "LayerNorm", "Linear"]
    assert float(model.head[0].weight.detach().std()) == pytest.approx(0.02, rel=0.02)
    assert not model.head[0].bias.any()
    assert [layer.out_features for layer in model.head if isinstance(layer, torch.nn.Linear)] == [768, 80]
    alterations = model.alterations
    assert (alterations.share, alterations.width, alterations.band, alterations.noise) == (0.15, 7, 0.2, 0.0)
    assert (alterations.zero, alterations.swapped, alterations.deviation) == (0.8, 0.1, 0.2)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(UserError, match=r"front\.mels=40 and backbone\.bands=80 must be equal"):
        TERA(FrameTransformer(80, 12, 1, 2), LogMel(mels=40), optimizer=torch.optim.SGD)
    for wrong in (
        {"image": torch.zeros(2, 3)},
        batch() | {"wave": torch.zeros(4, 2, 9)},
        batch() | {"length": torch.ones(4)},
        batch() | {"length": torch.ones(4, 1).long()},
    ):
        with pytest.raises(UserError, match=r"TERA reads recordings, wave float \[B, S\] with length int64 \[B\]"):
            method().features(wrong)
    with pytest.raises(UserError, match="length of this batch has 3 rows, and the batch has 4 samples"):
        method().features(batch() | {"length": torch.ones(3).long()})
