"""RSPNet: its loss written out, which clip plays which part, and what enters the queue."""

from functools import partial
from pathlib import Path
from typing import Any

import method_runs
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightspan.backbones.clips import R2Plus1D
from lightspan.core.errors import UserError
from lightspan.datamodules.video.sets.moving_digits import MovingDigits
from lightspan.methods.contrastive.rspnet import RSPNet
from lightspan.objectives.info_nce import queued_info_nce, row_cosine
from lightspan.objectives.margin import ranking_loss

ROWS = 6


def method(heads: tuple[nn.Module, nn.Module] | None = None, **settings: Any) -> RSPNet:
    torch.manual_seed(0)
    backbone = R2Plus1D(width=2, depths=(1, 1), in_chans=1)
    model = RSPNet(
        backbone,
        *(heads or (nn.Linear(4, 6), nn.Linear(4, 5))),
        **{"queue": 3 * ROWS, "momentum": 0.9, "optimizer": partial(torch.optim.SGD, lr=0.05)} | settings,
    )
    model.log_training = lambda figures: None  # type: ignore[method-assign]
    return model


def batch(rows: int = ROWS, seed: int = 1, views: int = 4) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    clips = [torch.randn(rows, 1, 4, 8, 8, generator=generator) for _ in range(views)]
    return {"views": clips, "index": torch.arange(rows) + 10 * seed}


def numbered(rows: int, views: int = 4, seed: int = 1) -> dict[str, Any]:
    """Clips whose pixels say which view of which row they are: 100 x row + view."""
    given = batch(rows, seed, views)
    names = 100.0 * torch.arange(rows).view(-1, 1, 1, 1, 1)
    return given | {"views": [names.expand(rows, 1, 1, 2, 2) + view for view in range(views)]}


def parts(model: RSPNet, given: dict[str, Any]) -> torch.Tensor:
    """Which view plays query, key and other key, [B 3]; every clip is of its own row."""
    played = torch.stack([clip[:, 0, 0, 0, 0] for clip in model.clips(given)], dim=1)
    assert torch.equal(played // 100, torch.arange(len(played))[:, None].expand_as(played).float())
    return played % 100


def test_the_loss_is_the_ranking_of_motion_and_two_searches_by_looks() -> None:
    settings = {"temperature": 0.1, "margin": 1.5, "appearance_weight": 0.5, "motion_weight": 2.0}
    model, reference, given = method(**settings), method(**settings), batch()
    queue_LD = F.normalize(torch.randn(18, 6, generator=torch.Generator().manual_seed(2)), dim=1)
    model.queue.rows_LD.copy_(queue_LD)
    q, k, other = reference.clips(given)
    (q_A, q_M), (k_A, k_M), (o_A, o_M) = reference.student(q), reference.teacher(k), reference.teacher(other)
    q_A, q_M, k_A, k_M, o_A, o_M = (F.normalize(z, dim=1) for z in (q_A, q_M, k_A, k_M, o_A, o_M))
    target = torch.zeros(ROWS, dtype=torch.int64)
    searches = [
        F.cross_entropy(torch.cat([(q_A * z).sum(dim=1, keepdim=True), q_A @ queue_LD.T], dim=1) / 0.1, target)
        for z in (k_A, o_A)
    ]
    gap_B = ((q_M * k_M).sum(dim=1) - (q_M * o_M).sum(dim=1)) / 0.1
    expected = 0.5 * sum(searches) + 2.0 * (1.5 - gap_B).relu().mean()
    loss = model.training_step(given, 0)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.student.parameters())
    assert all(p.grad is None for p in model.teacher.parameters())
    torch.testing.assert_close(model.queue.seen.take()[0], o_A)  # as in the authors' code, not k_A
    assert model.features(given).shape == (ROWS, 4)


def test_query_and_key_are_of_two_starts_at_one_speed_and_the_other_key_of_the_second_at_another() -> None:
    model = method()
    for rows in (1, 2, 7, 8):
        played = parts(model, numbered(rows))
        normal, fast = ([0.0, 2.0, 3.0], [1.0, 3.0, 2.0])
        kinds = played.tolist()
        assert all(kind in (normal, fast) for kind in kinds)
        assert kinds.count(normal) == rows // 2  # of an odd batch the larger half plays fast, as in the code


def test_halves_and_fast_speeds_are_functions_of_seed_step_and_videos(monkeypatch: pytest.MonkeyPatch) -> None:
    def drawn(step: int, views: int, seed: int = 0) -> torch.Tensor:
        monkeypatch.setattr(RSPNet, "global_step", step)
        return parts(method(seed=seed), numbered(64, views))

    assert torch.equal(drawn(3, 4), drawn(3, 4))
    assert not torch.equal(drawn(3, 4), drawn(4, 4))
    assert not torch.equal(drawn(3, 4), drawn(3, 4, seed=1))
    speeds = [{*drawn(step, 8)[:, 0].tolist()} for step in range(20)]
    assert all(len(one) == 2 and 0.0 in one for one in speeds)  # the normal one and one of three fast ones
    assert set.union(*speeds) == {0.0, 1.0, 2.0, 3.0}
    model, given = method(), numbered(64)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    shuffled = {"views": [view[order] for view in given["views"]], "index": given["index"][order]}
    assert torch.equal(model.clips(shuffled).query, model.clips(given).query[order])


def test_frames_of_clips_have_the_strides_that_their_parts_say() -> None:
    data = MovingDigits(frames=4, size=16, clips=2, speeds=(1, 3), batch_size=16, label="digit")
    data.setup()
    given = next(iter(data.train_dataloader()))
    named = given | {"views": [torch.full((16, 1), float(v)) for v in range(4)]}
    played = torch.stack([clip[:, 0] for clip in method().clips(named)], dim=1).long()
    stride = given["frames"].diff(dim=2)[torch.arange(16)[:, None], played]
    assert torch.equal(stride, stride[:, :, :1].expand_as(stride))
    query, same, other = stride[:, :, 0].unbind(1)
    assert torch.equal(query, same)
    assert torch.equal(other, 4 - query)  # 1 and 3
    assert torch.equal(query.sort().values, torch.tensor([1] * 8 + [3] * 8))


def test_nothing_is_left_to_rank_where_cosines_are_margin_times_temperature_apart() -> None:
    near = torch.tensor([0.5, 0.9, -0.2], dtype=torch.float64)
    far = near - 0.14 - 1e-9
    assert ranking_loss(near / 0.07, far / 0.07, 2.0) == 0
    assert ranking_loss(near / 0.07, (far + 0.07) / 0.07, 2.0).item() == pytest.approx(1.0)
    assert ranking_loss(far / 0.07, near / 0.07, 2.0).item() == pytest.approx(4.0)
    assert ranking_loss(near[:0], far[:0], 2.0) == 0


def test_the_gradient_of_the_loss_is_that_of_its_formula() -> None:
    generator = torch.Generator().manual_seed(3)
    draws = [torch.randn(3, 4, generator=generator, dtype=torch.float64) for _ in range(4)]

    def loss(q_A: torch.Tensor, q_M: torch.Tensor) -> torch.Tensor:
        near, far = (row_cosine(q_M, key) / 0.5 for key in draws[:2])
        return ranking_loss(near, far, 2.0) + queued_info_nce(q_A, draws[2], draws[3], 0.5)

    assert torch.autograd.gradcheck(loss, [z.clone().requires_grad_() for z in draws[2:]])


def test_keys_of_the_other_speed_enter_the_queue_after_the_step(tmp_path: Path) -> None:
    model, seen = method(), list[torch.Tensor]()
    step = model.training_step

    def kept(given: dict[str, Any], batch_idx: int) -> torch.Tensor:
        seen.append(F.normalize(model.teacher(model.clips(given).other)[0], dim=1))
        return step(given, batch_idx)

    model.training_step = kept  # type: ignore[method-assign]
    method_runs.fit(model, [batch(seed=seed) for seed in range(4)], tmp_path)
    torch.testing.assert_close(model.queue.rows_LD, torch.cat(seen)[-3 * ROWS :])


def test_the_teacher_copies_at_momentum_zero_and_stays_at_one(tmp_path: Path) -> None:
    for momentum in (0.0, 1.0):
        model = method(momentum=momentum)
        before = [p.clone() for p in model.student.parameters()]
        method_runs.fit(model, [batch()], tmp_path)
        after = before if momentum else model.student.parameters()
        assert all(torch.equal(p, q) for p, q in zip(model.teacher.parameters(), after, strict=True))
        assert any(not torch.equal(p, q) for p, q in zip(model.student.parameters(), before, strict=True))


def test_degenerate_clips_train(tmp_path: Path) -> None:
    still = batch() | {"views": [torch.full((ROWS, 1, 4, 8, 8), 0.5)] * 4}
    for precision in ("32-true", "bf16-mixed"):
        for given in (still, batch(1)):
            method_runs.stays_finite(method(), [given] * 2, tmp_path, precision=precision)


def test_what_it_cannot_train_is_refused() -> None:
    for name, wrong in (
        ("momentum", 1.5), ("temperature", 0.0), ("margin", -1.0), ("motion_weight", -1.0), ("seed", -1),
    ):  # fmt: skip
        with pytest.raises(UserError, match=f"{name}={wrong}"):
            method(**{name: wrong})
    with pytest.raises(UserError, match=r"motion\.in_features=5"):
        method((nn.Linear(4, 6), nn.Linear(5, 6)))
    for views in (2, 5):
        with pytest.raises(UserError, match=r"clips=2 and data.init_args.speeds"):
            method().training_step(batch(views=views), 0)
    with pytest.raises(UserError, match="views of one size"):
        method().training_step(batch() | {"views": [*batch(views=3)["views"], torch.randn(ROWS, 1, 4, 6, 6)]}, 0)
