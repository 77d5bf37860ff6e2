"""Demonstrations are recorded once, the same bytes each time, and read with exact order; wrong actions are refused."""

import json
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from shard_files import sound_shard

from lightspan.core.errors import UserError
from lightspan.datamodules.image.augment.views import RandomViews
from lightspan.datamodules.worlds.babyai import Demonstrations
from lightspan.datamodules.worlds.steps import StepShards, record, step_members

LEVEL = "BabyAI-GoToRedBallGrey-v0"


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("minigrid")
    folder = tmp_path_factory.mktemp("worlds") / "ball"
    record(Demonstrations([LEVEL], episodes=3, ahead=2), folder, shard_bytes=20_000)
    return folder


def steps_of(folder: Path, **settings: Any) -> StepShards:
    shards = sorted(str(path) for path in folder.glob("*.tar"))
    data = StepShards(shards, **{"batch_size": 4, "mean": (0.0,) * 3, "std": (1.0,) * 3} | settings)
    data.setup()
    return data


def test_a_recording_is_the_same_bytes_each_time_and_ends_with_the_last_step(recorded: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    count = record(Demonstrations([LEVEL], episodes=3, ahead=2), again, shard_bytes=20_000)
    for path in recorded.iterdir():
        assert path.read_bytes() == (again / path.name).read_bytes(), path.name
    assert len(list(again.glob("*.tar"))) > 1
    assert json.loads((again / "classes.json").read_text()) == ["go to the red ball"]
    assert len(steps_of(again).train or ()) == count


def test_a_step_is_what_the_environment_shows_before_and_after(recorded: Path) -> None:
    import gymnasium

    env: Any = gymnasium.make(LEVEL).unwrapped
    env.reset(seed=0)
    samples = steps_of(recorded, missions=True).train
    assert samples is not None
    actions = [int(samples.sample(number, 0)["action"]) for number in range(4)]
    for number in range(3):
        sample = samples.sample(number, 0)
        shown = torch.from_numpy(env.get_frame(highlight=False, tile_size=8)).permute(2, 0, 1) / 255
        assert torch.equal(sample["image"], shown)
        assert sample["mission"] == "go to the red ball"
        column, row, east, south = sample["state"].tolist()
        assert (round(7 * column), round(7 * row)) == tuple(map(int, env.agent_pos))
        assert (east, south) == tuple(map(float, env.dir_vec))
        env.step(actions[number])
        if number:
            before = samples.sample(number - 1, 0)
            assert torch.equal(
                before["next_image"],
                torch.from_numpy(env.get_frame(highlight=False, tile_size=8)).permute(2, 0, 1) / 255,
            )


def test_only_asked_missions_are_kept_and_labelled_in_their_order(tmp_path: Path) -> None:
    pytest.importorskip("minigrid")
    found = Demonstrations(["BabyAI-GoToLocal-v0"], episodes=4)
    list(found.samples())
    wanted = found.tasks[1]
    chosen = Demonstrations(["BabyAI-GoToLocal-v0"], episodes=1, missions=[wanted])
    assert all(
        members[next(name for name in members if name.endswith(".txt"))] == wanted.encode()
        for members in chosen.samples()
    )
    assert chosen.tasks == [wanted]
    absent = Demonstrations(["BabyAI-GoToLocal-v0"], episodes=1, missions=["go home"])
    with pytest.raises(UserError, match="missions"):
        list(absent.samples())


def test_order_is_exact_under_resume(recorded: Path) -> None:
    view = RandomViews(count=1, flip=0)
    straight = list(steps_of(recorded, view=view).train_dataloader())
    loader = steps_of(recorded, view=view).train_dataloader()
    list(islice(loader, 2))
    later = steps_of(recorded, view=view).train_dataloader()
    later.load_state_dict(loader.state_dict())
    rest = list(later)
    assert len(straight) == 2 + len(rest)
    for one, other in zip(straight[2:], rest, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_both_images_share_their_view_unless_told_otherwise(recorded: Path) -> None:
    view = RandomViews(count=1, size=32, scale=(0.3, 0.6))
    together, apart = (steps_of(recorded, view=view, share_views=share).train for share in (True, False))
    assert together is not None
    assert apart is not None
    turned = next(
        number for number in range(len(together)) if int(together.sample(number, 0)["action"]) == 0
    )  # the agent turned in its place: most of the picture stays
    moved = [
        float((sample["image"] - sample["next_image"]).abs().mean())
        for samples in (together, apart)
        for sample in [samples.sample(turned, 3)]
    ]
    assert moved[0] < moved[1]


def step(action: Any) -> dict[str, bytes]:
    frames = [np.zeros((8, 8, 3), np.uint8)] * 2
    members = step_members("k", frames, 1, "go", action=action, state=np.zeros(2, np.float32))
    return {name.partition(".")[2]: content for name, content in members.items()}


def test_actions_out_of_their_space_are_refused(tmp_path: Path) -> None:
    cases = (
        (7, np.int64(7)),
        (7, np.int64(-1)),
        (7, np.zeros(2, np.float32)),
        (7, np.float32(1)),
        (None, np.array([0.0, 1.01], np.float32)),
        (None, np.array([np.nan], np.float32)),
        (None, np.int64(1)),
    )
    for number, (actions, action) in enumerate(cases):
        sound_shard(tmp_path / f"{number}.tar", [step(action)])
        data = StepShards([str(tmp_path / f"{number}.tar")], actions=actions, batch_size=1)
        data.setup()
        assert data.train is not None
        with pytest.raises(UserError, match="action"):
            data.train.sample(0, 0)
    sound_shard(tmp_path / "good.tar", [step(np.array([-1.0, 1.0]))])
    data = StepShards([str(tmp_path / "good.tar")], actions=None, batch_size=1)
    data.setup()
    batch = next(iter(data.train_dataloader()))
    assert batch["action"].tolist() == [[-1, 1]]
    assert batch["label"].tolist() == [1]


def test_wrong_settings_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for wrong in ({"levels": []}, {"episodes": 0}, {"ahead": 0}, {"noise": 1.0}, {"tile": 3}, {"seed": -1}):
        with pytest.raises(UserError, match=next(iter(wrong))):
            Demonstrations(**{"levels": [LEVEL], "episodes": 1} | wrong)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="actions"):
        StepShards(["a.tar"], actions=0)
    with pytest.raises(UserError, match="count=1"):
        StepShards(["a.tar"], view=RandomViews(count=2))
    pytest.importorskip("minigrid")
    for levels, said in (
        (["CartPole-v1"], "BabyAI"),
        (["BabyAI-None-v0"], "None"),
        ([LEVEL, "BabyAI-GoToObjMaze-v0"], "squares"),
    ):
        with pytest.raises(UserError, match=said):
            list(Demonstrations(levels, 1).samples())
    monkeypatch.setitem(sys.modules, "minigrid", None)
    with pytest.raises(UserError, match=r"\[worlds\]"):
        list(Demonstrations([LEVEL], 1).samples())
