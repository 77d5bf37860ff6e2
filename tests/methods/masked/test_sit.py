"""SiT: both losses by hand, what has no say in them, the teacher, and what the corruption covers."""

import math
from functools import partial
from pathlib import Path
from typing import Any

import method_runs
import pytest
import torch
from method_runs import batch, fit, moved
from torch import Tensor, nn
from torch.nn import functional as F

from lightspan.backbones.vision import SmallConvNet
from lightspan.backbones.vit import vit
from lightspan.core.errors import UserError
from lightspan.methods.masked.sit import SiT
from lightspan.nn.heads.mlp_head import MLPHead
from lightspan.nn.heads.projector import Projector
from lightspan.nn.masking.block_masks import RectangleMasks
from lightspan.nn.masking.corruption import GroupCorruption
from lightspan.nn.sequences.patches import unpatchify
from lightspan.nn.sequences.token_backbone import ClassAndMean
from lightspan.objectives.info_nce import crossed_info_nce
from lightspan.objectives.masked import hidden_absolute_error
from lightspan.optim.schedules import cosine_between

BATCHES = [batch(seed=seed, locals_=0) for seed in range(4)]


def aligned(share: float = 0.5, align: int = 2, alien: float = 0.5) -> GroupCorruption:
    return GroupCorruption(RectangleMasks(share, longest=0.5, align=align), alien, "zeros")


def method(projector: nn.Module | None = None, **settings: Any) -> SiT:
    torch.manual_seed(0)
    backbone = vit(width=16, depth=2, heads=4, img_size=8, patch_size=2, in_chans=1)
    given = {"momentum": 0.5, "corruption": aligned(), "optimizer": partial(torch.optim.SGD, lr=0.05)}
    return SiT(backbone, projector or nn.Linear(16, 8), **given | settings)


def views(model: SiT, given: dict[str, Any]) -> list[tuple[Tensor, Tensor]]:
    return [model.corrupted(view, given["index"], number) for number, view in enumerate(given["views"])]


def losses_by_hand(model: SiT, given: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """L_con and L_rec, pixel by pixel."""
    student = [model.student.backbone.tokens(seen) for seen, _ in views(model, given)]
    q1, q2 = (F.normalize(model.student.projector(tokens[:, 0]), dim=1) for tokens in student)
    teacher = model.teacher.module
    k1, k2 = (F.normalize(teacher.projector(teacher.backbone.tokens(view)[:, 0]), dim=1) for view in given["views"])
    own = torch.arange(len(q1))
    contrast = 0.4 * (F.cross_entropy(q1 @ k2.T / 0.2, own) + F.cross_entropy(q2 @ k1.T / 0.2, own))
    errors = []
    for tokens, view, (_, hidden) in zip(student, given["views"], views(model, given), strict=True):
        guess = unpatchify(model.decoder(tokens[:, 1:]), (2, 2), (4, 4))
        errors.append((guess - view).abs()[hidden.expand_as(view)])
    return contrast, torch.cat(errors).mean()


@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.0, 1.0), (1.0, 5.0)])
def test_the_loss_is_both_by_hand(weights: tuple[float, float]) -> None:
    model, given = moved(method(contrast=weights[0], reconstruction=weights[1])), batch(locals_=0)
    contrast, reconstruction = losses_by_hand(model, given)
    expected = weights[0] * contrast + weights[1] * reconstruction
    torch.testing.assert_close(model.training_step(given, 0), expected)


def test_pixels_that_are_not_hidden_have_no_say_in_the_reconstruction_and_hidden_ones_the_same_say() -> None:
    guess, target = torch.randn(2, 3, 1, 8, 8).double()
    hidden = torch.zeros(3, 1, 8, 8, dtype=torch.bool)
    hidden[0, :, :2, :4], hidden[1, :, 3:] = True, True  # none of the last
    loss = hidden_absolute_error(guess, target, hidden)
    assert torch.equal(hidden_absolute_error(guess, torch.where(hidden, target, 99.0), hidden), loss)
    assert float(loss) == pytest.approx(float((guess - target).abs()[hidden].mean()))
    assert float(hidden_absolute_error(guess, guess + hidden, hidden)) == pytest.approx(1.0)


@pytest.mark.parametrize(("count", "tau"), [(1, 0.2), (2, 0.2), (6, 0.5)])
def test_the_contrast_of_orthonormal_pairs_is_that_of_the_formula_each_way(count: int, tau: float) -> None:
    rows = torch.eye(6, dtype=torch.float64)[:count]
    one_way = 2 * tau * (math.log(math.exp(1 / tau) + count - 1) - 1 / tau)
    assert float(crossed_info_nce([rows, rows], [rows, rows], tau)) == pytest.approx(2 * one_way)


def test_the_contrast_does_not_change_when_the_views_swap_and_each_query_looks_at_the_other_view() -> None:
    q1, q2, k1, k2 = torch.randn(4, 5, 3, generator=torch.Generator().manual_seed(0)).double()
    loss = crossed_info_nce([q1, q2], [k1, k2], 0.3)
    torch.testing.assert_close(crossed_info_nce([q2, q1], [k2, k1], 0.3), loss)
    assert not torch.isclose(crossed_info_nce([q1, q2], [k2, k1], 0.3), loss)


def test_the_student_sees_corrupted_views_the_teacher_clean_ones_and_gets_no_gradient() -> None:
    model, given, shown = method(), batch(locals_=0), list[Tensor]()
    for network in (model.student, model.teacher.module):
        network.register_forward_pre_hook(lambda module, args: shown.append(args[0]))
    model.training_step(given, 0).backward()
    assert torch.equal(shown[0], torch.cat([seen for seen, _ in views(model, given)]))
    assert torch.equal(shown[1], torch.cat(given["views"]))
    assert not torch.equal(shown[0], shown[1])
    assert all(parameter.grad is None for parameter in model.teacher.parameters())
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)


def test_the_teacher_is_the_moving_average_of_the_student_with_a_rising_momentum(tmp_path: Path) -> None:
    momenta = method_runs.averages(method(momentum=0.5, final_momentum=0.9), BATCHES, tmp_path)
    assert momenta == pytest.approx([cosine_between(0.5, 0.9, step / 4) for step in range(4)])


def test_norms_of_the_projector_see_both_views_of_the_batch_in_student_and_teacher() -> None:
    model, given, rows = method(Projector(16, [12], 8, batch_norm=True)), batch(locals_=0), list[int]()
    for network in (model.student, model.teacher.module):
        norm = next(module for module in network.modules() if isinstance(module, nn.BatchNorm1d))
        norm.register_forward_pre_hook(lambda module, args: rows.append(module.training * len(args[0])))
    model.training_step(given, 0)
    assert rows == [12, 12]


def test_every_step_corrupts_anew_and_each_view_by_itself(tmp_path: Path) -> None:
    model, seen = method(), list[Tensor]()
    model.student.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    fit(model, [BATCHES[0]] * 2, tmp_path)
    assert not torch.equal(seen[0], seen[1])
    (_, first), (_, second) = views(model, batch(locals_=0))
    assert not torch.equal(first, second)


def test_the_defaults_are_zeros_over_half_and_other_images_over_three_tenths() -> None:
    model = method(corruption=None)
    image, index = torch.full((40, 1, 32, 32), 1.0), torch.arange(40)
    image[::2] = 2.0
    seen, hidden = model.corrupted(image, index, 0)
    share, shows = hidden.float().mean(dim=(1, 2, 3)), torch.where(hidden, seen, torch.nan).flatten(1).nanmean(dim=1)
    aliens = shows != 0
    assert 10 < int(aliens.sum()) < 30
    torch.testing.assert_close(shows[aliens], image.roll(1, 0)[aliens].flatten(1)[:, 0])
    assert ((share >= torch.where(aliens, 0.3, 0.5)) & (share <= torch.where(aliens, 0.39, 0.59))).all()
    assert torch.equal(seen.where(~hidden, 0), image.where(~hidden, 0))


def test_by_default_three_hidden_layers_as_wide_as_the_network_guess_the_pixels_of_a_patch() -> None:
    layers = [[*layer.weight.shape] for layer in method().decoder.layers if isinstance(layer, nn.Linear)]
    assert layers == [[16, 16]] * 3 + [[4, 16]]


def test_an_image_alone_has_no_contrast_and_trains_by_its_reconstruction(tmp_path: Path) -> None:
    model, given = method(Projector(16, [12], 8, batch_norm=True)), batch(rows=1, locals_=0)
    without_norms = method(decoder=model.decoder)  # which one row cannot go through
    _, reconstruction = losses_by_hand(without_norms, given)
    torch.testing.assert_close(model.training_step(given, 0), reconstruction)
    nothing = method(corruption=aligned(share=0.0))
    assert fit(nothing, [given], tmp_path) == [0.0]
    method_runs.stays_finite(model, [given] * 2, tmp_path, precision="bf16-mixed")


def test_a_reconstruction_is_the_picture_but_for_what_is_hidden() -> None:
    model, image = method(), batch(locals_=0)["views"][0]
    found = model.reconstruct({"image": image, "label": torch.zeros(6), "index": torch.arange(6) + 10})
    assert torch.equal(found.guess_BChw.where(~found.hidden_B1hw, 0), image.where(~found.hidden_B1hw, 0))
    assert (found.guess_BChw != image)[found.hidden_B1hw].all()


def test_fine_tuning_reads_the_class_token_and_the_mean_of_the_patches() -> None:
    model, image = method(), batch(locals_=0)["views"][0]
    both, tokens = ClassAndMean(model.backbone), model.backbone.tokens(image)
    assert both.num_features == 32
    torch.testing.assert_close(both(image), torch.cat([tokens[:, 0], tokens[:, 1:].mean(dim=1)], dim=1))


def test_what_does_not_fit_is_refused() -> None:
    sgd: Any = {"optimizer": torch.optim.SGD}
    with pytest.raises(UserError, match=r"temperature=0\.0 must be above 0"):
        method(temperature=0.0)
    with pytest.raises(UserError, match="reconstruction=-1 must be at least 0"):
        method(reconstruction=-1)
    with pytest.raises(UserError, match="SiT needs a backbone with tokens and a grid"):
        SiT(SmallConvNet(), nn.Linear(128, 8), **sgd)
    with pytest.raises(UserError, match="SiT contrasts class tokens, and this backbone has none"):
        SiT(vit(16, 1, 2, img_size=8, patch_size=2, in_chans=1, class_token=False), nn.Linear(16, 8), **sgd)
    with pytest.raises(UserError, match=r"decoder\.out_features=5, and a patch of 2 x 2 pixels with 1 channels has 4"):
        method(decoder=MLPHead(16, 5))
    with pytest.raises(UserError, match=r"8 x 8; set align to a divisor"):
        method(corruption=aligned(align=3)).training_step(batch(locals_=0), 0)
    with pytest.raises(UserError, match="7 x 7 cannot be cut into patches of 2 x 2"):
        method().training_step(batch(locals_=0, side=7), 0)
    with pytest.raises(UserError, match="SiT needs views of which the first global_views=2 are of one size"):
        method().training_step(batch(locals_=0) | {"views": batch()["views"][:1]}, 0)
