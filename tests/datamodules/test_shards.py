"""The shard datamodule: every sample once in each epoch on any ranks, and what is damaged is named or counted."""

import io
import json
import os
import shutil
import tarfile
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.utilities.data import has_len_all_ranks
from PIL import Image
from shard_files import damage, write_shard, write_shards
from torch import Tensor, nn
from waiting import HANG_S

from lightspan.callbacks.pictures.feature_pictures import FeaturePictures
from lightspan.callbacks.pictures.first_batch import FirstBatch
from lightspan.callbacks.watching.online_probes import OnlineProbes
from lightspan.cli.config.build import quiet
from lightspan.core.errors import UserError
from lightspan.datamodules.image.augment.views import MultiCrop, Plain, RandomViews, TwoViews
from lightspan.datamodules.loading.loader import EvaluationLoader, ExactLoader
from lightspan.datamodules.loading.workers import Replacement
from lightspan.datamodules.shards import samples as shard_samples
from lightspan.datamodules.shards import stream as shards_module
from lightspan.datamodules.shards.index import SUFFIX, scan
from lightspan.datamodules.shards.stream import Decoding, Shards
from lightspan.evaluation.probes.probes import KNN, LinearProbe


@pytest.fixture
def shards(tmp_path: Path) -> list[str]:
    """Three shards of 5, 3 and 4 samples; sample n is labelled n and its red is n."""
    return write_shards(tmp_path, (5, 3, 4))


def opened(*arguments: object, **more: object) -> Shards:
    data = Shards(*arguments, **more)  # type: ignore[arg-type]
    data.setup()
    return data


def labels(batches: list[dict[str, Tensor]]) -> list[int]:
    return torch.cat([batch["label"] for batch in batches]).tolist()


def loaders(data: Shards, batch_size: int, ranks: int, num_workers: int = 0) -> list[ExactLoader]:
    """What each of several ranks would be given."""
    assert data.train is not None
    order = data.train.order(data.window)
    return [
        ExactLoader(data.train, batch_size, data.seed, rank, ranks, num_workers=num_workers, order=order)
        for rank in range(ranks)
    ]


def steps(ranks: list[ExactLoader], count: int) -> list[list[int]]:
    """Labels of each step over all ranks; it takes as many epochs as that needs."""
    seen: list[list[list[int]]] = []
    for loader in ranks:
        own: list[list[int]] = []
        while len(own) < count:
            for batch in loader:
                own.append(batch["label"].tolist())
                if len(own) == count:
                    break
        seen.append(own)
    return [list(chain.from_iterable(parts)) for parts in zip(*seen, strict=True)]


# Exactly once


@pytest.mark.sample(2)
@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_ranks_and_workers_see_every_sample_exactly_once_in_each_epoch(
    tmp_path: Path, ranks: int, num_workers: int
) -> None:
    """Shards of 20, 0, 1 and 9 samples: uneven, one empty, and on 4 ranks hardly one for each."""
    data = opened(write_shards(tmp_path, (20, 0, 1, 9)), window=2, seed=1)
    alone = steps(loaders(data, 12, 1), 5)
    together = steps(loaders(data, 12, ranks, num_workers), 5)  # 60 samples: two epochs of 30
    assert together == alone
    flat = list(chain.from_iterable(together))
    assert sorted(flat[:30]) == sorted(flat[30:]) == list(range(30))
    assert flat[:30] != flat[30:]


def test_one_shard_serves_more_ranks_than_there_are_shards(tmp_path: Path) -> None:
    data = opened(write_shards(tmp_path, (8,)))
    assert sorted(steps(loaders(data, 8, 4), 1)[0]) == list(range(8))


def test_a_run_stopped_at_any_step_goes_on_with_the_next_sample_on_any_ranks(shards: list[str]) -> None:
    data = opened(shards, window=2)
    straight = steps(loaders(data, 12, 1), 6)
    for stop in range(6):
        for saved, resumed in ((1, 2), (2, 1), (3, 4), (2, 2)):
            first, rest = loaders(data, 12, saved), loaders(data, 12, resumed)
            assert steps(first, stop) == straight[:stop]
            for loader in rest:
                loader.load_state_dict(first[0].state_dict())
            assert steps(rest, 6 - stop) == straight[stop:]


def test_a_checkpoint_of_other_shards_or_another_window_is_refused(shards: list[str], tmp_path: Path) -> None:
    state = loaders(opened(shards), 4, 1)[0].state_dict()
    other = opened([*shards[:2], write_shard(tmp_path / "other.tar", range(20, 24))])
    with pytest.raises(UserError, match=r"data content .* restore the data that it had, or"):
        loaders(other, 4, 1)[0].load_state_dict(state)
    with pytest.raises(UserError, match=r"data window 16, but this run has 2.*data\.init_args\.window"):
        loaders(opened(shards, window=2), 4, 1)[0].load_state_dict(state)


def test_validation_reads_every_sample_once_in_order(shards: list[str]) -> None:
    batches = list(opened(shards, shards, batch_size=5).val_dataloader())
    assert labels(batches) == list(range(12))
    assert [index for batch in batches for index in batch["index"].tolist()] == list(range(12))
    image = batches[0]["image"]
    assert image.dtype == torch.float32
    assert image.shape == (5, 3, 4, 6)
    expected = (torch.tensor([[n, 0, 255] for n in range(5)]) / 255 - 0.5) / 0.5
    assert torch.allclose(image, expected[:, :, None, None].expand_as(image))


def test_ranks_share_out_validation_without_padding(shards: list[str]) -> None:
    data = opened(shards, shards)
    assert data.val is not None
    ranks = [EvaluationLoader(data.val, 2, rank, 5) for rank in range(5)]
    assert sorted(chain.from_iterable(labels(list(rank)) for rank in ranks)) == list(range(12))


def test_without_validation_shards_there_is_no_validation(shards: list[str]) -> None:
    loaders = opened(shards).val_dataloader()
    assert loaders == []
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        quiet()
        has_len_all_ranks(loaders, SingleDeviceStrategy())  # Lightning takes the empty list for a loader
    assert not said


# Samples


def test_views_are_made_in_training_alone_and_are_a_function_of_the_seed(shards: list[str]) -> None:
    def first(seed: int) -> dict[str, list[Tensor]]:
        return next(iter(opened(shards, batch_size=12, views=TwoViews(), seed=seed).train_dataloader()))

    before = torch.get_rng_state()
    one, same, other = first(0), first(0), first(1)
    assert torch.equal(before, torch.get_rng_state())
    assert [view.shape for view in one["views"]] == [(12, 3, 4, 6)] * 2
    assert all(torch.equal(a, b) for a, b in zip(one["views"], same["views"], strict=True))
    assert not torch.equal(one["views"][0], one["views"][1])
    assert not torch.equal(one["views"][0], other["views"][0])
    data = opened(shards, shards, views=Plain())
    assert "views" not in next(iter(data.val_dataloader()))
    assert labels(list(data.bank_dataloader())) == list(range(12))
    assert "views" not in next(iter(data.bank_dataloader()))


def test_a_long_strip_is_cut_before_it_is_scaled() -> None:
    strip = Decoding({"image": "png"}, 32, None)._resized(torch.full((3, 1, 200_000), 7, dtype=torch.uint8))
    assert torch.equal(strip, torch.full((3, 32, 32), 7, dtype=torch.uint8))


def test_image_size_scales_the_shorter_side_and_cuts_out_the_middle(tmp_path: Path) -> None:
    shards = [write_shard(tmp_path / "a.tar", range(2), width=9), write_shard(tmp_path / "b.tar", range(2), width=3)]
    (batch,) = opened(shards, shards, image_size=8).val_dataloader()
    assert batch["image"].shape == (4, 3, 8, 8)
    with pytest.raises(UserError, match=r"samples do not fit into one batch: .*data\.init_args\.image_size"):
        list(opened(shards, shards).val_dataloader())


# The index


def test_a_shard_without_an_index_is_scanned_once_and_gives_the_same_samples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    indexed = write_shards(tmp_path, (5, 3))
    expected = steps(loaders(opened(indexed), 8, 1), 2)
    for shard in indexed:
        Path(shard + SUFFIX).unlink()
    trainer = Trainer(accelerator="cpu", devices=1, logger=False, barebones=True, default_root_dir=tmp_path)

    def attached() -> Shards:
        data = Shards(indexed)
        data.trainer = trainer
        data.setup()
        return data

    assert steps(loaders(attached(), 8, 1), 2) == expected
    assert len(list((tmp_path / "shards").iterdir())) == 2
    monkeypatch.setattr(shard_samples, "scan", None)
    assert steps(loaders(attached(), 8, 1), 2) == expected


def test_a_damaged_index_is_refused(shards: list[str]) -> None:
    Path(shards[1] + SUFFIX).write_text(json.dumps({"format": 1}))
    with pytest.raises(UserError, match=r"part-1\.tar\.index\.json is not the index of a shard"):
        opened(shards, skip_damaged=True)


def test_what_a_scan_passed_over_is_said_and_how_to_do_without(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shard = write_texts(tmp_path / "a.tar", {"__background__/0.txt": b"", "a.txt": b""})
    opened([shard], fields={"text": "txt"})
    printed = capsys.readouterr().out
    assert f"shard {shard}: 1 members belong to no sample and are skipped, the first: '__background__" in printed
    assert "1 shards have no index, so they were read completely; `lightspan data index" in printed


@pytest.mark.parametrize("name", ["/dev/zero", "pipe", "."])
def test_what_is_no_regular_file_is_refused_with_and_without_an_index(
    shards: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    with pytest.raises(UserError, match=rf"shard {name} is (a device|a named pipe|a folder), not a regular file"):
        opened([name], skip_damaged=True)
    if name == "pipe":
        shutil.copy(shards[0] + SUFFIX, name + SUFFIX)
        with pytest.raises(UserError, match="shard pipe is a named pipe"):
            opened([name])
        os.mkfifo("part-9.tar" + SUFFIX)
        shutil.copy(shards[0], "part-9.tar")
        with pytest.raises(UserError, match=r"shard part-9\.tar\.index\.json is a named pipe"):
            opened(["part-9.tar"])


class Ranks:
    """Several ranks as threads: what `Shards` asks torch.distributed for."""

    def __init__(self, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count, self.own, self.parts = count, threading.local(), [None] * count
        self.barrier = threading.Barrier(count, timeout=HANG_S)
        monkeypatch.setattr(shards_module, "rank", lambda: self.own.rank)
        monkeypatch.setattr(shards_module, "world_size", lambda: count)
        monkeypatch.setattr(shards_module, "_gathered", self.gathered)

    def gathered(self, own: Any, ranks: int) -> list[Any]:
        self.parts[self.own.rank] = own
        self.barrier.wait()
        parts = list(self.parts)
        self.barrier.wait()
        return parts

    def run(self, work: Callable[[], Any]) -> list[Any]:
        def of(rank: int) -> Any:
            self.own.rank = rank
            try:
                return work()
            except UserError as error:
                return str(error)

        with ThreadPoolExecutor(self.count) as pool:
            return list(pool.map(of, range(self.count)))


@pytest.mark.parametrize("count", [1, 2, 3])
def test_ranks_share_out_the_scans_and_all_find_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    shards = write_shards(tmp_path, [1, 2, 0, 3, 1, 1, 2, 1])
    alone = opened(shards)
    scanned = []

    def counted(path: Path, *arguments: Any) -> Any:
        scanned.append(path)
        return scan(path, *arguments)

    monkeypatch.setattr(shard_samples, "scan", counted)
    monkeypatch.setattr(shards_module, "OPENED_BETWEEN_MEETINGS", 2)
    for shard in shards:
        Path(shard + SUFFIX).unlink()
    ranks = Ranks(count, monkeypatch)

    def of_trainer() -> Shards:
        data = Shards(shards)
        data.trainer = SimpleNamespace(default_root_dir=str(tmp_path))
        data.setup()
        return data

    found = ranks.run(of_trainer)
    assert sorted(map(str, scanned)) == sorted(shards)
    assert alone.train is not None
    for data in found:
        assert data.train.sizes == alone.train.sizes
        assert data.train.order(4) == alone.train.order(4)
    Path(shards[4]).write_bytes(b"\x1f\x8b\x08 packed")
    Path(shards[5]).write_bytes(b"\x1f\x8b\x08 packed")
    refusals = ranks.run(of_trainer)
    assert len(set(refusals)) == 1
    assert "part-4.tar is compressed" in refusals[0]


# Degenerate data


def test_values_that_fit_into_no_batch_are_told_with_the_setting(tmp_path: Path) -> None:
    """A number of 30 digits is a value of JSON, and no int64."""
    shard = write_texts(tmp_path / "a.tar", {"a.json": b"9" * 30})
    with pytest.raises(UserError, match=r"samples do not fit into one batch: .*data\.init_args\.fields"):
        list(opened([shard], fields={"x": "json"}, batch_size=1).train_dataloader())


def write_texts(path: Path, members: dict[str, bytes]) -> str:
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            header = tarfile.TarInfo(name)
            header.size = len(content)
            archive.addfile(header, io.BytesIO(content))
    return str(path)


def test_one_sample_is_a_data_set(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "one.tar", [7])
    data = opened([shard], [shard], batch_size=1, views=TwoViews(), image_size=8)
    assert [batch["label"].tolist() for batch in data.train_dataloader()] == [[7]]
    assert [batch["label"].tolist() for batch in data.val_dataloader()] == [[7]]
    with pytest.raises(UserError, match=r"batch_size=2 is larger than the training set of 1 samples"):
        opened([shard], batch_size=2).train_dataloader()


def test_the_last_batch_of_a_validation_may_hold_one_sample(tmp_path: Path) -> None:
    data = opened(write_shards(tmp_path, [5]), [str(tmp_path / "part-0.tar")], batch_size=4)
    assert [batch["label"].tolist() for batch in data.val_dataloader()] == [[0, 1, 2, 3], [4]]


def test_empty_texts_and_constant_images_are_samples(tmp_path: Path) -> None:
    picture = io.BytesIO()
    Image.new("L", (1, 1), 0).save(picture, "PNG")
    shard = write_texts(tmp_path / "a.tar", {"a.txt": b"", "a.png": picture.getvalue()})
    data = opened([shard], fields={"text": "txt", "image": "png"}, batch_size=1, image_size=4, views=TwoViews())
    (batch,) = data.train_dataloader()
    assert batch["text"] == [""]
    assert all(view.shape == (1, 3, 4, 4) and view.isfinite().all() for view in batch["views"])


# Damage


def cut(shard: str) -> None:
    path = Path(shard)
    start = json.loads(Path(shard + SUFFIX).read_text())["starts"][2]
    path.write_bytes(path.read_bytes()[: start + 700])


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda shard: Path(shard).unlink(), r"part-0\.tar is missing: .*; it contains 5 samples"),
        (cut, r"it is cut short: shard \S+part-0\.tar: sample 2 at byte \d+ is the first of 3 samples that cannot"),
        (lambda shard: (cut(shard), Path(shard + SUFFIX).unlink()), r"part-0\.tar is .*cut short after byte \d+"),
        (
            lambda shard: (Path(shard + SUFFIX).unlink(), Path(shard).write_bytes(b"no tar at all" * 100)),
            r"part-0\.tar is not a tar file, or is cut short",
        ),
    ],
)
def test_missing_and_cut_shards_are_refused_before_the_first_step(
    shards: list[str], harm: object, message: str
) -> None:
    harm(shards[0])  # type: ignore[operator]
    with pytest.raises(UserError, match=rf"{message}.*data\.init_args\.skip_damaged=true"):
        opened(shards)


@pytest.mark.parametrize("skip", [False, True])
def test_where_no_shard_is_there_the_paths_are_at_fault(
    skip: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as refused:
        opened(["packed/0.tar", "packed/1.tar"], skip_damaged=skip)
    said = str(refused.value)
    assert "shard packed/0.tar is missing" in said
    assert "(and 1 more damaged shards); no shard has a sample that can be read; correct data.init_args.shards" in said
    assert said.endswith(f"; relative paths begin at {tmp_path}")
    assert "skip_damaged" not in said


def test_shards_that_may_be_skipped_leave_only_whole_samples_counted_and_the_same_on_any_ranks(
    shards: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    cut(shards[0])
    Path(shards[1]).unlink()
    data = opened(shards, skip_damaged=True)
    printed = capsys.readouterr().out
    assert "shards: 3 with 6 training samples" in printed
    assert "left out: shard" in printed
    assert "first of 3 samples that cannot be read" in printed
    assert "it contains 3 samples" in printed
    for ranks in (1, 2, 3):
        assert sorted(steps(loaders(data, 6, ranks), 1)[0]) == [0, 1, 8, 9, 10, 11]
    assert len(loaders(data, 6, 1)[0].description()["damage"]) == 2


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_damaged_sample_stops_the_run_with_its_shard_number_and_byte(shards: list[str], num_workers: int) -> None:
    start = json.loads(Path(shards[2] + SUFFIX).read_text())["starts"][1]
    damage(shards[2], start + 520)
    (loader,) = loaders(opened(shards), 4, 1, num_workers)
    with pytest.raises(UserError, match=rf"^shard \S+part-2\.tar: sample 1 at byte {start} is damaged: its CRC-32 "):
        steps([loader], 3)


def test_a_sample_that_was_packed_broken_is_named_with_its_byte(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "a.tar", range(3), index=False)
    content = Path(shard).read_bytes()
    Path(shard).write_bytes(content.replace(b"IHDR", b"IHXX", 1))  # before any index knows better
    with pytest.raises(
        UserError, match=r"a\.tar: sample 0 at byte 0: .*sample 0000: its \.png member cannot be decoded"
    ):
        steps(loaders(opened([shard]), 3, 1), 1)


def test_damaged_samples_that_may_be_skipped_are_replaced_alike_on_any_ranks_and_workers(shards: list[str]) -> None:
    starts = json.loads(Path(shards[0] + SUFFIX).read_text())["starts"]
    for number in (1, 4):
        damage(shards[0], starts[number] + 520)
    data = opened(shards, skip_damaged=True)
    alone = loaders(data, 12, 1)
    expected = steps(alone, 2)
    assert not {1, 4} & set(chain.from_iterable(expected))
    assert set(expected[0]) == set(range(12)) - {1, 4}
    assert sorted(found.damaged for found in alone[0].replaced) == [1, 1, 4, 4]
    assert all("is damaged: its CRC-32" in found.reason for found in alone[0].replaced)
    assert {found.by for found in alone[0].replaced} <= set(range(12)) - {1, 4}
    for ranks, num_workers in ((2, 0), (3, 0), (2, 2)):
        others = loaders(data, 12, ranks, num_workers)
        assert steps(others, 2) == expected
        replaced: list[Replacement] = sorted(found for loader in others for found in loader.replaced)
        assert replaced == sorted(alone[0].replaced)


def test_shards_of_which_nothing_is_left_end_the_run_also_where_damage_may_be_skipped(
    tmp_path: Path, shards: list[str]
) -> None:
    empty = write_shard(tmp_path / "empty.tar", range(0))
    with pytest.raises(UserError, match=r"empty\.tar contain no sample"):
        opened([empty])
    data = opened(shards[:1], skip_damaged=True)
    for start in json.loads(Path(shards[0] + SUFFIX).read_text())["starts"]:
        damage(shards[0], start)
    with pytest.raises(UserError, match="100 samples drawn one after another are damaged, the first: shard"):
        steps(loaders(data, 5, 1), 1)


# With a trainer


class Probe(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.trained: list[int] = []
        self.validated: list[int] = []

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        self.trained += batch["label"].tolist()
        return self.weight * batch["image"].mean()

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.validated += batch["label"].tolist()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_a_trainer_trains_and_validates_on_shards(shards: list[str], tmp_path: Path) -> None:
    def trainer(**more: object) -> Trainer:
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        plain = {"accelerator": "cpu", "devices": 1, "enable_checkpointing": False, "num_sanity_val_steps": 0}
        return Trainer(default_root_dir=tmp_path, **plain, **quiet, **more)  # type: ignore[arg-type]

    module = Probe()
    trainer(max_epochs=2, accumulate_grad_batches=2).fit(
        module, datamodule=Shards(shards, shards, batch_size=6, window=2)
    )
    assert sorted(module.trained) == sorted([*range(12)] * 2)
    assert module.trained[:12] != module.trained[12:]
    assert module.validated == list(range(12)) * 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"shards": []}, "shards is an empty list"),
        ({"shards": ["pipe:curl x"]}, "shard pipe:curl x is neither a local path nor https"),
        ({"shards": ["a.tar"], "val_shards": ["http://x/a.tar"]}, "shard http://x/a.tar is neither"),
        ({"shards": ["{a,b}.tar", "b.tar"]}, "shards names b.tar 2 times"),
        ({"shards": ["a.tar"], "fields": {"x": "pth"}}, "pickled members are never read"),
        ({"shards": ["a.tar"], "image_size": 0}, "image_size=0 pixels is too small"),
        ({"shards": [""]}, "shard '' is not the name of a file"),
        ({"shards": ["https://[::1"]}, r"shard https://\[::1 is not an https address"),
        ({"shards": ["a.tar"], "cache_gib": -1}, r"cache_gib=-1 must be at least 0"),
        ({"shards": ["a.tar"], "window": 0}, "window=0 shards is too few"),
        ({"shards": ["a.tar"], "std": (1.0, 0.0, 1.0)}, r"std=\[1\.0, 0\.0, 1\.0\] must be above 0"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_anything_is_read(arguments: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Shards(**arguments)


def test_black_pictures_stand_in_where_no_shard_is(shards: list[str], tmp_path: Path) -> None:
    away = [str(tmp_path / "away" / f"{number}.tar") for number in range(2)]
    crops = MultiCrop([RandomViews(count=2, size=16), RandomViews(count=1, size=8)])
    batch = Shards(away, views=crops).stand_in()
    assert batch is not None
    assert [view.shape for view in batch["views"]] == [(2, 3, 16, 16)] * 2 + [(2, 3, 8, 8)]
    assert batch["label"].tolist() == [0, 0]
    assert batch["index"].tolist() == [0, 1]
    plain = Shards(away, image_size=20).stand_in()
    assert plain is not None
    assert plain["image"].shape == (2, 3, 20, 20)
    assert Shards([*shards, *away]).stand_in() is None
    assert Shards(["https://example.org/0.tar"]).stand_in() is None
    assert Shards(away, fields={"image": "jpg", "depth": "npy"}).stand_in() is None


# Probes


def test_probes_get_held_out_shards_and_a_bank_spread_over_the_others(shards: list[str]) -> None:
    whole = opened(shards, batch_size=2)
    held = opened(shards, batch_size=2, hold_out=1, bank_size=5)
    trained, validated = (labels(list(loader)) for loader in (held.train_dataloader(), held.val_dataloader()))
    assert sorted(trained + validated) == sorted(labels(list(whole.train_dataloader())))
    assert not set(trained) & set(validated)
    bank = labels(list(held.bank_dataloader()))
    assert len(bank) == len(set(bank)) == 5
    assert set(bank) <= set(trained)
    assert max(bank) - min(bank) >= len(trained) // 2
    assert len(labels(list(opened(shards, bank_size=100).bank_dataloader()))) == 12
    assert all("image" in batch for batch in held.bank_dataloader())


def test_online_probes_and_pictures_read_streamed_shards(tmp_path: Path) -> None:
    class Features(Probe):
        def features(self, batch: dict[str, Tensor]) -> Tensor:
            return self.weight * batch["image"].flatten(1)[:, :5]

    shards, run = write_shards(tmp_path, (6, 6, 6)), tmp_path / "run"
    options = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = Trainer(
        default_root_dir=tmp_path,
        max_epochs=1,
        enable_checkpointing=False,
        devices=1,
        callbacks=[
            OnlineProbes({"knn": KNN(k=3), "linear": LinearProbe()}),
            FeaturePictures(str(run), queries=2, neighbours=3),
            FirstBatch(str(run)),
        ],
        **options,  # type: ignore[arg-type]
    )
    trainer.fit(Features(), datamodule=Shards(shards, hold_out=1, bank_size=6, batch_size=4))
    assert {"probe/knn_accuracy", "probe/linear_accuracy", "probe/rankme"} <= set(trainer.callback_metrics)
    assert sorted(path.name for path in run.iterdir()) == ["first-batch.png", "map.png", "neighbours.png"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hold_out": 2}, "hold_out=2 shards cannot validate: .*2 shards, and one must train"),
        ({"hold_out": 1, "val_shards": ["c.tar"]}, "hold_out=1 shards cannot validate: val_shards is given too"),
        ({"bank_size": 0}, "bank_size=0 must be at least 1"),
    ],
)
def test_a_bank_that_cannot_be_is_refused(settings: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Shards(["a.tar", "b.tar"], **settings)
