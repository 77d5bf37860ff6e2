"""SD-FPT: its two terms, the teacher that nothing moves, plain further pre-training without it, and rounds of it."""

from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from method_runs import fit
from torch import Tensor, nn

from lightspan.backbones.vit import vit
from lightspan.core.errors import UserError
from lightspan.methods.distillation.sd_fpt import SDFPT, hidden_distance
from lightspan.methods.masked.mae import MAE
from lightspan.nn.decoders.mask_decoder import MaskDecoder


def encoder(width: int = 16, **settings: Any) -> nn.Module:
    return vit(width, 2, 2, img_size=12, patch_size=3, in_chans=1, **settings)


def parts() -> tuple[nn.Module, MaskDecoder, nn.Module]:
    """Backbone, decoder and a teacher that is not the backbone."""
    torch.manual_seed(0)
    return encoder(), MaskDecoder(16, 9, width=8, depth=1, heads=2), encoder()


def method(lr: float = 0.1, **settings: Any) -> SDFPT:
    return SDFPT(*parts(), **settings, optimizer=partial(torch.optim.SGD, lr=lr, momentum=0.9))


def batch(seed: int = 1, rows: int = 6) -> dict[str, Any]:
    image = torch.randn(rows, 1, 12, 12, generator=torch.Generator().manual_seed(seed))
    return {"image": image, "index": torch.arange(rows) + 10 * seed}


def loss_of(model: Any, given: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    logged: dict[str, Tensor] = {}
    model.log_training = logged.update
    return model.training_step(given, 0), logged


def test_the_loss_is_maes_and_the_squared_distance_of_whole_images() -> None:
    model, given = method(distillation=2.0), batch()
    backbone, decoder, teacher = parts()
    plain = MAE(backbone, decoder, optimizer=torch.optim.SGD)
    reconstruction, _ = loss_of(plain, given)
    apart = (backbone(given["image"]) - teacher.eval()(given["image"])).detach()
    distance = sum(float((row**2).sum()) for row in apart) / 6
    loss, logged = loss_of(model, given)
    torch.testing.assert_close(logged["train/reconstruction"], reconstruction, rtol=1e-6, atol=0)
    assert float(logged["train/distance"]) == pytest.approx(distance, rel=1e-5)
    torch.testing.assert_close(loss, reconstruction + 2 * logged["train/distance"])


def test_the_teacher_gets_no_gradient_and_no_step_moves_it(tmp_path: Path) -> None:
    model = method()
    before = {name: tensor.clone() for name, tensor in model.teacher.state_dict().items()}
    fit(model, [batch(seed) for seed in range(3)], tmp_path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.teacher.state_dict().items())
    assert all(parameter.grad is None for parameter in model.teacher.parameters())
    assert not any(part.training for part in model.teacher.modules())


def test_a_teacher_with_the_students_weights_pulls_nowhere() -> None:
    model, image = method().eval(), batch()["image"]
    model.teacher.module.load_state_dict(model.backbone.state_dict())
    distance = hidden_distance(model.backbone(image), model.teacher(image))
    distance.backward()
    assert distance == 0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_the_student_sees_whole_images_in_training_mode_and_the_teacher_in_evaluation_mode() -> None:
    model, seen = method(), list[tuple[str, bool]]()
    for name, network in (("student", model.backbone), ("teacher", model.teacher.module)):
        network.register_forward_hook(lambda module, args, x, name=name: seen.append((name, module.training)))
    model.training_step(batch(), 0)
    assert seen == [("student", True), ("teacher", False)]
    student, teacher = (torch.randn(3, 4, requires_grad=True) for _ in range(2))
    hidden_distance(student, teacher).backward()
    assert student.grad is not None
    assert teacher.grad is None


def test_without_weight_it_is_plain_further_pre_training_bit_for_bit(tmp_path: Path) -> None:
    student, plain = (
        method(distillation=0.0),
        MAE(*parts()[:2], optimizer=partial(torch.optim.SGD, lr=0.1, momentum=0.9)),
    )
    batches = [batch(seed) for seed in range(3)]
    assert fit(student, batches, tmp_path) == fit(plain, batches, tmp_path)
    found = student.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in plain.state_dict().items())


def test_training_brings_the_student_to_its_teacher(tmp_path: Path) -> None:
    held, free = method(lr=0.01), method(lr=0.01, distillation=0.0)
    for model in (held, free):
        fit(model, [batch()] * 20, tmp_path)
    image = batch()["image"]
    near, far = (float(hidden_distance(model.backbone(image), model.teacher(image))) for model in (held, free))
    assert near < 0.5 * far


def test_each_round_of_a_linear_network_ends_no_farther_from_where_it_started() -> None:
    """min_w hidden_distance(X w, t) + c |w - w_0|^2, where t are the answers of the round before, the data's at first:
    w - w_0 shrinks by (X'X / n + c)^-1 X'X / n in each round after the first.
    """
    torch.manual_seed(0)
    x, start, ridge = torch.randn(20, 5, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64), 0.3
    target, gram, moved = torch.randn(20, 3, dtype=torch.float64), x.T @ x / 20, []
    for _ in range(5):
        best = start + torch.linalg.solve(
            gram + ridge * torch.eye(5, dtype=torch.float64), x.T @ (target - x @ start) / 20
        )
        w = best.clone().requires_grad_()
        (hidden_distance(x @ w, target) + ridge * (w - start).square().sum()).backward()
        assert w.grad is not None
        assert float(w.grad.abs().max()) < 1e-12
        moved.append(float((best - start).norm()))
        target = x @ best
    assert all(later < earlier for earlier, later in pairwise(moved))


def test_a_batch_of_one_and_bfloat16_are_ordinary(tmp_path: Path) -> None:
    losses = fit(method(), [batch(rows=1)] * 2, tmp_path, precision="bf16-mixed")
    assert torch.tensor(losses).isfinite().all()
    assert hidden_distance(torch.ones(2, 3).bfloat16(), torch.zeros(2, 3)) == 3
    assert hidden_distance(torch.zeros(0, 3), torch.zeros(0, 3)) == 0


def test_parts_that_do_not_fit_are_refused() -> None:
    backbone, decoder, _ = parts()
    with pytest.raises(UserError, match="the teacher gives 12 features and the backbone 16; both must be the same net"):
        SDFPT(backbone, decoder, encoder(12), optimizer=torch.optim.SGD)
    with pytest.raises(UserError, match="the teacher shares weights with the backbone"):
        SDFPT(backbone, decoder, backbone, optimizer=torch.optim.SGD)
    with pytest.raises(UserError, match="distillation=-1 must be at least 0"):
        method(distillation=-1)
    with pytest.raises(UserError, match="SDFPT needs 1 view of each image"):
        method().training_step({"views": [batch()["image"]] * 2, "index": torch.arange(6)}, 0)
