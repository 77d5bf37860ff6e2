"""The shard datamodule: what its batches hold, and that its order depends on the seed alone."""

import io
import tarfile
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning import LightningModule, Trainer
from PIL import Image
from torch import Tensor, nn

from lightspan.datamodules.shards import Shards, shuffle
from lightspan.datamodules.views import Plain, TwoViews
from lightspan.errors import UserError


def write_shard(path: Path, numbers: range, width: int = 6) -> str:
    with tarfile.open(path, "w") as archive:
        for number in numbers:
            picture = io.BytesIO()
            Image.new("RGB", (width, 4), (number, 0, 255)).save(picture, "PNG")
            for ending, content in (("png", picture.getvalue()), ("cls", str(number).encode())):
                member = tarfile.TarInfo(f"{number:04}.{ending}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return str(path)


@pytest.fixture
def pattern(tmp_path: Path) -> str:
    """Three shards of 5, 3 and 4 samples; sample n is labelled n and its red is n."""
    for i, numbers in enumerate((range(5), range(5, 8), range(8, 12))):
        write_shard(tmp_path / f"part-{i}.tar", numbers)
    return str(tmp_path / "part-{0..2}.tar")


def labels(batches: list[dict[str, Tensor]]) -> list[int]:
    return torch.cat([batch["label"] for batch in batches]).tolist()


def test_validation_reads_every_sample_once_in_order(pattern: str) -> None:
    batches = list(Shards([pattern], [pattern], batch_size=5).val_dataloader())
    assert labels(batches) == list(range(12))
    assert len({index for batch in batches for index in batch["index"].tolist()}) == 12
    image = batches[0]["image"]
    assert image.dtype == torch.float32
    assert image.shape == (5, 3, 4, 6)
    expected = (torch.tensor([[n, 0, 255] for n in range(5)]) / 255 - 0.5) / 0.5
    assert torch.allclose(image, expected[:, :, None, None].expand_as(image))


def test_without_validation_shards_there_is_no_validation(pattern: str) -> None:
    assert Shards([pattern]).val_dataloader() == []


@pytest.mark.parametrize("num_workers", [0, 2])
def test_each_sweep_of_training_sees_every_sample_once_in_another_order(pattern: str, num_workers: int) -> None:
    def first(count: int, seed: int = 0) -> list[int]:
        data = Shards([pattern], batch_size=4, seed=seed, num_workers=num_workers, shuffle_buffer=3)
        return labels(list(islice(data.train_dataloader(), count)))

    seen = first(12)
    assert seen == first(12)
    assert seen != first(12, seed=1)
    if num_workers == 0:
        sweeps = [seen[at : at + 12] for at in range(0, 48, 12)]
        assert all(sorted(sweep) == list(range(12)) for sweep in sweeps)
        assert len({tuple(sweep) for sweep in sweeps}) > 1
    else:
        assert set(seen) == set(range(12))


def test_the_next_epoch_and_a_resumed_run_draw_a_new_order(pattern: str) -> None:
    loader = Shards([pattern], batch_size=12).train_dataloader()
    epochs = [labels(list(islice(loader, 1))) for _ in range(3)]
    assert len({tuple(epoch) for epoch in epochs}) == 3
    resumed = Shards([pattern], batch_size=12).train_dataloader()
    resumed.load_state_dict({"epoch": 2})
    assert labels(list(islice(resumed, 1))) == epochs[2]
    assert resumed.state_dict() == {"epoch": 3}


def test_views_are_made_in_training_alone_and_are_a_function_of_the_seed(pattern: str) -> None:
    def first(seed: int) -> dict[str, list[Tensor]]:
        return next(iter(Shards([pattern], batch_size=12, views=TwoViews(), seed=seed).train_dataloader()))

    before = torch.get_rng_state()
    one, same, other = first(0), first(0), first(1)
    assert torch.equal(before, torch.get_rng_state())
    assert [view.shape for view in one["views"]] == [(12, 3, 4, 6)] * 2
    assert all(torch.equal(a, b) for a, b in zip(one["views"], same["views"], strict=True))
    assert not torch.equal(one["views"][0], one["views"][1])
    assert not torch.equal(one["views"][0], other["views"][0])
    assert "views" not in next(iter(Shards([pattern], [pattern], views=Plain()).val_dataloader()))


def test_image_size_scales_the_shorter_side_and_cuts_out_the_middle(tmp_path: Path) -> None:
    shards = [write_shard(tmp_path / "a.tar", range(2), width=9), write_shard(tmp_path / "b.tar", range(2), width=3)]
    (batch,) = Shards(shards, shards, image_size=8).val_dataloader()
    assert batch["image"].shape == (4, 3, 8, 8)
    with pytest.raises(UserError, match=r"samples do not fit into one batch: .*data\.init_args\.image_size"):
        list(Shards(shards, shards).val_dataloader())


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_user_error_leaves_the_workers_as_it_is(tmp_path: Path, num_workers: int) -> None:
    (tmp_path / "bad.tar").write_bytes(b"no tar at all" * 100)
    good = write_shard(tmp_path / "good.tar", range(3))
    data = Shards([good, str(tmp_path / "bad.tar")], batch_size=2, num_workers=num_workers)
    with pytest.raises(UserError, match=r"^shard \S+bad\.tar is not a tar file, or is cut short .*again$"):
        list(islice(data.train_dataloader(), 20))


def test_shards_without_a_sample_do_not_loop_for_ever(tmp_path: Path) -> None:
    empty = write_shard(tmp_path / "empty.tar", range(0))
    with pytest.raises(UserError, match=r"empty\.tar hold no sample"):
        next(iter(Shards([empty]).train_dataloader()))


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


def test_a_trainer_trains_and_validates_on_shards(pattern: str, tmp_path: Path) -> None:
    def trainer(**more: object) -> Trainer:
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        plain = {"accelerator": "cpu", "devices": 1, "enable_checkpointing": False, "num_sanity_val_steps": 0}
        return Trainer(default_root_dir=tmp_path, **plain, **quiet, **more)  # type: ignore[arg-type]

    module = Probe()
    trainer(max_epochs=2, limit_train_batches=4, accumulate_grad_batches=2).fit(
        module, datamodule=Shards([pattern], [pattern], batch_size=6)
    )
    assert len(module.trained) == 2 * 4 * 3
    assert module.validated == list(range(12)) * 2
    with pytest.raises(UserError, match=r"no epoch of this run would end; set trainer\.max_steps"):
        trainer(max_epochs=2).fit(Probe(), datamodule=Shards([pattern]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"shards": []}, "shards is an empty list"),
        ({"shards": ["pipe:curl x"]}, "shard pipe:curl x is neither a local path nor https"),
        ({"shards": ["a.tar"], "val_shards": ["http://x/a.tar"]}, "shard http://x/a.tar is neither"),
        ({"shards": ["{a,b}.tar", "b.tar"]}, "shards names b.tar 2 times"),
        ({"shards": ["a.tar"], "fields": {"x": "pth"}}, "pickled members are never read"),
        ({"shards": ["a.tar"], "image_size": 0}, "image_size=0 pixels is too small"),
        ({"shards": ["a.tar"], "std": (1.0, 0.0, 1.0)}, r"std=\[1\.0, 0\.0, 1\.0\] must be above 0"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_anything_is_read(arguments: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Shards(**arguments)


@given(length=st.integers(0, 50), size=st.integers(0, 60), seed=st.integers(0, 99))
def test_shuffling_loses_and_repeats_nothing(length: int, size: int, seed: int) -> None:
    shuffled = list(shuffle(iter(range(length)), size, np.random.default_rng(seed)))
    assert sorted(shuffled) == list(range(length))
    if size < 2:
        assert shuffled == list(range(length))
