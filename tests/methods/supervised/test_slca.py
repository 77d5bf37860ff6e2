"""SLCA: rows of other tasks stay, the aligned head only answers, samples follow the Gaussians, a run resumes."""

import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rank_processes
import torch
from lightning import Callback, Trainer
from method_runs import SILENT, differences
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from lightspan.backbones.vision import MLP
from lightspan.callbacks.resilience.checkpoint import Checkpoint
from lightspan.cli.planning.planned_step import make_plan
from lightspan.core.errors import UserError
from lightspan.datamodules.image.sets.small import Digits
from lightspan.datamodules.image.variants.class_stream import ClassStream
from lightspan.evaluation.gaussians.class_gaussians import ClassGaussians, factor
from lightspan.evaluation.geometry.moments import Moments
from lightspan.methods.supervised.classifier import Classifier
from lightspan.methods.supervised.slca import SLCA
from lightspan.optim.low_rank.optimizer import LowRank
from lightspan.optim.schedules import Staircase

SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.01)


def stream(**settings: Any) -> ClassStream:
    return ClassStream(Digits(), **{"tasks": 4, "train_size": 300, "val_size": 40, "batch_size": 20, **settings})


def method(backbone: nn.Module | None = None, **settings: Any) -> SLCA:
    torch.manual_seed(0)
    given = {"num_classes": 10, "samples": 16, "align_epochs": 2, "optimizer": SGD, "backbone_rate": 0.1}
    return SLCA(backbone or MLP((1, 8, 8), (12,)), **given | settings)


def run(model: Any, data: ClassStream, folder: Path, *callbacks: Callback, **options: Any) -> Trainer:
    resume, options = options.pop("ckpt_path", None), {"max_epochs": 1, "limit_val_batches": 0} | options
    options = SILENT | {"accelerator": "cpu", "default_root_dir": folder} | options
    saves = any(isinstance(callback, Checkpoint) for callback in callbacks)
    trainer = Trainer(callbacks=[*callbacks], enable_checkpointing=saves, **options)
    trainer.fit(model, datamodule=data, ckpt_path=resume, weights_only=True)
    return trainer


class Watches(Callback):
    """The head and what is predicted after each step; the rates; what the optimiser remembers before each."""

    def __init__(self) -> None:
        self.heads: list[Tensor] = []
        self.answers: list[Tensor] = []
        self.rates: list[list[float]] = []
        self.remembers: list[bool] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.rates.append([group["lr"] for group in trainer.optimizers[0].param_groups])

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.remembers.append(bool(optimizer.state))

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.heads.append(torch.cat([pl_module.head.weight.detach(), pl_module.head.bias.detach()[:, None]], dim=1))
        with torch.no_grad():
            self.answers.append(pl_module(torch.ones(1, 1, 8, 8))[0])


def test_a_step_outside_of_a_run_such_as_a_plan_takes_is_one_of_the_first_task() -> None:
    model, batch = method(), {"image": torch.randn(4, 1, 8, 8), "label": torch.tensor([0, 1, 0, 1])}
    model.log_training = lambda figures, **options: None  # type: ignore[method-assign]
    model.task_C.copy_(torch.arange(10) // 2)
    loss = model.training_step(batch, 0)
    logits_BC = model.head(model.backbone(batch["image"]))[:, :2]
    torch.testing.assert_close(loss, nn.functional.cross_entropy(logits_BC, batch["label"]))


def test_a_plan_and_a_dry_run_need_no_run_of_the_length_of_all_tasks(tmp_path: Path) -> None:
    trainer = Trainer(accelerator="cpu", max_epochs=1, default_root_dir=tmp_path, **SILENT)
    assert make_plan(trainer, method(), stream(), 2**40).step.rows == 20


def test_rows_of_other_tasks_stay_bit_for_bit_and_the_head_goes_on_from_before_its_alignment(tmp_path: Path) -> None:
    data, watches = stream(), Watches()
    model, plain, other = method(), method(align_epochs=0), Watches()
    first = torch.cat([model.head.weight.detach(), model.head.bias.detach()[:, None]], dim=1).clone()
    run(model, data, tmp_path, watches)
    run(plain, stream(), tmp_path, other)
    assert all(map(torch.equal, watches.heads, other.heads))  # alignment left no trace in training
    ends = [0, *np.cumsum(data.task_steps())]
    before = first
    assert [len(task) for task in data.tasks] == [3, 3, 2, 2]
    for number, task in enumerate(data.tasks):
        rest = [c for c in range(10) if c not in task]
        for head in watches.heads[ends[number] : ends[number + 1]]:
            assert torch.equal(head[rest], before[rest])
        before = watches.heads[ends[number + 1] - 1]
        assert all(not torch.equal(before[c], first[c]) for c in task)
    assert not torch.equal(model.aligned_weight, model.head.weight)
    assert torch.equal(plain.aligned_weight, plain.head.weight)


def test_answers_come_from_the_aligned_head_between_tasks_and_never_from_classes_to_come(tmp_path: Path) -> None:
    data, watches, other = stream(), Watches(), Watches()
    run(method(), data, tmp_path, watches)
    run(method(align_epochs=0), stream(), tmp_path, other)
    ends = np.cumsum(data.task_steps())
    for step, (aligned, plain) in enumerate(zip(watches.answers, other.answers, strict=True)):
        task = int(np.searchsorted(ends, step, side="right"))
        seen = sorted(c for one in data.tasks[: task + 1] for c in one)
        assert aligned.isfinite().nonzero()[:, 0].tolist() == seen
        assert torch.equal(aligned, plain) == (step + 1 not in ends[1:])


def test_the_schedule_and_the_optimiser_begin_anew_with_each_task_and_the_backbone_is_slow(tmp_path: Path) -> None:
    data, watches = stream(), Watches()
    run(method(lr_scheduler=partial(Staircase, at=(0.5,))), data, tmp_path, watches)
    expected, fresh = [], []
    for steps in data.task_steps():
        expected += [0.1 if step < 0.5 * steps else 0.01 for step in range(steps)]
        fresh += [step > 0 for step in range(steps)]
    assert [max(rates) for rates in watches.rates] == pytest.approx(expected)
    assert [min(rates) for rates in watches.rates] == pytest.approx([0.1 * rate for rate in expected])
    assert watches.remembers == fresh


@pytest.mark.sample(1)
@pytest.mark.parametrize("optimizer", [SGD, partial(torch.optim.AdamW, lr=0.01), partial(LowRank, lr=0.01, rank=4)])
def test_a_run_that_is_killed_anywhere_resumes_bit_for_bit(optimizer: Any, tmp_path: Path) -> None:
    settings = {"optimizer": optimizer, "lr_scheduler": partial(Staircase, at=(0.5,))}
    straight, data = method(**settings), stream()
    saves = Checkpoint(str(tmp_path), every_n_train_steps=1, save_top_k=-1)
    run(straight, data, tmp_path, saves)
    first = data.task_steps()[0]
    for step in (first - 1, first, first + data.task_steps()[1] + 1):
        resumed = method(**settings)
        other = Checkpoint(str(tmp_path / f"from {step}"))
        run(resumed, stream(), tmp_path, other, ckpt_path=tmp_path / f"step={step}.ckpt")
        for (name, a), b in zip(straight.state_dict().items(), resumed.state_dict().values(), strict=True):
            assert torch.equal(a, b), (step, name)


def test_accumulated_micro_batches_train_and_align_as_one_batch(tmp_path: Path) -> None:
    one, two = method().double(), method().double()
    run(one, stream(), tmp_path, precision="64-true")
    run(two, stream(), tmp_path, precision="64-true", accumulate_grad_batches=2)
    assert not differences(two.state_dict(), one.state_dict())


def _on_rank(rank: int, folder: str, port: int) -> None:
    rank_processes.join(rank, port)
    model = method().double()
    run(model, stream(), Path(folder), precision="64-true", strategy="ddp", devices=2, use_distributed_sampler=False)
    torch.save(model.state_dict(), Path(folder) / f"{rank}.pt")


@pytest.mark.ranks
def test_two_ranks_train_and_align_as_one_process(tmp_path: Path) -> None:
    one = method().double()
    run(one, stream(), tmp_path, precision="64-true")
    rank_processes.start(_on_rank, 2, str(tmp_path), rank_processes.free_port())
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert not differences(first, one.state_dict())
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_single_task_is_plain_training(tmp_path: Path) -> None:
    settings = {"optimizer": SGD, "groups": None}
    model, plain = method(backbone_rate=1.0), Classifier(MLP((1, 8, 8), (12,)), 10, **settings)
    plain.load_state_dict({name: x for name, x in model.state_dict().items() if name.split(".")[0] in
                           ("backbone", "head")})  # fmt: skip
    run(model, stream(tasks=1), tmp_path, max_epochs=2)
    run(plain, stream(tasks=1), tmp_path, max_epochs=2)
    image = torch.randn(7, 1, 8, 8)
    assert torch.equal(model(image), plain(image))


def test_means_shrink_with_age_and_not_for_the_newest_task(tmp_path: Path) -> None:
    model, asked = method(align_epochs=1), []
    sample = model.gaussians.sample

    def watched(number: int, count: int, seeds: Any, scale: float) -> Tensor:
        asked.append((number, tuple(seeds), scale))
        return sample(number, count, seeds, scale)

    model.gaussians.sample = watched  # type: ignore[method-assign, assignment]
    data = stream()
    run(model, data, tmp_path)
    expected = [
        (c, (0, task, 0), 0.9 + 0.1 * (own + 1) / (task + 1))
        for task in (1, 2, 3)
        for c, own in sorted((c, own) for own in range(task + 1) for c in data.tasks[own])
    ]
    assert asked == [(c, seeds, pytest.approx(scale)) for c, seeds, scale in expected]
    assert {scale for _, (_, task, _), scale in asked if task == 3 for _ in (0,)} == {0.925, 0.95, 0.975, 1.0}


def test_gaussians_keep_numpys_mean_and_covariance_and_samples_follow_them() -> None:
    x_NF = torch.randn(40, 3, generator=torch.Generator().manual_seed(0)).double() @ torch.randn(3, 3).double() + 5
    found = ClassGaussians(2, 3, jitter=1e-4)
    found.learn(1, Moments.of(x_NF[:25]) + Moments.of(x_NF[25:]))
    expected = np.cov(x_NF.numpy().T) + 1e-4 * np.eye(3)
    np.testing.assert_allclose(found.covariance(1).numpy(), expected, rtol=1e-5, atol=1e-6)
    assert found.known() == [1]
    count = 50_000
    drawn_SF = found.sample(1, count, (0, 1, 2), scale=0.9).double().numpy()
    sigma = np.sqrt(np.diag(expected))
    assert (np.abs(drawn_SF.mean(axis=0) - 0.9 * x_NF.mean(dim=0).numpy()) < 5 * sigma / math.sqrt(count)).all()
    spread = np.sqrt((np.outer(sigma, sigma) ** 2 + expected**2) / count)
    assert (np.abs(np.cov(drawn_SF.T) - expected) < 5 * spread).all()
    again, other = found.sample(1, 4, (0, 1, 2)), found.sample(1, 4, (0, 1, 3))
    assert torch.equal(again, found.sample(1, 4, (0, 1, 2)))
    assert not torch.equal(again, other)


def test_one_row_no_row_dead_features_and_rounding_leave_a_gaussian_that_can_be_drawn_from() -> None:
    found = ClassGaussians(3, 4, jitter=0.01)
    found.learn(0, Moments.of(torch.ones(1, 4)))
    found.learn(1, Moments.of(torch.zeros(0, 4)))
    found.learn(2, Moments.of(torch.ones(9, 4)))
    assert found.known() == [0, 2]
    for number in (0, 2):
        torch.testing.assert_close(found.covariance(number), 0.01 * torch.eye(4))
        assert found.sample(number, 5, (0,)).isfinite().all()
    singular = torch.tensor([[1.0, 1.0], [1.0, 1.0 - 1e-9]], dtype=torch.float64)
    torch.testing.assert_close(factor(singular) @ factor(singular).T, singular, rtol=0, atol=1e-8)
    negative = torch.diag(torch.tensor([1.0, -0.25, 4.0]))  # as rounding may leave it, and more
    torch.testing.assert_close(factor(negative) @ factor(negative).T, torch.diag(torch.tensor([1.0, 0.0, 4.0])))
    with pytest.raises(UserError, match="of 4 features got moments of 3"):
        found.learn(0, Moments.of(torch.ones(2, 3)))


def test_the_best_line_on_samples_of_a_shared_covariance_is_that_of_discriminant_analysis() -> None:
    """Within a degree: the optimum of the cross-entropy, found by scikit-learn, against Sigma^-1 (mu_1 - mu_0)."""
    covariance = torch.tensor([[2.0, 0.8], [0.8, 1.0]]).double()
    found = ClassGaussians(2, 2, jitter=0.0)
    rows_NF = torch.linalg.cholesky(covariance * 3 / 2) @ torch.tensor([[1.0, -1, 1, -1], [1, 1, -1, -1]]).double()
    for number, mean in enumerate((torch.tensor([0.0, 0.0]), torch.tensor([1.0, 1.5]))):
        rows = rows_NF.T * math.sqrt(0.5) + mean.double()
        found.learn(number, Moments.of(rows))
        torch.testing.assert_close(found.covariance(number).double(), covariance, rtol=1e-5, atol=1e-5)
    x_NF = torch.cat([found.sample(number, 40_000, (3,)) for number in (0, 1)]).numpy()
    line = LogisticRegression(C=1e6).fit(x_NF, np.repeat([0, 1], 40_000)).coef_[0]
    lda = np.linalg.solve(covariance.numpy(), [1.0, 1.5])
    cosine = line @ lda / np.linalg.norm(line) / np.linalg.norm(lda)
    assert math.degrees(math.acos(min(cosine, 1.0))) < 1


def test_gaussians_are_of_features_without_dropout_and_the_modes_of_training_come_back(tmp_path: Path) -> None:
    """Of the last task, whose features the backbone at the end still gives."""
    backbone = nn.Sequential(MLP((1, 8, 8), (12,)), nn.Dropout(0.5))
    backbone.num_features = 12  # type: ignore[assignment]
    data, model = stream(), method(backbone)
    run(model, data, tmp_path)
    assert backbone[1].training
    backbone.eval()
    with torch.no_grad():
        batches = [(backbone(batch["image"]), batch["label"]) for batch in data.task_bank(3)]
    x_NF, label_N = (torch.cat(parts) for parts in zip(*batches, strict=True))
    for number in data.tasks[3]:
        torch.testing.assert_close(model.gaussians.mean_CF[number], x_NF[label_N == number].mean(dim=0))


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_tasks_of_one_class_classes_of_one_image_and_dead_features_train_to_finite_weights(
    precision: str, tmp_path: Path
) -> None:
    class Few(Digits):
        def load(self) -> Any:
            training, test = super().load()
            kept = np.concatenate([np.flatnonzero(training.labels == c)[: 1 if c == 3 else 8] for c in range(10)])
            return type(training)(training.images[kept], training.labels[kept]), test

    class Dead(MLP):
        def forward(self, x_BCHW: Tensor) -> Tensor:
            return super().forward(x_BCHW) * 0 + 1

    for backbone in (MLP((1, 8, 8), (12,)), Dead((1, 8, 8), (12,))):
        data = ClassStream(Few(), tasks=10, batch_size=2, passes=2)
        model = method(backbone, align_epochs=1)
        run(model, data, tmp_path, precision=precision)
        assert all(x.isfinite().all() for x in model.state_dict().values())
        assert model.gaussians.count_C.tolist() == [1 if c == 3 else 8 for c in range(10)]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"num_classes": 1}, "num_classes=1 must be at least 2"),
        ({"samples": 0}, "samples=0 must"),
        ({"align_epochs": -1}, "align_epochs=-1 must"),
        ({"backbone_rate": 0.0}, "backbone_rate=0.0 must"),
        ({"align_lr": math.nan}, "align_lr=nan must"),
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"shrink": 1.1}, "shrink=1.1"),
        ({"jitter": -1.0}, "jitter=-1.0"),
        ({"backbone": nn.Flatten()}, "Flatten has no attribute num_features"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        method(**settings)


def test_an_alignment_that_diverges_is_told(tmp_path: Path) -> None:
    model, given = method(align_lr=1e30), ClassGaussians(10, 12)
    for number in range(4):
        given.learn(number, Moments.of(torch.randn(5, 12)))
    model.gaussians, model.task_C = given, torch.tensor([0, 0, 1, 1] + [2] * 6)
    with pytest.raises(UserError, match=r"after task 1 has diverged with align_lr=1e\+30; lower it"):
        model.align(1)


def test_another_number_of_classes_and_a_second_pass_through_the_tasks_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="and SLCA num_classes=9; give it their number"):
        run(method(num_classes=9), stream(), tmp_path)
    with pytest.raises(UserError, match=r"set trainer.max_epochs=1, and data.init_args.passes"):
        run(method(), stream(), tmp_path, max_epochs=2)
