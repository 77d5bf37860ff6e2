"""The teacher: the recursion written out, its state, its buffers, and what it refuses."""

import os
from pathlib import Path

import pytest
import rank_processes
import torch
from lightning import Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightspan.errors import UserError
from lightspan.method import Method
from lightspan.nn.ema import EMATeacher
from lightspan.optim.schedules import cosine_between
from lightspan.strategies import FSDP2


def test_after_k_steps_it_is_the_recursion_written_out() -> None:
    student = nn.Linear(3, 2).double()
    teacher = EMATeacher(student)
    expected = student.weight.detach().clone()
    for momentum in (0.9, 0.99, 0.0, 0.5, 1.0):
        with torch.no_grad():
            student.weight.add_(torch.randn_like(student.weight))
        teacher.follow(student, momentum)
        expected = momentum * expected + (1 - momentum) * student.weight.detach()
    torch.testing.assert_close(teacher.module.weight, expected, rtol=1e-14, atol=1e-15)
    assert not teacher.module.weight.requires_grad
    assert student.weight.requires_grad


def test_it_runs_without_dropout_and_takes_over_the_statistics_of_the_student() -> None:
    student = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Dropout())
    teacher = EMATeacher(student)
    x = torch.randn(8, 3)
    student(x)
    teacher.follow(student, 0.9)
    teacher.train()
    assert torch.equal(teacher.module[1].running_mean, student[1].running_mean)
    assert teacher.module[1].num_batches_tracked == 1
    assert torch.equal(teacher(x), teacher(x))


def test_weights_in_half_precision_are_refused() -> None:
    with pytest.raises(UserError, match=r"weights are torch.bfloat16, .* with trainer.precision=bf16-mixed"):
        EMATeacher(nn.Linear(2, 2).bfloat16())(torch.randn(1, 2).bfloat16())


class Taught(Method):
    """Learns to do what its teacher does to other inputs."""

    def __init__(self) -> None:
        super().__init__(lambda groups: torch.optim.SGD(groups, lr=0.1))
        torch.manual_seed(0)
        self.student = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4))
        self.teacher = EMATeacher(self.student)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return (self.student(batch) - self.teacher(batch.flip(1)) - 1).square().mean()

    def after_optimizer_step(self) -> None:
        self.teacher.follow(self.student, cosine_between(0.5, 0.9, self.share_of_run()))


def fit(folder: Path, **options: object) -> Taught:
    module = Taught()
    silent = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(
        default_root_dir=folder, max_epochs=1, accelerator="cpu", enable_model_summary=False, **silent | options
    )
    rows = torch.randn(2, 4, generator=torch.Generator().manual_seed(1)).repeat(4, 1)
    trainer.fit(module, DataLoader(rows, batch_size=2))
    return module


def test_its_momentum_follows_the_run(tmp_path: Path) -> None:
    module = Taught()
    momenta = [cosine_between(0.5, 0.9, step / 4) for step in range(4)]
    assert momenta == pytest.approx([0.5, 0.55857864, 0.7, 0.84142136])
    assert (module.share_of_run(), fit(tmp_path).share_of_run()) == (0.0, 1.0)


def ranks_teach(rank: int, folder: str, port: int) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "NODE_RANK": "0"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    for strategy in ("ddp", FSDP2()):
        module = fit(Path(folder), strategy=strategy, devices=2, use_distributed_sampler=False)
        expected = torch.load(f"{folder}/alone.pt")
        for name, parameter in module.teacher.named_parameters():
            whole = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
            torch.testing.assert_close(whole, expected[name], rtol=1e-6, atol=1e-7)


@pytest.mark.ranks
def test_ranks_and_sharded_weights_have_the_teacher_of_one_process(tmp_path: Path) -> None:
    torch.save(dict(fit(tmp_path).teacher.named_parameters()), tmp_path / "alone.pt")
    rank_processes.start(ranks_teach, 2, str(tmp_path), rank_processes.free_port())
