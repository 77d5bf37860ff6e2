"""Lit heads: colour times shading, normals of ellipsoids, lights that can be found again, sets that share nobody."""

import numpy as np
import pytest
import torch

from lightspan.core.errors import UserError
from lightspan.datamodules.rendered.draws import Draws
from lightspan.datamodules.rendered.harmonic_light import CONSTANT, fitted_light, shading
from lightspan.datamodules.rendered.heads import REACH, HeadSpace, LitHeads, heads_of, lights_of, seen, turned

SPACE = HeadSpace(16, 3, 30.0, False)


def test_a_clip_is_colour_times_shading_within_the_face_and_ground_beside_it() -> None:
    drawn = SPACE.clips(0, np.arange(4))
    face = drawn["face"][:, :, None].repeat(3, axis=2)
    assert 0.2 < face.mean() < 0.6
    lit = np.clip(drawn["colour"] * drawn["shading"], 0, 1)
    np.testing.assert_array_equal(drawn["clip"][face], lit[face])
    assert (drawn["shading"][~face] == 0).all()
    beside = ~face[:, 0] & ~face[:, 2]
    np.testing.assert_array_equal(drawn["clip"][:, 0][beside], drawn["clip"][:, 2][beside])  # the ground stays


def test_the_shading_is_that_of_the_normals_and_shows_the_light() -> None:
    heads = heads_of(Draws(0, np.arange(4), 30))
    normal = seen(heads, turned(np.zeros((4, 1)), np.zeros((4, 1))), 24).normal
    lengths = np.linalg.norm(normal, axis=2)
    assert np.all((np.abs(lengths - 1) < 1e-5) | (lengths == 0))
    assert (normal[:, :, 2][lengths > 0] > 0).all()  # to the camera
    drawn = SPACE.clips(0, np.arange(4))
    for row in range(4):
        shown = drawn["shading"][row].transpose(0, 2, 3, 1)[drawn["face"][row]]
        normals = drawn["normal"][row].transpose(0, 2, 3, 1)[drawn["face"][row]]
        bright = (shown > 0).all(axis=1)
        light = fitted_light(torch.from_numpy(shown[bright]), torch.from_numpy(normals[bright]))
        torch.testing.assert_close(light, torch.from_numpy(drawn["light"][row]).double(), rtol=0, atol=2e-3)


def test_a_ball_has_the_normals_of_a_ball() -> None:
    heads = heads_of(Draws(0, np.arange(1)))
    ball = heads._replace(centre=np.zeros((1, 1, 3), np.float32), radii=np.full((1, 1, 3), 0.8, np.float32))
    found = seen(ball, turned(np.array([[0.4]]), np.array([[-0.3]])), 21)
    at = (np.arange(21) + 0.5) * 2 * REACH / 21 - REACH
    x, y = np.meshgrid(at, -at)
    inside = x**2 + y**2 < 0.64
    np.testing.assert_array_equal(found.face[0, 0], inside)
    expected = np.stack([x, y, np.sqrt(np.maximum(0.64 - x**2 - y**2, 0))]) / 0.8
    np.testing.assert_allclose(found.normal[0, 0][:, inside], expected[:, inside], atol=1e-5)


def test_an_ellipsoid_has_the_normals_of_its_equation() -> None:
    heads, radii = heads_of(Draws(0, np.arange(1))), np.array([0.9, 0.6, 0.4], np.float32)
    one = heads._replace(centre=np.zeros((1, 1, 3), np.float32), radii=radii[None, None])
    found = seen(one, turned(np.zeros((1, 1)), np.zeros((1, 1))), 21)
    at = (np.arange(21) + 0.5) * 2 * REACH / 21 - REACH
    x, y = np.meshgrid(at, -at)
    left = 1 - (x / 0.9) ** 2 - (y / 0.6) ** 2
    np.testing.assert_array_equal(found.face[0, 0], left > 0)
    slope = np.stack([x / 0.9**2, y / 0.6**2, 0.4 * np.sqrt(np.maximum(left, 0)) / 0.4**2])
    expected = slope / np.linalg.norm(slope, axis=0)
    np.testing.assert_allclose(found.normal[0, 0][:, left > 0], expected[:, left > 0], atol=1e-4)


def test_the_reference_is_the_same_head_in_a_third_pose_under_the_other_light() -> None:
    drawn, numbers = SPACE.clips(0, np.arange(4)), np.arange(4)
    draws, most = Draws(0, numbers, 31), np.deg2rad(SPACE.turn)
    yaw, pitch = most * draws.between(-1, 1, 3), most / 2 * draws.between(-1, 1, 3)
    found = seen(heads_of(Draws(0, numbers, 30)), turned(yaw[:, 2:], pitch[:, 2:]), SPACE.size)
    face = found.face[:, 0]
    assert (drawn["reference_face"] == face).mean() > 0.99
    normal = torch.from_numpy(found.normal[:, 0].transpose(0, 2, 3, 1))
    shaded = shading(torch.from_numpy(drawn["reference_light"])[:, None, None], normal).numpy().transpose(0, 3, 1, 2)
    lit = np.clip(found.colour[:, 0] * np.clip(shaded, 0, None), 0, 1)
    inside = (face & drawn["reference_face"])[:, None].repeat(3, axis=1)
    np.testing.assert_allclose(drawn["reference"][inside], lit[inside], atol=2e-3)
    assert np.abs(drawn["reference_light"] - drawn["light"]).max(axis=(1, 2)).min() > 0.05


def test_light_comes_mostly_from_one_side() -> None:
    light = torch.from_numpy(lights_of(Draws(0, np.arange(200), 32)))
    directions = torch.nn.functional.normalize(torch.randn(4000, 3, generator=torch.Generator().manual_seed(0)), dim=1)
    plain = light.clone()
    plain[:, 4:] = 0
    shown = shading(plain[:, None], directions)[..., 0]
    strength = shown.max(dim=1).values / light[:, 0, 0].mul(CONSTANT) - 1
    assert 0.39 < strength.min() < 0.45
    assert 0.70 < strength.max() < 0.76


def test_turns_are_rotations_to_the_right_and_up() -> None:
    rotation = turned(np.array([0.0, 0.5, 0.0]), np.array([0.0, 0.0, 0.5]))
    np.testing.assert_allclose(rotation @ rotation.transpose(0, 2, 1), np.stack([np.eye(3)] * 3), atol=1e-6)
    np.testing.assert_array_equal(rotation[0], np.eye(3))
    ahead = rotation[:, :, 2]
    assert ahead[1, 0] == pytest.approx(np.sin(0.5))
    assert ahead[2, 1] == pytest.approx(np.sin(0.5))


def test_a_sample_is_the_same_in_any_batch_and_no_head_is_in_two_sets() -> None:
    data = LitHeads(size=6, val_size=2, test_size=2, batch_size=3)
    data.setup()
    together, alone = data.train.batch([4, 1, 2], [0] * 3), data.train.batch([1], [9])
    for name, field in alone.items():
        assert torch.equal(field, together[name][1:2]), name
    firsts = [getattr(data, part).sample(0, 0)["reference"] for part in ("train", "val", "test")]
    assert not torch.equal(firsts[0], firsts[1])
    assert not torch.equal(firsts[1], firsts[2])


def test_a_batch_has_what_was_drawn() -> None:
    data = LitHeads(size=6, val_size=2, test_size=2, batch_size=3, image_size=12, frames=2)
    data.setup()
    batch, drawn = data.train.batch([4, 1], [0] * 2), data.space.clips(data.draw_seed, np.array([4, 1]))
    assert torch.equal(batch["shading"], torch.from_numpy(drawn["shading"]).transpose(1, 2))
    assert torch.equal(batch["face"], torch.from_numpy(drawn["face"]).long())
    assert torch.equal(batch["reference_face"], torch.from_numpy(drawn["reference_face"]).long())


def test_a_fixed_light_comes_evenly_from_all_around() -> None:
    drawn = HeadSpace(12, 2, 20.0, True).clips(3, np.arange(2))
    even = torch.zeros(9, 3)
    even[0] = 0.7 / CONSTANT
    torch.testing.assert_close(torch.from_numpy(drawn["light"]), even.expand(2, 9, 3))
    shown = drawn["shading"][drawn["face"][:, :, None].repeat(3, axis=2)]
    np.testing.assert_allclose(shown, shading(even, torch.tensor([0.0, 0.0, 1.0]))[0].item(), atol=1e-6)


def test_a_head_that_does_not_turn_stands_still() -> None:
    drawn = HeadSpace(12, 3, 0.0, False).clips(0, np.arange(2))
    assert (drawn["clip"] == drawn["clip"][:, :1]).all()


@pytest.mark.parametrize(
    ("name", "given"), [("image_size", 7), ("frames", 0), ("turn", 61), ("image_size", 100_000), ("frames", 10_000_000)]
)
def test_what_cannot_be_drawn_is_refused(name: str, given: int) -> None:
    with pytest.raises(UserError, match=name):
        LitHeads(**{name: given})
