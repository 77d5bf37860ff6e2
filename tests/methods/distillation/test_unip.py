"""UNIP: its one loss by hand, what learns and what cannot, a teacher that nothing moves, and maps that must fit."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from method_runs import fit
from torch import Tensor, nn

from lightspan.backbones.vision import SmallConvNet
from lightspan.backbones.vit import TokenViT, vit
from lightspan.core.errors import UserError
from lightspan.methods.distillation.unip import UNIP
from lightspan.nn.sequences.attention_maps import attention_logits, attention_of
from lightspan.objectives.distillation import attention_divergence

TEACHER = (32, 3, 4)


def network(width: int, depth: int, heads: int, **settings: Any) -> TokenViT:
    return vit(width, depth, heads, **{"img_size": 8, "patch_size": 2, "in_chans": 1} | settings)


def method(layer: int = 1, lr: float = 0.1, **settings: Any) -> UNIP:
    torch.manual_seed(0)
    student, teacher = network(16, 2, 2, last_heads=4, **settings), network(*TEACHER)
    return UNIP(student, teacher, layer, optimizer=partial(torch.optim.SGD, lr=lr, momentum=0.9))


def batch(seed: int = 1, rows: int = 6) -> dict[str, Any]:
    image = torch.randn(rows, 1, 8, 8, generator=torch.Generator().manual_seed(seed))
    return {"image": image, "index": torch.arange(rows) + 10 * seed}


def loss_of(model: Any, given: dict[str, Any]) -> Tensor:
    model.log_training = lambda figures: None
    return model.training_step(given, 0)


def test_the_loss_is_the_mean_divergence_of_each_row_of_attention() -> None:
    model, image = method(), batch()["image"]
    torch.manual_seed(0)
    network(16, 2, 2)  # the student's draws
    teacher = network(*TEACHER).eval()
    (taught,) = attention_logits(teacher, lambda: teacher(image), [1])
    (seen,) = attention_logits(model.backbone, lambda: model.backbone(image))
    t, s = taught.double().softmax(dim=3), seen.double().softmax(dim=3)
    expected = (t * (t.log() - s.log())).sum() / (6 * 4 * 17)
    torch.testing.assert_close(loss_of(model, batch()), expected.float(), rtol=1e-5, atol=0)


def test_equal_maps_have_no_loss_and_pull_nowhere() -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 5, 5, dtype=torch.float64, requires_grad=True)
    loss = attention_divergence(logits, logits.detach() + torch.randn(2, 3, 5, 1))  # a row's constant changes nothing
    loss.backward()
    assert abs(float(loss)) < 1e-12
    assert logits.grad is not None
    assert float(logits.grad.abs().max()) < 1e-12


def test_a_student_that_is_the_teacher_has_loss_0_and_gradients_0() -> None:
    torch.manual_seed(0)
    teacher = network(16, 2, 4)
    model = UNIP(network(16, 2, 4), teacher, -1, optimizer=torch.optim.SGD)
    model.backbone.load_state_dict(teacher.state_dict())
    loss = loss_of(model, batch())
    loss.backward()
    assert float(loss) < 1e-6
    assert all(p.grad is None or float(p.grad.abs().max()) < 1e-6 for p in model.parameters())


def test_the_divergence_has_the_gradient_that_it_should() -> None:
    torch.manual_seed(0)
    student, teacher = (torch.randn(1, 2, 3, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    torch.autograd.gradcheck(lambda s: attention_divergence(s, teacher), student)
    attention_divergence(student, teacher).backward()
    assert teacher.grad is None


def test_what_lies_behind_the_last_attention_stays_where_it_began_and_the_rest_moves(tmp_path: Path) -> None:
    model = method()
    before = {name: tensor.clone() for name, tensor in model.backbone.state_dict().items()}
    fit(model, [batch(seed) for seed in range(3)], tmp_path)
    kept = {name for name, tensor in model.backbone.state_dict().items() if torch.equal(tensor, before[name])}
    last = ("attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
    behind = {
        f"network.{part}.{of}" for part in ("norm", *(f"blocks.1.{one}" for one in last)) for of in ("weight", "bias")
    }
    assert kept == behind | {"network.pos_embed"}
    query, key, value = model.backbone.state_dict()["network.blocks.1.attn.qkv.weight"].chunk(3)
    assert torch.equal(value, before["network.blocks.1.attn.qkv.weight"][32:])
    assert not torch.equal(torch.cat([query, key]), before["network.blocks.1.attn.qkv.weight"][:32])


def test_the_teacher_ends_with_its_layer_is_in_the_checkpoint_and_nothing_moves_it(tmp_path: Path) -> None:
    model = method()
    before = {name: tensor.clone() for name, tensor in model.teacher.state_dict().items()}
    assert {int(name.split(".")[4]) for name in before if ".blocks." in name} == {0, 1}
    fit(model, [batch(seed) for seed in range(3)], tmp_path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.teacher.state_dict().items())
    assert {f"teacher.{name}" for name in before} <= model.state_dict().keys()
    assert not any(part.training for part in model.teacher.modules())


def test_training_brings_the_students_map_to_the_teachers(tmp_path: Path) -> None:
    model = method(lr=1.0)
    losses = fit(model, [batch()] * 40, tmp_path)
    assert losses[-1] < 0.5 * losses[0]


def test_features_are_the_patches_before_the_layer_whose_output_learns_nothing() -> None:
    model, given = method().eval(), batch()
    (tokens,) = model.token_features(given, [0])
    torch.testing.assert_close(model.features(given), tokens.tokens_BTD.mean(dim=1))
    assert torch.equal(model.features({"views": [given["image"]]}), model.features(given))
    with torch.no_grad():
        attention_of(model.backbone, -1).proj.weight.add_(1)
    torch.testing.assert_close(model.features(given), tokens.tokens_BTD.mean(dim=1))


def test_a_batch_of_one_a_constant_image_and_bfloat16_are_ordinary(tmp_path: Path) -> None:
    constant = {"image": torch.zeros(2, 1, 8, 8), "index": torch.arange(2)}
    losses = fit(method(), [batch(rows=1), constant, batch()], tmp_path, precision="bf16-mixed")
    assert torch.tensor(losses).isfinite().all()
    assert attention_divergence(torch.zeros(0, 2, 3, 3), torch.zeros(0, 2, 3, 3)) == 0


def test_networks_whose_maps_do_not_fit_are_refused() -> None:
    def make(student: nn.Module, teacher: nn.Module | None = None, layer: int = 1) -> UNIP:
        return UNIP(student, teacher or network(*TEACHER), layer, optimizer=torch.optim.SGD)

    with pytest.raises(UserError, match=r"last layer has 2 heads and layer 1 of the teacher 4; .* set last_heads=4"):
        make(network(16, 2, 2))
    for other in ({"patch_size": 4}, {"in_chans": 3}, {"class_token": False, "pool": "avg"}, {"registers": 1}):
        with pytest.raises(UserError, match=r"the teacher \(2, 2, 1\) and 1; both must be equal, so that their maps"):
            make(network(16, 2, 4, **other))
    with pytest.raises(UserError, match="layer 3 is outside the 3 layers of TokenViT"):
        make(network(16, 2, 4), layer=3)
    with pytest.raises(UserError, match="the backbone has one block, before which nothing is trained; give it depth=2"):
        make(network(16, 1, 4))
    with pytest.raises(UserError, match="the teacher shares weights with the backbone"):
        make(shared := network(16, 2, 4), shared)
    with pytest.raises(UserError, match=r"and teacher is SmallConvNet; use lightspan.backbones.vit.vit"):
        make(network(16, 2, 4), SmallConvNet(in_chans=1, width=4, stages=2))
    with pytest.raises(UserError, match=r"img_size=8 of patch_size=3"):
        network(16, 2, 4, patch_size=3)
    with pytest.raises(UserError, match=r"student \[1, 2, 3, 3\] and of the teacher \[1, 4, 3, 3\] must have as many"):
        attention_divergence(torch.zeros(1, 2, 3, 3), torch.zeros(1, 4, 3, 3))
    with pytest.raises(UserError, match="UNIP needs 1 view of each image"):
        method().training_step({"views": [batch()["image"]] * 2, "index": torch.arange(6)}, 0)
