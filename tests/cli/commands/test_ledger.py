"""The ledger of consumed samples: exact for straight and resumed runs, and it shows what is not exact."""

import json
import logging
import os
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from shard_files import damage, write_shards
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightspan.callbacks.resilience.checkpoint import Checkpoint
from lightspan.callbacks.watching.ledger import Ledger
from lightspan.cli.main import main
from lightspan.cli.runs.ledger import balance, true_stretches
from lightspan.datamodules.loading.loader import ExactLoader
from lightspan.datamodules.loading.order import ClassBalanced, InSequence, Order, packed, unpacked
from lightspan.datamodules.loading.ranks import train_loader
from lightspan.datamodules.loading.selection import DataSelection, data_name
from lightspan.datamodules.loading.subset import TrainingSubset
from lightspan.datamodules.shards.stream import Shards


class Numbers:
    def __len__(self) -> int:
        return 22

    def sample(self, index: int, seed: int) -> dict[str, Tensor]:
        return {"index": torch.tensor(index)}


class NumberData(LightningDataModule):
    def __init__(self, selection: DataSelection | None = None, order: Order | None = None) -> None:
        super().__init__()
        self.selection, self.order = selection, order

    def train_dataloader(self) -> ExactLoader:
        dataset, order = Numbers(), self.order
        if self.selection is not None:
            dataset, order = self.selection.taken(dataset, order)
        return train_loader(dataset, 4, 5, 0, self.trainer, order)


class Recorder(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.seen: list[int] = []

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        self.seen += batch["index"].tolist()
        return self.weight * 1.0

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(
    folder: Path,
    data: LightningDataModule,
    steps: int,
    resume: Path | None = None,
    module: Recorder | None = None,
    callbacks: Sequence[Callback] = (),
) -> tuple[Recorder, Trainer]:
    """A run with two micro-batches a step, a ledger, and a checkpoint after every second step."""
    module = module or Recorder()
    saver = ModelCheckpoint(folder, "{step}", every_n_train_steps=2, save_top_k=-1, save_on_train_epoch_end=False)
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=steps,
        max_epochs=-1,
        accumulate_grad_batches=2,
        logger=False,
        default_root_dir=folder,
        callbacks=[saver, Ledger(str(folder / "ledger.json")), *callbacks],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, datamodule=data, ckpt_path=resume, weights_only=True)
    return module, trainer


def ledger(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "ledger.json").read_text())


def test_the_ledger_says_which_samples_were_seen_how_often(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module, _ = fit(tmp_path, NumberData(), 13)  # 22 samples in batches of 4: 5 steps an epoch
    found = ledger(tmp_path)
    assert found["ranges"] == [[0, 0, 20], [1, 0, 20], [2, 0, 12]]
    account = balance(found)
    assert account.times.tolist() == [module.seen.count(sample) for sample in range(22)]
    assert (account.consumed, account.dropped, account.exact) == (52, 4, True)
    assert main(["ledger", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "22 in the training set, 52 consumed in 3 epochs, batches of 4" in printed
    assert "repeats     0\nskips       0\n" in printed


WEIGHTS = np.array([0.0, 5.0, *[1.0] * 17, *[0.02] * 3])
SELECTIONS = {
    "samples": {"index_n": np.arange(3, 22, 2)},
    "weights": {"weight_n": WEIGHTS},
    "a mixture": {"group_N": np.arange(22) // 8, "mixture_G": np.array([0.9, 0.1, 0.0])},
}
ORDERS = [InSequence((8, 14)), ClassBalanced((22,), labels=np.array([*[0] * 3, *[1] * 19]), batch_size=4)]


@pytest.mark.parametrize("kind", [*SELECTIONS, *ORDERS], ids=lambda kind: getattr(kind, "__name__", str(kind)[:9]))
def test_samples_are_counted_under_any_order_also_after_a_resume(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str | Order
) -> None:
    selection = order = None
    if isinstance(kind, str):
        selection = DataSelection(22, data_name(Numbers(), None), "by hand", **SELECTIONS[kind])
    else:
        order = kind
    taken = np.arange(22) if selection is None else np.flatnonzero(selection.expanded((22,))[0])
    module, _ = fit(tmp_path / "straight", NumberData(selection, order), 9)
    account = balance(ledger(tmp_path / "straight"))
    assert account.numbers.tolist() == taken.tolist()
    assert account.times.tolist() == [module.seen.count(sample) for sample in taken]
    assert account.exact
    fit(tmp_path / "resumed", NumberData(selection, order), 5)
    fit(tmp_path / "resumed", NumberData(selection, order), 9, resume=tmp_path / "resumed" / "step=4.ckpt")
    assert ledger(tmp_path / "resumed") == ledger(tmp_path / "straight")
    assert main(["ledger", str(tmp_path / "straight")]) == 0
    unseen = sorted(set(taken.tolist()) - set(module.seen))
    printed = capsys.readouterr().out
    assert f"never seen  {len(unseen)}{': ' if unseen else ''}{', '.join(map(str, unseen))}\n" in printed
    assert f"{len(taken)}{' of 22' if len(taken) < 22 else ''} in the training set, 36 consumed" in printed


def test_a_part_of_a_part_is_counted_by_the_numbers_of_the_whole(tmp_path: Path) -> None:
    selection = DataSelection(22, data_name(Numbers(), None), "by hand", weight_n=WEIGHTS)
    module, _ = fit(tmp_path, NumberData(selection), 9, callbacks=[TrainingSubset(9)])
    account = balance(ledger(tmp_path))
    assert (len(account.numbers), account.of) == (9, 22)
    assert set(module.seen) <= set(account.numbers.tolist())
    assert account.times.tolist() == [module.seen.count(sample) for sample in account.numbers]


def test_a_checkpoint_that_did_not_count_is_counted_from_its_ranges(tmp_path: Path) -> None:
    selection = DataSelection(22, data_name(Numbers(), None), "by hand", weight_n=WEIGHTS)
    fit(tmp_path, NumberData(selection), 9)
    kept, path = ledger(tmp_path), tmp_path / "step=4.ckpt"
    content = torch.load(path, weights_only=True)
    del content["callbacks"]["Ledger"]["times"]
    torch.save(content, path)
    fit(tmp_path, NumberData(selection), 9, resume=path)
    assert ledger(tmp_path) == kept


@given(data=st.data(), count=st.integers(1, 40))
def test_a_part_is_packed_into_a_bit_for_each_sample(data: st.DataObject, count: int) -> None:
    chosen = sorted(data.draw(st.sets(st.integers(0, count - 1))))
    text = packed(np.array(chosen, np.int64), count)
    assert unpacked(text, count).tolist() == chosen
    for other in (text[:-4], text + "AAAA", "?" + text[1:]):
        with pytest.raises(ValueError, match=r"bits? for each|base64|padding|bytes"):
            unpacked(other, count)


def test_a_resumed_run_forgets_what_came_after_its_checkpoint(tmp_path: Path) -> None:
    straight, _ = fit(tmp_path / "straight", NumberData(), 9)
    fit(tmp_path / "resumed", NumberData(), 5)  # its last checkpoint is that of step 4
    assert ledger(tmp_path / "resumed")["ranges"] == [[0, 0, 20]]
    fit(tmp_path / "resumed", NumberData(), 9, resume=tmp_path / "resumed" / "step=4.ckpt")
    assert ledger(tmp_path / "resumed") == ledger(tmp_path / "straight")
    assert balance(ledger(tmp_path / "straight")).times.sum() == len(straight.seen) == 36


def test_a_run_bounded_by_epochs_goes_on_where_its_last_epoch_ended(tmp_path: Path) -> None:
    def epochs(count: int, resume: Path | None) -> None:
        trainer = Trainer(
            accelerator="cpu",
            devices=1,
            max_epochs=count,
            logger=False,
            default_root_dir=tmp_path,
            callbacks=[Ledger(str(tmp_path / "ledger.json")), Checkpoint(str(tmp_path / "checkpoints"))],
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(Recorder(), datamodule=NumberData(), ckpt_path=resume, weights_only=True)

    epochs(2, None)
    epochs(4, tmp_path / "checkpoints" / "last.ckpt")
    assert ledger(tmp_path)["ranges"] == [[epoch, 0, 20] for epoch in range(4)]


def test_a_killed_run_has_on_file_what_its_last_checkpoint_had(tmp_path: Path) -> None:
    class Reader(Recorder):
        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
            if self.trainer.global_step == 3:
                on_file.append(ledger(tmp_path)["ranges"])
            return super().training_step(batch, batch_idx)

    on_file: list[Any] = []
    fit(tmp_path, NumberData(), 4, module=Reader())
    assert on_file == [[[0, 0, 8]]] * 2


def test_shards_carry_an_epochs_rest_into_the_next_and_damage_is_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = write_shards(tmp_path, (5, 3, 5))
    start = json.loads(Path(shards[1] + ".index.json").read_text())["starts"][2]
    damage(shards[1], start + 520)
    Path(shards[0]).unlink()
    module, trainer = fit(tmp_path, Shards(shards, batch_size=4, skip_damaged=True), 5)
    found = ledger(tmp_path)
    assert found["ranges"] == [[0, 0, 8], [1, 0, 8], [2, 0, 4]]
    account = balance(found)
    assert account.times.tolist() == [module.seen.count(sample) for sample in range(8)]
    assert account.times[2] == 0
    assert account.replaced in (2, 3)
    assert trainer.logged_metrics["data/replaced"] == account.replaced
    assert not account.exact
    assert main(["ledger", str(tmp_path)]) == 1
    printed = capsys.readouterr().out
    assert f"damaged     {account.replaced} samples replaced by others, 1 incomplete shards" in printed
    assert "never seen  1: 2\n" in printed
    assert "part-0.tar is missing" in printed
    assert f"part-1.tar: sample 2 at byte {start} is damaged" in printed


def test_repeats_and_skips_are_shown_with_their_places(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = ExactLoader(Numbers(), 4, seed=5).description()
    ranges = [[0, 0, 12], [0, 8, 20], [1, 4, 12]]
    (tmp_path / "ledger.json").write_text(json.dumps({"format": 1, "data": data, "ranges": ranges, "replaced": []}))
    account = balance(ledger(tmp_path))
    assert account.repeated == [(0, 8, 12)]
    assert account.skipped == [(1, 0, 4)]
    order = Order((22,))
    expected = [*order.epoch(5, 0)[:20], *order.epoch(5, 0)[8:12], *order.epoch(5, 1)[4:12]]
    assert account.times.tolist() == [expected.count(sample) for sample in range(22)]
    assert main(["ledger", str(tmp_path)]) == 1
    printed = capsys.readouterr().out
    assert "repeats     4; epoch 0: places 8 to 11" in printed
    assert "skips       4; epoch 1: places 0 to 3" in printed


@given(flags=st.lists(st.booleans(), max_size=30))
def test_stretches_cover_exactly_the_true_places(flags: list[bool]) -> None:
    stretches = true_stretches(np.array(flags, dtype=bool))
    assert [place for first, last in stretches for place in range(first, last)] == [
        place for place, flag in enumerate(flags) if flag
    ]
    assert all(last < first for (_, last), (first, _) in pairwise(stretches))


def test_a_loader_without_an_order_leaves_no_ledger_and_a_folder_without_one_is_refused(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Plain(LightningDataModule):
        def train_dataloader(self) -> DataLoader:
            return DataLoader([{"index": torch.tensor(0)}])  # type: ignore[arg-type]

    # Lightning keeps its lines to itself where it finds no handler when it is imported.
    for name in ("lightning", "lightning.pytorch"):
        monkeypatch.setattr(logging.getLogger(name), "propagate", True)
    with caplog.at_level("INFO", logger="lightning.pytorch.utilities.rank_zero"):
        fit(tmp_path, Plain(), 1)
    assert "no ledger is kept: a DataLoader has no order independent of ranks" in caplog.text
    assert not (tmp_path / "ledger.json").exists()
    assert main(["ledger", str(tmp_path)]) == 2
    assert "lightspan.callbacks.watching.ledger.Ledger" in capsys.readouterr().err
    (tmp_path / "ledger.json").write_text('{"format": 9}')
    assert main(["ledger", str(tmp_path)]) == 2
    assert "its format is 9, this lightspan reads 1" in capsys.readouterr().err


def test_why_there_is_no_ledger_is_said_by_what_the_run_records(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    callback = {"class_path": "lightspan.callbacks.watching.ledger.Ledger", "init_args": {"path": "${run}/ledger.json"}}
    record = {"trainer": {"callbacks": {"ledger": callback}}}
    said = {}
    for name, content in (("with", record), ("without", {"trainer": {"callbacks": None}}), ("odd", {"trainer": 1})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "resolved.yaml").write_text(json.dumps(content))
        assert main(["ledger", str(tmp_path / name)]) == 2
        said[name] = capsys.readouterr().err
    assert "the run has the Ledger callback" in said["with"]
    assert "your own DataLoader has none" in said["with"]
    assert "a run keeps a ledger if" not in said["with"]
    assert (
        "a run keeps a ledger if trainer.callbacks has {class_path: lightspan.callbacks.watching.led" in said["without"]
    )
    assert "a run keeps a ledger if" in said["odd"]


LEDGER = {
    "format": 1,
    "data": {
        "sizes": [4, 3],
        "window": 2,
        "seed": 0,
        "epoch_samples": 6,
        "batch_size": 2,
        "damage": [],
        "part": {"of": 9, "samples": packed(np.arange(1, 8), 9)},
    },
    "ranges": [[0, 0, 6], [1, 0, 2]],
    "replaced": [],
    "times": [1, 1, 1, 1, 1, 1, 2],
}
PLACES = [("format",), ("data",), ("ranges",), ("replaced",), ("ranges", 0), ("ranges", 0, 0), ("ranges", 1, 2)]
PLACES += [("times",), ("times", 3), ("data", "part", "of"), ("data", "part", "samples")]
PLACES += [("data", key) for key in LEDGER["data"]]


@pytest.mark.parametrize("place", PLACES, ids=lambda place: ".".join(map(str, place)))
def test_a_ledger_of_any_other_content_is_refused_in_words_or_read(tmp_path, capsys, place) -> None:
    *path, last = place
    for wrong in (None, "x", [], {}, -1, 10**18, 1.5, True, [[]], ["x"]):
        ledger = holder = json.loads(json.dumps(LEDGER))
        for key in path:
            holder = holder[key]
        holder[last] = wrong
        (tmp_path / "ledger.json").write_text(json.dumps(ledger))
        status, said = main(["ledger", str(tmp_path)]), capsys.readouterr().err
        assert status in (0, 1) or (status == 2 and "is not the ledger of a run: " in said), wrong


@pytest.mark.parametrize("text", ["", "[" * 100_000, "3", '{"format": 1}', '{"format": "\\u001b[2J"}'])
def test_a_file_that_is_no_ledger_is_refused(tmp_path, capsys, text) -> None:
    (tmp_path / "ledger.json").write_text(text)
    assert main(["ledger", str(tmp_path)]) == 2
    assert "\x1b" not in capsys.readouterr().err
    (tmp_path / "ledger.json").unlink()
    os.mkfifo(tmp_path / "ledger.json")
    assert main(["ledger", str(tmp_path)]) == 2
    assert "not a regular file" in capsys.readouterr().err


def test_a_ledger_that_claims_more_samples_than_fit_into_memory_is_refused_before_they_are_counted(tmp_path, capsys):
    data = {"sizes": [10**10], "window": 1, "epoch_samples": 10**10, "batch_size": 1, "seed": 0, "damage": []}
    ledger = {"format": 1, "data": data, "ranges": [[0, 0, 1]], "replaced": []}
    (tmp_path / "ledger.json").write_text(json.dumps(ledger))
    assert main(["ledger", str(tmp_path)]) == 2
    assert "LIGHTSPAN_MAX_NUMBERS" in capsys.readouterr().err


def test_a_ledger_that_claims_very_many_epochs_of_a_large_set_is_not_counted_for_days(tmp_path, capsys, monkeypatch):
    samples = 2**20
    data = {"sizes": [samples], "window": 1, "epoch_samples": samples, "batch_size": 1, "seed": 0, "damage": []}
    ledger = {"format": 1, "data": data, "ranges": [[epoch, 0, 1] for epoch in range(10**4)], "replaced": []}
    (tmp_path / "ledger.json").write_text(json.dumps(ledger))
    monkeypatch.setenv("LIGHTSPAN_MAX_SECONDS", "1")
    assert main(["ledger", str(tmp_path)]) == 2
    assert "more than 1 seconds" in capsys.readouterr().err
