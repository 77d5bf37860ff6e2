"""Places of levels are functions of their settings, and walkers stand and look as they are told."""

import numpy as np
import pytest
import torch

from lightspan.core.errors import UserError
from lightspan.datamodules.worlds.doom import game_of
from lightspan.datamodules.worlds.doom_places import AWAKE, CHEATS, TURN, DoomPlaces, behind_wall

SETTINGS = {"maps": ["map02"], "val_maps": ["map03"], "places": 4, "image_size": 32, "batch_size": 4}


@pytest.fixture(scope="module")
def data() -> DoomPlaces:
    pytest.importorskip("vizdoom")
    made = DoomPlaces(**SETTINGS)  # type: ignore[arg-type]
    made.setup()
    return made


def test_all_views_are_the_same_each_time(data: DoomPlaces) -> None:
    again = DoomPlaces(**SETTINGS)  # type: ignore[arg-type]
    again.setup()
    assert len(data.bank) == len(again.bank) > 0
    for number in range(len(data.bank)):
        one, two = data.bank.sample(number, 0), again.bank.sample(number, 0)
        assert all(torch.equal(torch.as_tensor(one[field]), torch.as_tensor(two[field])) for field in one)


def test_queries_are_near_their_view_and_places_lie_apart(data: DoomPlaces) -> None:
    places = data.bank.places  # type: ignore[attr-defined]
    seen = np.unique(places.place[~places.query], axis=0)
    gaps = np.hypot(*(seen[:, None] - seen).transpose(2, 0, 1))[~np.eye(len(seen), dtype=bool)]
    assert len(seen) > 1
    assert gaps.min() >= data.spacing
    assert all(len(rows) == 1 for rows in places.near(data.near))
    assert set(places.region.tolist()) == {0, 1}
    batch = next(iter(data.train_dataloader()))
    assert batch["views"][0].shape == (4, 3, 32, 32)
    assert not torch.equal(*batch["views"])


def test_a_walker_stands_where_it_is_sent_and_looks_there() -> None:
    pytest.importorskip("vizdoom")
    world = DoomPlaces(**SETTINGS)  # type: ignore[arg-type]
    with game_of("map02", TURN, CHEATS) as game:
        game.new_episode()
        game.make_action([0.0], AWAKE)
        x, y, _, _ = game.get_state().game_variables
        for angle in (90.0, 200.0, 10.0):
            assert world._seen_from(game, np.array([x, y]), angle) is not None
            there = game.get_state().game_variables
            assert np.hypot(there[0] - x, there[1] - y) < 8
            assert abs((there[3] - angle + 180) % 360 - 180) < 0.1


def test_a_wall_is_in_the_way_if_it_crosses_it_or_touches_it() -> None:
    walls = np.array([[(0.0, 0.0), (0.0, 10.0)]])
    for here, there, crosses in (
        ((-1, 5), (1, 5), True), ((-1, 5), (-2, 5), False), ((-1, 11), (1, 11), False), ((-1, 9), (0, 10), True),
        ((-3, 8), (1, 13), False),
    ):  # fmt: skip
        assert behind_wall(walls, np.array(here), np.array(there)) == crosses
        assert behind_wall(walls[:, ::-1], np.array(there), np.array(here)) == crosses


def test_wrong_settings_are_refused() -> None:
    for name, wrong in {
        "maps": [], "places": 0, "queries": 0, "directions": 0, "spacing": 0.0, "shift": -1.0, "turn": (20.0, 10.0),
        "image_size": 121, "world_seed": -1, "near": 0.0,
    }.items():  # fmt: skip
        with pytest.raises(UserError, match=name):
            DoomPlaces(**SETTINGS | {name: wrong})  # type: ignore[arg-type]
    with pytest.raises(UserError, match="val_maps"):
        DoomPlaces(**SETTINGS | {"val_maps": ["map04", "map02"]})  # type: ignore[arg-type]
