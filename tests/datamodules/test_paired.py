"""Pairs of photographs from shards: both of a sample, each changed by itself, and what is refused."""

from pathlib import Path

import pytest
from shard_files import posed_shard

from lightspan.core.errors import UserError
from lightspan.datamodules.image.augment.views import RandomViews
from lightspan.datamodules.shards.paired import PairedShards


def test_a_sample_has_both_photographs_in_the_order_of_their_names(tmp_path: Path) -> None:
    shards = [[posed_shard(tmp_path / f"{part}.tar", renders=2)] for part in ("train", "val")]
    made = PairedShards(*shards, batch_size=4, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    made.setup()
    for loader in (made.train_dataloader(), made.bank_dataloader(), made.val_dataloader()):
        (batch,) = loader
        assert batch.keys() == {"views", "index"}
        for number, view in enumerate(batch["views"]):
            assert (255 * view[:, 0, 0, 0]).round().tolist() == (10 * batch["index"] + number).tolist()


def test_each_photograph_is_changed_by_itself_and_as_the_seed_has_it(tmp_path: Path) -> None:
    view = RandomViews(count=1, size=6, scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=0.0, brightness=0.5, jitter=1.0)
    made = PairedShards([posed_shard(tmp_path / "train.tar", renders=2)], batch_size=4, view=view)
    made.setup()
    assert made.train is not None
    blue = [[float(one[2, 0, 0]) for one in made.train.sample(1, seed)["views"]] for seed in (3, 3, 4)]
    assert blue[0] == blue[1]
    assert len({*blue[0], *blue[2]}) == 4  # one colour in both photographs, in four lights
    assert made.bank.sample(1, 3)["views"][0][2, 0, 0] == 1.0  # as it is


def test_without_a_shard_a_plan_has_two_pairs(tmp_path: Path) -> None:
    view = RandomViews(count=1, size=8)
    batch = PairedShards([str(tmp_path / "none.tar")], view=view).stand_in()
    assert batch is not None
    assert [one.shape for one in batch["views"]] == [(2, 3, 8, 8)] * 2
    assert PairedShards([posed_shard(tmp_path / "x.tar", renders=2)]).stand_in() is None


@pytest.mark.parametrize("renders", [1, 3])
def test_a_sample_that_is_no_pair_is_named(renders: int, tmp_path: Path) -> None:
    made = PairedShards([posed_shard(tmp_path / "x.tar", renders=renders)], batch_size=4)
    made.setup()
    with pytest.raises(UserError, match=rf"sample \w+ has {renders} pictures; a pair has two, such as KEY\.1\.jpg"):
        next(iter(made.train_dataloader()))
