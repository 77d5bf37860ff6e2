"""Drawn LiDAR sweeps: rays stop where a plain search stops them, flows are rigid motions, boxes hold their points."""

from typing import Any

import numpy as np
import pytest
import torch

from lightspan.core.batches import require_declared
from lightspan.core.errors import UserError
from lightspan.datamodules.points.batch import SweepsBatch
from lightspan.datamodules.points.sweeps import DrawnSweeps
from lightspan.datamodules.rendered.traffic import (
    CAR,
    NEAR,
    Lidar,
    Solids,
    Street,
    Traffic,
    first_hits,
    moved,
    moved_on,
    turned,
)

EXACT = Lidar(beams=12, steps=60, noise=0.0, missing=0.0)


def inside_of(points: np.ndarray, solids: Solids, solid: int, more: float = 0.0) -> np.ndarray:
    away = points - solids.middle[solid]
    away = np.concatenate([turned(away[:, :2], -solids.yaw[solid]), away[:, 2:]], axis=1)
    half = solids.half[solid] + more
    if solids.round[solid]:
        return (np.hypot(away[:, 0], away[:, 1]) <= half[0]) & (np.abs(away[:, 2]) <= half[2])
    return (np.abs(away) <= half).all(axis=1)


def street(number: int = 0, **settings: Any) -> Street:
    return Traffic(**settings).street(1.8, 0, number)


def test_rays_stop_at_what_a_march_along_them_meets_first() -> None:
    step, lidar = 0.02, Lidar(beams=8, steps=40)
    for number in range(2):
        given, rays = street(number), lidar.rays(0.3)
        length, thing = first_hits(given.sensor[0], rays, given.solids)
        flat = (given.sensor[0] + np.arange(0, 24, step)[:, None, None] * rays).reshape(-1, 3)
        met = [inside_of(flat, given.solids, solid) for solid in range(len(given.solids.yaw))]
        within = np.array([*met, flat[:, 2] < 0]).reshape(len(met) + 1, -1, len(rays))
        at, stops = within.any(axis=0).argmax(axis=0), within.any(axis=(0, 1))
        ends = np.where(stops, at * step, 24)
        assert (length.clip(max=24) <= ends + 1e-9).all()
        # A march may step over an edge, and goes on then.
        near = ends - length.clip(max=24) <= step
        assert near.mean() > 0.98
        marched = np.append(given.solids.thing, -1)[within[:, at, range(len(rays))].argmax(axis=0)]
        assert (marched == thing)[near & stops].mean() > 0.99
        assert {CAR, 0} <= {*np.append(given.things.kind, 0)[thing].tolist()}


def test_a_box_and_a_cylinder_are_met_where_it_is_worked_out_by_hand() -> None:
    middle, half = np.array([[5.0, 0, 1], [0, 5, 1]]), np.array([[1.0, 2, 1], [0.5, 0.5, 1]])
    solids = Solids(middle, half, np.array([np.pi / 2, 0.3]), np.array([False, True]), np.array([7, 8]))
    rays = np.array([[1.0, 0, 0], [0, 1, 0], [0, -1, 0], [0, 0, -1], [0, 0, 1]])
    length, thing = first_hits(np.array([0.0, 0, 1]), rays, solids)
    # The box is turned by a quarter, so that its longer side lies along x.
    np.testing.assert_allclose(length, [3, 4.5, np.inf, 1, np.inf])
    assert thing.tolist() == [7, 8, -1, -1, -1]
    nothing = Solids(*(part[:0] for part in solids))
    np.testing.assert_allclose(first_hits(np.array([0.0, 0, 1]), rays, nothing)[0], [np.inf] * 3 + [1, np.inf])


def test_flow_is_the_rigid_motion_of_the_box_around_a_point() -> None:
    for number in range(3):
        given = street(number)
        seen, later, things = EXACT.sweeps(given, 0, number), moved_on(given), given.things
        ground = seen.thing < 0
        assert (seen.flow[ground] == 0).all()
        assert np.abs(seen.xyz[ground][:, 2]).max() < 1e-9
        after = seen.xyz + seen.flow
        for solid, thing in enumerate(given.solids.thing):
            own = np.flatnonzero((seen.thing == thing) & inside_of(seen.xyz, given.solids, solid, 1e-9))
            assert inside_of(after[own], later, solid, 1e-9).all()
            apart = np.linalg.norm(seen.xyz[own][:, None] - seen.xyz[own], axis=-1)
            np.testing.assert_allclose(np.linalg.norm(after[own][:, None] - after[own], axis=-1), apart, atol=1e-9)
            box = np.concatenate([things.box[thing, :3], [0]])[None, :3]
            np.testing.assert_allclose(moved(box, np.array([thing]), things) - box, things.shift[thing][None])
        assert np.abs(seen.flow).max() > 0.3


def test_what_is_seen_again_lies_on_what_the_next_rays_meet() -> None:
    given, far = street(1), Lidar(beams=12, steps=60, noise=0.0, missing=0.0, reach=15.0)
    seen, later = far.sweeps(given, 0, 1), moved_on(given)
    ahead = seen.xyz + seen.flow - given.sensor[1]
    length = np.linalg.norm(ahead, axis=1)
    first, _ = first_hits(given.sensor[1], ahead / length[:, None], later)
    assert (first >= length - NEAR)[seen.again].all()
    hidden = first < length - NEAR
    assert hidden.any()
    assert not seen.again[hidden].any()
    assert not seen.again[length > 15].any()
    assert 0.5 < seen.again.mean() < 1


def test_without_motion_both_moments_are_alike_up_to_where_rays_begin() -> None:
    given = street(2, speed=0.0, walk=0.0, ride=0.0, turn=0.0)
    seen, later = EXACT.sweeps(given, 0, 2), moved_on(given)
    assert np.abs(seen.flow).max() < 1e-12
    assert seen.again.mean() > 0.98  # but on the rim of what the beams see
    np.testing.assert_allclose(later.middle, given.solids.middle)


def test_cars_stay_apart_at_both_moments_and_face_the_label() -> None:
    for number in range(20):
        given = street(number, cars=24, poles=0, pedestrians=0, speed=6.0)
        box, later = given.things.box, moved(given.things.box[:, :3], np.arange(24), given.things)
        off = (box[:, 6] - given.heading * np.pi / 2 + np.pi) % (2 * np.pi) - np.pi
        assert (np.abs(off) <= np.deg2rad(30) + 1e-6).all()
        along = turned(np.stack([box[:, :2], later[:, :2]]), -box[0, 6])
        for at in along:
            gap = np.abs(at[:, None] - at) - (np.array([4.6, 1.9]) + np.array([0.2, 0.4]))
            apart = (gap > 0).any(axis=-1) | np.eye(24, dtype=bool)
            assert apart.all()


def test_batches_are_as_declared_and_the_same_whenever_they_are_asked_for() -> None:
    data = DrawnSweeps(Traffic(cars=3), EXACT, size=6, val_size=2, test_size=2, batch_size=3)
    data.setup()
    for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader(), data.bank_dataloader()):
        require_declared(next(iter(loader)), SweepsBatch, "DrawnSweeps")
    first, again = data.train.sample(4, 0), data.train.sample(4, 9)
    assert all(torch.equal(torch.as_tensor(first[name]), torch.as_tensor(again[name])) for name in first)
    assert not torch.equal(first["box"], data.val.sample(0, 0)["box"][: len(first["box"])])
    require_declared(data.stand_in(), SweepsBatch, "DrawnSweeps")
    noisy = DrawnSweeps(Traffic(cars=3), EXACT, flow_noise=0.2, size=6)
    noisy.setup()
    error = noisy.train.sample(4, 0)["flow"] - first["flow"]
    assert float(error.std()) == pytest.approx(0.2, rel=0.1)


def test_a_street_may_be_bare_and_a_sensor_blind() -> None:
    bare = DrawnSweeps(Traffic(0, 0, 0), EXACT)
    sample = bare.blank().sample(0, 0)
    assert sample["box"].shape == (0, 7)
    assert (sample["classes"] == 0).all()
    up = DrawnSweeps(None, Lidar(beams=1, steps=3, low=80, high=80, missing=0.0), batch_size=2)
    assert len(up.stand_in()["xyz"]) == 0
    require_declared(up.stand_in(), SweepsBatch, "DrawnSweeps")


def test_returns_are_lost_and_lengths_are_off_as_asked() -> None:
    given = street(0)
    whole, lossy = (len(Lidar(noise=0, missing=share).sweeps(given, 0, 0).xyz) for share in (0.0, 0.3))
    assert lossy / whole == pytest.approx(0.7, abs=0.05)
    ground = Lidar(noise=0.05).sweeps(street(0, cars=0, poles=0, pedestrians=0), 0, 0)
    assert (ground.thing == -1).all()
    away = ground.xyz - given.sensor[0]
    length = np.linalg.norm(away, axis=1)
    off = length - length * given.sensor[0, 2] / -away[:, 2]
    assert off.std() == pytest.approx(0.05, rel=0.1)


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [
        (Lidar, "beams", 0), (Lidar, "high", -30), (Lidar, "low", -90), (Lidar, "missing", 1), (Lidar, "noise", -1),
        (Lidar, "reach", 0), (Traffic, "cars", 25), (Traffic, "speed", 7), (Traffic, "turn", 11),
        (Traffic, "walk", -1), (DrawnSweeps, "flow_noise", -0.1),
    ],
)  # fmt: skip
def test_settings_out_of_range_are_refused(kind: Any, name: str, value: float) -> None:
    with pytest.raises(UserError, match=name):
        kind(**{name: value})
