"""Videos with questions and answers: which frames a clip has, where it stands in the text, and what is learned."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import default_collate
from video_files import number_of, numbered, write_video

from lightspan.backbones.tokenizers import Letters
from lightspan.core.batches import require_declared
from lightspan.core.errors import UserError
from lightspan.datamodules.video.answers import Questions
from lightspan.datamodules.video.batch import ClipTextBatch
from lightspan.datamodules.video.captioned import CaptionedVideos, spread

SIDE = 16
LINES = [
    {"video": "a/0.mkv", "question": "<video>who? ", "answer": "tux"},
    {"video": "a/1.mkv", "question": "see <video>: ", "answer": "a gnu"},
    {"video": "a/1.mkv", "answer": "a gnu, grey"},
    {"video": "a/0.mkv", "question": "<video>how? ", "answer": "on foot"},
]


def data(folder: Path, lines: Any = LINES, name: str = "lines.jsonl", **settings: Any) -> CaptionedVideos:
    for number, frames in enumerate((12, 3)):
        if not (file := folder / "in" / "a" / f"{number}.mkv").exists():
            write_video(file, numbered(frames, SIDE, 10 * number))
    (folder / name).write_text(lines if isinstance(lines, str) else "\n".join(map(json.dumps, lines)))
    settings = {"frames": 4, "size": SIDE, "batch_size": 2, "length": 80, "val_size": 1} | settings
    return CaptionedVideos(
        str(folder / "in"),
        str(folder / name),
        Letters(),
        mean=(0.5,) * 3,
        std=(0.5,) * 3,
        cache_dir=str(folder / "cache"),
        **settings,
    )


def ready(folder: Path, **settings: Any) -> CaptionedVideos:
    made = data(folder, **settings)
    made.setup()
    return made


def said(sample: dict[str, Any], field: str = "mask") -> str:
    return Letters().decode(sample["tokens"][sample[field] > 0].tolist())


def test_frames_are_spread_over_the_video_and_repeated_evenly_where_there_are_too_few() -> None:
    assert spread(16, 4).tolist() == [2, 6, 10, 14]
    for count in range(1, 20):
        for frames in (1, 3, 4, 7):
            numbers = spread(count, frames)
            assert (np.diff(numbers) >= 0).all()
            repeats = np.bincount(numbers, minlength=count)
            assert set(repeats) <= ({0, 1} if frames <= count else {frames // count, -(-frames // count)})
            drawn = spread(count, frames, np.random.default_rng(count))
            assert (drawn >= np.floor(np.arange(frames) * count / frames)).all()
            assert (drawn < np.ceil(np.arange(1, frames + 1) * count / frames)).all()
            assert count > frames or drawn.tolist() == numbers.tolist()
    assert spread(1, 3).tolist() == [0, 0, 0]


def test_a_sample_shows_the_frames_that_it_names_beside_its_text(tmp_path: Path) -> None:
    made = ready(tmp_path)
    assert made.train is not None
    assert len(made.train) == 3
    drawn = [{tuple(made.train.sample(i, seed)["frames"].tolist()) for seed in range(12)} for i in range(3)]
    assert sorted(map(len, drawn))[0] == 1  # of the video with three frames
    assert sorted(map(len, drawn))[-1] > 6
    for samples in (made.train, made.bank, made.val):
        for index in range(len(samples)):
            sample = samples.sample(index, 7)
            first = 10 if len(set(sample["frames"].tolist())) < 4 else 0
            shown = [number_of((frame * 0.5 + 0.5).numpy() * 255) - first for frame in sample["clip"].unbind(1)]
            assert shown == sample["frames"].tolist()
    batch = default_collate([made.train.sample(index, 7) for index in range(3)])
    require_declared(batch, ClipTextBatch, "CaptionedVideos")
    found = {said(made.train.sample(i, 0), "learned"): said(made.train.sample(i, 0)) for i in range(3)}
    whole = ["<start>who? tux<end>", "<start>see : a gnu<end>", "<start>how? on foot<end>"]
    whole.append("<start>user: \ndescribe the video. assistant: a gnu, grey<end>")
    assert {*found.values(), said(made.val.sample(0, 0))} == {*whole}
    assert set(found) | {said(made.val.sample(0, 0), "learned")} == {
        "tux<end>",
        "a gnu<end>",
        "a gnu, grey<end>",
        "on foot<end>",
    }


def test_the_clip_stands_where_the_question_says() -> None:
    made = Questions(Letters())
    for question, at in (("<video>who? ", 1), ("see <video>: ", 5), ("who? <video>", 6)):
        found = made.tokens("line 1", question, "tux")
        assert found.clip_at == at
        assert Letters().decode(found.tokens.tolist()) == f"<start>{question.replace('<video>', '')}tux<end>"
        assert found.learned.sum() == 4  # with the end
        cut = found.fields(at + 2)
        assert cut["tokens"].shape == (at + 2,)


def test_csv_lines_are_as_good(tmp_path: Path) -> None:
    table = 'video,answer\na/0.mkv,"tux, on foot"\na/1.mkv,a gnu\n'
    made = ready(tmp_path, lines=table, name="lines.csv", question="<video>what? ")
    assert said(made.val.sample(0, 0)) + said(made.train.sample(0, 0)) in (  # type: ignore[union-attr]
        "<start>what? tux, on foot<end><start>what? a gnu<end>",
        "<start>what? a gnu<end><start>what? tux, on foot<end>",
    )


def test_long_answers_are_cut_and_those_without_room_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [*LINES[:2], {"video": "a/0.mkv", "question": f"<video>{'so ' * 20}", "answer": "no"}, LINES[0]]
    made = ready(tmp_path, lines=lines, length=9)
    assert made.train is not None
    assert "1 with nothing to learn in their first 9 tokens" in capsys.readouterr().out
    assert {int(made.train.sample(i, 0)["mask"].sum()) for i in range(len(made.train))} == {9}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"video": "a/0.mkv"}, "line 5 has no answer"),
        ({"video": "a/0.mkv", "answer": " "}, "line 5 has no answer"),
        ({"answer": "tux"}, "line 5 has no video"),
        ({"video": "a/0.mkv", "question": "who?", "answer": "tux"}, "line 5 has <video> 0 times"),
        ({"video": "a/0.mkv", "question": "<video><video>", "answer": "tux"}, "line 5 has <video> 2 times"),
        ({"video": "a/0.mkv", "question": 3, "answer": "tux"}, "line 5 has a question"),
        ({"video": "a/9.mkv", "answer": "tux"}, r"1 of 3 videos .*a/9\.mkv"),
    ],
)
def test_a_line_that_cannot_be_used_is_named(line: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        ready(tmp_path, lines=[*LINES, line])


def test_bad_settings_are_refused(tmp_path: Path) -> None:
    for setting, wrong in {"question": "what?", "frames": 0, "length": 2, "val_size": 0, "size": 0}.items():
        with pytest.raises(UserError, match=setting):
            data(tmp_path, **{setting: wrong})


def test_a_damaged_video_is_named_or_left_out(tmp_path: Path) -> None:
    data(tmp_path)
    (tmp_path / "in" / "a" / "2.mkv").write_bytes(b"no video")
    lines = [*LINES, {"video": "a/2.mkv", "answer": "nothing"}]
    with pytest.raises(UserError, match=r"2\.mkv"):
        ready(tmp_path, lines=lines)
    made = ready(tmp_path, lines=lines, skip_damaged=True)
    assert made.train is not None
    assert len(made.train) + len(made.val) in (3, 4)


def test_without_the_file_two_black_clips_with_full_texts_stand_in(tmp_path: Path) -> None:
    batch = CaptionedVideos(str(tmp_path), str(tmp_path / "none.jsonl"), Letters(), frames=2, size=16).stand_in()
    assert batch is not None
    require_declared(batch, ClipTextBatch, "CaptionedVideos")
    assert torch.equal(batch["clip"], batch["clip"][:, :, :1, :1, :1].expand_as(batch["clip"]))
    assert bool(batch["mask"].all())
