"""CION: the loss over all pairs of an identity, what it does not depend on, DINO where everybody is alone."""

from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import method_runs
import pytest
import torch
from method_runs import batch, moved, resumes
from torch import Tensor

from lightspan.backbones.vision import SmallConvNet
from lightspan.core.errors import UserError
from lightspan.methods.distillation.cion import CION
from lightspan.methods.distillation.dino import DINO
from lightspan.nn.heads.dino_head import DINOHead
from lightspan.objectives.prototypes import centred_softmax, identity_shares, mixed_targets
from lightspan.optim.schedules import cosine_between

SGD = partial(torch.optim.SGD, lr=0.05, weight_decay=0.04)


def method(kind: Any = CION, **settings: Any) -> Any:
    torch.manual_seed(0)
    given: dict[str, Any] = {"momentum": 0.5, "final_momentum": 0.9, "freeze_prototypes": 0.0, "optimizer": SGD}
    return kind(method_runs.Pooled(), DINOHead(8, 9, hidden=(12,), bottleneck=6), **given | settings)


def persons(label: list[int], seed: int = 1) -> dict[str, Any]:
    return batch(rows=len(label), seed=seed) | {"label": torch.tensor(label)}


def loss_of(model: Any, given: dict[str, Any]) -> Tensor:
    model.log_training = lambda figures: None
    return model.training_step(given, 0)


@pytest.mark.parametrize("label", [[0, 0, 1, 1, 2, 2], [4, 7, 4, 7, 4, 7], [3] * 6], ids=["K=2", "K=3", "K=6"])
def test_the_loss_is_the_mean_over_crops_of_every_ordered_pair_of_an_identity(label: list[int]) -> None:
    model, given = moved(method()), persons(label)
    targets = [centred_softmax(model.teacher([view])[0], model.centre(), 0.04) for view in given["views"][:2]]
    answers = [(model.student([view])[0] / 0.1).log_softmax(dim=1) for view in given["views"]]
    people, expected = sorted(set(label)), torch.zeros(())
    size = len(label) // len(people)
    for g, v in product(range(2), range(5)):
        if g == v:
            continue
        own = sum(-(targets[g][n] * answers[v][n]).sum() for n in range(6)) / 6
        pairs = [(n, m) for n, m in product(range(6), repeat=2) if n != m and label[n] == label[m]]
        others = sum((-(targets[g][n] * answers[v][m]).sum() for n, m in pairs), torch.zeros(())) / len(people)
        expected = expected + (own + others) / (size * (size - 1) + 1) / 8
    torch.testing.assert_close(loss_of(model, given), expected)


def test_where_everybody_is_alone_or_unknown_it_is_dino_bit_for_bit(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"teacher_temperature": 0.04, "final_temperature": 0.04}
    plain = method(DINO, **settings)
    batches = [persons([*range(6)], seed) for seed in range(3)]
    expected = method_runs.fit(plain, batches, tmp_path)
    for label in ([5, 3, 0, 1, 9, 7], [-1] * 6):
        model = method()
        assert method_runs.fit(model, [persons(label, seed) for seed in range(3)], tmp_path) == expected
        assert all(map(torch.equal, model.state_dict().values(), plain.state_dict().values()))


def test_neither_names_nor_order_of_people_and_pictures_change_it() -> None:
    model, given = moved(method()), persons([0, 0, 1, 1, 2, 2])
    expected = loss_of(model, given)
    torch.testing.assert_close(loss_of(model, given | {"label": torch.tensor([8, 8, 3, 3, 5, 5])}), expected)
    for order in ([2, 3, 4, 5, 0, 1], [1, 0, 2, 3, 5, 4], [4, 1, 2, 0, 5, 3]):
        turned = method_runs.rows_of(given, torch.tensor(order))
        torch.testing.assert_close(loss_of(model, turned), expected)


def test_shares_of_each_picture_sum_to_1_and_others_of_a_large_group_weigh_most() -> None:
    shares = identity_shares(torch.tensor([2, 5, 2, 2, -1, -1]))
    torch.testing.assert_close(shares.sum(dim=1), torch.ones(6))
    torch.testing.assert_close(shares[0], torch.tensor([1, 0, 3, 3, 0, 0]) / 7)
    assert torch.equal(shares[[1, 4, 5]], torch.eye(6)[[1, 4, 5]])
    eight = identity_shares(torch.zeros(8, dtype=torch.int64))
    assert 1 - float(eight[0, 0]) == pytest.approx(56 / 57)  # what others have of a target where K is 8
    assert identity_shares(torch.zeros(0, dtype=torch.int64)).shape == (0, 0)
    targets = torch.rand(2, 6, 5)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(mixed_targets(targets, torch.full((6,), -1)), targets)


def test_gradients_reach_the_student_alone_and_the_centre_takes_a_tenth_of_the_mean() -> None:
    model, given = method(), persons([0, 0, 1, 1, 2, 2])
    loss_of(model, given).backward()
    assert all(parameter.grad is None for parameter in model.teacher.parameters())
    assert all(parameter.grad is not None for parameter in model.student.parameters())
    seen = model.teacher(given["views"][:2]).flatten(0, 1)
    model.centre.follow()
    torch.testing.assert_close(model.centre(), 0.1 * seen.mean(dim=0))


def test_momentum_and_prototypes_follow_their_schedules(tmp_path: Path) -> None:
    batches = [persons([0, 0, 1, 1, 2, 2], seed) for seed in range(4)]
    model = method(freeze_prototypes=0.5)
    momenta, kept = method_runs.taught(model, batches, tmp_path, lambda: model.student.head.prototypes.weight)
    assert momenta == pytest.approx([cosine_between(0.5, 0.9, step / 4) for step in range(4)])
    assert kept == [True, True, False, False]


def test_a_run_resumes_with_its_teacher_and_centre_bit_for_bit(tmp_path: Path) -> None:
    batches = [persons([0, 0, 1, 1, 2, 2], seed) for seed in range(4)]
    resumes(method, batches, tmp_path, steps=(1, 3))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"centre_momentum": 1.2}, r"centre_momentum=1.2 must lie in \[0, 1\]"),
        ({"teacher_temperature": 0.0}, r"teacher_temperature=0.0 must be above 0"),
        ({"global_views": 1}, r"global_views=1 leaves a global view without another one"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        method(**settings)


def test_parts_and_batches_that_do_not_fit_are_refused() -> None:
    with pytest.raises(UserError, match=r"head.in_features=16, but SmallConvNet gives 8"):
        CION(SmallConvNet(width=8, stages=1), DINOHead(16, 9), optimizer=torch.optim.SGD)
    given = persons([0, 0, 1, 1])
    with pytest.raises(UserError, match="CION needs a whole number for each sample as label"):
        method().training_step({name: given[name] for name in ("views", "index")}, 0)
    with pytest.raises(UserError, match=r"CION needs views of which the first global_views=2"):
        method().training_step({"image": torch.zeros(2, 1, 8, 8), "label": torch.zeros(2).long()}, 0)
