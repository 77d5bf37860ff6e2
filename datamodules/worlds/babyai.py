"""Demonstrations of BabyAI's bot (Chevalier-Boisvert et al., 2019, arXiv 1810.08272), recorded once into shards."""

import contextlib
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from lightspan.core.errors import UserError, install_extra
from lightspan.core.ranges import require_in, require_numbers
from lightspan.datamodules.shards.pack_sources import Members
from lightspan.datamodules.worlds.steps import Recorded, step_members

ACTIONS = 7
"""Turn left, turn right, go forward, pick up, drop, toggle, done."""
_MOVES = 3  # the first of them, which change nothing but the agent's place
_TRIES = 100  # episodes for each that is kept, before the missions count as not there


class Step(NamedTuple):
    """frame: uint8 [H W 3], before the action. state: float32 [4], see `Demonstrations`."""

    frame: np.ndarray
    action: int
    state: np.ndarray


@dataclass
class Demonstrations(Recorded):
    """What `lightspan.datamodules.worlds.steps.record` writes. A sample is a step: the whole grid from above before
    it and `ahead` steps later, the bot's action, the mission's text, and as its state the agent's column and row as
    shares of the grid's and the direction in which it looks as (east, south).

    Args:
        levels: of BabyAI, such as "BabyAI-GoToLocal-v0"; episodes go through them in turn.
        episodes: that are written, at least 1. Those that the bot does not solve are left out.
        missions: texts, such as "go to the red ball", whose episodes are kept; None keeps all.
        ahead: steps from an image to the next one, at least 1.
        noise: probability that the agent turns or goes forward at random instead, in [0, 1). Without, what an expert
            does follows from what it sees and its mission alone.
        tile: side of a square of the grid in pixels, at least 4.
        seed: of the first episode, >= 0; the next one has the next.

    Attributes:
        tasks: the missions of the episodes so far; a sample's label is the place of its own.
    """

    levels: Sequence[str]
    episodes: int
    missions: Sequence[str] | None = None
    ahead: int = 1
    noise: float = 0.1
    tile: int = 8
    seed: int = 0
    tasks: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        require_in("[1, inf)", episodes=self.episodes, ahead=self.ahead)
        require_in("[0, 1)", noise=self.noise)
        require_in("[4, inf)", tile=self.tile)
        require_numbers(3 * (22 * self.tile) ** 2, tile=self.tile)  # of the largest levels
        require_in("[0, inf)", seed=self.seed)
        if not self.levels:
            raise UserError("levels is an empty list; name one such as BabyAI-GoToLocal-v0")

    def samples(self) -> Iterator[Members]:
        """The members of each step, by episode.

        Raises: UserError for an unknown level, for levels whose grids have other sizes, and where none of so many
            episodes has one of the missions.
        """
        environments = [_made(level) for level in self.levels]
        if len(sizes := {(env.width, env.height) for env in environments}) > 1:
            raise UserError(f"levels have grids of {sorted(sizes)} squares, and images of one size; record them apart")
        kept, number = 0, 0
        while kept < self.episodes:
            if number >= _TRIES * (kept + 1):
                raise UserError(
                    f"{kept} of {number} episodes of {', '.join(self.levels)} have one of missions="
                    f"{list(self.missions or ())} and were solved; name others, as Demonstrations.tasks lists them"
                )
            env = environments[number % len(environments)]
            mission, steps = self._episode(env, self.seed + number)
            number += 1
            if len(steps) > self.ahead:
                kept += 1
                yield from self._written(mission, steps, kept - 1)

    def _written(self, mission: str, steps: Sequence[Step], episode: int) -> Iterator[Members]:
        if mission not in self.tasks:
            self.tasks.append(mission)
        task = self.tasks.index(mission)
        for at, (now, later) in enumerate(zip(steps, steps[self.ahead :], strict=False)):
            numbers = {"action": np.int64(now.action), "state": now.state}
            yield step_members(f"{episode:06}_{at:04}", (now.frame, later.frame), task, mission, **numbers)

    def _episode(self, env: Any, seed: int) -> tuple[str, list[Step]]:
        """(mission, steps and, as the last of them, the end): none of an episode that is not kept."""
        from minigrid.utils.baby_ai_bot import BabyAIBot

        with contextlib.redirect_stdout(io.StringIO()):  # it says how often it drew a grid
            env.reset(seed=seed)
        mission = str(env.mission)
        if self.missions is not None and mission not in self.missions:
            return mission, []
        bot, draws, action = BabyAIBot(env), np.random.default_rng(seed), None
        steps, solved, ended = list[Step](), False, False
        while not ended:
            action = int(bot.replan(action))
            action = int(draws.integers(_MOVES)) if draws.random() < self.noise else action
            steps.append(self._seen(env, action))
            _, reward, terminated, truncated, _ = env.step(action)
            solved, ended = float(reward) > 0, terminated or truncated
        return mission, [*steps, self._seen(env, 0)] if solved else []

    def _seen(self, env: Any, action: int) -> Step:
        column, row = (
            int(place) / (size - 1) for place, size in zip(env.agent_pos, (env.width, env.height), strict=True)
        )
        east, south = (int(part) for part in env.dir_vec)
        frame = env.get_frame(highlight=False, tile_size=self.tile)
        return Step(frame, action, np.array([column, row, east, south], np.float32))


def _made(level: str) -> Any:
    try:
        import gymnasium
        import minigrid  # noqa: F401  # which registers its levels
    except ImportError as error:
        raise UserError(f"BabyAI is part of minigrid: {install_extra('worlds')}") from error
    if not level.startswith("BabyAI-"):
        raise UserError(f"{level} is no level of BabyAI, whose bot solves them; name one such as BabyAI-GoToLocal-v0")
    try:
        env = gymnasium.make(level).unwrapped
        env.reset(seed=0)
    except gymnasium.error.Error as error:
        raise UserError(f"{level} is no level of BabyAI: {error}") from error
    return env
