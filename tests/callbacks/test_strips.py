"""Volumes and clips are drawn with names: which crop, which plane, which frames, how fast, whose."""

from typing import Any

import numpy as np
import pytest
import torch

from lightspan.callbacks.pictures.first_batch import FirstBatch
from lightspan.callbacks.pictures.strips import Strip, evenly_spaced, planes, strips_figure, strips_of
from lightspan.core.drawing import png
from lightspan.datamodules.shards.decoders import decode_image

UNIT = torch.zeros(1, 1, 1), torch.ones(1, 1, 1)


def test_a_volume_is_three_planes_with_the_head_and_the_right_where_radiologists_have_them():
    volume = torch.zeros(1, 2, 4, 6, 8)
    assert {part.shape for part in planes(volume)} == {(1, 1, 8, 8)}
    assert len(planes(volume)) == 6
    lit = torch.zeros(1, 1, 5, 5, 5)
    lit[0, 0, 4, 4, 4], lit[0, 0, 2, 4, 4], lit[0, 0, 4, 2, 4], lit[0, 0, 4, 4, 2] = 1, 2, 3, 4
    axial, coronal, sagittal = (part[0, 0] for part in planes(lit))
    assert axial[0, 0] == 2  # front above, right on the left
    assert coronal[0, 0] == 3  # head above, right on the left
    assert sagittal[0, 0] == 4  # head above, front on the left


def crops(sides: tuple[int, ...] = (4, 4, 4)) -> dict[str, Any]:
    """Of two volumes a grid of 1 x 1 x 2 base crops and one crop, each as bright as its number."""
    return {
        "views": [torch.full((2, 1, *sides), number / 2) for number in range(3)],
        "spacing": torch.ones(2, 3),
        "corner": torch.tensor([[0, 0, 0], [0, 0, 4], [0, 0, 1]]).expand(2, 3, 3),
        "overlap": torch.tensor([[[0.25, 0.75]], [[0.0, 1.0]]]),
        "label": torch.tensor([0, 1]),
        "index": torch.tensor([5, 0]),
    }


def test_base_crops_are_told_from_others_by_name_place_and_how_much_of_these_lies_in_them():
    first, second = strips_of(crops(), 8, ["Ada"], ["ill", "well"])
    assert (first.title, second.title) == ("sample 5, ill", "Ada, well")
    assert first.rows == ["axial", "coronal", "sagittal"]
    bases = ["base 1\nat 0, 0, 0", "base 2\nat 0, 0, 4"]
    assert first.columns == [*bases, "crop 1\nat 0, 0, 1\n75% in base 2\n25% in base 1"]
    assert second.columns == [*bases, "crop 1\nat 0, 0, 1\n100% in base 2"]
    assert first.first == 2
    assert first.pictures_RKCHW.shape == (3, 3, 1, 4, 4)
    assert torch.equal(first.pictures_RKCHW[:, :, 0, 0, 0], torch.tensor([[0, 0.5, 1]] * 3))


def test_crops_without_a_grid_have_no_base_crops_and_channels_have_rows_of_their_own():
    batch = crops()
    del batch["overlap"]
    batch["views"] = [view.expand(-1, 2, -1, -1, -1) for view in batch["views"]]
    (strip,) = strips_of(batch, 1, channels=["t1", "t2"])
    assert strip.first == 0
    assert strip.columns[0] == "crop 1\nat 0, 0, 0"
    assert strip.rows == [f"{name}\n{plane}" for name in ("t1", "t2") for plane in ("axial", "coronal", "sagittal")]
    assert strips_of(batch, 1)[0].rows[3] == "channel 2\naxial"


def test_of_single_volumes_each_is_a_row():
    batch = {"volume": torch.rand(3, 1, 2, 4, 5), "spacing": torch.ones(3, 3), "index": torch.arange(3)}
    (strip,) = strips_of(batch, 2, ["a", "b", "c"])
    assert (strip.rows, strip.columns) == (["a", "b"], ["axial", "coronal", "sagittal"])
    assert strip.pictures_RKCHW.shape == (2, 3, 1, 5, 5)
    one_view = {**batch, "views": [batch["volume"]], "corner": torch.zeros(3, 1, 3)}
    (same,) = strips_of(one_view, 2, ["a", "b", "c"])
    assert torch.equal(same.pictures_RKCHW, strip.pictures_RKCHW)
    assert same[1:] == strip[1:]


def clips(T: int = 3) -> dict[str, Any]:
    """Of two videos one start at two speeds, each frame as bright as its number in the video."""
    frames = torch.stack([torch.arange(T) + 4, 2 * torch.arange(T) + 4]).expand(2, 2, T)
    views = [(frames[:, clip, None, :, None, None] / 40).expand(2, 3, T, 8, 8) for clip in range(2)]
    fps = torch.tensor([[25, 12.5]]).expand(2, 2)
    return {"views": views, "fps": fps, "frames": frames, "label": torch.zeros(2).long(), "index": torch.arange(2)}


def test_clips_of_a_video_are_below_one_another_and_say_which_frames_they_show_and_how_fast():
    first, second = strips_of(clips(), 8, ["kitchen.mp4", "\x1b.mp4"])
    assert (first.title, second.title) == ("kitchen.mp4", "\\x1b.mp4")
    assert first.rows == ["frames 4 to 6\n25 a second", "frames 4 to 8\n12.5 a second, 2 x as fast"]
    assert torch.equal(first.pictures_RKCHW[:, :, 0, 0, 0] * 40, torch.tensor([[4.0, 5, 6], [4, 6, 8]]))
    long = strips_of(clips(31), 8)
    assert long[0].pictures_RKCHW[0, :, 0, 0, 0].mul(40).tolist() == pytest.approx([*range(4, 35, 2)])


def test_of_single_clips_each_is_a_row():
    batch = clips()
    single = {"clip": batch["views"][1], "fps": batch["fps"][:, 1], "frames": batch["frames"][:, 1]}
    (strip,) = strips_of({**single, "index": batch["index"]}, 8)
    assert strip.rows == [f"sample {number}\nframes 4 to 8\n12.5 a second" for number in range(2)]
    assert strip.pictures_RKCHW.shape == (2, 3, 3, 8, 8)


def test_what_is_neither_a_volume_nor_a_clip_of_pixels_has_no_strips():
    assert strips_of({"image": torch.rand(2, 3, 4, 4), "index": torch.arange(2)}, 8) == []
    latents = {"clip": torch.rand(2, 4, 3, 8, 8), "fps": torch.ones(2), "index": torch.arange(2)}
    assert strips_of(latents, 8) == []
    assert strips_of([torch.rand(2, 3)], 8) == []


def test_a_strip_is_drawn_picture_by_picture_with_its_names_in_one_range():
    pictures = torch.arange(2 * 3).view(2, 3, 1, 1, 1) / 5 * torch.ones(2, 3, 1, 4, 4)
    figure = strips_figure([Strip(pictures, "a $ b $", ["up", "down"], ["x", "y", "z"], first=1)] * 2, UNIT)
    axis, other = figure.axes
    assert axis.get_title("left") == other.get_title("left") == "a $ b $"
    assert [label.get_text() for label in axis.get_yticklabels()] == ["up", "down"]
    assert [label.get_text() for label in axis.get_xticklabels()] == ["x", "y", "z"]
    shown = np.asarray(axis.images[0].get_array())
    assert shown.shape == (8, 12, 3)
    np.testing.assert_allclose(shown[::4, ::4, 0], pictures[..., 0, 0, 0])
    assert decode_image(png(figure)).shape[2] == pytest.approx(150 * (3 * 0.85 + 1.6), abs=2)


def test_the_callback_names_samples_as_the_data_do(make_trainer, tmp_path, monkeypatch: pytest.MonkeyPatch):
    class Data:
        sample_names = ("Ada", "Bob", "Cyd", "Dan", "Eve", "Fay")
        bounds = UNIT

    drawn = list[Strip]()
    monkeypatch.setattr(
        "lightspan.callbacks.pictures.first_batch.strips_figure",
        lambda strips, bounds: drawn.extend(strips) or strips_figure(strips, bounds),
    )
    callback, trainer = FirstBatch(str(tmp_path), rows=2), make_trainer()
    trainer.datamodule = Data()
    callback.on_train_batch_start(trainer, None, crops(), 0)
    assert [strip.title for strip in drawn] == ["Fay", "Ada"]
    assert decode_image((tmp_path / "first-batch.png").read_bytes()).shape[0] == 3


def test_numbers_are_spread_over_the_whole():
    assert evenly_spaced(10, 4).tolist() == [0, 3, 6, 9]
    assert evenly_spaced(2, 4).tolist() == [0, 1]
