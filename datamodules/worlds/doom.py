"""Walks through the levels of Freedoom in ViZDoom (Kempka et al., 2016, arXiv 1605.02097), recorded once into shards:
what is seen, with its depth, its objects and the walker's place.
"""

import tempfile
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import chdir, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lightspan.core.errors import UserError, install_extra
from lightspan.core.ranges import require_in
from lightspan.datamodules.shards.pack_sources import Members
from lightspan.datamodules.worlds.steps import Recorded, npy, step_members

BUTTONS = ("MOVE_FORWARD", "TURN_LEFT", "TURN_RIGHT")
"""The actions, in their order."""
SEEN = ("POSITION_X", "POSITION_Y", "POSITION_Z", "ANGLE")
_WEIGHTS = (0.6, 0.2, 0.2)  # of the actions
_TICS = 6  # of the game, of which there are 35 a second, for each action
_HELD = 4  # actions for which the walker repeats the last one, on average


class View(NamedTuple):
    """frame: uint8 [H W 3]. depth: uint8 [H W]. objects: [H W], see `Walks`. place: of `SEEN`."""

    frame: np.ndarray
    depth: np.ndarray
    objects: np.ndarray
    place: np.ndarray


@dataclass
class Walks(Recorded):
    """What `lightspan.datamodules.worlds.steps.record` writes. A sample is a step of a random walk without monsters:
    the view before it and `ahead` steps later, the action, the level's name, and as its state x, y and z in the
    level's units and the sine and cosine of the direction.

    Members `depth.npy` have the depth of the first view as ViZDoom tells it, from 0 near to 255 far, and
    `objects.npy` the number of the object in each pixel, 0 of walls, floors and sky.

    Args:
        maps: of Freedoom's second part, such as "map02".
        walks: in each level, at least 1.
        steps: of each walk, at least 1.
        ahead: steps from a view to the next one, at least 1.
        size: height and width in pixels of the middle of the view, at most 120.
        seed: of the first walk, >= 0; the next one has the next.

    Attributes:
        tasks: the levels; a sample's label is the place of its own.
        objects: names of the objects so far; the first has the number 1.
    """

    maps: Sequence[str]
    walks: int = 4
    steps: int = 100
    ahead: int = 1
    size: int = 64
    seed: int = 0
    tasks: list[str] = field(default_factory=list)
    objects: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        require_in("[1, inf)", walks=self.walks, steps=self.steps, ahead=self.ahead)
        require_in("[8, 120]", size=self.size)
        require_in("[0, inf)", seed=self.seed)
        if not self.maps:
            raise UserError("maps is an empty list; name one such as map02")

    def samples(self) -> Iterator[Members]:
        """The members of each step, level by level. Raises: UserError for an unknown level."""
        for task, level in enumerate(self.maps):
            self.tasks.append(level)
            with game_of(level) as game:
                for walk in range(self.walks):
                    yield from self._walk(game, self.seed + walk, task, f"{level}_{walk:04}")

    def _walk(self, game: Any, seed: int, task: int, key: str) -> Iterator[Members]:
        game.set_seed(seed)
        game.new_episode()
        draws, action = np.random.default_rng([seed, task]), 0
        seen = deque[tuple[View, int]](maxlen=self.ahead + 1)
        for at in range(self.steps + self.ahead):
            if game.is_episode_finished():  # the walker fell into something
                return
            if draws.random() < 1 / _HELD:
                action = int(draws.choice(len(BUTTONS), p=_WEIGHTS))
            seen.append((self._seen(game), action))
            if at >= self.ahead:
                (now, done), (later, _) = seen[0], seen[-1]
                yield self._members(f"{key}_{at - self.ahead:04}", now, later, done, task)
            game.make_action([float(action == button) for button in range(len(BUTTONS))], _TICS)

    def _members(self, key: str, now: View, later: View, action: int, task: int) -> Members:
        x, y, z, degrees = now.place.tolist()
        angle = np.deg2rad(degrees)
        state = np.array([x, y, z, np.sin(angle), np.cos(angle)], np.float32)
        frames = now.frame, later.frame
        members = step_members(key, frames, task, self.tasks[task], action=np.int64(action), state=state)
        return members | {f"{key}.depth.npy": npy(now.depth), f"{key}.objects.npy": npy(now.objects)}

    def _seen(self, game: Any) -> View:
        state = game.get_state()
        objects = np.zeros(state.labels_buffer.shape, np.int32)
        for label in state.labels:
            if label.object_name not in self.objects:
                self.objects.append(label.object_name)
            objects[state.labels_buffer == label.value] = self.objects.index(label.object_name) + 1
        seen = state.screen_buffer, state.depth_buffer, objects
        frame, depth, objects = (middle_of(array, self.size) for array in seen)
        return View(frame, depth, objects, np.array(state.game_variables))


def middle_of(array: np.ndarray, size: int) -> np.ndarray:
    """[H W ...] -> a copy of its middle, [size size ...]."""
    top, left = ((side - size) // 2 for side in array.shape[:2])
    return np.ascontiguousarray(array[top : top + size, left : left + size])


@contextmanager
def game_of(level: str, buttons: Sequence[str] = BUTTONS, arguments: Sequence[str] = ("-nomonsters",)) -> Iterator[Any]:
    """A level of Freedoom's second part, with views of 160 x 120 pixels, depth, labels and the state of `SEEN`.

    Args:
        buttons: what an action has a number for.
        arguments: of the engine.
    Raises: UserError for an unknown level, and without ViZDoom.
    """
    try:
        import vizdoom
    except ImportError as error:
        raise UserError(f"walks are made by ViZDoom: {install_extra('worlds')}") from error
    if level not in {f"map{number:02}" for number in range(1, 33)}:
        raise UserError(f"{level} is no level of Freedoom's second part, which has map01 to map32")
    game = vizdoom.DoomGame()
    game.set_doom_game_path(str(Path(vizdoom.__file__).parent / "freedoom2.wad"))
    game.set_doom_map(level)
    game.set_screen_resolution(vizdoom.ScreenResolution.RES_160X120)
    game.set_screen_format(vizdoom.ScreenFormat.RGB24)
    game.set_depth_buffer_enabled(True)
    game.set_labels_buffer_enabled(True)
    game.set_objects_info_enabled(True)
    game.set_sectors_info_enabled(True)
    for hidden in (game.set_render_hud, game.set_render_weapon, game.set_render_crosshair, game.set_render_messages):
        hidden(False)
    game.set_window_visible(False)
    game.set_sound_enabled(False)
    game.set_episode_timeout(0)
    game.set_available_buttons([getattr(vizdoom.Button, name) for name in buttons])
    game.set_available_game_variables([getattr(vizdoom.GameVariable, name) for name in SEEN])
    game.add_game_args(" ".join(arguments))
    with tempfile.TemporaryDirectory() as folder:
        game.set_doom_config_path(str(Path(folder, "doom.ini")))
        with chdir(folder):  # where it keeps files of its own
            game.init()
        try:
            yield game
        finally:
            game.close()
