"""Tags of images from shards: which hold, which are known, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
from shard_files import partial_shard

from lightspan.core.errors import UserError
from lightspan.datamodules.shards.tagged import TaggedShards

SAID = ['{"present": [0, 2], "absent": [3]}', '{"absent": [0, 1]}', "{}", "null", '{"present": [1], "absent": [1]}']
HOLD = [[1, 0, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0], [0, 1, 0, 0]]
ANNOTATED = [[1, 0, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0], [0, 1, 0, 0]]


def data(folder: Path, said: list[str], **settings: Any) -> TaggedShards:
    return TaggedShards(
        [partial_shard(folder / "train.tar", [{"json": one} for one in said])], num_tags=4, batch_size=5, **settings
    )


@pytest.mark.parametrize(("complete", "known"), [(False, ANNOTATED), (True, [[1] * 4] * 5)])
def test_tags_in_neither_list_are_absent_or_unknown(tmp_path: Path, complete: bool, known: list[list[int]]) -> None:
    made = data(tmp_path, SAID, complete=complete)
    made.setup()
    (batch,) = made.bank_dataloader()
    assert batch["tags"].tolist() == HOLD
    assert batch["tags_known"].tolist() == known


@pytest.mark.parametrize(
    "said", ['{"present": [4]}', '{"present": [-1]}', '{"absent": [true]}', '{"tags": [1]}', "[1]"]
)
def test_what_is_no_list_of_tags_is_refused(tmp_path: Path, said: str) -> None:
    made = data(tmp_path, [said])
    made.setup()
    with pytest.raises(
        UserError, match=r"sample 0000 has tags .* lists of numbers from 0 to num_tags - 1 = 3, or null"
    ):
        next(iter(made.bank_dataloader()))


def test_a_plan_without_shards_has_a_batch_and_no_tag_is_no_set(tmp_path: Path) -> None:
    batch = TaggedShards([str(tmp_path / "none.tar")], num_tags=4).stand_in()
    assert batch is not None
    assert batch["tags_known"].shape == (2, 4)
    with pytest.raises(UserError, match="num_tags=0 must be at least 1"):
        TaggedShards(["a.tar"], num_tags=0)
