"""SwAV: the loss pair by pair and against lightly's, prototypes, queue and freeze."""

import math
from functools import partial
from pathlib import Path
from typing import Any

import method_runs
import pytest
import torch
from method_runs import batch, fit
from torch import Tensor, nn
from torch.nn import functional as F

from lightspan.backbones.vision import SmallConvNet
from lightspan.core.errors import UserError
from lightspan.methods.clustering.swav import SwAV
from lightspan.nn.heads.projector import Projector
from lightspan.objectives.prototypes import sinkhorn

STEPS = 4
BATCHES = [batch(seed=seed) for seed in range(STEPS)]


def method(**settings: Any) -> SwAV:
    torch.manual_seed(0)
    given = {
        "prototypes": 7, "freeze_prototypes": 0.0, "code_temperature": 0.3,
        "optimizer": partial(torch.optim.SGD, lr=0.5, momentum=0.9),
    }  # fmt: skip
    return SwAV(SmallConvNet(width=4, stages=2), Projector(8, [10], 6), **given | settings)


def embedded(model: SwAV, view: Tensor) -> Tensor:
    return F.normalize(model.network.head(model.network.backbone(view)), dim=1)


def test_the_loss_is_the_papers_put_together_pair_by_pair() -> None:
    model, given = method().eval(), batch()  # evaluation: a BatchNorm would see other rows below
    scores = [embedded(model, view) @ model.prototypes.weight.T for view in given["views"]]
    codes = [sinkhorn(scores[view], 0.3) for view in range(2)]
    pairs = [
        -(codes[t] * (scores[v] / 0.1).log_softmax(dim=1)).sum(dim=1).mean()
        for t in range(2)
        for v in range(5)
        if v != t
    ]
    torch.testing.assert_close(model.training_step(given, 0), sum(pairs) / 8)


def test_autocast_rounds_no_score_of_an_embedding(monkeypatch: pytest.MonkeyPatch) -> None:
    model = method(queue=6)
    z_VBD = torch.randn(5, 6, 6, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(model.network, "forward", lambda views: z_VBD)
    model.training_step(batch(), 0)
    model.after_optimizer_step()  # fills the queue
    exact = model.training_step(batch(), 0)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model.training_step(batch(), 0), exact)


def test_loss_and_codes_are_lightlys_with_and_without_a_queue() -> None:
    lightly = pytest.importorskip("lightly.loss")
    oracle = lightly.SwaVLoss(temperature=0.1, sinkhorn_epsilon=0.3)
    model, given = method(queue=6).eval(), batch()
    scores = [embedded(model, view) @ model.prototypes.weight.T for view in given["views"]]
    torch.testing.assert_close(model.training_step(given, 0), oracle(scores[:2], scores[2:])[0])
    model.after_optimizer_step()
    queued = [queue.rows_LD @ model.prototypes.weight.T for queue in model.prototypes.queues]
    torch.testing.assert_close(model.training_step(given, 0), oracle(scores[:2], scores[2:], queued)[0])


def test_with_equal_scores_the_loss_is_log_k_and_hot_codes_are_uniform() -> None:
    model = method()
    nn.init.zeros_(model.prototypes.weight)
    assert model.training_step(batch(), 0).item() == pytest.approx(math.log(7))
    scores = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        method(code_temperature=1e6).prototypes.codes(0, scores), torch.full((5, 7), 1 / 7), rtol=1e-4, atol=0
    )


def test_codes_behind_a_queue_are_the_last_rows_of_those_of_all_and_a_batch_never_meets_itself() -> None:
    model, given = method(queue=12).eval(), batch()
    seen: list[Tensor] = []
    codes = model.prototypes.codes
    model.prototypes.codes = lambda view, scores: (seen.append(scores), codes(view, scores))[1]  # type: ignore[method-assign]
    for step in range(2):
        model.training_step(BATCHES[step], 0)
        model.after_optimizer_step()
        assert model.prototypes.queues[0].full == (step == 1)
    before = [queue.rows_LD.clone() for queue in model.prototypes.queues]
    expected = [torch.cat([embedded(model, BATCHES[step]["views"][view]) for step in range(2)]) for view in range(2)]
    for rows, own in zip(expected, before, strict=True):
        torch.testing.assert_close(rows.detach(), own)
    scores = torch.randn(6, 7, generator=torch.Generator().manual_seed(0))
    for view, rows in enumerate(before):
        whole = sinkhorn(torch.cat([rows @ model.prototypes.weight.T, scores]).detach(), 0.3)
        torch.testing.assert_close(codes(view, scores), whole[-6:])
    model.training_step(given, 0)
    assert torch.equal(model.prototypes.queues[0].rows_LD, before[0])
    model.after_optimizer_step()
    torch.testing.assert_close(model.prototypes.queues[0].rows_LD[:6], before[0][6:])


def test_the_queue_waits_for_its_share_of_the_run(tmp_path: Path) -> None:
    model = method(queue=6, queue_from=0.5)
    seen: list[int] = []
    codes = model.prototypes.codes
    model.prototypes.codes = lambda view, scores: (
        seen.append(int(model.prototypes.queues[view].filled)),
        codes(view, scores),
    )[1]  # type: ignore[method-assign]
    fit(model, BATCHES, tmp_path)
    assert seen == [0, 0, 0, 0, 0, 0, 6, 6]


def test_prototypes_have_unit_length_after_each_step_and_the_step_itself_is_the_optimisers(tmp_path: Path) -> None:
    model = method(optimizer=partial(torch.optim.SGD, lr=0.5))
    start = model.prototypes.weight.detach().clone()
    torch.testing.assert_close(start.norm(dim=1), torch.ones(7))
    model.training_step(BATCHES[0], 0).backward()
    step = start - 0.5 * model.prototypes.weight.grad  # type: ignore[operator]
    model = method(optimizer=partial(torch.optim.SGD, lr=0.5))
    fit(model, BATCHES[:1], tmp_path)
    torch.testing.assert_close(model.prototypes.weight.detach(), F.normalize(step, dim=1))
    assert (step.norm(dim=1) - 1).abs().max() > 1e-3


def test_frozen_prototypes_keep_their_place(tmp_path: Path) -> None:
    model, kept = method(freeze_prototypes=0.5), list[bool]()
    before, after = model.prototypes.weight.detach().clone(), model.after_optimizer_step

    def watched() -> None:
        kept.append(torch.equal(model.prototypes.weight, before))
        after()
        model.prototypes.weight.data.copy_(before) if kept[-1] else None  # renormalising may round

    model.after_optimizer_step = watched  # type: ignore[method-assign]
    fit(model, BATCHES, tmp_path)
    assert kept == [True, True, False, False]


def test_prototypes_are_one_table_that_is_not_decayed() -> None:
    groups = {
        group["name"]: group
        for group in method(optimizer=partial(torch.optim.SGD, weight_decay=0.1)).groups.build(method())
    }
    assert [name for name, _ in groups["embeddings"]["params"]] == ["prototypes.weight"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prototypes": 0}, "prototypes=0 must"),
        ({"queue": -1}, "queue=-1 must"),
        ({"queue_from": 1.5}, r"queue_from=1.5 must lie in \[0, 1\]"),
        ({"code_temperature": 0.0}, r"code_temperature=0.0 must be above 0"),
        ({"global_views": 1}, r"global_views=1 leaves a global view without another one"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        method(**settings)


def test_a_projector_that_does_not_say_its_width_is_refused() -> None:
    with pytest.raises(UserError, match=r"Sequential has no out_features; use lightspan.nn.heads.projector.Projector"):
        SwAV(method_runs.Pooled(), nn.Sequential(nn.Linear(8, 6)), optimizer=torch.optim.SGD)


def test_assignments_are_what_a_view_predicts() -> None:
    model, image = method().eval(), batch()["views"][0]
    scores = embedded(model, image) @ model.prototypes.weight.T / 0.1
    torch.testing.assert_close(model.assignments({"image": image}), scores.softmax(dim=1))
