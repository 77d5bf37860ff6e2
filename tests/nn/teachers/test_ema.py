"""The teacher: the recursion written out, its state, its buffers, and what it refuses."""

import os
from pathlib import Path

import pytest
import rank_processes
import torch
from lightning import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from timm.layers import BatchNormAct2d, DropPath
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightspan.core.errors import UserError
from lightspan.nn.teachers.ema import EMATeacher
from lightspan.optim.schedules import cosine_between
from lightspan.training.method import Method
from lightspan.training.strategies import FSDP2


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


def test_statistics_are_averaged_like_the_weights_if_asked_for() -> None:
    student = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    teacher = EMATeacher(student, average_statistics=True)
    student(torch.randn(8, 3) + 4)
    teacher.follow(student, 0.75)
    own, theirs = teacher.module[1], student[1]
    torch.testing.assert_close(own.running_mean, 0.25 * theirs.running_mean)
    torch.testing.assert_close(own.running_var, 0.75 + 0.25 * theirs.running_var)
    assert own.num_batches_tracked == 1
    assert not own.training


def test_a_weight_that_the_student_got_later_is_named() -> None:
    student = nn.Sequential(nn.Linear(3, 3))
    teacher = EMATeacher(student)
    torch.nn.utils.parametrizations.weight_norm(student[0])
    with pytest.raises(
        UserError, match=r"weight 0.parametrizations.weight.original0 came after its teacher was copied"
    ):
        teacher.follow(student, 0.9)


def normalised() -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(), DropPath(0.5), nn.Linear(4, 3))
    net.register_buffer("table", torch.zeros(2))
    return net


def test_with_batch_statistics_it_normalises_by_its_own_batches_without_dropout() -> None:
    student = normalised()
    teacher, x = EMATeacher(student, batch_statistics=True), torch.randn(8, 3)
    first, norm, *_, last = teacher.module
    hidden = first(x)
    batch = nn.functional.batch_norm(hidden, None, None, norm.weight, norm.bias, training=True)
    torch.testing.assert_close(teacher(x), last(batch))
    torch.testing.assert_close(norm.running_mean, 0.1 * hidden.mean(dim=0))
    assert {type(m) for m in teacher.modules() if m.training} == {nn.BatchNorm1d}
    assert not teacher(x).requires_grad

    student(torch.randn(8, 3) + 5)
    student.table += 1
    own = norm.running_mean.clone(), norm.num_batches_tracked.clone()
    teacher.follow(student, 0.9)
    assert (norm.running_mean, norm.num_batches_tracked) == (pytest.approx(own[0]), own[1])
    assert (teacher.module.table == 1).all()

    teacher.eval()
    running = nn.functional.batch_norm(first(x), own[0], norm.running_var, norm.weight, norm.bias)
    torch.testing.assert_close(teacher(x), last(running))
    assert torch.equal(norm.running_mean, own[0])
    nn.ModuleList([teacher]).train()
    assert norm.training


def test_a_batch_norm_that_holds_a_dropout_leaves_it_off() -> None:
    teacher = EMATeacher(BatchNormAct2d(3, drop_layer=nn.Dropout), batch_statistics=True)
    assert teacher.module.training
    assert not any(module.training for module in teacher.module.children())


def test_weights_in_half_precision_are_refused() -> None:
    with pytest.raises(UserError, match=r"weights are torch.bfloat16, .* with trainer.precision=bf16-mixed"):
        EMATeacher(nn.Linear(2, 2).bfloat16())(torch.randn(1, 2).bfloat16())


class Taught(Method):
    """Learns to do what its teacher does to other inputs."""

    def __init__(self, batch_statistics: bool = False) -> None:
        super().__init__(lambda groups: torch.optim.SGD(groups, lr=0.1))
        torch.manual_seed(0)
        norm = [nn.BatchNorm1d(6)] * batch_statistics
        self.student = nn.Sequential(nn.Linear(4, 6), *norm, nn.Tanh(), nn.Linear(6, 4))
        self.teacher = EMATeacher(self.student, batch_statistics)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return (self.student(batch) - self.teacher(batch.flip(1)) - 1).square().mean()

    def after_optimizer_step(self) -> None:
        self.teacher.follow(self.student, cosine_between(0.5, 0.9, self.share_of_run()))


def fit(folder: Path, module: Taught | None = None, resume: Path | None = None, **options: object) -> Taught:
    module = module or Taught()
    silent = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(
        default_root_dir=folder, max_epochs=1, accelerator="cpu", enable_model_summary=False, **silent | options
    )
    rows = torch.randn(2, 4, generator=torch.Generator().manual_seed(1)).repeat(4, 1)
    trainer.fit(module, DataLoader(rows, batch_size=2), ckpt_path=resume, weights_only=True)
    return module


def test_its_momentum_follows_the_run(tmp_path: Path) -> None:
    module = Taught()
    momenta = [cosine_between(0.5, 0.9, step / 4) for step in range(4)]
    assert momenta == pytest.approx([0.5, 0.55857864, 0.7, 0.84142136])
    assert (module.share_of_run(), fit(tmp_path).share_of_run()) == (0.0, 1.0)


def test_statistics_of_its_own_batches_are_saved_and_a_resumed_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    saves = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    straight = fit(tmp_path, Taught(True), callbacks=[saves], enable_checkpointing=True)
    resumed = fit(tmp_path, Taught(True), tmp_path / "step=2.ckpt")
    assert straight.teacher.module[1].num_batches_tracked == 4
    assert not torch.equal(straight.teacher.module[1].running_mean, straight.student[1].running_mean)
    for (name, a), b in zip(straight.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


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
