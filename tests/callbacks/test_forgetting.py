"""Forgetting: the shares of right answers that a loop by hand finds, with no trace in the run, and through a resume."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rank_processes
import torch
from lightning import Callback, Trainer
from method_runs import SILENT
from torch import Tensor
from torchmetrics.functional import accuracy

from lightspan.backbones.vision import MLP
from lightspan.callbacks.pictures.forgetting import Forgetting
from lightspan.callbacks.resilience.checkpoint import Checkpoint
from lightspan.core.errors import UserError
from lightspan.datamodules.image.sets.small import Digits
from lightspan.datamodules.image.variants.class_stream import ClassStream
from lightspan.evaluation.scores.task_accuracy import TaskAccuracy
from lightspan.methods.supervised.classifier import Classifier
from lightspan.methods.supervised.slca import SLCA


def method(kind: Any = Classifier, **settings: Any) -> Any:
    torch.manual_seed(0)
    return kind(MLP((1, 8, 8), (12,)), num_classes=10, optimizer=partial(torch.optim.SGD, lr=0.1), **settings)


def run(model: Any, folder: Path, *callbacks: Callback, **options: Any) -> Trainer:
    data = ClassStream(Digits(), tasks=3, train_size=300, batch_size=20)
    resume, saves = options.pop("ckpt_path", None), any(isinstance(one, Checkpoint) for one in callbacks)
    options = SILENT | {"accelerator": "cpu", "limit_val_batches": 0, "max_epochs": 1} | options
    trainer = Trainer(default_root_dir=folder, callbacks=[*callbacks], enable_checkpointing=saves, **options)
    trainer.fit(model, datamodule=data, ckpt_path=resume, weights_only=True)
    return trainer


class ByHand(Callback):
    """Logits of all validation images when each task has ended."""

    def __init__(self) -> None:
        self.shares: list[list[float]] = []
        self.overall: list[float] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        data = trainer.datamodule
        ends = np.cumsum(data.task_steps()).tolist()
        if batch_idx + 1 not in ends:
            return
        tasks = data.tasks[: ends.index(batch_idx + 1) + 1]
        seen = [c for task in tasks for c in task]
        image, label = data.val.data
        image = (torch.tensor(image)[:, None] / 255 - data.val.mean) / data.val.std
        with torch.no_grad():
            logits = pl_module(image)
        answers = np.array(seen)[logits[:, seen].argmax(dim=1).numpy()]
        self.shares.append([float((answers == label)[np.isin(label, task)].mean()) for task in tasks])
        self.overall.append(float((answers == label)[np.isin(label, seen)].mean()))


@pytest.mark.parametrize("kind", [Classifier, partial(SLCA, align_epochs=1, samples=8)])
def test_shares_are_those_of_a_loop_by_hand(kind: Any, tmp_path: Path) -> None:
    watched, by_hand = Forgetting(str(tmp_path / "pictures")), ByHand()
    trainer = run(method(kind), tmp_path, watched, by_hand)
    found = watched.result()
    rows = [row["accuracy"] for row in found.table()]
    assert rows == pytest.approx([share for shares in by_hand.shares for share in shares])
    assert found.after_task() == pytest.approx(by_hand.overall)
    logged = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("tasks/")}
    best = [max(shares[task] for shares in by_hand.shares[task:]) for task in range(2)]
    forgotten = np.mean([best[task] - by_hand.shares[-1][task] for task in range(2)])
    expected = {"accuracy": by_hand.overall[-1], "average_accuracy": np.mean(by_hand.overall), "forgetting": forgotten}
    expected |= {f"accuracy_of_{task}": by_hand.shares[-1][task] for task in range(3)}
    assert logged == pytest.approx({f"tasks/{name}": value for name, value in expected.items()})
    assert (tmp_path / "pictures/forgetting.png").read_bytes().startswith(b"\x89PNG")


def test_training_is_what_it_is_without_it_and_a_resume_keeps_the_counts(tmp_path: Path) -> None:
    watched, plain = method(), method()
    first = Forgetting()
    run(watched, tmp_path, first, Checkpoint(str(tmp_path / "a"), every_n_train_steps=1, save_top_k=-1))
    run(plain, tmp_path)
    assert all(map(torch.equal, watched.state_dict().values(), plain.state_dict().values()))
    resumed = Forgetting()
    run(method(), tmp_path, resumed, Checkpoint(str(tmp_path / "b")), ckpt_path=tmp_path / "a/step=8.ckpt")
    assert resumed.result() == first.result()


def test_accumulated_micro_batches_end_a_task_where_its_last_step_is(tmp_path: Path) -> None:
    one, two = Forgetting(), Forgetting()
    run(method().double(), tmp_path, one, precision="64-true")
    run(method().double(), tmp_path, two, precision="64-true", accumulate_grad_batches=2)
    assert two.result() == one.result()


def _on_rank(rank: int, folder: str, port: int) -> None:
    rank_processes.join(rank, port)
    watched = Forgetting()
    run(method().double(), Path(folder), watched, precision="64-true", strategy="ddp", devices=2,
        use_distributed_sampler=False)  # fmt: skip
    assert watched.result().to_json() == Path(folder, "one.json").read_text()


@pytest.mark.ranks
def test_two_ranks_count_each_image_once(tmp_path: Path) -> None:
    watched = Forgetting()
    run(method().double(), tmp_path, watched, precision="64-true")
    (tmp_path / "one.json").write_text(watched.result().to_json())
    rank_processes.start(_on_rank, 2, str(tmp_path), rank_processes.free_port())


def test_data_without_tasks_and_what_gives_no_logits_are_refused(tmp_path: Path) -> None:
    trainer = Trainer(**SILENT, callbacks=[Forgetting()], enable_checkpointing=False, accelerator="cpu", max_steps=1)
    with pytest.raises(UserError, match="needs data that come task by task, and Digits do not"):
        trainer.fit(method(), datamodule=Digits())

    class Odd(Classifier):
        def forward(self, x_BCHW: Tensor) -> Tensor:
            return super().forward(x_BCHW)[None]

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().forward(batch["image"]).square().mean()

    with pytest.raises(UserError, match=r"gave \[1, 20, 10\], but Forgetting needs logits"):
        run(method(Odd), tmp_path, Forgetting())


def test_the_metric_counts_by_task_and_refuses_what_does_not_fit() -> None:
    metric, generator = TaskAccuracy(2), torch.Generator().manual_seed(0)
    scores_BC, label_B = torch.randn(9, 3, generator=generator), torch.randint(3, (9,), generator=generator)
    metric.update(scores_BC[:4], label_B[:4], 1, 0)
    metric.update(scores_BC[4:], label_B[4:], 1, 0)
    found = metric.compute()
    expected = accuracy(scores_BC, label_B, task="multiclass", num_classes=3, average="micro")
    assert float(found[1, 0]) == pytest.approx(float(expected))
    assert found.isnan().sum() == 3
    for scores, after, on in ((scores_BC, 2, 0), (scores_BC, 0, -1), (scores_BC[:3], 0, 0)):
        with pytest.raises(UserError, match="TaskAccuracy of 2 tasks got 9 labels"):
            metric.update(scores, label_B, after, on)
    with pytest.raises(UserError, match="tasks=0 must be at least 1"):
        TaskAccuracy(0)
