"""Places of Freedoom's levels, seen in ViZDoom from a few steps aside and turned a little: pictures that ask where they
were taken, and others that answer. Levels to validate on are not trained on.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from lightspan.core.errors import UserError
from lightspan.core.ranges import require_in, require_numbers
from lightspan.datamodules.image.places import Places, PlaceSets
from lightspan.datamodules.worlds.doom import game_of, middle_of

TURN = ("TURN_LEFT_RIGHT_DELTA",)
STRAYED = 8.0  # units from where the walker was sent: there is no room for it
CHEATS = "-nomonsters", "+sv_cheats 1"
AWAKE = 35  # tics after the start; a walker does not turn in the first ones
STEP_ASIDE = 48.0  # from the object that marks a place, which would be taken
TRIES = 8


class SeenPlace(NamedTuple):
    """frame: uint8 [S S 3]. place: x and y. region: of its level and direction."""

    frame: np.ndarray
    place: tuple[float, float]
    region: int


class DoomPlaces(PlaceSets):
    """Places lie beside the objects of a level, at least `spacing` apart, and are seen in `directions`: once
    for the database, and `queries` times by a walker who stands up to `shift` units aside and is turned by an angle in
    `turn`, to either side. A region is a direction in a level: views into opposite directions show different places.

    A level takes a second and 100 views another one; each rank sees all before the first step, and sees the same.

    Args:
        maps: of Freedoom's second part, to train on, such as map02.
        val_maps: to validate on.
        places: at most so many in a level.
        directions: in which each place is seen, evenly spaced, at least 1.
        queries: of each view, at least 1.
        spacing: of the places, in units of the level; a walker is 32 wide.
        shift: of a query, in each coordinate.
        turn: of a query, in degrees, the least and the most.
        image_size: height and width in pixels of the middle of the view, in [8, 120].
        near: in units; None is 1.5 of `shift`, at least 1, within which all queries are of their view.
        world_seed: of places, shifts and turns.
        settings: those of `PlaceSets`.
    Raises: UserError as `PlaceSets`, for an unknown level, one in both lists, and settings out of range.
    """

    def __init__(
        self,
        maps: Sequence[str],
        val_maps: Sequence[str],
        places: int = 30,
        directions: int = 2,
        queries: int = 2,
        spacing: float = 160.0,
        shift: float = 40.0,
        turn: tuple[float, float] = (12.0, 24.0),
        image_size: int = 96,
        near: float | None = None,
        world_seed: int = 0,
        mean: tuple[float, ...] = (0.5, 0.5, 0.5),
        std: tuple[float, ...] = (0.5, 0.5, 0.5),
        **settings: Any,
    ) -> None:
        require_in("[0, inf)", shift=shift)
        super().__init__(max(1.0, 1.5 * shift) if near is None else near, mean, std, **settings)
        require_in("[1, inf)", places=places, directions=directions, queries=queries)
        require_in("[0, inf)", world_seed=world_seed)
        require_in("[0, 180]", turn=turn)
        require_in("(0, inf)", spacing=spacing)
        require_in("[8, 120]", image_size=image_size)
        views = (len(maps) + len(val_maps)) * places * directions * (1 + queries)
        require_numbers(3 * views * image_size**2, places=places, directions=directions, queries=queries)
        for name, levels in (("maps", maps), ("val_maps", val_maps)):
            if not levels:
                raise UserError(f"DoomPlaces {name} is an empty list; name a level such as map02")
        if shared := sorted({*maps} & {*val_maps}):
            raise UserError(f"DoomPlaces: {shared[0]} is in maps and in val_maps; hold out other levels")
        if turn[0] > turn[1]:
            raise UserError(f"DoomPlaces turn={[*turn]} must have its least angle first")
        self.maps, self.val_maps = tuple(maps), tuple(val_maps)
        self.places, self.directions, self.queries = places, directions, queries
        self.spacing, self.shift, self.turn = spacing, shift, turn
        self.image_size, self.world_seed = image_size, world_seed

    def find(self) -> tuple[Places, Places]:
        return self._seen(self.maps), self._seen(self.val_maps)

    def _seen(self, maps: Sequence[str]) -> Places:
        views = [(view, query) for number, level in enumerate(maps) for view, query in self._level(number, level)]
        if not views:
            raise UserError(f"{', '.join(maps)} have no place of these settings; lower spacing or shift")
        frames_N3HW = torch.from_numpy(np.stack([view.frame for view, _ in views])).permute(0, 3, 1, 2).contiguous()
        return Places(
            lambda number: frames_N3HW[number],
            np.array([view.place for view, _ in views], np.float64),
            np.array([view.region for view, _ in views], np.int64),
            np.array([query for _, query in views]),
        )

    def _level(self, number: int, level: str) -> Iterator[tuple[SeenPlace, bool]]:
        with game_of(level, TURN, CHEATS) as game:
            draws = np.random.default_rng([self.world_seed, *level.encode()])
            game.set_seed(self.world_seed)
            game.new_episode()
            game.send_game_command("god")
            game.make_action([0.0], AWAKE)
            walls_W22 = np.array([
                [(line.x1, line.y1), (line.x2, line.y2)]
                for sector in game.get_state().sectors
                for line in sector.lines
                if line.is_blocking
            ])  # fmt: skip
            for place in self._chosen(game, draws, walls_W22):
                for direction in range(self.directions):
                    angle, region = 360.0 * direction / self.directions, number * self.directions + direction
                    yield from self._views(game, draws, walls_W22, place, angle, region)

    def _views(
        self,
        game: Any,
        draws: np.random.Generator,
        walls_W22: np.ndarray,
        place: np.ndarray,
        angle: float,
        region: int,
    ) -> Iterator[tuple[SeenPlace, bool]]:
        """A view for the database, and its queries; nothing where the walker has no room."""
        if (frame := self._seen_from(game, place, angle)) is None:
            return
        yield SeenPlace(frame, (float(place[0]), float(place[1])), region), False
        for _ in range(self.queries):
            for _ in range(TRIES):
                aside = place + draws.uniform(-self.shift, self.shift, 2).round()
                turned = angle + draws.uniform(*self.turn) * draws.choice([-1, 1])
                if behind_wall(walls_W22, place, aside):
                    continue
                if (frame := self._seen_from(game, aside, turned)) is not None:
                    yield SeenPlace(frame, (float(aside[0]), float(aside[1])), region), True
                    break

    def _chosen(self, game: Any, draws: np.random.Generator, walls_W22: np.ndarray) -> list[np.ndarray]:
        """Places beside objects, in an order of chance."""
        state = game.get_state()
        objects = sorted({(o.position_x, o.position_y) for o in state.objects if o.name != "DoomPlayer"})
        chosen: list[np.ndarray] = []
        for at in draws.permutation(len(objects)):
            angle = draws.uniform(0, 2 * np.pi)
            place = (np.array(objects[at]) + STEP_ASIDE * np.array([np.cos(angle), np.sin(angle)])).round()
            apart = all(np.hypot(*(place - each)) >= self.spacing for each in chosen)
            if len(chosen) < self.places and apart and not behind_wall(walls_W22, np.array(objects[at]), place):
                chosen.append(place)
        return chosen

    def _seen_from(self, game: Any, place: np.ndarray, angle: float) -> np.ndarray | None:
        """uint8 [S S 3]; None if the walker cannot stand there. There is room outside of a level, too."""
        if game.is_episode_finished():
            return None
        game.send_game_command(f"warp {place[0]:.0f} {place[1]:.0f}")
        game.make_action([0.0])
        if game.is_episode_finished():
            return None
        x, y, _, now = game.get_state().game_variables
        if np.hypot(x - place[0], y - place[1]) > STRAYED:
            return None
        game.make_action([float((now - angle + 180) % 360 - 180)])  # to the right
        state = game.get_state()
        return None if state is None else middle_of(state.screen_buffer, self.image_size)


def behind_wall(walls_W22: np.ndarray, here: np.ndarray, there: np.ndarray) -> bool:
    """Whether a wall, from one point [2] to another, meets the straight way between two points [2]."""

    def left(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
        return (b[..., 0] - a[..., 0]) * (c[..., 1] - a[..., 1]) - (b[..., 1] - a[..., 1]) * (c[..., 0] - a[..., 0])

    one, two = walls_W22[:, 0], walls_W22[:, 1]
    parts_way = left(one, two, here) * left(one, two, there) <= 0
    parts_wall = left(here, there, one) * left(here, there, two) <= 0
    return bool((parts_way & parts_wall).any())
