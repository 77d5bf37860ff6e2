"""FST: steps that are undone, the teacher that they leave, plain self-training where they change nothing, mixtures."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Trainer
from method_runs import fit
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightspan.backbones.dense import UNet
from lightspan.cli.planning.planned_step import make_plan
from lightspan.cli.planning.step_memory import faked
from lightspan.core.collate import resized
from lightspan.core.errors import UserError
from lightspan.datamodules.rendered.scene_data import TwoDomains
from lightspan.datamodules.rendered.scenes import SceneSpace
from lightspan.methods.distillation import fst
from lightspan.methods.distillation.fst import FST
from lightspan.objectives.pseudo_labels import pixel_cross_entropy, pixel_labels
from lightspan.optim.virtual import copies, copy_into, tensors_of

SGD = partial(torch.optim.SGD, lr=0.1)
ADAM = partial(torch.optim.Adam, lr=0.01)


def method(optimizer: Any = SGD, **settings: Any) -> FST:
    torch.manual_seed(0)
    settings = {"momentum": 0.9, "momentum_warmup": False, "confidence": 0.3, "virtual_steps": 2} | settings
    return FST(UNet(1, width=4, levels=2), 3, **settings, optimizer=optimizer)


def batch(seed: int = 0, rows: int = 4) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    image, target = (torch.randn(rows, 1, 8, 8, generator=generator) for _ in range(2))
    index = torch.arange(rows) + 10 * seed
    return {"image": image, "target_image": target, "semantic": (image[:, 0] > 0).long() + 1, "index": index}


BATCHES = [batch(seed) for seed in range(3)]


def state(model: nn.Module) -> list[Tensor]:
    return [tensor.detach().clone() for tensor in model.state_dict().values()]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(torch.equal(*pair) for pair in zip(one, other, strict=True))


@pytest.mark.parametrize("form", ["deep", "wide"])
@pytest.mark.parametrize("optimizer", [partial(SGD, momentum=0.9), ADAM])
def test_virtual_steps_leave_student_teacher_and_optimiser_as_they_were(
    form: Any, optimizer: Any, tmp_path: Path
) -> None:
    model, looked = method(optimizer, form=form), []
    look_ahead = model.look_ahead

    def watched(given: Any) -> list[Tensor]:
        def moments() -> list[Tensor]:
            (optimiser,) = model.trainer.optimizers
            of = optimiser.state_dict()["state"].values()
            return [each.clone() for one in of for each in one.values() if isinstance(each, Tensor)]

        before = state(model), moments()
        ahead = look_ahead(given)
        assert same(before[0], state(model))
        assert same(before[1], moments())
        looked.append(not same(ahead, copies(model.teacher.module)))
        return ahead

    model.look_ahead = watched  # type: ignore[method-assign]
    fit(model, BATCHES, tmp_path)
    assert looked == [True] * 3


@pytest.mark.parametrize("form", ["deep", "wide"])
def test_with_a_frozen_teacher_it_is_plain_self_training_bit_for_bit(
    form: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    mixtures = fst.pasted_pixels
    # The mixture of the real step, whatever the number of virtual ones.
    monkeypatch.setattr(fst, "pasted_pixels", lambda *given: mixtures(*given[:3], 0, 0))
    plain = method(virtual_steps=0, momentum=1.0)
    expected = fit(plain, BATCHES, tmp_path), state(plain)
    future = method(virtual_steps=3, momentum=1.0, form=form)
    assert fit(future, BATCHES, tmp_path) == expected[0]
    assert same(state(future), expected[1])
    moving = method(virtual_steps=3, momentum=0.5, form=form)
    assert fit(moving, BATCHES, tmp_path) != expected[0]


class Quadratic(FST):
    """L = |w - target|^2 / 2 of the head's bias, whatever the teacher says; notes the teacher's bias in each step."""

    def losses(self, batch: Any, teacher: list[Tensor], number: int) -> dict[str, Tensor]:
        self.__dict__.setdefault("seen", []).append(teacher[-1].clone())
        return {"train/loss": (self.student[1].bias - torch.tensor([1.0, 2.0, 3.0])).square().sum() / 2}


@pytest.mark.parametrize("steps", [1, 3])
def test_of_a_quadratic_loss_the_teacher_is_the_closed_form(steps: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    settings: dict[str, Any] = {"virtual_steps": steps, "momentum": 0.9, "momentum_warmup": False, "optimizer": SGD}
    model, best = Quadratic(UNet(1, 4, 1), 3, **settings), torch.tensor([1.0, 2.0, 3.0])
    start = model.student[1].bias.detach().clone()
    fit(model, [batch()], tmp_path)
    teacher = start
    for k in range(1, steps + 1):  # theta~_k = best + 0.9^k (theta - best)
        teacher = 0.9 * teacher + 0.1 * (best + 0.9**k * (start - best))
    torch.testing.assert_close(model.seen[-1], teacher)  # of the real step
    student = best + 0.9 * (start - best)
    torch.testing.assert_close(model.student[1].bias.detach(), student)
    torch.testing.assert_close(model.teacher.module[1].bias, 0.9 * teacher + 0.1 * student)


def test_one_wide_step_is_one_deep_step(tmp_path: Path) -> None:
    ends = []
    for form in ("deep", "wide"):
        model = method(ADAM, form=form, virtual_steps=1)
        fit(model, BATCHES, tmp_path)
        ends.append(state(model))
    assert same(*ends)


def test_a_soup_of_equal_wide_steps_is_one_of_them(tmp_path: Path, monkeypatch: Any) -> None:
    mixtures, ends = fst.pasted_pixels, []
    monkeypatch.setattr(fst, "pasted_pixels", lambda *given: mixtures(*given[:3], 0, 0))  # one for all
    for steps in (1, 3):
        model = method(ADAM, form="wide", virtual_steps=steps)
        fit(model, BATCHES, tmp_path)
        ends.append(state(model))
    assert same(*ends)


def test_only_the_first_micro_batch_of_a_step_looks_ahead(tmp_path: Path) -> None:
    model, looked = method(), list[Tensor]()
    look_ahead = model.look_ahead
    model.look_ahead = lambda given: (looked.append(given["index"]), look_ahead(given))[1]  # type: ignore[method-assign]
    fit(model, [*BATCHES, batch(3)], tmp_path, accumulate_grad_batches=2)
    assert [int(index[0]) for index in looked] == [0, 20]


def test_without_virtual_steps_it_is_the_mean_teacher(tmp_path: Path) -> None:
    model = method(virtual_steps=0, momentum=0.75)
    before = [p.clone() for p in model.teacher.module.parameters()]
    fit(model, [batch()], tmp_path)
    for old, new, student in zip(before, model.teacher.module.parameters(), model.student.parameters(), strict=True):
        torch.testing.assert_close(new, 0.75 * old + 0.25 * student)


def test_the_first_step_copies_the_student_and_later_ones_reach_the_momentum(tmp_path: Path) -> None:
    model, momenta = method(momentum=0.6, momentum_warmup=True, virtual_steps=1), []
    follow = model.teacher.follow
    model.teacher.follow = lambda student, m: (momenta.append(m), follow(student, m))  # type: ignore[method-assign]
    fit(model, [*BATCHES, batch(3)], tmp_path)
    assert momenta == pytest.approx([0, 0, 0.5, 0.5, 0.6, 0.6, 0.6, 0.6])


def test_kept_moments_go_on_from_where_virtual_steps_leave_them(tmp_path: Path) -> None:
    counts = []
    for keep in (False, True):
        model = method(ADAM, keep_moments=keep)
        steps: list[float] = []
        look_ahead = model.look_ahead

        def watched(given: Any, model: FST = model, steps: list[float] = steps, look: Any = look_ahead) -> list[Tensor]:
            ahead = look(given)
            of = [*model.trainer.optimizers[0].state_dict()["state"].values()]
            steps.append(float(of[0]["step"]) if of else 0.0)
            return ahead

        model.look_ahead = watched  # type: ignore[method-assign]
        fit(model, BATCHES, tmp_path)
        counts.append(steps)
    assert counts == [[0, 1, 2], [2, 5, 8]]


def test_the_loss_is_that_of_the_source_and_of_mixtures_with_the_teachers_answers(tmp_path: Path) -> None:
    model, given = method(confidence=0.5), batch()
    teacher = method(confidence=0.5).teacher.module
    figures = model.losses(given, copies(teacher), 2)
    with torch.no_grad():
        answers = teacher(given["target_image"]).softmax(dim=1)
    pasted = fst.pasted_pixels(given["semantic"], 3, given["index"], 0, 2)
    sure = (answers.amax(dim=1) > 0.5).float().mean(dim=(1, 2))
    terms = []
    for row in range(4):
        mixed = torch.where(pasted[row], given["image"][row], given["target_image"][row])
        label = torch.where(pasted[row], given["semantic"][row], answers[row].argmax(dim=0))
        loss = F.cross_entropy(model(mixed[None]), label[None], reduction="none")[0]
        terms.append(torch.where(pasted[row], loss, sure[row] * loss).mean())
    torch.testing.assert_close(figures["train/mixed_nats"], torch.stack(terms).mean())
    torch.testing.assert_close(figures["train/source_nats"], F.cross_entropy(model(given["image"]), given["semantic"]))
    torch.testing.assert_close(figures["train/loss"], figures["train/mixed_nats"] + figures["train/source_nats"])
    torch.testing.assert_close(figures["train/sure"], sure.mean())
    assert "train/pseudo_accuracy" not in figures
    true = answers.argmax(dim=1).clone()
    true[:, :2] = (true[:, :2] + 1) % 3  # a quarter of the rows of 8
    told = model.losses(given | {"target_semantic": true}, copies(teacher), 2)
    assert float(told["train/pseudo_accuracy"]) == 0.75


def test_each_virtual_step_and_the_real_one_have_mixtures_of_their_own_and_so_has_each_step(
    tmp_path: Path, monkeypatch: Any
) -> None:
    draws, mixtures = list[int](), fst.pasted_pixels
    monkeypatch.setattr(fst, "pasted_pixels", lambda *given: (draws.append(given[4]), mixtures(*given))[1])
    fit(method(virtual_steps=2), BATCHES, tmp_path)
    assert draws == [*range(9)]


class Normed(nn.Module):
    """With statistics of batches, and noise."""

    num_features = 4

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Dropout(0.5))

    def forward(self, image: Tensor) -> Tensor:
        return self.layers(image)


def test_the_teacher_answers_in_evaluation_mode(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, modes = FST(Normed(), 3, virtual_steps=1, optimizer=SGD), set[bool]()
    for part in model.teacher.module.modules():
        part.register_forward_pre_hook(lambda module, args: modes.add(module.training))
    fit(model, BATCHES, tmp_path)
    assert modes == {False}


def test_features_are_the_mean_of_the_backbones_maps() -> None:
    model, given = method(), batch()
    torch.testing.assert_close(model.features(given), model.backbone(given["image"]).mean(dim=(2, 3)))


def test_pixels_without_a_class_and_images_without_a_sure_answer_add_nothing() -> None:
    logits = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    label = torch.zeros(2, 4, 4, dtype=torch.int64)
    label[0] = -1
    expected = F.cross_entropy(logits[1:], label[1:]) / 2
    torch.testing.assert_close(pixel_cross_entropy(logits, label), expected)
    assert pixel_cross_entropy(logits, label, torch.zeros(2, 1, 1)) == 0
    assert pixel_cross_entropy(logits[:0], label[:0]) == 0
    even = pixel_labels(torch.zeros(2, 3, 4, 4, dtype=torch.bfloat16), 0.968)
    assert even.sure_B.tolist() == [0, 0]
    assert even.sure_B.dtype == torch.float32


def test_a_plan_needs_no_numbers(tmp_path: Path) -> None:
    """Its second step has an optimiser, with which no virtual step is taken."""
    data = TwoDomains(SceneSpace(8, 8, fewest=1, most=1), size=8, val_size=4, test_size=4, batch_size=4)
    model = FST(UNet(3, width=4, levels=2), data.num_classes, optimizer=ADAM)
    trainer = Trainer(default_root_dir=tmp_path, accelerator="cpu", logger=False, enable_model_summary=False)
    plan = make_plan(trainer, model, data, 2**32)
    assert not plan.notes


def test_a_step_is_tried_on_tensors_without_numbers_and_then_on_real_ones() -> None:
    model, given, mode = method(), batch(), FakeTensorMode()
    with faked(model, mode), mode:
        model.training_step(resized(given, 3), 0)
    assert model.training_step(given, 0).isfinite()
    copy_into(tensors_of(model.teacher.module), [torch.zeros_like(t) for t in tensors_of(model.teacher.module)])
    teacher = copies(model.teacher.module)  # of now, as in the next step
    torch.testing.assert_close(model.training_step(given, 0), model.losses(given, teacher, 2)["train/loss"])


def test_pixels_without_a_class_are_not_judged(tmp_path: Path) -> None:
    model = method()
    given = batch() | {"target_semantic": torch.zeros(4, 8, 8, dtype=torch.int64)}
    with torch.no_grad():
        teacher, answer = copies(model.teacher.module), model(given["target_image"]).argmax(dim=1)
    right = torch.where(torch.arange(8) < 4, answer, (answer + 1) % 3)  # half of each row
    losses = {}
    for name, target in (("all", right), ("left", right.clone()), ("none", torch.full_like(right, -1))):
        if name == "left":
            target[..., 4:] = -1
        losses[name] = float(model.losses(given | {"target_semantic": target}, teacher, 0)["train/pseudo_accuracy"])
    assert losses == {"all": 0.5, "left": 1.0, "none": 0.0}


def test_validation_has_the_mean_iou_and_the_accuracy_of_pixels_that_have_a_class(tmp_path: Path) -> None:
    class Told(FST):
        def forward(self, image_BCHW: Tensor) -> Tensor:
            return F.one_hot(image_BCHW[:, 0].long(), 4).permute(0, 3, 1, 2).float()

    model = Told(UNet(1, width=4, levels=2), 4, optimizer=SGD)
    answer = torch.tensor([[[0, 0, 1, 1]], [[0, 0, 1, 2]], [[1, 1, 1, 1]]])
    right = torch.tensor([[[0, 1, 1, 1]], [[0, 0, 1, -1]], [[-1, -1, -1, -1]]])
    batches = [{"target_image": answer[rows, None].float(), "target_semantic": right[rows]} for rows in ([0], [1, 2])]
    trainer = Trainer(
        default_root_dir=tmp_path, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    (found,) = trainer.validate(model, DataLoader(batches, batch_size=None), verbose=False)
    # Of class 0 three of four, of class 1 three of four; 2 is an answer to no question, and 3 nowhere.
    assert found == {"val/pixel_accuracy": pytest.approx(6 / 7), "val/mean_iou": pytest.approx(0.75)}
    assert not [name for name in model.state_dict() if name.startswith("scores")]


def test_bfloat16_restores_weights_too_and_its_virtual_steps_see_their_own_weights(tmp_path: Path) -> None:
    """Autocast keeps copies of weights in half precision, which steps in place would leave behind."""
    seen: list[float] = []
    model = method(virtual_steps=3)
    losses = model.losses

    def watched(*given: Any) -> dict[str, Tensor]:
        figures = losses(*given)
        seen.append(float(figures["train/source_nats"].detach()))
        return figures

    model.losses = watched  # type: ignore[method-assign]
    fit(model, [batch()], tmp_path, precision="bf16-mixed")
    assert seen[3] == seen[0]
    assert len({*seen}) == 3


def test_what_it_cannot_train_is_refused() -> None:
    with pytest.raises(UserError, match="virtual_steps=-1 must be at least 0"):
        method(virtual_steps=-1)
    with pytest.raises(UserError, match="num_classes=1 must"):
        FST(UNet(1, 4, 1), 1, optimizer=SGD)
    with pytest.raises(UserError, match=r"confidence=2 must lie in \[0, 1\]"):
        method(confidence=2)
    with pytest.raises(UserError, match="Identity has no num_features"):
        FST(nn.Identity(), 3, optimizer=SGD)
    for lacking in ("semantic", "target_image", "index"):
        given = batch()
        del given[lacking]
        with pytest.raises(UserError, match=f"FST needs {lacking} in a batch, and this one holds"):
            method().training_step(given, 0)
    with pytest.raises(UserError, match=r"a whole number for each pixel .* semantic torch.int64 \[4, 8\]"):
        method().training_step(batch() | {"semantic": torch.zeros(4, 8, dtype=torch.int64)}, 0)


def test_masks_of_small_whole_numbers_train_and_a_class_that_it_does_not_have_is_refused(tmp_path: Path) -> None:
    given, plain, bytes_ = batch(), method(), method()
    given["semantic"] = given["semantic"].clamp_min(0)
    fit(plain, [given], tmp_path)
    fit(bytes_, [given | {"semantic": given["semantic"].to(torch.uint8)}], tmp_path)
    assert same(state(plain), state(bytes_))
    ignored = given["semantic"].clone()
    ignored[0, 0, 0] = 255
    with pytest.raises(UserError, match=r"semantic has the class 255, and FST num_classes=\d knows .* give -1"):
        fit(method(), [given | {"semantic": ignored}], tmp_path)


def test_weights_in_half_precision_in_which_the_teacher_would_stand_still_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"the teacher's weights are torch\.bfloat16, where steps"):
        fit(method(), [batch()], tmp_path, precision="bf16-true")


@pytest.mark.parametrize("network", [nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten()), nn.Conv2d(1, 4, 3, stride=2)])
def test_a_backbone_without_maps_of_the_images_size_is_refused(network: Any, tmp_path: Path) -> None:
    network.num_features = 4
    with pytest.raises(UserError, match=r"each pixel is classified, and of images .* the backbone .* gives"):
        fit(FST(network, 3, optimizer=SGD), [batch()], tmp_path)
