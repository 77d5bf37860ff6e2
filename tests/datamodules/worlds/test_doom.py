"""Walks are functions of their seed, and their places, depths and objects are those of what is seen."""

import sys
from pathlib import Path

import pytest
import torch

from lightspan.core.errors import UserError
from lightspan.datamodules.worlds.doom import BUTTONS, Walks
from lightspan.datamodules.worlds.steps import StepShards, record


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> tuple[StepShards, Walks, Path]:
    pytest.importorskip("vizdoom")
    folder = tmp_path_factory.mktemp("walks") / "out"
    walks = Walks(["map02"], walks=2, steps=12, size=48)
    assert record(walks, folder) == 24
    data = StepShards([str(folder / "00000.tar")], actions=len(BUTTONS), batch_size=4, truth=True, missions=True)
    data.setup()
    return data, walks, folder


def test_a_walk_is_the_same_bytes_each_time(recorded: tuple[StepShards, Walks, Path], tmp_path: Path) -> None:
    record(Walks(["map02"], walks=2, steps=12, size=48), tmp_path / "again")
    assert (tmp_path / "again" / "00000.tar").read_bytes() == (recorded[2] / "00000.tar").read_bytes()
    assert not list(Path.cwd().glob("*vizdoom*"))


def test_actions_move_the_walker_as_they_say(recorded: tuple[StepShards, Walks, Path]) -> None:
    samples, moved, turned = recorded[0].train, 0, 0
    assert samples is not None
    for number in range(11):
        one, two = samples.sample(number, 0), samples.sample(number + 1, 0)
        assert torch.equal(one["next_image"], two["image"])
        (sine, cosine), (later_sine, later_cosine) = one["state"][3:], two["state"][3:]
        left = float(cosine * later_sine - sine * later_cosine)  # the sine of the turn
        if one["action"] == 0:
            moved += float((two["state"][:2] - one["state"][:2]).norm()) > 0
        else:
            turned += (left > 0) == (int(one["action"]) == BUTTONS.index("TURN_LEFT")) and left != 0
        assert one["mission"] == "map02"
    actions = [int(samples.sample(number, 0)["action"]) for number in range(11)]
    assert turned == sum(action > 0 for action in actions)
    assert moved


def test_depth_and_objects_belong_to_the_view(recorded: tuple[StepShards, Walks, Path]) -> None:
    data, walks, _ = recorded
    batch = next(iter(data.train_dataloader()))
    assert batch["depth"].shape == batch["objects"].shape == (4, 48, 48)
    assert 0 <= batch["depth"].min() < batch["depth"].max() <= 255
    assert int(batch["objects"].max()) <= len(walks.objects)
    assert walks.objects


def test_wrong_settings_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for wrong in ({"maps": []}, {"walks": 0}, {"steps": 0}, {"ahead": 0}, {"size": 121}, {"seed": -1}):
        with pytest.raises(UserError, match=next(iter(wrong))):
            Walks(**{"maps": ["map01"]} | wrong)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="truth"):
        StepShards(["a.tar"], actions=None, truth=True)
    monkeypatch.setitem(sys.modules, "vizdoom", None)
    with pytest.raises(UserError, match=r"\[worlds\]"):
        list(Walks(["map01"]).samples())
    monkeypatch.undo()
    pytest.importorskip("vizdoom")
    with pytest.raises(UserError, match="map99"):
        list(Walks(["map99"]).samples())
