"""Generated speech: formants where the phones say, pitches of the speakers, a grammar, and draws by number alone."""

import numpy as np
import pytest
import torch

from lightspan.core.errors import UserError
from lightspan.datamodules.rendered.speech import (
    FOLLOWERS,
    FORMANTS_P2,
    LOUDNESS,
    PHONES,
    PITCH_K,
    RATE,
    SPEAKERS,
    VOICELESS_P,
    RenderedSpeech,
    grammar,
    utterances,
)

SAID = utterances(0, np.arange(60), 1.0, 0.5, None)


def frames(wave: np.ndarray) -> np.ndarray:
    """Spectra of frames, [T K]."""
    windows = np.lib.stride_tricks.sliding_window_view(wave, 400)[::160] * np.hanning(400)
    return np.abs(np.fft.rfft(windows, 1024, axis=1))


def test_an_utterance_is_a_function_of_its_seed_and_number() -> None:
    some = utterances(0, np.arange(20, 23), 1.0, 0.5, None)
    for one, other in zip(some, SAID, strict=True):
        assert np.array_equal(one, other[20:23])
    assert not np.array_equal(utterances(1, np.arange(20, 23), 1.0, 0.5, None).wave, some.wave)


def test_lengths_lie_between_both_and_nothing_follows_them() -> None:
    assert (SAID.length >= 0.5 * RATE).all()
    assert (SAID.length <= RATE).all()
    assert np.ptp(SAID.length) > 0.4 * RATE
    for wave, length, phones in zip(SAID.wave, SAID.length, SAID.phone, strict=True):
        assert not wave[length:].any()
        count = 1 + (length - 400) // 160
        assert (phones[:count] >= 0).all()
        assert (phones[count:] == -1).all()


def test_phones_last_50_to_150_ms_and_follow_the_grammar() -> None:
    followers, _ = grammar()
    assert followers.shape == (PHONES, FOLLOWERS)
    lengths, seen = [], set()
    for phones in SAID.phone:
        of = phones[phones >= 0]
        change = np.flatnonzero(np.diff(of)) + 1
        for before, after in zip(of[change - 1], of[change], strict=True):
            assert after in followers[before]
            seen.add((int(before), int(after)))
        lengths += np.diff(change).tolist()
    assert (min(lengths), max(lengths)) == (pytest.approx(5, abs=1), pytest.approx(15, abs=1))
    assert len(seen) > 60
    assert {int(phone) for phone in np.unique(SAID.phone)} == {*range(-1, PHONES)}


def test_the_strongest_frequencies_of_a_phone_are_near_its_formants() -> None:
    errors = []
    for wave, phones in zip(SAID.wave, SAID.phone, strict=True):
        spectra = frames(wave)
        for at in range(3, len(phones) - 3):
            if phones[at] >= 0 and len({*phones[at - 3 : at + 4].tolist()}) == 1:  # away from glides
                hertz = 1024 * FORMANTS_P2[phones[at]] / RATE
                for place in hertz:
                    near = spectra[at, int(0.75 * place) : int(1.25 * place) + 1]
                    away = spectra[at, int(1.4 * hertz[1]) : int(1.8 * hertz[1])]
                    errors.append(near.max() > 2 * np.median(away))
    assert len(errors) > 500
    assert np.mean(errors) > 0.9


def test_voiced_frames_repeat_at_the_pitch_of_the_speaker() -> None:
    found = []
    for wave, speaker, phones in zip(SAID.wave, SAID.speaker, SAID.phone, strict=True):
        for at in range(2, len(phones) - 5):
            if (phones[at - 2 : at + 5] >= 0).all() and not VOICELESS_P[phones[at - 2 : at + 5]].any():
                piece = wave[160 * at : 160 * at + 800]
                spectrum = np.abs(np.fft.rfft(piece * np.hanning(800), 4096)) ** 2
                correlation = np.fft.irfft(spectrum)
                lags = np.arange(int(RATE / 280), int(RATE / 75))
                found.append(RATE / lags[correlation[lags].argmax()] / PITCH_K[speaker])
    assert len(found) > 500
    assert 0.97 < np.median(found) < 1.03
    assert np.mean(np.abs(np.log(found)) < 0.12) > 0.7


def test_speakers_are_drawn_equally_and_speech_has_one_loudness() -> None:
    many = utterances(3, np.arange(300), 0.2, 0.2, None)
    assert np.bincount(many.speaker, minlength=SPEAKERS).min() > 10
    rms = np.sqrt(np.square(many.wave).sum(1) / many.length)
    np.testing.assert_allclose(rms, LOUDNESS, rtol=1e-3)


def test_noise_lies_at_the_stated_distance_over_the_same_speech() -> None:
    noisy = utterances(0, np.arange(60), 1.0, 0.5, 5.0)
    assert np.array_equal(noisy.phone, SAID.phone)
    noise = noisy.wave - SAID.wave
    ratio = np.square(SAID.wave).sum(1) / np.square(noise).sum(1)
    np.testing.assert_allclose(10 * np.log10(ratio), 5.0, atol=0.3)


def test_sets_share_no_utterance_and_batches_are_samples() -> None:
    data = RenderedSpeech(seconds=0.2, shortest=0.1, size=6, val_size=4, test_size=4, batch_size=3)
    data.setup()
    assert data.train is not None
    first = [samples.batch(range(4), [0] * 4) for samples in (data.train, data.val, data.test)]
    assert not torch.equal(first[0]["wave"], first[1]["wave"])
    assert not torch.equal(first[1]["wave"], first[2]["wave"])
    assert torch.equal(first[0]["phone"][2], data.train.sample(2, 5)["phone"])


@pytest.mark.parametrize("settings", [{"seconds": 0.05}, {"shortest": 3.0}, {"shortest": 0.0}, {"size": 0}])
def test_settings_that_do_not_fit_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(UserError, match=next(iter(settings))):
        RenderedSpeech(**settings)  # type: ignore[arg-type]
