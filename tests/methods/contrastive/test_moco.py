"""MoCo: its step written out, and what enters the queue and when."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from method_runs import batch, fit
from torch import Tensor
from torch.nn import functional as F

from lightspan.backbones.vision import SmallConvNet
from lightspan.core.errors import UserError
from lightspan.methods.contrastive.moco import MoCo
from lightspan.nn.heads.projector import Projector


def method(queue: int = 15, momentum: float = 0.9, **settings: Any) -> MoCo:
    torch.manual_seed(0)
    parts = SmallConvNet(width=4, stages=2), Projector(8, [16], 6, hidden_norm=False)
    return MoCo(*parts, queue=queue, momentum=momentum, **settings, optimizer=partial(torch.optim.SGD, lr=0.05))


def two_views(rows: int = 6, seed: int = 1) -> dict[str, Any]:
    return batch(rows, seed, locals_=0)


def test_the_loss_is_that_of_the_pair_among_the_rows_of_the_queue() -> None:
    model, reference, given = method(), method(), two_views()
    model.log_training = lambda figures: None  # type: ignore[method-assign]
    queue_LD = F.normalize(torch.randn(15, 6, generator=torch.Generator().manual_seed(2)), dim=1)
    model.queue.rows_LD.copy_(queue_LD)
    query = F.normalize(reference.student(given["views"][0]), dim=1)
    key = F.normalize(reference.teacher(given["views"][1]), dim=1)
    logits = torch.cat([(query * key).sum(dim=1, keepdim=True), query @ queue_LD.T], dim=1) / 0.2
    expected = F.cross_entropy(logits, torch.zeros(6, dtype=torch.int64))
    loss = model.training_step(given, 0)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.student.parameters())
    assert all(p.grad is None for p in model.teacher.parameters())
    assert not model.queue.seen.take()[0].requires_grad


def test_an_empty_queue_is_as_many_keys_at_a_right_angle() -> None:
    model, given = method().eval(), two_views()
    model.log_training = lambda figures: None  # type: ignore[method-assign]
    cosine_B = F.cosine_similarity(model.student(given["views"][0]), model.teacher(given["views"][1]))
    expected = (1 + 15 * (-cosine_B / 0.2).exp()).log().mean()
    torch.testing.assert_close(model.training_step(given, 0), expected)


def test_a_key_depends_on_its_own_image_alone_so_there_is_nothing_to_shuffle() -> None:
    model, given = method().train(), two_views()
    images = given["views"][1]
    alone = torch.cat([model.teacher(images[i : i + 1]) for i in range(len(images))])
    torch.testing.assert_close(model.teacher(images), alone)
    by_batch = method(batch_statistics=True).train()
    assert not torch.allclose(by_batch.teacher(images)[:3], by_batch.teacher(images[:3]), atol=1e-3)


def test_the_keys_of_a_step_enter_after_it_once_and_the_oldest_leave(tmp_path: Path) -> None:
    model, batches = method(queue=15), [two_views(seed=seed) for seed in range(3)]
    seen: list[Tensor] = []
    step = model.training_step

    def kept(given: dict[str, Any], batch_idx: int) -> Tensor:
        seen.append(F.normalize(model.teacher(given["views"][1]), dim=1))
        return step(given, batch_idx)

    model.training_step = kept  # type: ignore[method-assign]
    fit(model, batches, tmp_path)
    torch.testing.assert_close(model.queue.rows_LD, torch.cat(seen)[-15:])
    assert model.queue.filled == 18
    assert model.queue.seen.take() == []


def test_the_teacher_is_the_average_of_the_student(tmp_path: Path) -> None:
    model = method(momentum=0.5)
    before = [p.clone() for p in model.teacher.parameters()]
    fit(model, [two_views()], tmp_path)
    for old, new, student in zip(before, model.teacher.parameters(), model.student.parameters(), strict=True):
        torch.testing.assert_close(new, 0.5 * old + 0.5 * student)


def test_the_statistics_of_its_norms_are_averaged_as_its_weights_are(tmp_path: Path) -> None:
    model = method(momentum=0.75)
    before = {name: buffer.clone() for name, buffer in model.teacher.module.named_buffers() if "running" in name}
    fit(model, [two_views()], tmp_path)
    mine, theirs = dict(model.teacher.module.named_buffers()), dict(model.student.named_buffers())
    assert len(before) == 4
    for name, old in before.items():
        assert not torch.equal(theirs[name], old)
        torch.testing.assert_close(mine[name], 0.75 * old + 0.25 * theirs[name])


def test_what_it_cannot_train_is_refused() -> None:
    with pytest.raises(UserError, match=r"momentum=1.5 must lie in \[0, 1\]"):
        method(momentum=1.5)
    with pytest.raises(UserError, match=r"temperature=0.0 must be above 0"):
        method(temperature=0.0)
    with pytest.raises(UserError, match=r"length=0 must"):
        method(queue=0)
    with pytest.raises(UserError, match=r"MoCo needs 2 views of each image, and this batch gives 5"):
        method().training_step(batch(), 0)
