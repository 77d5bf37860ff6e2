"""Stamps go where their answers say, and no frame half way tells it."""

from itertools import product
from typing import Any

import numpy as np
import pytest
import torch

from lightspan.backbones.tokenizers import Letters
from lightspan.core.errors import UserError
from lightspan.datamodules.image_text.captioned import Captioned
from lightspan.datamodules.video.sets.moving_stamps import (
    ASKED,
    MOTIONS,
    STRAIGHT,
    SWINGS,
    TURNS,
    WAYS,
    Motion,
    MovingStamps,
    StampSamples,
    place_of,
)


def samples(monkeypatch: pytest.MonkeyPatch, part: str = "train", **settings: Any) -> StampSamples:
    """Of four black squares."""
    stamps = Captioned(np.zeros((4, 3, 32, 32), np.uint8), ["a tux", "a gnu", "a cat", "a dog"], np.zeros(4, np.int64))
    monkeypatch.setattr("lightspan.datamodules.image_text.stamps.Stamps.load", lambda self: (stamps, stamps))
    data = MovingStamps(Letters(), **{"frames": 5, "size": 40, "length": 40} | settings)
    data.setup()
    return getattr(data, part)


def said(sample: dict[str, Any]) -> tuple[str, str]:
    """Question and answer."""
    parts = (sample["mask"] - sample["learned"], sample["learned"])
    question, answer = (Letters().decode(sample["tokens"][part > 0].tolist()) for part in parts)
    return question.removeprefix("<start>"), answer.removesuffix("<end>")


def centres(sample: dict[str, Any]) -> np.ndarray:
    """Of what is not white, in pixels from the middle: [T 2]."""
    ink = (1 - sample["clip"].mean(dim=0)).numpy()
    row, column = np.mgrid[: ink.shape[1], : ink.shape[2]] - (ink.shape[1] - 1) / 2
    return np.stack([(ink * axis).sum(axis=(1, 2)) / ink.sum(axis=(1, 2)) for axis in (row, column)], axis=1)


def test_a_stamp_goes_where_the_answer_says(monkeypatch: pytest.MonkeyPatch) -> None:
    found, seen = samples(monkeypatch, questions=["motion"]), set()
    for seed in range(40):
        sample = found.sample(seed % 4, seed)
        question, motion = said(sample)
        assert question == ASKED["motion"].removeprefix("<video>")
        step_T2 = np.diff(centres(sample), axis=0)  # of four: there are five frames
        if motion in STRAIGHT:
            np.testing.assert_allclose(step_T2, np.tile(step_T2.mean(axis=0), (4, 1)), atol=0.7)
            way_2 = step_T2.mean(axis=0) / np.linalg.norm(step_T2.mean(axis=0))
            np.testing.assert_allclose(way_2, np.array(WAYS[motion]), atol=0.05)
        elif motion in TURNS:  # a quarter of the circle a step, to the right of the last one or to the left
            turned_T2 = TURNS[motion] * step_T2[:, ::-1] * (1, -1)
            np.testing.assert_allclose(step_T2[1:], turned_T2[:-1], atol=1.2)
        else:
            axis = SWINGS[motion].index(1)
            np.testing.assert_allclose(step_T2[:, 1 - axis], 0, atol=0.1)
            assert np.sign(step_T2[:, axis]).tolist() == [-1, 1, 1, -1]
        if motion not in STRAIGHT:
            np.testing.assert_allclose(step_T2.sum(axis=0), 0, atol=0.7)
        seen.add(motion)
    assert seen == {*MOTIONS}


def test_the_place_is_that_half_way_and_the_same_for_all_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    data = samples(monkeypatch, questions=["place"])
    for seed in range(20):
        sample = data.sample(0, seed)
        near = [centres(sample)[2] / 20 + 0.03 * np.array(off) for off in product((-1, 0, 1), repeat=2)]
        assert said(sample)[1] in {place_of(offset) for offset in near}
    motion = Motion(5, 40, (0.3, 0.4), (0.2, 0.5))
    for seed in range(4):
        found = [motion.places(name, np.random.default_rng(seed)) for name in MOTIONS]
        for places_T2, half_way_2, share in found:
            np.testing.assert_allclose(places_T2[2], found[0][1], atol=1e-12)
            np.testing.assert_allclose(half_way_2, found[0][1])
            assert np.abs(places_T2).max() + share <= 1  # in the picture
    assert place_of(np.array([0.1, -0.1])) == "middle"
    assert place_of(np.array([-0.5, 0.5])) == "up right"


def test_what_is_seen_and_asked_is_a_function_of_the_seed_or_in_evaluation_of_the_number(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    train, val = samples(monkeypatch), samples(monkeypatch, "val", val_questions=["caption", "motion"])
    assert torch.equal(train.sample(1, 5)["clip"], train.sample(1, 5)["clip"])
    assert not torch.equal(train.sample(1, 5)["clip"], train.sample(1, 6)["clip"])
    assert {said(train.sample(1, seed))[0] for seed in range(20)} == {q.removeprefix("<video>") for q in ASKED.values()}
    assert torch.equal(val.sample(1, 5)["clip"], val.sample(1, 6)["clip"])
    assert said(val.sample(2, 0)) == ("what is it? ".rjust(13), "a cat")
    assert said(val.sample(3, 0))[0] == ASKED["motion"].removeprefix("<video>")


def test_one_frame_is_the_one_half_way(monkeypatch: pytest.MonkeyPatch) -> None:
    clip = samples(monkeypatch, questions=["place"]).sample(2, 3)["clip"]
    frame = samples(monkeypatch, questions=["place"], frames=1).sample(2, 3)["clip"]
    torch.testing.assert_close(frame[:, 0], clip[:, 2])


def test_bad_settings_are_refused() -> None:
    for setting, wrong in {
        "frames": 0,
        "size": 15,
        "share": (0.4, 0.3),
        "path": (-0.1, 0.3),
        "questions": (),
        "val_questions": (),
        "length": 2,
    }.items():
        with pytest.raises(UserError, match=setting):
            MovingStamps(Letters(), **{setting: wrong})
    with pytest.raises(UserError, match="frames=1"):
        MovingStamps(Letters(), frames=1)
