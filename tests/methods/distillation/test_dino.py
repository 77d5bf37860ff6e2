"""DINO: the loss pair by pair and against lightly's, centre, schedules and the frozen last layer."""

from functools import partial
from pathlib import Path
from typing import Any

import method_runs
import pytest
import torch
from method_runs import batch, moved
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from lightspan.backbones.vision import SmallConvNet
from lightspan.core.errors import UserError
from lightspan.methods.distillation import dino
from lightspan.methods.distillation.dino import DINO
from lightspan.nn.heads.dino_head import DINOHead
from lightspan.objectives.prototypes import centred_softmax
from lightspan.optim.schedules import cosine_between

STEPS = 4
BATCHES = [batch(seed=seed) for seed in range(STEPS)]


def method(convolutional: bool = False, **settings: Any) -> DINO:
    torch.manual_seed(0)
    sides = {"img_size": 8, "patch_size": 2, "in_chans": 1, "num_classes": 0, "dynamic_img_size": True}
    transformer = VisionTransformer(embed_dim=16, depth=2, num_heads=4, **sides)
    backbone = SmallConvNet(width=8, stages=2) if convolutional else transformer
    given = {
        "momentum": 0.5, "final_momentum": 0.9, "temperature_warmup": 0.5, "freeze_prototypes": 0.0,
        "optimizer": partial(torch.optim.SGD, lr=0.05, weight_decay=0.04),
    }  # fmt: skip
    return DINO(backbone, DINOHead(16, 9, hidden=(12,), bottleneck=6), **given | settings)


def scores(network: Any, view: Tensor) -> Tensor:
    return network.head(network.backbone(view))


@pytest.mark.parametrize("convolutional", [False, True])
def test_the_loss_is_the_papers_put_together_pair_by_pair(convolutional: bool) -> None:
    model, given = moved(method(convolutional)).eval(), batch()  # evaluation: a BatchNorm would see other rows below
    centre = model.centre().clone()
    targets = [centred_softmax(scores(model.teacher.module, view), centre, 0.04) for view in given["views"][:2]]
    answers = [(scores(model.student, view) / 0.1).log_softmax(dim=1) for view in given["views"]]
    pairs = [-(targets[g] * answers[v]).sum(dim=1).mean() for g in range(2) for v in range(5) if g != v]
    loss = model.training_step(given, 0)
    torch.testing.assert_close(loss, sum(pairs) / 8)
    seen = torch.cat([scores(model.teacher.module, view) for view in given["views"][:2]])
    assert torch.equal(model.centre(), centre)
    model.centre.follow()
    torch.testing.assert_close(model.centre(), 0.9 * centre + 0.1 * seen.mean(dim=0))


def test_loss_and_centre_are_lightlys_over_two_steps() -> None:
    oracle = pytest.importorskip("lightly.loss").DINOLoss(9, teacher_temp=0.04, student_temp=0.1, center_momentum=0.9)
    model = moved(method()).eval()
    oracle.center.copy_(model.centre()[None, None])
    for given in BATCHES[:2]:
        taught, seen = model.teacher(given["views"][:2]), model.student(given["views"])
        expected = oracle([*taught], [*seen])
        torch.testing.assert_close(model.training_step(given, 0), expected)
        model.centre.follow()
        torch.testing.assert_close(model.centre(), oracle.center[0, 0])


def test_gradients_reach_the_student_alone_and_views_of_one_size_go_through_it_together() -> None:
    model, sizes = method(), list[tuple[int, ...]]()
    model.student.backbone.register_forward_pre_hook(lambda module, given: sizes.append(given[0].shape))
    model.training_step(batch(), 0).backward()
    assert all(parameter.grad is None for parameter in model.teacher.parameters())
    assert all(parameter.grad is not None for parameter in model.student.parameters())
    assert sizes == [(12, 1, 8, 8), (18, 1, 4, 4)]


def test_a_convolutional_teacher_normalises_by_its_own_batch_and_is_what_probes_read() -> None:
    model, given = method(convolutional=True), batch()
    before = [buffer.clone() for buffer in model.teacher.buffers()]
    model.training_step(given, 0)
    assert any(not torch.equal(a, b) for a, b in zip(before, model.teacher.buffers(), strict=True))
    model.eval()
    assert torch.equal(model.features(given), model.teacher.module.backbone(given["views"][0]))


def test_temperature_momentum_and_last_layer_follow_their_schedules(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, temperatures = method(freeze_prototypes=0.5), list[float]()

    def softmax(given: Tensor, centre: Tensor, temperature: float) -> Tensor:
        temperatures.append(temperature)
        return centred_softmax(given, centre, temperature)

    monkeypatch.setattr(dino, "centred_softmax", softmax)
    momenta, kept = method_runs.taught(model, BATCHES, tmp_path, lambda: model.student.head.prototypes.weight)
    assert temperatures == pytest.approx([0.04, 0.055, 0.07, 0.07])
    assert momenta == pytest.approx([cosine_between(0.5, 0.9, step / STEPS) for step in range(STEPS)])
    assert kept == [True, True, False, False]  # its decay waits as well


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"centre_momentum": 1.2}, r"centre_momentum=1.2 must lie in \[0, 1\]"),
        ({"teacher_temperature": float("nan")}, r"teacher_temperature=nan must be above 0"),
        ({"global_views": 1}, r"global_views=1 leaves a global view without another one"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        method(**settings)


def test_parts_and_batches_that_do_not_fit_are_refused() -> None:
    with pytest.raises(UserError, match=r"head.in_features=16, but SmallConvNet gives 8"):
        DINO(SmallConvNet(width=8, stages=1), DINOHead(16, 9), optimizer=torch.optim.SGD)
    with pytest.raises(UserError, match=r"DINO needs views of which the first global_views=2 .* no kind"):
        method().training_step({"image": torch.zeros(2, 1, 8, 8)}, 0)  # type: ignore[arg-type]


def test_the_sentinel_reads_the_teachers_bottleneck_and_its_centred_answers() -> None:
    model, image = moved(method()).eval(), batch()["views"][0]
    taught = scores(model.teacher.module, image)
    torch.testing.assert_close(model.teacher.module.head.prototypes(model.embeddings({"image": image})), taught)
    torch.testing.assert_close(model.assignments({"image": image}), centred_softmax(taught, model.centre(), 0.07))
