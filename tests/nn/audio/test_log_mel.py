"""The log-mel front end equals that of transformers, padding has no say in valid frames, and silence is finite."""

import numpy as np
import pytest
import torch
from transformers.audio_utils import mel_filter_bank, spectrogram, window_function

from lightspan.core.errors import UserError
from lightspan.nn.audio.log_mel import LogMel, mel_filters, normalised

WAVES = 0.1 * torch.randn(3, 4000, generator=torch.Generator().manual_seed(0))
LENGTHS = torch.tensor([4000, 2345, 1000])


@pytest.mark.parametrize(
    ("mels", "window", "low", "high"), [(80, 400, 0.0, 8000.0), (40, 400, 20.0, 7600.0), (13, 512, 0.0, 4000.0)]
)
def test_the_filters_are_those_of_transformers(mels: int, window: int, low: float, high: float) -> None:
    found = mel_filters(16_000, window, mels, low, high)
    expected = mel_filter_bank(window // 2 + 1, mels, low, high, 16_000, norm=None, mel_scale="htk")
    np.testing.assert_allclose(found, expected, atol=1e-12)


@pytest.mark.parametrize("loudness", [1.0, 1e-5])  # of the second the floor is a large part
def test_log_energies_are_those_of_transformers(loudness: float) -> None:
    waves = loudness * WAVES.double()
    found = LogMel(normalise=False).double()(waves, LENGTHS)
    for wave, length, frames, valid in zip(waves, LENGTHS.tolist(), *found, strict=True):
        filters = mel_filter_bank(201, 80, 0.0, 8000.0, 16_000, norm=None, mel_scale="htk")
        hann = window_function(400, "hann")
        settings = {"power": 2.0, "center": False, "mel_filters": filters, "mel_floor": 0.0}
        expected = np.log(spectrogram(wave[:length].numpy(), hann, 400, 160, **settings) + 1e-10).T
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


def test_a_valid_frame_ends_within_its_recording_and_a_short_one_is_followed_by_zeros() -> None:
    front, ends = LogMel(mels=40, normalise=False), [559, 560, 719, 720, 721]
    noise = WAVES[:1, :900].expand(5, -1)
    assert front(noise, torch.tensor(ends)).valid_BT.sum(1).tolist() == [1, 2, 2, 3, 3]
    assert front.count(torch.tensor(ends)).tolist() == [1, 2, 2, 3, 3]
    for length in (1, 120, 399):
        alone = torch.nn.functional.pad(WAVES[:1, :length], (0, 400 - length))
        expected = front(alone, torch.tensor([400])).frames_BTF
        for wave in (WAVES[:1, :length], WAVES[:1, :399], WAVES[:1, :900]):
            found = front(wave, torch.tensor([length])).frames_BTF
            torch.testing.assert_close(found[:, :1], expected)
            assert not found[:, 1:].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_network_in_half_precision_has_the_same_front_end(dtype: torch.dtype) -> None:
    front = LogMel(mels=40)
    assert torch.equal(LogMel(mels=40).to(dtype)(WAVES, LENGTHS).frames_BTF, front(WAVES, LENGTHS).frames_BTF)
    half = WAVES.to(dtype)
    assert torch.equal(LogMel(mels=40).to(dtype)(half, LENGTHS).frames_BTF, front(half.float(), LENGTHS).frames_BTF)
    assert not front.state_dict()


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
    constant, valid = torch.full((1, 5, 3), -23.02585), torch.ones(1, 5, dtype=torch.bool)
    assert not normalised(constant, valid).abs().gt(0.01).any()
    rounding = 1e-5 * torch.randn(1, 5, 3, generator=torch.Generator().manual_seed(0))
    assert not normalised(constant + rounding, valid).abs().gt(0.05).any()


def test_windows_are_the_nearest_whole_number_of_samples() -> None:
    front = LogMel(11_025, 40)
    assert (front.window, front.hop) == (276, 110)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"mels": 0}, "mels=0"),
        ({"high": 9000.0}, "high=9000"),
        ({"low": 5000.0, "high": 4000.0}, "low=5000 and high=4000"),
        ({"window_ms": 0.01}, r"window_ms=0\.01"),
        ({"window_ms": 0.0625}, r"window_ms=0\.0625, .* a window needs two samples"),
        ({"mels": 300}, r"LogMel mels=300: [0-9]+ bands lie between two frequencies .* 40 Hz apart; lower mels"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, float], said: str) -> None:
    with pytest.raises(UserError, match=said):
        LogMel(**settings)  # type: ignore[arg-type]
