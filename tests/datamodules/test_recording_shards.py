"""Recordings from shards: packed from a folder, exact on ranks, damage named or replaced."""

from pathlib import Path
from typing import Any

import pytest
import torch
from shard_files import sound_shard
from sound_files import BAD, encoded, tone, write_recordings

from lightspan.cli.main import main
from lightspan.core.errors import UserError
from lightspan.datamodules.loading.loader import ExactLoader
from lightspan.datamodules.shards import pack as packing
from lightspan.datamodules.shards.pack_sources import sources
from lightspan.datamodules.shards.recordings import RecordingShards


def opened(shards: list[str], **settings: Any) -> RecordingShards:
    data = RecordingShards(shards, **{"seconds": 0.3, "batch_size": 2} | settings)
    data.setup()
    return data


def test_a_packed_folder_gives_its_recordings_with_their_classes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_recordings(tmp_path / "in", {"no": 3, "yes": 3}, "flac")
    assert main(["data", "pack", str(tmp_path / "in"), "--out", str(tmp_path / "out"), "--decode"]) == 0
    printed = capsys.readouterr().out
    assert "6 samples of 2 classes (no, yes)" in printed
    assert "data.class_path=lightspan.datamodules.shards.recordings.RecordingShards" in printed
    data = opened([packing.pattern(tmp_path / "out")], batch_size=6)
    (batch,) = data.train_dataloader()
    assert (batch["wave"].shape, batch["length"].tolist()) == ((6, 4800), [4800] * 6)
    assert sorted(batch["label"].tolist()) == [0, 0, 0, 1, 1, 1]
    assert {path.suffix for path in (tmp_path / "out").iterdir()} == {".tar", ".json", ""}


@pytest.mark.parametrize("name", ["empty", "text", "a cut WAV", "no channels"])
def test_what_cannot_be_read_is_not_packed(name: str, tmp_path: Path) -> None:
    write_recordings(tmp_path / "in", {"no": 1, "yes": 1})
    (tmp_path / "in/no/bad.wav").write_bytes(BAD[name][0])
    with pytest.raises(UserError, match=rf"1 of 3 samples cannot be decoded.*bad\.wav: {BAD[name][1]}"):
        list(packing.pack(sources(tmp_path / "in").samples, [], tmp_path / "out", 2**20))


def test_every_rank_has_its_share_of_each_batch(tmp_path: Path) -> None:
    samples = [{"wav": encoded(tone(0.1 + 0.01 * number))} for number in range(8)]
    parts = {"a": samples[:3], "b": samples[3:]}
    data = opened([sound_shard(tmp_path / f"{name}.tar", part) for name, part in parts.items()], batch_size=4)
    assert data.train is not None
    loaders = [
        ExactLoader(data.train, 4, rank=rank, world_size=size, order=data.train.order(2))
        for rank, size in ((0, 1), (0, 2), (1, 2))
    ]
    for whole, first, second in zip(*loaders, strict=True):
        for field in ("wave", "length", "label", "index"):
            assert torch.equal(whole[field], torch.cat([first[field], second[field]]))
        assert whole["label"].tolist() == [0] * 4
        lengths = 1600 + 160 * whole["index"]
        assert torch.equal(whole["length"], lengths)


def test_training_draws_segments_and_the_bank_takes_the_middle(tmp_path: Path) -> None:
    ramp = torch.linspace(0, 0.5, 16_000).numpy()
    data = opened([sound_shard(tmp_path / "a.tar", [{"wav": encoded(ramp, subtype="FLOAT"), "cls": b"3"}] * 2)])
    assert data.train is not None
    starts = [float(data.train.sample(0, seed)["wave"][0]) for seed in (1, 2, 1)]
    assert starts[0] == starts[2] != starts[1]
    assert float(data.bank.sample(0, 1)["wave"][0]) == pytest.approx(0.175, abs=1e-3)
    assert int(data.bank.sample(0, 1)["label"]) == 3


@pytest.mark.parametrize("name", [*BAD])
def test_damage_is_named_with_its_place_or_replaced(name: str, tmp_path: Path) -> None:
    samples = [{"wav": BAD[name][0]}, {"wav": encoded(tone())}]
    path = sound_shard(tmp_path / "a.tar", samples)
    with pytest.raises(UserError, match=rf"a\.tar: sample 0000: its \.wav member cannot be decoded: ({BAD[name][1]})"):
        list(opened([path]).train_dataloader())
    (batch,) = opened([path], skip_damaged=True).train_dataloader()
    assert batch["index"].tolist() == [1, 1]


def test_a_sample_without_sound_or_with_a_wrong_class_is_named(tmp_path: Path) -> None:
    path = sound_shard(tmp_path / "a.tar", [{"txt": b"words"}, {"wav": encoded(tone()), "cls": b"x"}])
    data = opened([path])
    assert data.train is not None
    with pytest.raises(UserError, match=r"sample 0000 has no \.wav or \.flac or \.ogg or \.mp3 member; it has txt"):
        data.train.sample(0, 0)
    with pytest.raises(UserError, match=r"its \.cls member cannot be decoded: 'x' is not a class"):
        data.train.sample(1, 0)


def test_without_a_shard_a_plan_has_two_silent_recordings(tmp_path: Path) -> None:
    batch = RecordingShards([str(tmp_path / "none.tar")], rate=8_000, seconds=0.5).stand_in()
    assert batch is not None
    assert batch["wave"].shape == (2, 4_000)
    assert batch["length"].tolist() == [4_000] * 2
    assert opened([sound_shard(tmp_path / "a.tar", [{"wav": encoded(tone())}] * 2)]).stand_in() is None
