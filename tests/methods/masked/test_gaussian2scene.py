"""Gaussian2Scene: what its losses are, what they may not depend on, both stages, scenes of any size, wrong sizes."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Trainer
from method_cases import drawn_scenes, gaussian2scene
from method_runs import Served, fit, resumes, stays_finite
from torch import Tensor
from torch.nn import functional as F

from lightspan.backbones.vit import vit
from lightspan.core.errors import UserError
from lightspan.methods.masked.gaussian2scene import Gaussian2Scene, gaussians_of, picture_loss
from lightspan.nn.decoders.mask_decoder import MaskDecoder
from lightspan.nn.decoders.point_decoder import PointDecoder
from lightspan.nn.gaussians import turns
from lightspan.nn.masking.mask_samplers import RandomMasks
from lightspan.nn.sequences.joint_encoder import JointEncoder
from lightspan.objectives.chamfer import chamfer_squared
from lightspan.objectives.similarity import structural_similarity


def method(**settings: Any) -> Gaussian2Scene:
    torch.manual_seed(0)
    return gaussian2scene(**{"optimizer": partial(torch.optim.AdamW, lr=3e-3)} | settings)


def parts(width: int = 12, **changed: Any) -> dict[str, Any]:
    """Of a method, one of which may be another."""
    return {
        "backbone": method().backbone,
        "pictures": vit(width, 1, 2, img_size=4, patch_size=2),
        "joint": JointEncoder(width, 1, 2),
        "decoder": PointDecoder(width, depth=1, heads=2),
        "pixels": MaskDecoder(width, width=8, depth=1, heads=2),
        "optimizer": torch.optim.SGD,
    } | changed


def test_zeros_are_grey_balls_half_opaque_at_their_groups_centres_and_other_numbers_move_them() -> None:
    numbers, centre = torch.zeros(1, 2, 3, 14), torch.tensor([[[1.0, 2, 3], [4, 5, 6]]])
    found = gaussians_of(numbers, centre, 0.1)
    assert torch.equal(found.centre_BG3, centre.repeat_interleave(3, dim=1))
    torch.testing.assert_close(found.scale_BG3, torch.full((1, 6, 3), 0.1))
    assert torch.equal(turns(found.turn_BG4), torch.eye(3).expand(1, 6, 3, 3))
    assert (found.opacity_BG == 0.5).all()
    assert (found.colour_BGC == 0.5).all()
    numbers[0, 1, 2] = torch.tensor([0.5, 0, 0, 900, -900, 0.01, 0, 0, 0, 0, 50, -50, 0, 50])
    last = [part[0, 5] for part in gaussians_of(numbers, centre, 0.1)]
    assert last[0].tolist() == [4.5, 5, 6]
    torch.testing.assert_close(last[1], 0.1 * torch.tensor([3.0, -3, 0.01]).exp())
    assert float(last[3]) == pytest.approx(1)
    assert last[4].tolist() == pytest.approx([0, 0.5, 1], abs=1e-6)


def test_pictures_are_judged_by_difference_and_similarity_and_unknown_ones_not_at_all() -> None:
    guess, truth = torch.rand(2, 3, 3, 5, 6, generator=torch.Generator().manual_seed(0)).unbind()
    truth[2] = torch.nan
    known = torch.tensor([True, True, False])
    apart = (guess - truth).abs()[:2].mean()
    alike = structural_similarity(guess[:2], truth[:2]).mean()
    for share in (0.0, 0.2, 1.0):
        wanted = (1 - share) * apart + share * (1 - alike)
        torch.testing.assert_close(picture_loss(guess, truth, known, share), wanted)
    assert float(picture_loss(truth[:2], truth[:2], known[:2], 0.2)) == pytest.approx(0, abs=1e-5)
    assert float(picture_loss(guess, truth, known & False, 0.2)) == 0


def test_hidden_groups_and_patches_alone_are_judged_and_not_seen() -> None:
    model, batch = method(masks=RandomMasks(0.6, seed=3)).eval(), drawn_scenes(4, 0)
    found: list[Any] = []
    inner = model.guess

    def watched(*given: Any) -> Any:
        found[:] = [given, inner(*given)]
        return found[1]

    model.guess = watched  # type: ignore[method-assign]
    losses = model.losses(batch, 2, False)
    assert set(losses) == {"point", "pixel"}
    (groups, pictures, see, see_patches, hide_patches), guess = found
    assert sorted(torch.cat([see_patches, hide_patches], dim=1)[0].tolist()) == [0, 1, 2, 3]
    hidden = torch.ones(4, 5, dtype=torch.bool).scatter(1, see, False)
    wanted = chamfer_squared(guess.numbers_BGKn[..., :3][hidden], groups.near_BGK3[hidden]).mean()
    torch.testing.assert_close(losses["point"], wanted)
    # What is hidden may be anything: nothing that is guessed depends on it.
    other = groups._replace(near_BGK3=groups.near_BGK3.where(~hidden[..., None, None], 7.0))
    cells = torch.ones(8, 4).scatter(1, see_patches, 0).view(8, 1, 2, 2).bool()
    noise = torch.where(F.interpolate(cells.float(), scale_factor=2).bool(), 0.3, pictures)
    for left, right in zip(inner(other, noise, see, see_patches, hide_patches), guess, strict=True):
        torch.testing.assert_close(left, right)
    wrong = inner(groups, 1 - pictures, see, see_patches, hide_patches)
    assert not torch.allclose(wrong.numbers_BGKn, guess.numbers_BGKn)  # points learn of pictures


def test_the_loss_is_the_weighted_sum_and_gaussians_are_drawn_from_their_share_of_the_run_on() -> None:
    weights = {"point": 2.0, "pixel": 3.0, "picture": 5.0, "position": 7.0}
    model = method(**{f"{name}_weight": weight for name, weight in weights.items()}).eval()
    batch, logged = drawn_scenes(4, 0), list[dict[str, Tensor]]()
    model.log_training = lambda figures, **options: logged.append(figures)  # type: ignore[method-assign]
    losses = model.losses(batch, 0, True)
    assert all((value > 0).all() for value in losses.values())
    wanted = sum(weights[name] * float(value) for name, value in losses.items())
    assert float(model.training_step(batch, 0)) == pytest.approx(wanted, rel=1e-5)
    model.draw_from = 0.5
    for share, drawing in ((0.0, False), (0.49, False), (0.5, True), (1.0, True)):
        model.share_of_run = lambda share=share: share  # type: ignore[method-assign]
        model.training_step(batch, 0)
        assert ("train/picture_loss" in logged[-1]) is drawing


def test_pictures_and_positions_train_the_encoder_of_points() -> None:
    model, batch = method(), drawn_scenes(4, 0)
    for name in ("picture", "position"):
        model.zero_grad()
        model.losses(batch, 0, True)[name].backward()
        gradient = model.backbone.blocks[0].mlp.fc1.weight.grad
        assert gradient is not None
        assert float(gradient.abs().max()) > 0


def test_losses_do_not_depend_on_the_order_of_points_and_move_with_points_and_cameras() -> None:
    model, batch = method().eval(), drawn_scenes(2, 0)
    starts, counts = batch["offsets"].tolist(), batch["offsets"].diff().tolist()
    order = torch.cat([start + torch.randperm(count) for start, count in zip(starts, counts, strict=False)])
    mixed = batch | {"xyz": batch["xyz"][order]}
    before = model.losses(batch, 1, True)
    for name, value in model.losses(mixed, 1, True).items():
        torch.testing.assert_close(value, before[name])
    torch.testing.assert_close(model.features(mixed), model.features(batch))
    # Without places in the tokens nothing tells where a scene is.
    for place in (model.backbone.place, model.decoder.place):
        torch.nn.init.zeros_(place[0].weight)
    before = model.losses(batch, 1, True)
    shifted = batch | {name: batch[name] + torch.tensor([3.0, -2, 1]) for name in ("xyz", "place")}
    for name, value in model.losses(shifted, 1, True).items():
        torch.testing.assert_close(value, before[name], rtol=1e-3, atol=1e-4)


def test_cameras_that_are_none_have_no_part() -> None:
    model, batch = method().eval(), drawn_scenes(3, 0)
    for name, value in (("intrinsics", 0.0), ("rotation", 0.0), ("place", float("nan"))):
        broken = {**batch, name: torch.full_like(batch[name], value)}
        losses = model.losses(broken, 0, True)
        assert float(losses["picture"]) == 0
        sum(losses.values()).backward()  # type: ignore[union-attr]
        assert all(x.grad is None or x.grad.isfinite().all() for x in model.parameters())


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_scenes_of_one_point_and_none_train(precision: str, tmp_path: Path) -> None:
    batches = []
    for seed, counts in enumerate(((1,), (0,), (3, 0, 1), (2, 30))):
        batch = drawn_scenes(len(counts), seed)
        points = sum(counts)
        offsets = torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()])
        xyz = torch.zeros(points, 3) if points < 30 else torch.randn(points, 3)
        batches.append(batch | {"offsets": offsets, "xyz": xyz, "colour": torch.rand(points, 3)})
    stays_finite(method(), batches, tmp_path, precision=precision)


def test_a_run_learns_and_resumes_bit_for_bit(tmp_path: Path) -> None:
    losses = fit(method(optimizer=partial(torch.optim.AdamW, lr=1e-2)), [drawn_scenes(4, 0)] * 40, tmp_path)
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    resumes(method, [drawn_scenes(4, seed) for seed in range(3)], tmp_path)


def test_it_validates_without_gradients(tmp_path: Path) -> None:
    model, batch = method(), drawn_scenes(4, 0)
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    (figures,) = trainer.validate(model, Served([batch]), verbose=False)
    for name, value in model.eval().losses(batch, 0, True).items():
        assert figures[f"val/{name}_loss"] == pytest.approx(float(value), rel=1e-5)


def test_what_does_not_fit_is_named() -> None:
    wrong = {"draw_from": 1.5, "size": 0.0, "near": 0.0, "similarity": -0.1, "position_weight": -1.0}
    for setting, value in wrong.items():
        with pytest.raises(UserError, match=setting):
            Gaussian2Scene(**parts(**{setting: value}))
    other = parts(16)
    for setting, names in (("pictures", ("pictures", "pixels")), ("joint", ("joint",)), ("decoder", ("decoder",))):
        with pytest.raises(UserError, match=rf"{setting}\.\w*(num_features|width|in_features)=16"):
            Gaussian2Scene(**parts(**{name: other[name] for name in names}))
    with pytest.raises(UserError, match="out_features"):
        Gaussian2Scene(**parts(decoder=PointDecoder(12, 5, depth=1, heads=2)))
    with pytest.raises(UserError, match="heads"):
        JointEncoder(12, 1, 5)
    batch = drawn_scenes(3, 0)
    for name, given in (("pictures", None), ("rotation", batch["rotation"][:2])):
        with pytest.raises(UserError, match="pictures"):
            method().losses(batch | {name: given}, 0, True)
