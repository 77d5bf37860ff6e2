"""Clips are functions of the seed, the epoch and the sample; a folder of videos trains and resumes exactly."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from video_files import number_of, numbered, write_video

from lightspan.core.batches import require_declared
from lightspan.core.errors import UserError
from lightspan.datamodules.image.augment.views import RandomViews
from lightspan.datamodules.loading.workers import Damaged
from lightspan.datamodules.video import indices
from lightspan.datamodules.video.batch import ClipBatch, ClipsBatch, DrawnClipsBatch
from lightspan.datamodules.video.clips import ClipTimes
from lightspan.datamodules.video.folder import VideoFolder
from lightspan.datamodules.video.reader import VideoIndex

SIDE = 16


def videos(folder: Path, count: int = 6, frames: int = 24) -> Path:
    for number in range(count):
        write_video(folder / "in" / f"{number}.mkv", numbered(frames, SIDE))
    return folder / "in"


def folder_of(folder: Path, **settings: Any) -> VideoFolder:
    settings = {"frames": 4, "size": SIDE, "batch_size": 2} | settings
    return VideoFolder(str(folder / "in"), cache_dir=str(folder / "cache"), **settings)


def ready(folder: Path, **settings: Any) -> VideoFolder:
    data = folder_of(folder, **settings)
    data.setup()
    return data


def shown(clip_CTHW: torch.Tensor) -> list[int]:
    """The numbers of the frames of `numbered`, standardised with 0.5."""
    return [number_of((frame * 0.5 + 0.5).numpy() * 255) for frame in clip_CTHW.unbind(1)]


def test_a_clip_shows_the_frames_that_it_names(tmp_path: Path) -> None:
    videos(tmp_path)
    data = ready(tmp_path, fps=12.5)
    assert data.train is not None
    starts = set()
    for seed in range(20):
        sample = data.train.sample(1, seed)
        assert shown(sample["clip"]) == sample["frames"].tolist()
        assert sample["frames"].diff().tolist() == [2, 2, 2]
        starts.add(int(sample["frames"][0]))
        assert torch.equal(sample["clip"], data.train.sample(1, seed)["clip"])
    assert len(starts) > 8
    assert float(sample["fps"]) == 12.5
    assert data.bank.sample(1, 5)["frames"].tolist() == [9, 11, 13, 15]


def test_every_start_is_drawn_and_no_clip_leaves_its_part() -> None:
    index = VideoIndex(np.arange(20), 0.04, np.empty(0))
    times = ClipTimes(4, speeds=(1, 2))
    assert times.starts(index, 5, 15) == 4  # the fast clip has 7 frames of 10
    for at in range(4):
        assert times.numbers(index, 5, 15, 5 + at).tolist() == [
            [5 + at, 6 + at, 7 + at, 8 + at],
            [5 + at, 7 + at, 9 + at, 11 + at],
        ]
    assert times.starts(index, 5, 12) == 1
    assert times.starts(index, 5, 11) == 0
    assert ClipTimes(1).starts(index, 0, 1) == 1


def test_times_rounded_to_ticks_lose_no_frame() -> None:
    for fps in (24, 30, 50, 29.97, 23.976):
        index = VideoIndex((1000 * np.arange(64) / fps).round().astype(np.int64), 0.001, np.empty(0))
        for times in (ClipTimes(16), ClipTimes(16, fps)):
            assert times.starts(index, 0, 64) == 49, fps
            for start in range(49):
                assert times.numbers(index, 0, 64, start).tolist() == [[*range(start, start + 16)]], fps


def test_a_variable_rate_is_sampled_by_time() -> None:
    index = VideoIndex(np.array([0, 40, 80, 120, 1000, 1040, 2000]), 0.001, np.empty(0))
    assert ClipTimes(3, fps=1).numbers(index, 0, 7, 0).tolist() == [[0, 4, 6]]
    assert ClipTimes(3, fps=2).numbers(index, 0, 7, 0).tolist() == [[0, 3, 4]]


def test_clips_of_one_start_share_first_frame_and_view_and_those_of_two_do_not(tmp_path: Path) -> None:
    videos(tmp_path)
    views = RandomViews(count=1, size=SIDE, scale=(0.5, 1.0), saturation=0.4, hue=0.1, grain=0.02)
    sample = ready(tmp_path, clips=2, speeds=(1, 3), views=views).train.sample(0, 7)  # type: ignore[union-attr]
    slow, fast, other, _ = sample["views"]
    frames = sample["frames"]
    assert sample["fps"].tolist() == pytest.approx([25, 25 / 3, 25, 25 / 3])
    assert frames[0, 0] == frames[1, 0]
    assert frames[2, 0] != frames[0, 0]
    assert frames.diff(dim=1).tolist() == [[1] * 3, [3] * 3] * 2
    assert torch.equal(slow[:, 3], fast[:, 1])
    assert not torch.allclose(slow[:, 0], other[:, 0])


def test_all_frames_of_a_clip_get_the_same_view(tmp_path: Path) -> None:
    still = np.repeat(np.random.default_rng(0).integers(0, 256, (1, SIDE, SIDE, 3)), 8, 0).astype(np.uint8)
    for number in range(2):
        write_video(tmp_path / "in" / f"{number}.mkv", still)
    views = RandomViews(count=1, size=8, degrees=20, saturation=0.4, hue=0.1, blur=0.5, solarise=0.5, grain=0.1)
    data = ready(tmp_path, views=views, batch_size=1)
    assert data.train is not None
    made = [data.train.sample(0, seed)["clip"] for seed in range(8)]
    for clip in made:
        torch.testing.assert_close(clip, clip[:, :1].expand_as(clip), rtol=0, atol=1e-6)
    assert len({float(clip.sum()) for clip in made}) == 8


def test_views_on_the_device_are_those_of_the_workers(tmp_path: Path) -> None:
    videos(tmp_path)
    settings = {"clips": 2, "speeds": (1, 2), "views": RandomViews(count=1, size=8, saturation=0.4, hue=0.1)}
    for more in ({}, {"clips": 1, "speeds": (1,)}):
        batches = []
        for place in ("workers", "device"):
            data = ready(tmp_path, views_on=place, **settings | more)
            batch = next(iter(data.train_dataloader()))
            batches.append(data.on_after_batch_transfer(batch, 0))
        one, other = batches
        assert one.keys() == other.keys()
        for name in one:
            torch.testing.assert_close(one[name], other[name], rtol=0, atol=2e-4)


def test_a_folder_that_is_not_here_is_planned_with_black_clips_of_its_batches(tmp_path: Path) -> None:
    views = RandomViews(count=1, size=8)
    for settings, kind in (
        ({}, ClipBatch),
        ({"clips": 2, "speeds": (1, 2), "views": views}, ClipsBatch),
        ({"clips": 2, "views": views, "views_on": "device"}, DrawnClipsBatch),
    ):
        data = folder_of(tmp_path / "none", **settings)
        batch = data.stand_in()
        assert batch is not None
        assert data.batch_type is kind
        require_declared(batch, kind, "VideoFolder")
        finished = data.on_after_batch_transfer(batch, 0)
        assert all(view.shape == (2, 3, 4, 8, 8) for view in finished.get("views", []))
    videos(tmp_path)
    assert folder_of(tmp_path).stand_in() is None


def test_a_folder_of_videos_resumes_at_the_next_sample(tmp_path: Path) -> None:
    videos(tmp_path)

    def batches(count: int, state: dict[str, Any] | None = None, workers: int = 0) -> tuple[list[Any], Any]:
        loader = ready(tmp_path, views=RandomViews(count=1), num_workers=workers).train_dataloader()
        if state is not None:
            loader.load_state_dict(state)
        seen = []
        while len(seen) < count:
            for batch in loader:
                seen.append(batch)
                if len(seen) == count:
                    break
        return seen, loader.state_dict()

    straight, _ = batches(5)
    first, state = batches(2)
    rest, _ = batches(3, state, workers=1)
    for one, other in zip(straight, first + rest, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)
    write_video(tmp_path / "in" / "6.mkv", numbered(24, SIDE))
    with pytest.raises(UserError, match="checkpoint"):
        ready(tmp_path, val_share=0.3).train_dataloader().load_state_dict(state)


def test_an_index_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    videos(tmp_path, 3)
    one = ready(tmp_path).train.sample(0, 1)  # type: ignore[union-attr]
    monkeypatch.setattr(indices, "index_of", None)
    other = ready(tmp_path).train.sample(0, 1)  # type: ignore[union-attr]
    assert torch.equal(one["clip"], other["clip"])
    write_video(tmp_path / "in" / "0.mkv", numbered(9, SIDE))
    with pytest.raises(TypeError, match="NoneType"):
        ready(tmp_path)


def test_shots_are_samples_and_those_of_one_video_are_divided(tmp_path: Path) -> None:
    colours = np.zeros((30, SIDE, SIDE, 3), np.uint8)
    for number in range(30):
        colours[number, ..., number // 6 % 3] = 200 if number < 28 else 0  # five shots, and two frames of black
    write_video(tmp_path / "in" / "film.mkv", colours)
    data = ready(tmp_path, samples="shots", frames=4, val_share=0.2)
    assert data.train is not None
    assert (len(data.train), len(data.val)) == (4, 1)
    held = {int(data.val.sample(0, 0)["frames"][0]) // 6}
    for place in range(4):
        for seed in range(3):
            sample = data.train.sample(place, seed)
            assert len({frame // 6 for frame in sample["frames"].tolist()} - held) == 1
            assert float(sample["clip"].std(dim=(1, 2, 3)).max()) < 0.05  # of one colour throughout


def test_bad_videos_are_named_and_can_be_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    videos(tmp_path, 4)
    good = (tmp_path / "in" / "0.mkv").read_bytes()
    write_video(tmp_path / "in" / "short.mkv", numbered(3, SIDE))
    (tmp_path / "in" / "cut.mkv").write_bytes(good[: len(good) // 2])
    (tmp_path / "in" / "text.mp4").write_text("no video")
    with pytest.raises(UserError) as refused:
        ready(tmp_path)
    for said in (
        "short.mkv: it is too short",
        "cut.mkv: it is cut short",
        "text.mp4: it is damaged, or no MP4",
        "skip_damaged=true",
    ):
        assert said in str(refused.value)
    data = ready(tmp_path, skip_damaged=True)
    assert data.train is not None
    assert len(data.train) + len(data.val) == 4
    with pytest.raises(UserError, match=r"none of the 7 videos"):
        ready(tmp_path, frames=25)
    with pytest.raises(UserError, match="no readable videos are left for val: 1 for train, 0 for val"):
        ready(videos(tmp_path / "alone", 1).parent)


def test_damage_found_while_reading_names_the_file(tmp_path: Path) -> None:
    videos(tmp_path, 2)
    data = ready(tmp_path, batch_size=1)
    assert data.train is not None
    file = data.train.files[data.train.parts[0].video]
    write_video(file, numbered(3, SIDE))  # another one in its place
    with pytest.raises(UserError, match=rf"{file.name}: its frame"):
        data.train.sample(0, 3)
    data.train = replace(data.train, skip_damaged=True)
    with pytest.raises(Damaged, match=rf"{file.name}: its frame"):
        data.train.sample(0, 3)


def test_links_out_of_the_folder_are_not_followed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    videos(tmp_path, 3)
    outside = write_video(tmp_path / "out" / "x.mkv", numbered(24, SIDE))
    (tmp_path / "in" / "x.mkv").symlink_to(outside)
    assert len(ready(tmp_path).train or ()) == 2
    assert "1 links were left out" in capsys.readouterr().out


def test_an_empty_folder_and_wrong_settings_are_refused(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    with pytest.raises(UserError, match=r"\.webm"):
        ready(tmp_path)
    for name, wrong in {
        "frames": 0,
        "fps": 0.0,
        "clips": 0,
        "speeds": (1.0, -1.0),
        "cut": 1.5,
        "size": 0,
        "std": (1.0, 0.0, 1.0),
        "val_share": 1.0,
        "count": RandomViews(count=2),
    }.items():
        with pytest.raises(UserError, match=name):
            folder_of(tmp_path, **{"views" if name == "count" else name: wrong})
    for name, much in {"frames": 10**12, "speeds": (1.0, 1e300), "clips": 10**9, "size": 10**5}.items():
        with pytest.raises(UserError, match=name):
            folder_of(tmp_path, **{name: much})


def test_classes_are_folders_and_one_frame_is_a_clip(tmp_path: Path) -> None:
    for number in range(4):
        write_video(tmp_path / "in" / "ab"[number % 2] / f"{number}.mkv", numbered(1, SIDE))
    data = ready(tmp_path, frames=1, batch_size=1)
    assert data.classes == ("a", "b")
    (batch,) = [batch for batch in data.val_dataloader() if batch["label"].max() == 1][:1]
    assert batch["clip"].shape[1:] == (3, 1, SIDE, SIDE)
