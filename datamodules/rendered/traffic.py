"""A street with traffic at two moments as a turning LiDAR sees it, with the truth of all that moves.

Ground, cars of a body and a cabin, poles and pedestrians are planes, boxes and upright cylinders: where a ray meets
one has a closed form, and what it meets first hides the others. A street and all that a sensor sees of it is a function
of (seed, number) alone. Lengths are in metres. Things move from one moment to the
other, and axes x and y lie in the ground below the sensor at the first moment, z points up.
Shapes: R rays, N returns, K solids, O things.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from lightspan.core.ranges import require_in, require_numbers
from lightspan.datamodules.rendered.draws import Draws

KINDS = ("ground", "car", "pole", "pedestrian")
"""What the numbers of classes mean."""
CAR, POLE, PEDESTRIAN = 1, 2, 3
HEADINGS = ("east", "north", "west", "south")
"""The quarter in which traffic goes: along x, y, -x and -y, give or take 30 degrees."""
LANES, SLOTS, GAP = (-6.0, -3.0, 3.0, 6.0), 6, 6.0
"""Places for cars: lanes to the right of the sensor's own, and how many of them along each so many metres apart."""
NEAR = 0.05
"""A surface that a moved point lies on is not in front of it by more."""


class Solids(NamedTuple):
    """Boxes that stand upright, and cylinders that do.

    middle: float64 [K 3]. half: float64 [K 3], half the sides; of a cylinder the first two are its radius.
    yaw: float64 [K], from x to y. round: bool [K], whether it is a cylinder. thing: int64 [K], to which it belongs.
    """

    middle: np.ndarray
    half: np.ndarray
    yaw: np.ndarray
    round: np.ndarray
    thing: np.ndarray


class Things(NamedTuple):
    """Objects on the ground, and how each moves to the next moment: it turns about its middle and is shifted.

    box: float64 [O 7]: x, y and z of the middle, length, width, height, yaw. kind: int64 [O], a place in `KINDS`.
    shift: float64 [O 3]. turn: float64 [O].
    """

    box: np.ndarray
    kind: np.ndarray
    shift: np.ndarray
    turn: np.ndarray


class Street(NamedTuple):
    """A street at the first moment. heading: a place in `HEADINGS`. sensor: float64 [2 3], where it is at either."""

    things: Things
    solids: Solids
    heading: int
    sensor: np.ndarray


class Sweeps(NamedTuple):
    """What the sensor sees at both moments, in the axes of the first.

    xyz: float64 [N 3]. thing: int64 [N], -1 for the ground. flow: float64 [N 3], from where a point is to where it is
    at the next moment. again: bool [N], whether the sensor then sees that place of its surface. later: float64 [M 3],
    the returns of the next moment.
    """

    xyz: np.ndarray
    thing: np.ndarray
    flow: np.ndarray
    again: np.ndarray
    later: np.ndarray


def turned(xy: np.ndarray, angle: np.ndarray | float) -> np.ndarray:
    """[... 2], turned from x to y."""
    cos, sin = np.cos(angle), np.sin(angle)
    return np.stack([cos * xy[..., 0] - sin * xy[..., 1], sin * xy[..., 0] + cos * xy[..., 1]], axis=-1)


def moved(points: np.ndarray, thing: np.ndarray, things: Things) -> np.ndarray:
    """Where points of things are at the next moment, [N 3]; the ground, thing -1, stays."""
    found = points.copy()
    own = np.flatnonzero(thing >= 0)
    which = thing[own]
    middle = things.box[which, :3]
    away = points[own] - middle
    away[:, :2] = turned(away[:, :2], things.turn[which])
    found[own] = middle + away + things.shift[which]
    return found


def moved_on(street: Street) -> Solids:
    """The solids at the next moment."""
    solids = street.solids
    middle = moved(solids.middle, solids.thing, street.things)
    return solids._replace(middle=middle, yaw=solids.yaw + street.things.turn[solids.thing])


def first_hits(origin: np.ndarray, rays: np.ndarray, solids: Solids) -> tuple[np.ndarray, np.ndarray]:
    """(length [R], thing [R]) of what each ray meets first: infinity where it meets nothing, -1 for ground and nothing.

    Args:
        origin: float64 [3], above the ground and outside of all solids.
        rays: float64 [R 3], of length 1.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        length = np.where(rays[:, 2] < 0, -origin[2] / rays[:, 2], np.inf)
        thing = np.full(len(rays), -1)
        # Pairs of a ray and a solid whose circumscribed sphere it meets: a few in a hundred.
        middle = solids.middle - origin
        along = rays @ middle.T
        beside = (middle**2).sum(axis=1) - along**2 - (solids.half**2).sum(axis=1)
        ray, solid = np.nonzero(beside <= 1e-6)
        away, ahead, half = -middle[solid], rays[ray], solids.half[solid]
        away[:, :2], ahead[:, :2] = (turned(part[:, :2], -solids.yaw[solid]) for part in (away, ahead))
        near, far = _slabs(away, ahead, half)
        # A cylinder: within its circle, and between its ends as a box is.
        a, b = (ahead[:, :2] ** 2).sum(axis=1), (ahead[:, :2] * away[:, :2]).sum(axis=1)
        root = np.sqrt(b**2 - a * ((away[:, :2] ** 2).sum(axis=1) - half[:, 0] ** 2))  # NaN where a ray passes
        low, high = _slabs(away[:, 2:], ahead[:, 2:], half[:, 2:])
        enters, leaves = np.maximum((-b - root) / a, low), np.minimum((-b + root) / a, high)
        round_ = solids.round[solid]
        near, far = np.where(round_, enters, near), np.where(round_, leaves, far)
        hit = np.flatnonzero((near <= far) & (near > 0) & (near < length[ray]))
    hit = hit[np.lexsort((near[hit], ray[hit]))]
    first = hit[np.append(True, np.diff(ray[hit]) > 0)[: len(hit)]]
    length[ray[first]], thing[ray[first]] = near[first], solids.thing[solid[first]]
    return length, thing


def _slabs(away: np.ndarray, ahead: np.ndarray, half: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where rays enter and leave boxes around 0 with axes as theirs, [P] each of [P A]."""
    safe = np.where(np.abs(ahead) < 1e-12, 1e-12, ahead)
    one, two = (-half - away) / safe, (half - away) / safe
    return np.minimum(one, two).max(axis=-1), np.maximum(one, two).min(axis=-1)


@dataclass(frozen=True)
class Lidar:
    """A sensor that turns about an upright axis.

    Args:
        beams: one above the other, at least 1. steps: of a turn, at least 1.
        low, high: degrees of the lowest and the highest beam above the horizon, -90 < low <= high < 90.
        height: above the ground, above 0. reach: metres up to which it sees, above 0.
        noise: standard deviation of lengths, in metres, >= 0. missing: share of the returns that are lost, in [0, 1).
    Raises: UserError for settings outside of these.
    """

    beams: int = 24
    steps: int = 120
    low: float = -22.0
    high: float = 2.0
    height: float = 1.8
    reach: float = 24.0
    noise: float = 0.02
    missing: float = 0.1

    def __post_init__(self) -> None:
        require_in("[1, inf)", beams=self.beams, steps=self.steps)
        require_in("(-90, 90)", low=self.low)
        require_in(f"[{self.low}, 90)", high=self.high)
        require_in("(0, inf)", height=self.height, reach=self.reach)
        require_in("[0, inf)", noise=self.noise)
        require_in("[0, 1)", missing=self.missing)
        require_numbers(100 * self.beams * self.steps, beams=self.beams, steps=self.steps)  # with all solids

    def rays(self, turn: float) -> np.ndarray:
        """float64 [R 3] of length 1; `turn`, in steps, is how far the first ray is from x."""
        up = np.deg2rad(np.linspace(self.low, self.high, self.beams))[:, None]
        around = 2 * np.pi * (np.arange(self.steps) + turn)[None] / self.steps
        ahead = [np.cos(up) * np.cos(around), np.cos(up) * np.sin(around), np.sin(up) + 0 * around]
        return np.stack(ahead, axis=-1).reshape(-1, 3)

    def sees(self, points: np.ndarray, origin: np.ndarray, solids: Solids) -> np.ndarray:
        """Whether points lie in reach, between the beams, and behind nothing, bool [N]."""
        ahead = points - origin
        length = np.linalg.norm(ahead, axis=1)
        up = np.rad2deg(np.arctan2(ahead[:, 2], np.hypot(ahead[:, 0], ahead[:, 1])))
        first, _ = first_hits(origin, ahead / length[:, None].clip(1e-9), solids)
        clear = first >= length - NEAR - 4 * self.noise
        return clear & (length <= self.reach) & (up >= self.low) & (up <= self.high)

    def returns(self, origin: np.ndarray, solids: Solids, draws: Draws) -> tuple[np.ndarray, np.ndarray]:
        """(points [N 3], their things [N])."""
        rays = self.rays(float(draws.uniform(1)[0, 0]))
        noise, lost = draws.normal(len(rays))[0], draws.uniform(len(rays))[0] < self.missing
        length, thing = first_hits(origin, rays, solids)
        there = np.flatnonzero((length <= self.reach) & ~lost)
        far = length[there] + self.noise * noise[there]
        return origin + far[:, None] * rays[there], thing[there]

    def sweeps(self, street: Street, seed: int, number: int) -> Sweeps:
        """Both moments of street `number`."""
        draws, later = Draws(seed, np.array([number]), 77), moved_on(street)
        xyz, thing = self.returns(street.sensor[0], street.solids, draws)
        after = moved(xyz, thing, street.things)
        again = self.sees(after, street.sensor[1], later)
        return Sweeps(xyz, thing, after - xyz, again, self.returns(street.sensor[1], later, draws)[0])


@dataclass(frozen=True)
class Traffic:
    """What stands and moves on a street; cars face where traffic goes, those beside the sensor's own lane drive.

    Args:
        cars: at most 24. poles, pedestrians: how many, at least 0.
        speed: metres from one moment to the next, at most, of a car; in [0, 6]. Those of a lane are alike.
        walk: of a pedestrian along x and y. ride: of the sensor; both in [0, 6].
        turn: degrees by which a car turns, at most, in [0, 10].
    Raises: UserError for settings outside of these.
    """

    cars: int = 10
    poles: int = 6
    pedestrians: int = 4
    speed: float = 3.0
    walk: float = 0.8
    ride: float = 1.5
    turn: float = 5.0

    def __post_init__(self) -> None:
        require_in(f"[0, {len(LANES) * SLOTS}]", cars=self.cars)
        require_in("[0, 64]", poles=self.poles, pedestrians=self.pedestrians)
        require_in("[0, 6]", speed=self.speed, ride=self.ride, walk=self.walk)
        require_in("[0, 10]", turn=self.turn)

    def street(self, height: float, seed: int, number: int) -> Street:
        """Street `number`, of which the sensor is `height` above the ground."""
        draws = Draws(seed, np.array([number]), 76)
        heading = int(draws.integers(len(HEADINGS), 1)[0, 0])
        angle = heading * np.pi / 2 + np.deg2rad(float(draws.between(-30, 30, 1)[0, 0]))
        boxes, kinds, shifts, turns = zip(*self._along(draws), strict=True) if self._count() else ((), (), (), ())
        # Drawn along x, and then turned to where the street goes.
        box = np.array(boxes, np.float64).reshape(-1, 7)
        shift = np.array(shifts, np.float64).reshape(-1, 3)
        box[:, :2], shift[:, :2] = turned(box[:, :2], angle), turned(shift[:, :2], angle)
        box[:, 6] = (box[:, 6] + angle + np.pi) % (2 * np.pi) - np.pi
        things = Things(box, np.array(kinds, np.int64), shift, np.array(turns, np.float64))
        ride = float(draws.between(0, self.ride, 1)[0, 0])
        ahead = turned(np.array([ride, 0.0]), angle)
        sensor = np.array([[0, 0, height], [*ahead, height]])
        return Street(things, solids_of(things), heading, sensor)

    def _count(self) -> int:
        return self.cars + self.poles + self.pedestrians

    def _along(self, draws: Draws) -> list[tuple[list[float], int, list[float], float]]:
        """Box, kind, shift and turn of all things, on a street along x."""
        found = list[tuple[list[float], int, list[float], float]]()
        slot = draws.uniform(len(LANES) * SLOTS)[0].argsort()[: self.cars]
        speed = draws.between(0.3, 1, len(LANES))[0] * self.speed
        jitter, size = draws.between(-0.5, 0.5, self.cars, 2)[0], draws.uniform(self.cars, 3)[0]
        turn = np.deg2rad(self.turn) * draws.between(-1, 1, self.cars)[0]
        for own, (along, across), sides, by in zip(slot.tolist(), jitter, size, turn, strict=True):
            lane, place = divmod(own, SLOTS)
            drives = abs(LANES[lane]) < 4
            length, width, height = 3.6 + sides[0], 1.6 + 0.3 * sides[1], 1.4 + 0.4 * sides[2]
            x = (place - (SLOTS - 1) / 2) * GAP + along
            box = [x, LANES[lane] + 0.4 * across, height / 2, length, width, height, 0.0]
            found.append((box, CAR, [drives * speed[lane], 0, 0], drives * by))
        for kind, count, apart in ((POLE, self.poles, 8.5), (PEDESTRIAN, self.pedestrians, 10.0)):
            place, size = draws.between(-1, 1, count, 2)[0], draws.uniform(count, 2)[0]
            way = draws.between(-1, 1, count, 2)[0] * self.walk * (kind == PEDESTRIAN)
            for (x, side), (wide, high), (u, v) in zip(place, size, way, strict=True):
                pole = kind == POLE
                radius, height = (0.1, 3 + 2 * high) if pole else (0.25, 1.5 + 0.4 * high)
                radius += 0.1 * wide
                y = np.sign(side) * (apart + 2 * abs(side))
                found.append(([16 * x, y, height / 2, 2 * radius, 2 * radius, height, 0.0], kind, [u, v, 0], 0.0))
        return found


def solids_of(things: Things) -> Solids:
    """What things are made of: a car of its body, the lower half of its box, and a cabin above the rear of that."""
    middle, half, yaw, round_, thing = [], [], [], [], []
    for number, (box, kind) in enumerate(zip(things.box, things.kind, strict=True)):
        place, sides, angle = box[:3], box[3:6], box[6]
        if kind != CAR:
            parts = [(np.zeros(3), sides / 2)]
        else:
            lower, cabin = np.array([1, 1, 0.55]), np.array([0.5, 0.9, 0.45])
            parts = [
                (np.array([0, 0, -0.225]) * sides, lower * sides / 2),
                (np.array([-0.15, 0, 0.275]) * sides, cabin * sides / 2),
            ]
        for away, own in parts:
            middle.append(place + np.array([*turned(away[:2], angle), away[2]]))
            half.append(own)
            yaw.append(angle)
            round_.append(kind != CAR)
            thing.append(number)
    lengths = np.array(middle, np.float64).reshape(-1, 3), np.array(half, np.float64).reshape(-1, 3)
    return Solids(*lengths, np.array(yaw, np.float64), np.array(round_, bool), np.array(thing, np.int64))
