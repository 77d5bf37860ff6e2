"""Videos of the user's with questions and answers, or captions: a line of a file for each.

Shapes: T frames of a clip, C H W frames.
"""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lightspan.core.errors import UserError
from lightspan.core.files.atomic import expanded
from lightspan.core.files.foreign import whole_text
from lightspan.core.files.places import CachePath, PathUse, ReadPath
from lightspan.core.ranges import require_in, require_numbers
from lightspan.datamodules.image.augment.fields import ImageFields
from lightspan.datamodules.image.packed import Fit
from lightspan.datamodules.image.sets.small import per_channel
from lightspan.datamodules.loading.damage import report_damage
from lightspan.datamodules.loading.order import content_of
from lightspan.datamodules.loading.ranks import say
from lightspan.datamodules.loading.sample_sets import SampleSets, require_val_size, split_rows
from lightspan.datamodules.text.documents import Skipped
from lightspan.datamodules.text.json_lines import json_lines, text_in
from lightspan.datamodules.text.tokenized import require_length
from lightspan.datamodules.video.answers import AnsweredQuestion, Questions, require_place
from lightspan.datamodules.video.batch import ClipTextBatch
from lightspan.datamodules.video.clips import decoded
from lightspan.datamodules.video.indices import IndexCache
from lightspan.datamodules.video.reader import VideoIndex

DESCRIBE = "USER: <video>\nDescribe the video. ASSISTANT: "


class Film(NamedTuple):
    """A line of the file. where: of the line, for messages; video: relative to the folder."""

    where: str
    video: str
    question: str
    answer: str


class FilmAnswer(NamedTuple):
    """A sample: which video, and what is said of it."""

    video: int
    text: AnsweredQuestion


def spread(count: int, frames: int, draws: np.random.Generator | None = None) -> np.ndarray:
    """Which of a video's frames a clip has, int64 [T]: one of each of T parts of equal length, in their order. A video
    of fewer frames repeats them as evenly as can be.

    Args:
        count: frames of the video, at least 1.
        draws: of a place in each part, where these have several frames; None takes the middle.
    """
    within_T = np.full(frames, 0.5) if draws is None or count <= frames else draws.random(frames)
    return np.minimum(((np.arange(frames) + within_T) * count / frames).astype(np.int64), count - 1)


@dataclass(frozen=True)
class FilmSamples:
    """Samples of `ClipTextBatch`, whose clips are spread over the whole of a video.

    Args:
        files, indices: the videos.
        rows: the samples.
        frames: T.
        image: makes the frames.
        size, fit: of a frame, as in `lightspan.datamodules.image.packed.fitted`.
        length: tokens of a text.
        drawn: whether frames are drawn from a sample's seed; otherwise they are the middles of their parts.
        skip_damaged: True raises `Damaged` for a video that cannot be read, so that the loader replaces it.
    """

    batch_type = ClipTextBatch

    files: Sequence[Annotated[Path, PathUse.READ]]
    indices: Sequence[VideoIndex]
    rows: Sequence[FilmAnswer]
    frames: int
    image: ImageFields
    size: int
    fit: Fit
    length: int
    drawn: bool
    skip_damaged: bool = False

    def __len__(self) -> int:
        return len(self.rows)

    def sample(self, index: int, seed: int) -> dict[str, Any]:
        video, text = self.rows[index]
        found = self.indices[video]
        numbers = spread(len(found), self.frames, np.random.default_rng(seed) if self.drawn else None)
        made = self.image(self._read(video, numbers), seed)
        return {
            "clip": made["image"].transpose(0, 1),
            "fps": torch.tensor(self.frames * found.fps / len(found), dtype=torch.float32),
            "frames": torch.from_numpy(numbers),
            **text.fields(self.length),
            "index": torch.tensor(index),
        }

    def _read(self, video: int, numbers_T: np.ndarray) -> Tensor:
        """uint8 [T C H W]."""
        return decoded(self.files[video], self.indices[video], numbers_T, self.size, self.fit, self.skip_damaged)


@dataclass(frozen=True)
class BlackFilms(FilmSamples):
    """Those of videos that are not here: every frame is black."""

    def _read(self, video: int, numbers_T: np.ndarray) -> Tensor:
        return torch.zeros(*numbers_T.shape, 3, self.size, self.size, dtype=torch.uint8)


class CaptionedVideos(SampleSets):
    """Videos below a folder, and a file with a line for each question about one, or caption: `ClipTextBatch`.

    A clip has T frames, one of each of T parts of the whole video: in training drawn anew in each epoch, elsewhere the
    middle ones. A video of no more than T frames shows all of them, repeated evenly. Frames are
    upright, RGB and square. A video may have any number of lines; those without a line are not read.

    A text that is longer than `length` is cut at its end. Left out, and counted in a line at the start, are those of
    which nothing is left to learn then, and those in which someone says a special token of the tokenizer.

    Args:
        folder: of the videos: MP4, MOV, MKV, WebM, AVI and MPEG files.
        path: lines such as {"video": "kitchen/7.mp4", "question": "<video>\\nWhat is cut?", "answer": "An onion."},
            without a question {"video": "kitchen/7.mp4", "answer": "Someone cuts an onion."}; or a CSV file with the
            columns video, question and answer, or video and answer.
        tokenizer: the language model's own.
        val_path: likewise, to validate on; None takes `val_size` of the first file.
        val_size: lines, evenly spaced, at least 1; None takes a tenth of the file, at most 1,000.
        question: of lines without one; `<video>` is where the clip stands, once.
        frames: T.
        size: height and width of a frame in pixels.
        fit: "crop" scales the shorter side and cuts out the middle, "pad" puts black around the whole.
        length: tokens of question and answer, at least 3, without those of the clip.
        mean, std: of each channel of pixels in [0, 1], for standardising.
        batch_size: lines of one optimiser step over all ranks.
        skip_damaged: True trains without videos that cannot be read, and names those found at the start; one that
            cannot be decoded later is replaced by another sample, drawn from the seed.
        cache_dir: folder of the videos' indices; None means ~/.cache/lightspan/videos.
        settings: the others of `SampleSets`.
    Raises: UserError at setup for a file that cannot be read, a line without a video or an answer or with the clip in
        no place, naming the line, and for videos that are missing or damaged, all of which are named.
    """

    def __init__(
        self,
        folder: ReadPath,
        path: ReadPath,
        tokenizer: PreTrainedTokenizerBase,
        val_path: ReadPath | None = None,
        val_size: int | None = None,
        question: str = DESCRIBE,
        frames: int = 16,
        size: int = 336,
        fit: Fit = "crop",
        length: int = 512,
        mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073),
        std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711),
        batch_size: int = 16,
        skip_damaged: bool = False,
        cache_dir: CachePath | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(batch_size, **settings)
        require_length(length)
        require_val_size(val_size)
        require_in("[1, inf)", frames=frames, size=size)
        require_numbers(3 * frames * size**2, frames=frames, size=size)
        require_in("(0, inf)", std=std)
        require_place("data.init_args.question", question)
        self.folder, self.path, self.val_path, self.val_size = folder, path, val_path, val_size
        self.tokenizer, self.questions, self.question = tokenizer, Questions(tokenizer), question
        self.image = ImageFields(per_channel(mean), per_channel(std))
        self.shape: tuple[int, int, Fit, int] = frames, size, fit, length
        self.length, self.skip_damaged, self.cache = length, skip_damaged, IndexCache(cache_dir)

    def blank(self) -> FilmSamples | None:
        """Two black clips with texts that are full, where the file is not here."""
        if expanded(self.path, "data.init_args.path").exists():
            return None
        text = AnsweredQuestion(np.zeros(self.length, np.int32), np.arange(self.length) > 0, 0)
        video = VideoIndex(np.arange(2), 0.04, np.empty(0, np.float32))
        return self._samples(BlackFilms, [], [video], [FilmAnswer(0, text)] * 2)

    def setup(self, stage: str | None = None) -> None:
        """Reads the lines and the indices of their videos, once."""
        if self.train is not None:
            return
        training, validation = split_rows(self._films, self.path, self.val_path, self.val_size, "lines")
        folder = expanded(self.folder, "data.init_args.folder")
        names = sorted({film.video for film in (*training, *validation)})
        files = [folder / name for name in names]
        if missing := [str(file) for file in files if not file.is_file()]:
            raise UserError(
                f"{len(missing):,} of {len(files):,} videos that {self.path} names are not in {folder}, such as "
                f"{', '.join(missing[:3])}; correct the lines, or data.init_args.folder"
            )
        indices = self.cache.indexed(files, False, self.num_workers)
        damage = [(file, index) for file, index in zip(files, indices, strict=True) if isinstance(index, str)]
        report_damage(damage, len(files), "videos", self.skip_damaged)
        kept = [index if isinstance(index, VideoIndex) else _NONE for index in indices]
        sound = {name: at for at, name in enumerate(names) if kept[at] is not _NONE}
        skipped = Skipped()
        held = self._rows(validation, sound, skipped, "validation")
        rows = self._rows(training, sound, skipped, "training")
        self.train = self._samples(FilmSamples, files, kept, rows)
        self.bank = replace(self.train, drawn=False)
        self.val = replace(self.train, rows=held, drawn=False)
        self._content = content_of([array for row in rows for array in (np.array([row.video]), *row.text.content)])
        say(
            f"videos: {len(sound):,}, with {len(rows):,} answers to train on and {len(held):,} to validate on; clips of"
            f" {self.shape[0]} x {self.shape[1]} x {self.shape[1]}{skipped}"
        )

    def training_content(self) -> str:
        return self._content

    def _samples(
        self, kind: type[FilmSamples], files: Sequence[Path], indices: Sequence[VideoIndex], rows: Sequence[FilmAnswer]
    ) -> FilmSamples:
        frames, size, fit, length = self.shape
        return kind(files, indices, rows, frames, self.image, size, fit, length, True, self.skip_damaged)

    def _films(self, path: str, setting: str) -> list[Film]:
        found = lines_of(path, f"data.init_args.{setting}")
        films = []
        for where, line in found:
            question = line["question"] if isinstance(line, dict) and line.get("question") else self.question
            if not isinstance(question, str):
                raise UserError(f"{where} has a question that is no text")
            require_place(where, question)
            films.append(Film(where, text_in(where, line, "video"), question, text_in(where, line, "answer")))
        return films

    def _rows(self, films: Sequence[Film], sound: dict[str, int], skipped: Skipped, what: str) -> list[FilmAnswer]:
        rows = []
        for film in films:
            if film.video not in sound:
                continue
            if self.questions.special_in(film.question, film.answer):
                skipped.reasons["in which someone says a special token"] += 1
                continue
            text = self.questions.tokens(film.where, film.question, film.answer)
            if text.learned[: self.length].any():
                rows.append(FilmAnswer(sound[film.video], text))
            else:
                skipped.reasons[f"with nothing to learn in their first {self.length} tokens"] += 1
        if not rows:
            raise UserError(
                f"no line to use for {what} is left{skipped}; raise data.init_args.length={self.length}, or give "
                "other lines"
            )
        return rows


_NONE = VideoIndex(np.zeros(1, np.int64), 1.0, np.empty(0, np.float32))  # of a video that no sample is of


def lines_of(path: str, setting: str) -> list[tuple[str, Any]]:
    """(where a line stands, for messages; what it says by name) of a file of JSON Lines, or a CSV file whose first line
    has the names.

    Raises: UserError for a file that cannot be read, or has no line.
    """
    file = expanded(path, setting)
    if file.suffix.lower() != ".csv":
        return json_lines(path, setting, "line", "video and answer")
    try:
        rows = csv.DictReader(io.StringIO(whole_text(file), newline=""), strict=True)
        found = [(f"{file}, line {rows.line_num}", row) for row in rows]
    except (ValueError, csv.Error) as error:
        raise UserError(f"{setting}={file} is no CSV file: {error}") from error
    if not found:
        raise UserError(f"{setting}={file} has no line below its first, which names columns: video and answer")
    return found
