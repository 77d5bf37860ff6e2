"""Pictures with captions that move: clips of known motion with questions and answers, from Tux Paint's stamps.

Shapes: C = 3 channels, T frames, S pixels a side.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from lightspan.core.errors import UserError
from lightspan.core.files.places import ReadPath
from lightspan.core.ranges import require_in, require_numbers
from lightspan.datamodules.image.augment.fields import ImageFields
from lightspan.datamodules.image.sets.small import per_channel
from lightspan.datamodules.image_text.captioned import Captioned
from lightspan.datamodules.image_text.stamps import Stamps
from lightspan.datamodules.loading.ranks import say
from lightspan.datamodules.loading.sample_sets import SampleSets
from lightspan.datamodules.text.tokenized import require_length
from lightspan.datamodules.video.answers import PLACE, Questions
from lightspan.datamodules.video.batch import ClipTextBatch

FPS = 25.0
WAYS = {
    "right": (0, 1),
    "down right": (1, 1),
    "down": (1, 0),
    "down left": (1, -1),
    "left": (0, -1),
    "up left": (-1, -1),
    "up": (-1, 0),
    "up right": (-1, 1),
}
"""Rows and columns to which it is from the middle."""
MIDDLE, NEAR = "middle", 0.15
"""Of half the side: so far from the middle a place is still called that."""
STRAIGHT = "right", "down", "left", "up"
TURNS = {"round right": 1, "round left": -1}
"""Once round a circle, clockwise or not."""
SWINGS = {"to and fro": (0, 1), "up and down": (1, 0)}
"""One way, all the way back beyond the beginning, and to it."""
MOTIONS = *STRAIGHT, *TURNS, *SWINGS
"""Of the last four, a clip begins and ends at one place."""
Question = Literal["caption", "place", "motion"]
ASKED: dict[Question, str] = {
    "caption": f"{PLACE} what is it? ",
    "place": f"{PLACE} where is it? ",
    "motion": f"{PLACE} where does it go? ",
}


def place_of(offset_2: np.ndarray) -> str:
    """What a place is called: the nearest of eight ways from the middle, or the middle.

    Args:
        offset_2: rows and columns from the middle of the picture, in units of half its side.
    """
    signs = tuple(int(sign) for sign in np.sign(offset_2) * (np.abs(offset_2) > NEAR))
    return next((way for way, to in WAYS.items() if to == signs), MIDDLE)


class MovingStamps(SampleSets):
    """761 stamps for training and 190 for validation, on white, each moving in one of eight ways: batches of
    `ClipTextBatch`.

    What is asked is drawn for a training sample: what the picture shows, as its caption says; where the stamp is half
    way through the clip, one of eight ways from the middle or the middle; where it goes, one of `MOTIONS`. Motion,
    place, size and question are functions of a training sample's seed, new in each epoch, and in evaluation of its
    number. Half way, nothing tells where a stamp goes.

    Args:
        tokenizer: the language model's own.
        frames: T, at least 1; of one frame, half way, no motion is asked.
        size: S, at least 16.
        share: least and most of the picture's side that the stamp has, in (0, 1).
        path: least and most that it goes straight on in a clip, in shares of the side, at least 0; it turns and
            swings as far.
        questions: of training.
        val_questions: of validation, in turn; None takes those of training.
        length: tokens of question and answer, at least 3, without those of the clip.
        root: folder of the stamps; None means the system package tuxpaint-stamps-default.
        mean, std: of each channel of pixels in [0, 1], for standardising.
        batch_size: clips of one optimiser step over all ranks.
        settings: the others of `SampleSets`.
    Raises: UserError at setup if there are no stamps.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        frames: int = 8,
        size: int = 64,
        share: tuple[float, float] = (0.2, 0.3),
        path: tuple[float, float] = (0.25, 0.45),
        questions: Sequence[Question] = ("caption", "place", "motion"),
        val_questions: Sequence[Question] | None = None,
        length: int = 64,
        root: ReadPath | None = None,
        mean: tuple[float, float, float] = (0.5, 0.5, 0.5),
        std: tuple[float, float, float] = (0.5, 0.5, 0.5),
        batch_size: int = 32,
        **settings: Any,
    ) -> None:
        super().__init__(batch_size, **settings)
        require_in("[1, inf)", frames=frames)
        require_in("[16, inf)", size=size)
        require_numbers(3 * frames * size**2, frames=frames, size=size)
        require_in("(0, 1)", share=share)
        require_in("[0, inf)", path=path)
        require_in("(0, inf)", std=std)
        require_length(length)
        val_questions = questions if val_questions is None else val_questions
        if not questions or not val_questions or (frames == 1 and "motion" in (*questions, *val_questions)):
            raise UserError(
                f"questions={[*questions]} and val_questions={[*val_questions]} must name at least one, of clips of "
                f"frames={frames}; of one frame, caption and place"
            )
        if share[0] > share[1] or path[0] > path[1]:
            raise UserError(f"share={[*share]} and path={[*path]} must each be the least and the most")
        self.stamps = Stamps(root, tokenizer=tokenizer)
        self.asks = Questions(tokenizer)
        self.motion = Motion(frames, size, share, path)
        self.asked = {"train": tuple(questions), "val": tuple(val_questions)}
        self.length, self.image = length, ImageFields(per_channel(mean), per_channel(std))

    def setup(self, stage: str | None = None) -> None:
        if self.train is not None:
            return
        training, test = self.stamps.load()
        self.train = self._samples(training, "train", fixed=False)
        self.bank = self._samples(training, "train", fixed=True)
        self.val = self._samples(test, "val", fixed=True)
        say(f"videos: {len(self.train)} moving stamps for training and {len(self.val)} for validation")

    def _samples(self, stamps: Captioned, part: str, fixed: bool) -> "StampSamples":
        return StampSamples(stamps, self.motion, self.image, self.asks, self.asked[part], self.length, fixed)


@dataclass(frozen=True)
class Motion:
    """How stamps move; see `MovingStamps`."""

    frames: int
    size: int
    share: tuple[float, float]
    path: tuple[float, float]

    def places(self, motion: str, draws: np.random.Generator) -> tuple[np.ndarray, np.ndarray, float]:
        """(float64 [T 2], rows and columns from the middle in units of half the side; those half way, float64 [2]; the
        stamp's share of a side).
        """
        share, path, phase = draws.uniform(*self.share), draws.uniform(*self.path), draws.uniform(0, 2 * np.pi)
        # The same room for all motions, none of which goes further than `path`: the place half way tells nothing.
        room = max(0.0, 1 - share - path)
        half_way_2 = draws.uniform(-room, room, 2)
        time_T1 = (np.linspace(-1, 1, self.frames) if self.frames > 1 else np.zeros(1))[:, None]
        if motion in TURNS:
            angle_T1 = phase + TURNS[motion] * np.pi * time_T1
            circle_T2 = np.concatenate([np.sin(angle_T1) - np.sin(phase), np.cos(angle_T1) - np.cos(phase)], axis=1)
            return half_way_2 + path / 2 * circle_T2, half_way_2, share
        if motion in SWINGS:
            return half_way_2 + path * np.sin(np.pi * time_T1) * np.array(SWINGS[motion]), half_way_2, share
        return half_way_2 + path * time_T1 * np.array(WAYS[motion]), half_way_2, share

    def drawn(self, stamp_CPP: np.ndarray, places_T2: np.ndarray, share: float) -> Tensor:
        """uint8 [T C S S], on white.

        Args:
            stamp_CPP: uint8.
        """
        ink = 1 - torch.from_numpy(stamp_CPP).float() / 255
        maps = torch.zeros(len(places_T2), 2, 3)
        maps[:, 0, 0] = maps[:, 1, 1] = 1 / share
        maps[:, :, 2] = -torch.from_numpy(places_T2).float().flip(1) / share
        grid = F.affine_grid(maps, [len(maps), len(ink), self.size, self.size], align_corners=False)
        found = F.grid_sample(ink.expand(len(maps), -1, -1, -1), grid, align_corners=False)
        return ((1 - found) * 255).round().to(torch.uint8)


@dataclass(frozen=True)
class StampSamples:
    """The clips of some stamps, with a question each.

    Args:
        fixed: by a sample's number alone.
        stamps, motion, image, asks, questions, length: as in `MovingStamps`.
    """

    batch_type = ClipTextBatch

    stamps: Captioned
    motion: Motion
    image: ImageFields
    asks: Questions
    questions: tuple[Question, ...]
    length: int
    fixed: bool

    def __len__(self) -> int:
        return len(self.stamps.labels)

    def sample(self, index: int, seed: int) -> dict[str, Any]:
        draws = np.random.default_rng([index, 0] if self.fixed else [seed, 1])
        motion = MOTIONS[int(draws.integers(len(MOTIONS)))]
        places_T2, half_way_2, share = self.motion.places(motion, draws)
        number = index % len(self.questions) if self.fixed else int(draws.integers(len(self.questions)))
        question = self.questions[number]
        answer = {
            "caption": self.stamps.captions[index],
            "place": place_of(half_way_2),
            "motion": motion,
        }[question]
        frames_TCSS = self.motion.drawn(self.stamps.images[index], places_T2, share)
        text = self.asks.tokens(f"stamp {index}", ASKED[question], answer)
        return {
            "clip": self.image(frames_TCSS, seed)["image"].transpose(0, 1),
            "fps": torch.tensor(FPS),
            "frames": torch.arange(self.motion.frames),
            **text.fields(self.length),
            "index": torch.tensor(index),
        }
