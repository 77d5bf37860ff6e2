"""Reading recordings: lengths, channels, rates, levels, segments, and one clear reason for each that is wrong."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.signal import resample_poly
from sound_files import BAD, FORMATS, encoded, tone, wav_header, written

from lightspan.core.errors import UserError
from lightspan.datamodules.audio.segments import WaveReader
from lightspan.datamodules.audio.sound import header, is_clipped, is_silent, levelled, read, resampled
from lightspan.datamodules.audio.spoken import FOLDER


@pytest.mark.parametrize("ending", FORMATS)
def test_every_format_gives_its_samples_and_rate(ending: str, tmp_path: Path) -> None:
    wave, content = tone(0.5, 22_050), encoded(tone(0.5, 22_050), 22_050, ending)
    (tmp_path / "one").write_bytes(content)
    for source in (content, tmp_path / "one"):
        said = header(source)
        assert (said.frames, said.rate, said.channels) == (len(wave), 22_050, 1)
        found, rate = read(source)
        assert (len(found), rate, found.dtype) == (len(wave), 22_050, np.float32)
        assert np.abs(found - wave)[500:-500].max() < (1e-4 if ending in ("wav", "flac") else 0.1)


@pytest.mark.parametrize("ending", FORMATS)
def test_a_part_is_that_part_of_the_whole(ending: str) -> None:
    content = encoded(tone(1.0), ending=ending)
    whole, (part, _) = read(content)[0], read(content, 5_000, 4_000)
    np.testing.assert_allclose(part, whole[5_000:9_000], atol=1e-4)


def test_channels_are_mixed_by_their_mean() -> None:
    stereo = np.stack([tone(), 0.5 * tone()], axis=1)
    found, _ = read(encoded(stereo, subtype="FLOAT"))
    np.testing.assert_allclose(found, 0.75 * tone(), atol=1e-6)


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_with_a_recording_is_said(name: str, tmp_path: Path) -> None:
    content, said = BAD[name]
    (tmp_path / "bad.wav").write_bytes(content)
    for source in (content, tmp_path / "bad.wav"):
        with pytest.raises(ValueError, match=said):
            read(source)


@pytest.mark.parametrize("length", [b"\xff\xff\xff\xff", b"\x00\xf0\xff\x7f"])  # the second is SoX's
def test_a_wav_that_was_written_as_a_stream_is_whole(length: bytes) -> None:
    content = bytearray(encoded(tone()))
    at = content.index(b"data") + 4
    content[at : at + 4] = length
    assert len(read(bytes(content))[0]) == len(tone())


def test_an_rf64_is_whole_and_a_wav_of_gsm_which_none_can_seek_in_is_read() -> None:
    np.testing.assert_allclose(read(written(tone(), "RF64"))[0], tone(), atol=1e-4)
    gsm = written(tone(0.5, 8_000), "WAV", "GSM610", 8_000)
    whole, (part, _) = read(gsm)[0], read(gsm, 1_000, 500)
    assert np.corrcoef(whole[: len(tone(0.5, 8_000))], tone(0.5, 8_000))[0, 1] > 0.9
    assert np.array_equal(part, whole[1_000:1_500])


@pytest.mark.parametrize("rate", [8_000, 22_050, 44_100, 48_000, 16_001])
def test_resampling_is_scipys_and_gives_the_stated_length(rate: int) -> None:
    wave = tone(0.1, rate)
    found, divisor = resampled(wave, rate, 16_000), math.gcd(rate, 16_000)
    assert len(found) == math.ceil(len(wave) * 16_000 / rate)
    np.testing.assert_allclose(found, resample_poly(wave.astype(float), 16_000 // divisor, rate // divisor), atol=1e-5)
    np.testing.assert_allclose(found[200:-200], tone(0.1)[200:][: len(found) - 400], atol=2e-3)
    assert resampled(wave, rate, rate) is wave


def test_levels_have_the_stated_root_mean_square_and_silence_stays() -> None:
    assert np.sqrt(np.square(levelled(tone(), -25.0)).mean()) == pytest.approx(10 ** (-25 / 20), rel=1e-5)
    assert not levelled(np.zeros(9, np.float32), -25.0).any()


def test_silence_is_what_does_not_move_and_clipping_what_stays_at_full_scale() -> None:
    assert is_silent(np.full(9, 0.2, np.float32))
    assert is_silent(np.zeros(0, np.float32))
    assert not is_silent(tone())
    assert is_clipped(np.array([0, 0.5, 1, 1, 1, 0.5], np.float32))
    assert is_clipped(np.array([0, -1, -1, -1], np.float32))
    for sound in ([0, 1, 1, 0.5, 1, 1, 0], [0.5] * 9, [1], [], [1, -1, 1, -1]):
        assert not is_clipped(np.array(sound, np.float32))
    assert is_clipped(read(encoded((5 * tone()).clip(-1, 1)))[0])
    assert not is_clipped(read(encoded(tone()))[0])


def test_a_short_recording_is_followed_by_zeros_and_a_long_one_gives_a_segment() -> None:
    wave = tone(1.0)
    content = encoded(wave, subtype="FLOAT")
    long = WaveReader(16_000, 1.5)(content, seed=3)
    assert (long["wave"].shape, int(long["length"])) == ((24_000,), 16_000)
    assert torch.equal(long["wave"][:16_000], torch.from_numpy(wave))
    assert not long["wave"][16_000:].any()
    ramp = encoded(np.linspace(0, 0.5, 16_000, dtype=np.float32), subtype="FLOAT")
    reader = WaveReader(16_000, 0.25)
    starts = [round(32_000 * float(reader(ramp, seed)["wave"][0])) for seed in range(200)]
    assert min(starts) < 1_000
    assert max(starts) > 11_000
    assert len({*starts}) > 150
    assert starts[:3] == [round(32_000 * float(reader(ramp, seed)["wave"][0])) for seed in range(3)]
    middle = reader(ramp)
    assert (round(32_000 * float(middle["wave"][0])), int(middle["length"])) == (6_000, 4_000)


def test_a_segment_of_another_rate_has_the_stated_length() -> None:
    reader = WaveReader(16_000, 0.25, level_db=-25.0)
    found = reader(encoded(tone(1.0, 44_100), 44_100), seed=0)
    assert (found["wave"].shape, int(found["length"])) == ((4_000,), 4_000)
    assert float(found["wave"].square().mean().sqrt()) == pytest.approx(10 ** (-25 / 20), rel=1e-4)
    whole = reader(encoded(tone(0.1, 44_100), 44_100))
    assert int(whole["length"]) == math.ceil(4_410 * 160 / 441)


def test_a_segment_is_as_long_as_stated_where_rates_do_not_divide_it_and_levels_are_those_of_what_is_kept() -> None:
    noise = np.random.default_rng(0).normal(0, 0.1, 900).astype(np.float32)
    reader = WaveReader(16_000, 0.1000625, level_db=-25.0)
    for rate in (1_000, 8_000):
        found = reader(encoded(np.tile(noise, 8), rate, subtype="FLOAT"), seed=1)
        assert int(found["length"]) == 1_601
        assert float(found["wave"].double().square().mean().sqrt()) == pytest.approx(10 ** (-25 / 20), rel=1e-6)


def test_a_sample_that_is_no_number_is_counted_from_the_beginning() -> None:
    with pytest.raises(ValueError, match="its sample 2 is not a finite number"):
        read(wav_header(values=[0.0, 0.0, math.nan, 0.0]), 1, 3)


def test_a_chunk_of_odd_length_stands_before_an_even_place() -> None:
    content = encoded(tone())
    at = content.index(b"data")
    odd = content[:at] + b"note" + (3).to_bytes(4, "little") + b"abc\0" + content[at:]
    with pytest.raises(ValueError, match="it is cut short: its header says 9,600 bytes of samples"):
        header(odd[:5_000])


def test_an_ogg_that_counts_a_block_too_many_is_read() -> None:
    file = FOLDER / "seasonal/hanukkah/menorah_desc_fr.ogg"
    if not file.is_file():
        pytest.skip("the package tuxpaint-stamps-default is not installed")
    said = header(file)
    assert 0 < said.frames - len(read(file)[0]) < 1_000


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ((10, 1.0), r"rate=10 Hz must be in \[1,000, 768,000\]"),
        ((16_000, 0.0), r"seconds=0\.0 above 0"),
        ((16_000, float("inf")), "seconds=inf above 0"),
        ((16_000, 1e-6), r"seconds=1e-06 at rate=16000 Hz is less than one sample"),
        ((16_000, 1.0, 3.0), r"level_db=3\.0 must be in \[-100, 0\] dB"),
    ],
)
def test_settings_out_of_range_are_refused(settings: tuple[float, ...], said: str) -> None:
    with pytest.raises(UserError, match=said):
        WaveReader(*settings)  # type: ignore[arg-type]


def test_a_header_of_float_samples_is_a_recording() -> None:
    assert header(wav_header(5)).frames == 5
