"""A proof runs the first steps of the recipe, not a shortened recipe; it sees what no checkpoint holds, and kills where
it says."""

import json
import os
import signal

import pytest
import torch
from lightning.pytorch import Trainer
from torch import nn
from torch.utils.data import DataLoader

from lightspan.callbacks.resilience.checkpoint import Checkpoint
from lightspan.callbacks.resilience.proof import StopAfter, Trace, sample_digests
from lightspan.cli.runs.kill_at import KillAt
from lightspan.core.collate import collated
from lightspan.core.errors import UserError
from lightspan.datamodules.graph.batch import GraphBatch
from lightspan.optim.schedules import WarmupCosine
from lightspan.training.method import Method


class Scheduled(Method):
    def __init__(self) -> None:
        super().__init__(lambda groups: torch.optim.SGD(groups, lr=1.0), WarmupCosine)
        self.net = nn.Linear(3, 1)

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return self.net(batch).square().mean()


def test_a_run_stops_early_with_a_schedule_of_its_full_length(tmp_path):
    module = Scheduled()
    trainer = Trainer(
        accelerator="cpu", max_steps=100, callbacks=[StopAfter(3)], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(module, DataLoader(torch.randn(4, 3)))
    assert trainer.global_step == 3
    assert module.lr_schedulers().total_steps == 100
    assert module.lr_schedulers().get_last_lr()[0] == 4 / 11


def test_a_run_that_is_over_before_the_steps_of_the_proof_is_refused(tmp_path):
    trainer = Trainer(
        accelerator="cpu", max_epochs=2, callbacks=[StopAfter(5)], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    with pytest.raises(UserError, match=r"after 4 steps.*--steps.*trainer\.max_epochs=2"):
        trainer.fit(Scheduled(), DataLoader(torch.randn(2, 3)))


def test_a_packed_sample_has_the_same_digest_in_any_batch():
    """Its edges count through the batch, so that their bytes depend on the samples before it."""
    graphs = []
    for number, nodes in enumerate((3, 1, 4, 3)):
        edges = torch.stack([torch.arange(nodes), torch.arange(nodes).roll(1)])
        graph = {"node": torch.full((nodes, 2), 1.0), "edge_index": edges, "edge": torch.ones(nodes, 1)}
        graphs.append({**graph, "label": 0, "index": number})
    graphs[3]["index"] = 0  # equal samples have equal digests
    together = sample_digests(collated(graphs, GraphBatch), GraphBatch)
    apart = [sample_digests(collated(graphs[i : i + 2], GraphBatch), GraphBatch) for i in (0, 2)]
    assert together == apart[0] + apart[1]
    assert together[3] == together[0]
    assert len(set(together)) == 3


class Counted(Scheduled):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()), persistent=False)
        self.register_buffer("kept", torch.zeros(()))

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        self.seen += 1
        return super().training_step(batch, batch_idx)


class Killed(BaseException):
    """In the place of SIGKILL."""


def fit(folder, *callbacks) -> None:
    trainer = Trainer(
        accelerator="cpu", max_steps=4, callbacks=[*callbacks], logger=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=folder,
    )  # fmt: skip
    trainer.fit(Counted(), DataLoader(torch.randn(4, 3)))


def test_the_trace_holds_the_buffers_that_checkpoints_leave_out(tmp_path):
    fit(tmp_path, Trace(str(tmp_path)))
    buffers = [json.loads(line)["buffers"] for line in (tmp_path / "rank-0.jsonl").read_text().splitlines()]
    assert [list(names) for names in buffers] == [["seen"]] * 4
    assert len({names["seen"] for names in buffers}) == 4


@pytest.mark.parametrize(
    ("step", "place", "saved"), [(1, "batch_start", 0), (1, "batch_end", 0), (0, "after_save", 2), (2, "after_save", 4)]
)
def test_a_kill_comes_before_the_checkpoint_of_its_step_or_right_after_the_next_one(
    tmp_path, monkeypatch, step, place, saved
):
    def kill(pid: int, number: int) -> None:
        assert (pid, number) == (os.getpid(), signal.SIGKILL)
        raise Killed

    monkeypatch.setattr(os, "kill", kill)
    with pytest.raises(Killed):
        fit(tmp_path, KillAt(step, place), Checkpoint(str(tmp_path / "kept"), every_n_train_steps=2))
    steps = [int(path.stem.removeprefix("step=")) for path in (tmp_path / "kept").glob("step=*.ckpt")]
    assert max(steps, default=0) == saved
