"""The point mass: where actions lead, what is drawn, who reaches goals; and worlds played when a run starts."""

from collections.abc import Callable
from itertools import islice, pairwise
from typing import Any

import numpy as np
import pytest
import torch

from lightspan.core.errors import UserError
from lightspan.datamodules.image.augment.views import RandomViews
from lightspan.datamodules.image.variants.shifts import Shifted
from lightspan.datamodules.worlds.played import PlayedSteps
from lightspan.datamodules.worlds.point_mass import (
    GOALS,
    HALF,
    NEAR,
    REACH,
    PointMass,
    distractors,
    expert,
    moved,
    pictures,
)
from lightspan.datamodules.worlds.steps import StepShards, record


def played(**settings: Any) -> PlayedSteps:
    given = {"actions": None, "batch_size": 4, "mean": (0.0,) * 3, "std": (1.0,) * 3} | settings
    data = PlayedSteps(PointMass(3, steps=4), PointMass(2, steps=4, seed=1), **given)
    data.setup()
    return data


def samples(data: PlayedSteps) -> list[dict[str, Any]]:
    assert data.train is not None
    return [dict(data.train.sample(number, 0)) for number in range(len(data.train))]


def test_an_action_of_one_moves_by_the_reach_and_none_leaves_the_square() -> None:
    place = np.array([[0.0, 0.1], [HALF, -HALF]])
    assert np.allclose(moved(place, np.array([[1.0, -0.5], [1, -1]])), [[REACH, 0.1 - REACH / 2], [HALF, -HALF]])
    assert np.allclose(moved(place, np.array([[9.0, 0], [-9, 0]])), [[REACH, 0.1], [HALF - REACH, -HALF]])


def test_an_expert_is_there_in_as_many_steps_as_the_way_has_reaches() -> None:
    place, goal = np.array([[-0.2, 0.0]]), np.array([[0.03, 0.01]])
    for _ in range(5):  # 0.23 / 0.05
        place = moved(place, expert(place, goal))
    assert np.allclose(place, goal)


def test_a_spot_has_its_centre_where_the_point_is_and_the_distractor_lies_under_it() -> None:
    side = 40
    axis = HALF * ((2 * np.arange(side) + 1) / side - 1)
    place, other = np.array([[0.1, -0.15]]), np.array([[-0.1, 0.12]])
    picture = pictures(place, other, side, larger=2.0)[0].astype(float)
    for channel, at in ((0, place[0]), (2, other[0])):
        light = np.where(picture[..., channel] > 60, picture[..., channel], 0)  # of its own spot alone
        centre = light.sum(axis=0) @ axis / light.sum(), light.sum(axis=1) @ axis / light.sum()
        assert np.allclose(centre, at, atol=0.005)
    over = pictures(place, place, side, 2.0)[0]
    row, column = np.unravel_index(over[..., 0].argmax(), (side, side))
    assert over[row, column, 0] > 2 * over[row, column, 2]


def test_distractors_go_straight_on_and_come_back_at_the_sides() -> None:
    way = distractors(50, 200, np.random.default_rng(0))
    assert np.abs(way).max() <= HALF
    steps = np.abs(np.diff(way, axis=0))
    assert (np.abs(steps - np.median(steps, axis=0)) < 1e-9).mean() > 0.9  # all but those that turn


def test_steps_are_what_the_world_does_and_goals_are_hidden_in_the_label() -> None:
    data = played()
    found = samples(data)
    assert [int(sample["label"]) for sample in found] == [0] * 4 + [1] * 4 + [2] * 4
    assert len(set(data.worlds[0].tasks)) == 3
    for now, later in pairwise(found):
        if now["label"] == later["label"]:
            assert torch.equal(now["next_image"], later["image"])
            reached = moved(now["state"].numpy(), now["action"].numpy())
            assert np.allclose(reached, later["state"], atol=1e-6)
    assert {tuple(sample["action"].shape) for sample in found} == {(2,)}


def test_goals_are_those_of_their_own_seed_and_episodes_pursue_them_in_turn() -> None:
    one, other = PointMass(4, goals=2, seed=0), PointMass(6, goals=2, seed=5)
    assert np.array_equal(one.goal_of_tasks(), other.goal_of_tasks())
    assert np.abs(one.goal_of_tasks()).max() <= GOALS
    assert not np.array_equal(one.goal_of_tasks(), PointMass(4, goals=2, tasks_seed=1).goal_of_tasks())
    list(one.samples())
    assert len(one.tasks) == 2


def test_later_images_are_as_many_steps_ahead_as_asked() -> None:
    one, two = (list(PointMass(1, steps=5, ahead=ahead).samples()) for ahead in (1, 2))
    for at in range(4):
        names = f"000000_{at:04}.next.png", f"000000_{at + 1:04}.next.png"
        assert two[at][names[0]] == one[at + 1][names[1]]


def test_success_is_sure_for_the_expert_and_by_chance_for_a_point_that_stays() -> None:
    world, goal = PointMass(1), np.array([0.1, -0.2])
    assert world.success(lambda picture, place: expert(place, goal), goal) == 1.0
    stays = world.success(lambda picture, place: 0 * place, goal, rollouts=1500)
    assert stays == pytest.approx(np.pi * NEAR**2 / (2 * GOALS) ** 2, abs=0.01)
    seen: list[tuple[int, ...]] = []
    world.success(lambda picture, place: seen.append(picture.shape) or 0 * place, goal, rollouts=3)  # type: ignore[func-returns-value]
    assert seen == [(3, 24, 24, 3)] * 30
    wrong: Callable[..., np.ndarray]
    for wrong in (lambda picture, place: place[:, :1], lambda picture, place: place * np.nan):
        with pytest.raises(UserError, match="policy"):
            world.success(wrong, goal)


def test_a_world_that_is_played_is_the_world_that_was_recorded(tmp_path: Any) -> None:
    world = PointMass(3, steps=4)
    record(world, tmp_path / "steps")
    stored = StepShards(
        [str(tmp_path / "steps" / "00000.tar")], actions=None, batch_size=4, mean=(0.0,) * 3, std=(1.0,) * 3
    )
    stored.setup()
    assert stored.train is not None
    data = played()
    for number, sample in enumerate(samples(data)):
        other = stored.train.sample(number, 0)
        assert sample.keys() | {"index"} == other.keys() | {"index"}
        assert all(torch.equal(torch.as_tensor(sample[name]), torch.as_tensor(other[name])) for name in other)


def test_order_and_views_are_exact_under_resume_and_both_images_are_shifted_alike() -> None:
    straight = list(played(view=Shifted(3, flip=0.0)).train_dataloader())
    loader = played(view=Shifted(3, flip=0.0)).train_dataloader()
    list(islice(loader, 1))
    later = played(view=Shifted(3, flip=0.0)).train_dataloader()
    later.load_state_dict(loader.state_dict())
    for one, other in zip(straight[1:], later, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)
    plain, shifted = samples(played())[0], played(view=Shifted(3, flip=0.0)).train
    assert shifted is not None
    drawn = (shifted.sample(0, seed) for seed in range(9))
    sample = next(each for each in drawn if not torch.equal(each["image"], plain["image"]))
    shifts = [
        [
            (down, across)
            for down in range(-3, 4)
            for across in range(-3, 4)
            if torch.equal(moved_by(plain[name], down, across), sample[name])
        ]
        for name in ("image", "next_image")
    ]
    assert shifts[0] == shifts[1]
    assert len(shifts[0]) == 1


def moved_by(image: torch.Tensor, down: int, across: int) -> torch.Tensor:
    padded = torch.nn.functional.pad(image, [3] * 4)
    return padded[:, 3 + down : 27 + down, 3 + across : 27 + across]


def test_wrong_settings_are_refused() -> None:
    for wrong in (
        {"episodes": 0}, {"goals": 0}, {"steps": 0}, {"ahead": 0}, {"noise": -1.0}, {"side": 7}, {"larger": 0.0},
        {"seed": -1}, {"tasks_seed": -1},
    ):  # fmt: skip
        with pytest.raises(UserError, match=next(iter(wrong))):
            PointMass(**{"episodes": 1} | wrong)  # type: ignore[arg-type]
    worlds = PointMass(1), PointMass(1, seed=1)
    for wrong, said in (
        ({"actions": 0}, "actions"),
        ({"view": RandomViews(count=2)}, "count=1"),
        ({"std": (0.0,)}, "std"),
    ):
        with pytest.raises(UserError, match=said):
            PlayedSteps(*worlds, **wrong)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="val_world"):
        PlayedSteps(worlds[0], PointMass(1))


def test_steps_that_take_more_bytes_than_the_limit_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTSPAN_MAX_BYTES", "2000")
    with pytest.raises(UserError, match=r"PointMass .*LIGHTSPAN_MAX_BYTES"):
        played().setup()
