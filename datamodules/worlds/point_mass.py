"""A point that flies to a goal which nobody sees: demonstrations of many tasks with exact states, drawn in no time.

Source: after the point mass of Brandfonbrener et al., 2023, arXiv 2305.16985, whose goals are uniform in
[-0.29, 0.29]^2 and not in the picture. Differences: the point moves by its action, without mass; the picture is a
spot beside a second one, the distractor, which moves on its own.
Shapes: N points, T steps, S side of a picture.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from lightspan.core.errors import UserError
from lightspan.core.ranges import require_in, require_numbers
from lightspan.datamodules.shards.pack_sources import Members
from lightspan.datamodules.worlds.steps import Recorded, step_members

HALF = 0.3
"""Of the side of the square in which points are."""
GOALS = 0.29
"""The same of goals."""
REACH = 0.05
"""How far an action of 1 moves the point."""
NEAR = 0.05
"""From the goal: what counts as there."""
SPOT = 0.025
"""Radius of the point, at which a spot has 0.61 of its brightness."""
_COLOURS = np.array([[230, 60, 40], [50, 90, 230]], np.float32)  # of the point and the distractor
_PACE = 0.02  # by which the distractor moves along each axis in a step, at most

Policy = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""(pictures uint8 [N S S 3], places [N 2]) -> actions [N 2], of which what exceeds [-1, 1] is cut off."""


def expert(place_N2: np.ndarray, goal_N2: np.ndarray) -> np.ndarray:
    """The action that goes straight on, as far as one can at a time: [N 2] in [-1, 1]."""
    return np.clip((goal_N2 - place_N2) / REACH, -1, 1)


def moved(place_N2: np.ndarray, action_N2: np.ndarray) -> np.ndarray:
    """Where an action leads: `REACH` times it, and not beyond the square."""
    return np.clip(place_N2 + REACH * np.clip(action_N2, -1, 1), -HALF, HALF)


def anywhere(count: int, draws: np.random.Generator) -> np.ndarray:
    """Goals, or places to start from, [N 2]: uniform in the square of goals."""
    return draws.uniform(-GOALS, GOALS, (count, 2))


def distractors(count: int, steps: int, draws: np.random.Generator) -> np.ndarray:
    """Where distractors are in each step, [T N 2]: straight on at a constant pace, back at the sides."""
    start_N2, pace_N2 = draws.uniform(-HALF, HALF, (count, 2)), draws.uniform(-_PACE, _PACE, (count, 2))
    way_TN2 = start_N2 + HALF + np.arange(steps)[:, None, None] * pace_N2
    return np.abs((way_TN2 + 2 * HALF) % (4 * HALF) - 2 * HALF) - HALF


def pictures(place_N2: np.ndarray, other_N2: np.ndarray, side: int, larger: float) -> np.ndarray:
    """uint8 [N S S 3]: a red spot at each place over a blue one, `larger` times as large, x to the right and y down."""
    axis_S = HALF * ((2 * np.arange(side) + 1) / side - 1)  # the middles of pixels
    spots = []
    for at_N2, radius in ((place_N2, SPOT), (other_N2, SPOT * larger)):
        along_2NS = np.exp(-(((axis_S - at_N2.T[:, :, None]) / radius) ** 2) / 2)
        spots.append((along_2NS[1][:, :, None] * along_2NS[0][:, None])[..., None].astype(np.float32))
    point, distractor = spots
    return np.rint(point * _COLOURS[0] + (1 - point) * distractor * _COLOURS[1]).astype(np.uint8)


class Episode(NamedTuple):
    """task: its goal's number. place_T2, action_T2: float32, in each step and, behind the last one, in `ahead` more.
    frames: of the same, uint8 [T S S 3].
    """

    task: int
    place_T2: np.ndarray
    action_T2: np.ndarray
    frames: np.ndarray


@dataclass
class PointMass(Recorded):
    """What `lightspan.datamodules.worlds.steps.record` writes and `PlayedSteps` plays. A sample is a step: the picture
    before it and `ahead` steps later, the action as two numbers in [-1, 1], and as its state the point's place, x and
    y in [-0.3, 0.3]. The label is the task: a goal, which is its text.

    Args:
        episodes: each of a random start, at least 1.
        tasks_seed: of the goals, >= 0. Worlds of one such seed and one number of goals have the same.
        goals: how many there are, at least 1, which episodes pursue in turn; None is one for each episode.
        steps: samples of an episode, at least 1.
        ahead: steps from an image to the next one, at least 1.
        noise: deviation of what is added to each number of an expert's action, at least 0. Without, what an expert
            does follows from what it sees and its goal alone.
        side: of a picture in pixels, at least 8.
        larger: radius of the distractor by the point's, above 0.
        seed: of starts, noise and distractors, >= 0.

    Attributes:
        tasks: the goals of the episodes so far.
    """

    episodes: int
    tasks_seed: int = 0
    goals: int | None = None
    steps: int = 30
    ahead: int = 1
    noise: float = 0.1
    side: int = 24
    larger: float = 2.0
    seed: int = 0
    tasks: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        require_in("[1, inf)", episodes=self.episodes, goals=self.goals, steps=self.steps, ahead=self.ahead)
        require_in("[0, inf)", tasks_seed=self.tasks_seed, noise=self.noise, seed=self.seed)
        require_in("[8, inf)", side=self.side)
        numbers = 3 * (self.steps + self.ahead) * self.side**2
        require_numbers(numbers, steps=self.steps, ahead=self.ahead, side=self.side)
        require_numbers(2 * (self.goals or self.episodes), episodes=self.episodes, goals=self.goals)
        require_in("(0, inf)", larger=self.larger)

    def goal_of_tasks(self) -> np.ndarray:
        """The goal of each task, [tasks 2]."""
        return anywhere(self.goals or self.episodes, np.random.default_rng((self.tasks_seed, 1)))

    def samples(self) -> Iterator[Members]:
        """The members of each step, by episode."""
        for number, episode in enumerate(self.played()):
            if episode.task == len(self.tasks):
                self.tasks.append("go to {:.3f} {:.3f}".format(*self.goal_of_tasks()[episode.task]))
            for at in range(self.steps):
                frames = episode.frames[at], episode.frames[at + self.ahead]
                numbers = {"action": episode.action_T2[at], "state": episode.place_T2[at]}
                key, mission = f"{number:06}_{at:04}", self.tasks[episode.task]
                yield step_members(key, frames, episode.task, mission, **numbers)

    def played(self) -> Iterator[Episode]:
        """The episodes, without what only shards need."""
        goals_K2, length = self.goal_of_tasks(), self.steps + self.ahead
        for number in range(self.episodes):
            task, draws = number % len(goals_K2), np.random.default_rng((self.seed, 2, number))
            other_T2 = distractors(1, length, draws)[:, 0]
            place_12, places, actions = anywhere(1, draws), [], []
            for _ in range(length):
                noise_12 = self.noise * draws.normal(size=(1, 2))
                action_12 = np.clip(expert(place_12, goals_K2[task]) + noise_12, -1, 1)
                places.append(place_12[0])
                actions.append(action_12[0])
                place_12 = moved(place_12, action_12)
            place_T2, action_T2 = (np.array(rows, np.float32) for rows in (places, actions))
            yield Episode(task, place_T2, action_T2, pictures(place_T2, other_T2, self.side, self.larger))

    def success(self, policy: Policy, goal_2: np.ndarray, rollouts: int = 100, seed: int = 0) -> float:
        """The share of rollouts that end within `NEAR` of a goal, of so many starts; the same starts and distractors
        for each policy.

        Args:
            rollouts: at least 1, of `steps` steps.
            seed: of starts and distractors.
        Raises: UserError for a policy that gives actions of another shape, or NaN.
        """
        require_in("[1, inf)", rollouts=rollouts)
        draws = np.random.default_rng((seed, 3))
        place_N2, other_TN2 = anywhere(rollouts, draws), distractors(rollouts, self.steps, draws)
        for other_N2 in other_TN2:
            action_N2 = np.asarray(policy(pictures(place_N2, other_N2, self.side, self.larger), place_N2))
            if action_N2.shape != place_N2.shape or not np.isfinite(action_N2).all():
                raise UserError(
                    f"a policy of PointMass gives two finite numbers for each of {rollouts} points, and this one gave "
                    f"{[*action_N2.shape]} of which {int(np.isfinite(action_N2).sum())} are finite"
                )
            place_N2 = moved(place_N2, action_N2)
        return float((np.linalg.norm(place_N2 - goal_2, axis=1) <= NEAR).mean())
