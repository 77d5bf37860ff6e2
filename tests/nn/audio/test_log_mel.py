"""The log-mel front end equals that of transformers, padding has no say in valid frames, and silence is finite."""

import numpy as np
import pytest
import torch
from transformers.audio_utils import mel_filter_bank, spectrogram, window_function

from lightspan.errors import UserError
from lightspan.nn.audio.log_mel import FLOOR, LogMel, mel_filters, normalised

WAVES = 0.1 * torch.randn(3, 4000, generator=torch.Generator().manual_seed(0))
LENGTHS = torch.tensor([4000, 2345, 1000])


@pytest.mark.parametrize(
    ("mels", "window", "low", "high"), [(80, 400, 0.0, 8000.0), (40, 400, 20.0, 7600.0), (13, 512, 0.0, 4000.0)]
)
def test_the_filters_are_those_of_transformers(mels: int, window: int, low: float, high: float) -> None:
    found = mel_filters(16_000, window, mels, low, high)
    expected = mel_filter_bank(window // 2 + 1, mels, low, high, 16_000, norm=None, mel_scale="htk")
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_log_energies_are_those_of_transformers() -> None:
    found = LogMel(normalise=False).double()(WAVES.double(), LENGTHS)
    for wave, length, frames, valid in zip(WAVES.double(), LENGTHS.tolist(), *found, strict=True):
        filters = mel_filter_bank(201, 80, 0.0, 8000.0, 16_000, norm=None, mel_scale="htk")
        hann = window_function(400, "hann")
        settings = {"power": 2.0, "center": False, "mel_filters": filters, "mel_floor": 0.0}
        expected = np.log(spectrogram(wave[:length].numpy(), hann, 400, 160, **settings) + FLOOR).T
        assert int(valid.sum()) == len(expected)
        np.testing.assert_allclose(frames[valid].numpy(), expected, atol=2e-4)  # filters are kept in float32


def test_padding_and_what_stands_in_it_change_no_valid_frame() -> None:
    front = LogMel(mels=40)
    together = front(WAVES, LENGTHS)
    for row, length in enumerate(LENGTHS.tolist()):
        alone = front(WAVES[row : row + 1, :length], LENGTHS[row : row + 1])
        torch.testing.assert_close(together.frames_BTF[row][together.valid_BT[row]], alone.frames_BTF[0])
        assert alone.valid_BT.all()
    assert not together.frames_BTF[~together.valid_BT].any()


def test_each_band_of_an_utterance_has_mean_0_and_variance_1_over_its_valid_frames() -> None:
    frames, valid = LogMel(mels=40)(WAVES, LENGTHS)
    for row, of in zip(frames.double(), valid, strict=True):
        np.testing.assert_allclose(row[of].mean(0), 0, atol=1e-5)
        np.testing.assert_allclose(row[of].var(0, correction=0), 1, atol=1e-3)


def test_a_louder_recording_has_the_same_features() -> None:
    front = LogMel(mels=40)
    torch.testing.assert_close(
        front(3 * WAVES, LENGTHS).frames_BTF, front(WAVES, LENGTHS).frames_BTF, atol=1e-3, rtol=0
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_silence_one_frame_and_less_are_finite_in_every_precision(dtype: torch.dtype) -> None:
    front = LogMel(mels=40).to(dtype)
    wave = torch.zeros(4, 900, dtype=dtype)
    wave[1:] = WAVES[:, :900].to(dtype)
    frames, valid = front(wave, torch.tensor([900, 400, 7, 0]))
    assert frames.isfinite().all()
    assert frames.dtype == torch.promote_types(dtype, torch.float32)
    assert frames[0].abs().max() < 0.1
    assert valid.sum(1).tolist() == [4, 1, 1, 1]
    assert front(wave[:, :100], torch.tensor([100] * 4)).valid_BT.tolist() == [[True]] * 4  # shorter than a window


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_does_not_reach_the_energies(dtype: torch.dtype) -> None:
    front = LogMel(mels=40)
    with torch.autocast("cpu", dtype):
        frames, _ = front(WAVES, LENGTHS)
    assert torch.equal(frames, front(WAVES, LENGTHS).frames_BTF)


def test_no_recording_is_a_batch_too() -> None:
    frames, valid = LogMel(mels=40)(WAVES[:0], LENGTHS[:0])
    assert (frames.shape, valid.shape) == ((0, 23, 40), (0, 23))


def test_what_does_not_vary_becomes_zero() -> None:
    assert not normalised(torch.full((1, 5, 3), -23.02585), torch.ones(1, 5, dtype=torch.bool)).abs().gt(0.01).any()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"mels": 0}, "mels=0"),
        ({"high": 9000.0}, "high=9000"),
        ({"low": 5000.0, "high": 4000.0}, "low=5000 and high=4000"),
        ({"window_ms": 0.01}, r"window_ms=0\.01"),
        ({"mels": 300}, r"LogMel mels=300: [0-9]+ bands lie between two frequencies .* 40 Hz apart; lower mels"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, float], said: str) -> None:
    with pytest.raises(UserError, match=said):
        LogMel(**settings)  # type: ignore[arg-type]
