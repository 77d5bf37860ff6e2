"""Latents from shards: as stored and scaled, or drawn anew from their distribution, and what is refused."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from shard_files import sound_shard
from torch import Tensor

from lightspan.core.errors import UserError
from lightspan.datamodules.image.augment.views import TwoViews
from lightspan.datamodules.shards.latents import LatentShards

MEAN = np.random.default_rng(0).normal(size=(2, 3, 3)).astype(np.float16)


def data(path: Path, arrays: list[np.ndarray], **settings: Any) -> LatentShards:
    members: list[dict[str, bytes]] = []
    for number, array in enumerate(arrays):
        content = io.BytesIO()
        np.save(content, array)
        members.append({"npy": content.getvalue()} | ({"cls": b"7"} if number else {}))
    shard = sound_shard(path / "train.tar", members)
    return LatentShards([shard], shape=(2, 3, 3), batch_size=len(arrays), **settings)


def images(made: LatentShards, seed: int = 0) -> Tensor:
    made.setup()
    assert made.train is not None
    return torch.stack([made.train.sample(i, seed + i)["image"] for i in range(len(made.train))])


def test_a_latent_is_scaled_and_has_its_class_or_0(tmp_path: Path) -> None:
    made = data(tmp_path, [MEAN, MEAN], scale=0.5)
    made.setup()
    (batch,) = made.bank_dataloader()
    assert torch.equal(batch["image"], torch.from_numpy(MEAN).float().expand(2, -1, -1, -1) / 2)
    assert batch["label"].tolist() == [0, 7]


def test_a_distribution_is_drawn_from_anew_and_of_no_width_is_its_mean(tmp_path: Path) -> None:
    spread, none = (np.full_like(MEAN, value) for value in (np.log(4.0), -100.0))
    made = data(tmp_path, [np.concatenate([MEAN, spread])] * 3 + [np.concatenate([MEAN, none])], scale=1.0)
    first, again, other = images(made), images(made), images(made, seed=9)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first[0], first[1])
    fresh = torch.randn(2, 3, 3, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(first[1], torch.from_numpy(MEAN).float() + 2 * fresh, rtol=1e-3, atol=1e-3)  # of float16
    torch.testing.assert_close(first[3], torch.from_numpy(MEAN).float(), rtol=0, atol=2e-6)  # exp(-15)


def test_what_is_no_latent_is_refused(tmp_path: Path) -> None:
    for wrong, said in (
        (MEAN[:, :2], r"shape=\[2, 3, 3\] asks for"),
        (MEAN[:1], r"shape=\[2, 3, 3\] asks for"),
        (MEAN.astype(np.int64), "int64"),
        (np.where(MEAN > 0, np.nan, MEAN), "NaN or infinite"),
    ):
        with pytest.raises(UserError, match=f"sample 0000 cannot be used: its array .*{said}"):
            images(data(tmp_path, [wrong]))
    with pytest.raises(UserError, match="no image_size and no views"):
        data(tmp_path, [MEAN], views=TwoViews())
    with pytest.raises(UserError, match=r"shape=\[0, 1, 1\]"):
        LatentShards(["a.tar"], shape=(0, 1, 1))


def test_a_plan_without_shards_has_a_batch() -> None:
    batch = LatentShards(["none.tar"]).stand_in()
    assert batch is not None
    assert batch["image"].shape == (2, 4, 32, 32)


def test_a_latent_beyond_float32_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="NaN or infinite"):
        images(data(tmp_path, [MEAN.astype(np.float64) + 1e300]))
