"""Clips of lit faces from shards: scales, masks and colours, and what is refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from shard_files import lit_clip, npy_members, sound_shard

from lightspan.core.batches import require_declared
from lightspan.core.errors import UserError
from lightspan.datamodules.image.augment.views import TwoViews
from lightspan.datamodules.shards.lit_clips import LitClipShards
from lightspan.datamodules.video.batch import LitClipBatch

SIZES: dict[str, Any] = {"shape": (2, 3, 4, 5), "pixels": (6, 7), "embedding": 5}


def data(path: Path, arrays: dict[str, np.ndarray], **settings: Any) -> LitClipShards:
    return LitClipShards([sound_shard(path / "a.tar", [npy_members(arrays)])], batch_size=1, **SIZES | settings)


def test_a_sample_is_what_its_arrays_say(tmp_path: Path) -> None:
    arrays = lit_clip(0, **SIZES)
    made = data(tmp_path, arrays, scale=0.5, fps=8.0)
    made.setup()
    (batch,) = made.bank_dataloader()
    require_declared(batch, LitClipBatch, "LitClipShards")
    clip = torch.from_numpy(arrays["clip"]).float()
    assert torch.equal(batch["clip"][0], clip.transpose(0, 1) / 2)
    assert torch.equal(batch["reference"][0], torch.from_numpy(arrays["reference"]).float() / 2)
    assert torch.equal(batch["face"][0], torch.from_numpy(arrays["face"] // 255).long())
    assert torch.equal(batch["reference_face"][0], torch.from_numpy(arrays["reference_face"] // 255).long())
    torch.testing.assert_close(batch["portrait"][0], torch.from_numpy(arrays["portrait"]) / 127.5 - 1)
    torch.testing.assert_close(batch["shading"][0], torch.from_numpy(arrays["shading"]).transpose(0, 1) / 255)
    assert torch.equal(batch["embedding"][0], torch.from_numpy(arrays["embedding"]))
    assert batch["fps"].tolist() == [8]


def test_without_an_embedding_none_is_read(tmp_path: Path) -> None:
    arrays = lit_clip(0, **SIZES)
    del arrays["embedding"]
    made = data(tmp_path, arrays, embedding=0)
    made.setup()
    assert "embedding" not in next(iter(made.bank_dataloader()))


def test_where_no_shard_is_there_is_a_batch_of_the_right_shapes() -> None:
    for embedding in (5, 0):
        made = LitClipShards(["nowhere/a.tar"], **SIZES | {"embedding": embedding})
        require_declared(made.stand_in(), LitClipBatch, "LitClipShards")


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("clip", np.zeros((3, 2, 4, 4))),
        ("face", np.zeros((3, 4, 5), np.int64)),
        ("shading", np.full((3, 3, 6, 7), np.nan)),
    ],
)
def test_what_is_no_such_array_is_refused(name: str, wrong: np.ndarray, tmp_path: Path) -> None:
    for arrays in (lit_clip(0, **SIZES) | {name: wrong}, {k: v for k, v in lit_clip(0, **SIZES).items() if k != name}):
        made = data(tmp_path, arrays)
        made.setup()
        assert made.train is not None
        with pytest.raises(UserError, match=name):
            made.train.sample(0, 0)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        *(("shape", {"shape": (4, 0, 2, 2)}), ("pixels", {"pixels": (0, 4)}), ("embedding", {"embedding": -1})),
        *(("scale", {"scale": 0.0}), ("fps", {"fps": 0.0}), ("views", {"views": TwoViews()})),
    ],
)
def test_settings_that_mean_nothing_are_refused(name: str, settings: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=name):
        LitClipShards(["a.tar"], **settings)
