"""Mined identities: tracklets of the same people are joined, strangers in them are left out, on data that is known."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lightspan.core.errors import UserError
from lightspan.evaluation.features.features import Features
from lightspan.evaluation.geometry.identities import MinedIdentities, MineIdentities

PEOPLE, TRACKLETS, FRAMES = 6, 4, 5


def crowd(strangers: int = 10, scatter: float = 0.02) -> Features:
    """Each person has a direction of its own; some pictures show another one. Tracklets come in random order."""
    generator = torch.Generator().manual_seed(0)
    person, tracklet = torch.arange(PEOPLE * TRACKLETS * FRAMES).div(
        torch.tensor([TRACKLETS * FRAMES, FRAMES])[:, None], rounding_mode="floor"
    )
    shuffled = torch.randperm(PEOPLE * TRACKLETS, generator=generator)
    camera, seen = tracklet % 2, person.clone()
    seen[::FRAMES][:strangers] += 1
    x = torch.eye(PEOPLE)[seen % PEOPLE] + scatter * torch.randn(len(seen), PEOPLE, generator=generator)
    return Features(x, fields={"tracklet": shuffled[tracklet], "camera": camera, "identity": seen % PEOPLE})


def mined(features: Features, **settings: Any) -> tuple[MinedIdentities, Tensor]:
    found = MineIdentities(truth="identity", **settings).fit(features)
    return found, found.tensors["label"]


def test_every_stage_brings_labels_nearer_to_the_truth_and_the_last_is_right() -> None:
    features = crowd()
    found, label = mined(features, near=24)
    f1 = [stage["f1"] for stage in found.stages]
    assert f1[0] < 0.4
    assert found.stages[1]["precision"] == 1
    assert f1[2] >= f1[1]
    assert f1[3] > 0.9
    assert [stage["groups"] for stage in found.stages] == [24, 24, 12, 6, 6]
    assert found.stages[0]["pictures"] - found.stages[-1]["pictures"] == int((label < 0).sum()) == 10
    assert set(label[label >= 0].tolist()) == set(range(PEOPLE))


def test_pictures_of_which_nobody_knows_the_person_have_no_say_in_the_figures() -> None:
    features = crowd()
    unknown = features.fields | {
        "identity": torch.where(torch.arange(len(features.x)) % 3 == 0, -1, features.fields["identity"])
    }
    known, _ = mined(features, near=24)
    partly, label = mined(Features(features.x, fields=unknown), near=24)
    assert torch.equal(label, mined(features, near=24)[1])
    assert [stage["groups"] for stage in partly.stages] == [stage["groups"] for stage in known.stages]
    assert partly.stages[-1]["precision"] == 1
    with pytest.raises(
        UserError, match=r"'identity' of the batches, whole numbers \[B\] from -1, but got torch.int64 \[\d+\] from -2"
    ):
        mined(Features(features.x, fields=unknown | {"identity": unknown["identity"] - 1}), near=24)


def test_without_reach_cameras_stay_apart_and_a_scattered_person_is_left_out() -> None:
    apart, _ = mined(crowd(), near=24, far=0, noisy=1e9)
    assert apart.stages[-1]["groups"] == 2 * PEOPLE  # once for each camera
    assert apart.stages[-1]["precision"] == 1
    axes = torch.eye(4)
    scattered = axes[1] + torch.stack([axes[2], -axes[2], axes[3], -axes[3]])
    x, tracklet = torch.cat([axes[:1].expand(4, 4), scattered]), torch.arange(8) // 4
    label = MineIdentities(core=-1.0, noisy=0.1).fit(Features(x, fields={"tracklet": tracklet, "camera": tracklet}))
    assert label.tensors["label"].tolist() == [0] * 4 + [-1] * 4


def test_one_strong_direction_hides_people_until_features_are_whitened() -> None:
    features = crowd(strangers=0)
    light = 50 * torch.randn(len(features.x), 1, generator=torch.Generator().manual_seed(1))
    lit = replace(features, x=torch.cat([features.x, light], dim=1))
    plain, whitened = (mined(lit, near=24, core=-1.0, within=0.7, whiten=whiten)[0] for whiten in (False, True))
    assert plain.stages[-1]["f1"] < 0.5 < 0.9 < whitened.stages[-1]["f1"]


def test_equal_pictures_have_nothing_to_whiten_and_are_one_person() -> None:
    fields = {"tracklet": torch.arange(6), "camera": torch.zeros(6, dtype=torch.int64)}
    found = MineIdentities(whiten=True, core=-1.0).fit(Features(torch.ones(6, 3), fields=fields))
    assert [stage["groups"] for stage in found.stages[2:4]] == [1, 1]


def test_a_picture_moves_to_the_person_of_its_video_whom_it_shows() -> None:
    found, label = mined(crowd(), core=-1.0, near=24)  # nobody is left out of a tracklet
    assert found.stages[1]["precision"] < 1
    assert found.stages[2]["precision"] == 1
    assert (label >= 0).all()


def test_what_all_pictures_have_in_common_changes_nothing() -> None:
    plain = crowd()
    (_, label), (_, moved) = (mined(each, near=24) for each in (plain, Features(plain.x + 5, fields=plain.fields)))
    assert torch.equal(label, moved)


def test_nothing_is_said_of_a_truth_that_nobody_knows() -> None:
    found = MineIdentities().fit(crowd())
    assert "f1" not in found.stages[0]
    assert [figure.name for figure in found.figures()] == ["people", "tracklets", "pictures left out"]


def test_what_cannot_be_mined_is_refused() -> None:
    features = crowd()
    with pytest.raises(UserError, match=r"reads 'camera' of the batches, whole numbers .* but got nothing"):
        MineIdentities().fit(Features(features.x, fields={"tracklet": features.fields["tracklet"]}))
    with pytest.raises(UserError, match="there is none; give at least one"):
        MineIdentities().fit(Features(features.x[:0]))
    with pytest.raises(UserError, match="the model has diverged"):
        MineIdentities().fit(Features(features.x * torch.nan, fields=features.fields))
