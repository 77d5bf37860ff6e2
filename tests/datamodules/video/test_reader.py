"""Frames are found by their times, and files that are damaged, cut short or something else are refused."""

import resource
import struct
import sys
import wave
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from video_files import number_of, numbered, write_video

from lightspan.core.errors import UserError
from lightspan.datamodules.video.reader import VideoIndex, colours, index_of, read_frames, shots

av = pytest.importorskip("av")

FORMATS = {".mkv": "ffv1", ".mp4": "mpeg4", ".avi": "mpeg4", ".mpg": "mpeg1video", ".mov": "mpeg4"}


def test_every_format_gives_the_frames_that_were_written_in_any_order(tmp_path: Path) -> None:
    wanted = [21, 3, 7, 7, 0, 23]
    for ending, codec in FORMATS.items():
        path = write_video(tmp_path / f"a{ending}", numbered(24), codec=codec)
        index = index_of(path)
        assert len(index) == 24, ending
        assert index.fps == pytest.approx(25)
        assert read_frames(path, index, wanted, number_of) == wanted, ending


def test_frames_that_are_stored_after_later_ones_are_found_each_alone(tmp_path: Path) -> None:
    """Of an AVI no place is known at which its first frame begins."""
    for ending in (".avi", ".mp4", ".mkv"):
        path = write_video(tmp_path / f"a{ending}", numbered(12), every=6, codec="mpeg4", between=2)
        index = index_of(path)
        found = [read_frames(path, index, [number], number_of)[0] for number in range(12)]
        assert found == read_frames(path, index, range(12), number_of) == [*range(12)], ending


def test_lossless_frames_come_back_bit_by_bit(tmp_path: Path) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (6, 10, 14, 3)).astype(np.uint8)
    path = write_video(tmp_path / "a.mkv", frames)
    assert np.array_equal(np.stack(read_frames(path, index_of(path), range(6), np.copy)), frames)


def test_a_variable_rate_is_known_by_the_times_of_frames(tmp_path: Path) -> None:
    times = [0, 40, 80, 500, 1000, 1010]
    index = index_of(write_video(tmp_path / "a.mkv", numbered(6), times))
    assert (index.ticks * index.tick_s * 1000).round().tolist() == times
    milliseconds = np.array([0, 39, 61, 300, 1004, 5000])
    assert index.nearest(milliseconds / 1000 / index.tick_s).tolist() == [0, 1, 2, 3, 4, 5]


def test_of_two_frames_as_near_the_earlier_is_shown() -> None:
    assert VideoIndex(np.array([0, 10]), 0.1, np.empty(0)).nearest(np.array([4.9, 5.0, 5.1])).tolist() == [0, 0, 1]


def test_frames_are_upright_whatever_the_rotation(tmp_path: Path) -> None:
    picture = np.zeros((16, 32, 3), np.uint8)
    picture[:, :16] = 255  # the left half is white
    path = write_video(tmp_path / "a.mp4", [picture] * 3, codec="mpeg4")
    content = path.read_bytes()
    at = content.index(b"tkhd") + 44  # its matrix: ISO/IEC 14496-12, section 8.3.2
    for matrix, white in (((0, 1, -1, 0), (0, 8)), ((0, -1, 1, 0), (31, 8)), ((-1, 0, 0, -1), (8, 31))):
        a, b, c, d = (number << 16 for number in matrix)
        (tmp_path / "b.mp4").write_bytes(
            content[:at] + struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30) + content[at + 36 :]
        )
        index = index_of(tmp_path / "b.mp4")
        (turned,) = read_frames(tmp_path / "b.mp4", index, [1], np.copy)
        assert turned.shape == ((32, 16, 3) if matrix[0] == 0 else (16, 32, 3))
        assert turned[white].min() > 200, matrix
        assert turned[-1 - white[0], -1 - white[1]].max() < 50, matrix


def test_a_file_that_is_cut_short_is_refused(tmp_path: Path) -> None:
    for ending, codec in FORMATS.items():
        if ending == ".mpg":  # a stream of packets that may end anywhere
            continue
        content = write_video(tmp_path / f"a{ending}", numbered(24), codec=codec).read_bytes()
        for kept in (len(content) // 2, len(content) - 1):
            (tmp_path / f"cut{ending}").write_bytes(content[:kept])
            with pytest.raises(ValueError, match="cut short"):
                index_of(tmp_path / f"cut{ending}")


def test_what_is_no_video_is_refused(tmp_path: Path) -> None:
    with wave.open(str(tmp_path / "sound.avi"), "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(8000)
        sound.writeframes(bytes(1600))
    with av.open(str(tmp_path / "sound.mkv"), "w") as out:
        stream = out.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), "s16", "mono")
        frame.rate, frame.pts, frame.time_base = 8000, 0, Fraction(1, 8000)
        out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("no video" * 100)
    write_video(tmp_path / "real.mkv", numbered(3))
    (tmp_path / "list.mp4").write_text(f"ffconcat version 1.0\nfile {tmp_path / 'real.mkv'}\n")
    (tmp_path / "playlist.mp4").write_text(f"#EXTM3U\n#EXTINF:1,\n{tmp_path / 'real.mkv'}\n#EXT-X-ENDLIST\n")
    for name, reason in {
        "sound.avi": "or no MP4",
        "sound.mkv": "no video stream",
        "empty.mp4": "empty",
        "text.mp4": "or no MP4",
        "list.mp4": "or no MP4",
        "playlist.mp4": "or no MP4",
        "none.mp4": "cannot be read",
    }.items():
        with pytest.raises(ValueError, match=reason):
            index_of(tmp_path / name)


def test_a_header_of_any_length_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "a.mkv").write_bytes(b"\x1a\x45\xdf\xa3\x01" + b"\xff" * 6 + b"\xfe" + bytes(64))
    with pytest.raises(ValueError, match="it is damaged, or no MP4"):
        index_of(tmp_path / "a.mkv")


def test_limits_come_before_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_video(tmp_path / "a.mkv", numbered(8))
    monkeypatch.setenv("LIGHTSPAN_MAX_FRAMES", "7")
    with pytest.raises(ValueError, match="LIGHTSPAN_MAX_FRAMES"):
        index_of(path)
    monkeypatch.delenv("LIGHTSPAN_MAX_FRAMES")
    monkeypatch.setenv("LIGHTSPAN_MAX_PIXELS", "1000")  # of the 32 x 32 that it has
    with pytest.raises(ValueError, match="LIGHTSPAN_MAX_PIXELS"):
        index_of(path)
    monkeypatch.delenv("LIGHTSPAN_MAX_PIXELS")
    huge = write_video(tmp_path / "huge.mp4", numbered(3), codec="mpeg4").read_bytes()
    at = huge.index(b"mp4v") + 4 + 24  # width and height of the sample entry: ISO/IEC 14496-12, section 12.1.3
    (tmp_path / "huge.mp4").write_bytes(huge[:at] + struct.pack(">HH", 65535, 65535) + huge[at + 4 :])
    index_of(tmp_path / "huge.mp4")  # the stream itself says what it has


def test_a_few_bytes_that_say_that_there_are_many_frames_take_no_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = write_video(tmp_path / "a.mp4", numbered(3), codec="mpeg4").read_bytes()
    many, sizes, times = 2**24, content.index(b"stsz") + 8, content.index(b"stts") + 12
    runs = content.index(b"stsc") + 16
    content = bytearray(content)
    for at, said in ((sizes, (1, many)), (times, (many,)), (runs, (many,))):
        struct.pack_into(f">{len(said)}I", content, at, *said)
    (tmp_path / "a.mp4").write_bytes(content)
    monkeypatch.setenv("LIGHTSPAN_MAX_BYTES", str(2**26))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match="its"):
        index_of(tmp_path / "a.mp4")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**18  # KiB; 36 bytes a frame are 576 MiB


def test_a_file_of_many_small_parts_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(struct.pack(">I4s", 8, b"free") * (2**20 + 1))
    with pytest.raises(ValueError, match="1,048,576 parts"):
        index_of(tmp_path / "a.mp4")


def test_frames_after_damage_are_lost_until_the_next_whole_one(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (24, 48, 48, 3)).astype(np.uint8)
    path = write_video(tmp_path / "a.mp4", noise, codec="mpeg4", every=6)
    with av.open(str(path)) as container:
        packets = [bytes(packet) for packet in container.demux(video=0) if packet.size]
    content = path.read_bytes()
    at = content.index(packets[13]) + 40
    (tmp_path / "bad.mp4").write_bytes(content[:at] + bytes(200) + content[at + 200 :])
    index = index_of(tmp_path / "bad.mp4", through=True)
    lost = np.flatnonzero(np.isnan(index.change)).tolist()
    assert lost
    assert lost[0] == 13
    assert lost[-1] < 23
    assert all(not set(range(first, end)) & set(lost) for first, end in shots(index, 1.0))
    for number in range(len(index)):
        if number in lost:
            with pytest.raises(ValueError, match=f"frame {number}, "):
                read_frames(tmp_path / "bad.mp4", index, [number], np.copy)
        else:
            read_frames(tmp_path / "bad.mp4", index, [number], np.copy)


def test_cuts_are_where_the_colours_change(tmp_path: Path) -> None:
    red, blue = np.zeros((8, 8, 3), np.uint8), np.zeros((8, 8, 3), np.uint8)
    red[..., 0] = blue[..., 2] = 200
    half = red.copy()
    half[:4] = blue[:4]
    path = write_video(tmp_path / "a.mkv", [red, red, blue, blue, blue, half, half])
    index = index_of(path, through=True)
    assert index.change.tolist() == pytest.approx([0, 0, 1, 0, 0, 0.5, 0], abs=0.08)
    assert shots(index, 0.3) == [(0, 2), (2, 5), (5, 7)]
    assert shots(index, 0.7) == [(0, 2), (2, 7)]
    assert colours(red).max() == 1


def test_a_frame_that_is_lost_belongs_to_no_shot() -> None:
    nan = float("nan")
    index = VideoIndex(np.arange(7), 0.1, np.array([nan, 0, 0, nan, nan, 0, 0.9], np.float32))
    assert shots(index, 0.5) == [(1, 3), (5, 6), (6, 7)]


def test_without_pyav_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_video(tmp_path / "a.mkv", numbered(3))
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(UserError, match=r"PyAV.*\[video\]"):
        index_of(path)
