"""Renders of objects from shards: pairs with their own parameters, drawn by the seed, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from shard_files import posed_shard

from lightspan.core.errors import UserError
from lightspan.datamodules.shards.posed import PosedShards


def data(folder: Path, **settings: Any) -> PosedShards:
    folder.mkdir(exist_ok=True)
    options: dict[str, Any] = {"columns": 2, "batch_size": 4, "mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
    return PosedShards([posed_shard(folder / "train.tar")], [posed_shard(folder / "val.tar", 2)], **options | settings)


def test_views_are_two_renders_of_one_object_with_the_parameters_of_each(tmp_path: Path) -> None:
    made = data(tmp_path)
    made.setup()
    (batch,) = made.train_dataloader()
    assert sorted(batch["label"].tolist()) == [0, 1, 2, 3]
    for view, of_view in zip(batch["views"], batch["parameters"].unbind(1), strict=True):
        red = (255 * view[:, 0, 0, 0]).round()
        assert torch.equal(red, 10 * of_view[:, 0] + of_view[:, 1])
        assert torch.equal(of_view[:, 0].long(), batch["label"])
    first, second = batch["parameters"][:, :, 1].unbind(1)
    assert (first != second).all()
    object_ = {"__url__": "a", "__key__": "b", **members(made)}
    orders = [tuple(made.decode(object_, seed)["parameters"][:, 1].tolist()) for seed in range(40)]
    assert len(set(orders)) == 6  # each order of two of three renders
    assert orders[7] == tuple(made.decode(object_, 7)["parameters"][:, 1].tolist())


def members(made: PosedShards) -> dict[str, Any]:
    assert made.train is not None
    found: dict[str, Any] = {}
    plain = made.train.decoded_by(lambda members, seed: found.update(members) or {})  # type: ignore[arg-type, func-returns-value]
    plain.sample(1, 0)
    return found


def test_bank_and_validation_have_the_first_render_of_each_object(tmp_path: Path) -> None:
    made = data(tmp_path)
    made.setup()
    for loader, objects in ((made.bank_dataloader(), 4), (made.val_dataloader(), 2)):
        (batch,) = loader
        assert batch.keys() == {"image", "label", "index"}
        assert (255 * batch["image"][:, 0, 0, 0]).round().tolist() == [10.0 * n for n in range(objects)]


def test_without_a_shard_a_plan_has_two_objects(tmp_path: Path) -> None:
    batch = PosedShards([str(tmp_path / "none.tar")], columns=6, image_size=8).stand_in()
    assert batch is not None
    assert [view.shape for view in batch["views"]] == [(2, 3, 8, 8)] * 2
    assert batch["parameters"].shape == (2, 2, 6)
    assert data(tmp_path).stand_in() is None


def test_renders_without_their_numbers_are_named(tmp_path: Path) -> None:
    for columns, renders in ((3, 3), (2, 1)):
        folder = tmp_path / str(columns)
        folder.mkdir()
        made = PosedShards([posed_shard(folder / "x.tar", renders=renders)], columns=columns, batch_size=4)
        made.setup()
        message = rf"sample \w+ has {renders} renders and parameters \[{renders}, 2\]; .* columns={columns} numbers"
        with pytest.raises(UserError, match=message):
            next(iter(made.train_dataloader()))
    with pytest.raises(UserError, match="columns=0 must be at least 1"):
        PosedShards(["x.tar"], columns=0)
