"""`--videos FOLDER`: what of a recipe follows from the user's videos, and what stays."""

from pathlib import Path
from typing import Any

import pytest
from video_files import numbered, write_video

from lightspan.cli.config.resolve import resolve
from lightspan.cli.config.user_files import USER_FILES, with_files
from lightspan.cli.main import main
from lightspan.core.errors import UserError

VIDEOS = next(own for own in USER_FILES if own.option == "--videos")
RECIPE, PAIRS = "masked/videomae_small", "contrastive/rspnet"


def videos(folder: Path, count: int = 6, frames: int = 12) -> Path:
    for number in range(count):
        write_video(folder / f"{number}.mkv", numbered(frames))
    return folder


def test_the_folder_replaces_the_data_and_the_networks_channels_follow(tmp_path: Path) -> None:
    before, after = resolve(RECIPE), with_files(VIDEOS, RECIPE, (), videos(tmp_path / "in"), ["data.init_args.fps=10"])
    data = after.config["data"]
    assert data["class_path"] == VIDEOS.data
    given, kept = data["init_args"], before.config["data"]["init_args"]
    assert (given["folder"], given["frames"], given["size"]) == (str(tmp_path / "in"), kept["frames"], kept["size"])
    assert (given["batch_size"], given["fps"]) == (4, 10)
    assert after.config["model"]["init_args"]["backbone"]["init_args"]["in_chans"] == 3
    assert after.about["title"] == f"{RECIPE} on the videos of in"
    assert after.notes == [
        f"--videos: 6 videos in {tmp_path / 'in'}",
        "model.init_args.backbone.init_args.in_chans=3",
        "data.init_args.batch_size=4, since there are few videos",
        "trainer.callbacks.probes left out: probes need classes, and the folder has none",
    ]
    assert "probes" not in after.config["trainer"]["callbacks"]


def test_train_and_validation_folders_are_taken_and_classes_bring_probes(tmp_path: Path) -> None:
    for place in ("train/a", "train/b", "val/a", "val/b"):
        videos(tmp_path / "in" / place, 1)
    found = with_files(VIDEOS, RECIPE, (), tmp_path / "in", []).config
    assert found["data"]["init_args"]["val_folder"] == str(tmp_path / "in" / "val")
    assert "probes" in found["trainer"]["callbacks"]


def test_a_method_that_compares_clips_keeps_their_starts_speeds_and_views(tmp_path: Path) -> None:
    before, after = (one.config for one in (resolve(PAIRS), with_files(VIDEOS, PAIRS, (), videos(tmp_path / "in"), [])))
    assert after["data"]["class_path"] == VIDEOS.data
    for name in ("clips", "speeds", "views", "frames"):
        assert after["data"]["init_args"][name] == before["data"]["init_args"][name]
    assert (after["data"]["init_args"]["clips"], after["data"]["init_args"]["speeds"]) == (2, [1, 2])
    assert after["model"]["init_args"]["backbone"]["init_args"]["in_chans"] == 3


def test_recipes_of_other_data_and_empty_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="contrastive/simclr is a recipe for data of modality image"):
        with_files(VIDEOS, "contrastive/simclr", (), videos(tmp_path / "in", 1), [])
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match="the folder is empty"):
        with_files(VIDEOS, RECIPE, (), tmp_path / "none", [])
    assert main(["check", RECIPE, "--videos", str(tmp_path / "in"), "--images", str(tmp_path), "--fast"]) == 2


def test_check_names_damaged_videos(tmp_path: Path, capsys: Any) -> None:
    folder = videos(tmp_path / "in", 3)
    assert main(["check", RECIPE, "--videos", str(folder), "--fast"]) == 0
    (folder / "1.mkv").write_bytes((folder / "0.mkv").read_bytes()[:-9])
    assert main(["check", RECIPE, "--videos", str(folder), "--fast"]) == 2
    assert "1 of 3 videos cannot be read: 1.mkv (it is cut short" in capsys.readouterr().err


@pytest.mark.runs
def test_a_method_that_tells_videos_apart_refuses_a_single_one_and_says_how_to_have_more(
    tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    """One of two is held out."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    given = [PAIRS, "--videos", str(videos(tmp_path / "in", 2, 20)), "trainer.max_steps=1", "trainer.accelerator=cpu"]
    given += ["data.init_args.num_workers=0", "--run", str(tmp_path / "run")]
    assert main(["fit", *given]) == 2
    said = capsys.readouterr().err
    assert "1 sample to train on, and RSPNet tells 2 or more apart" in said
    for way_out in ("add videos", "data.init_args.val_folder", "data.init_args.samples=shots"):
        assert way_out in said


@pytest.mark.runs
@pytest.mark.parametrize("recipe", [RECIPE, PAIRS])
def test_one_line_trains_on_a_folder_and_draws_it(recipe: str, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = videos(tmp_path / "in", frames=20)
    given = [recipe, "--videos", str(folder), "trainer.max_steps=2", "trainer.accelerator=cpu"]
    given += ["data.init_args.num_workers=0", "trainer.log_every_n_steps=1"]
    assert main(["fit", *given, "--dry-run"]) == 0
    assert not (tmp_path / "cache" / "lightspan" / "videos").exists()
    assert main(["fit", *given, "--run", str(tmp_path / "run")]) == 0
    assert (tmp_path / "run" / "pictures" / "first-batch.png").stat().st_size > 1000
    assert "report:" in capsys.readouterr().out
