"""Heuristic MTL: three losses by hand, how they add up, who sees what, and what is refused."""

from functools import partial
from pathlib import Path
from typing import Any

import method_runs
import pytest
import torch
from lightning import Trainer
from method_cases import tagged_views
from method_runs import fit, moved
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightspan.backbones.vision import SmallConvNet
from lightspan.backbones.vit import vit
from lightspan.core.errors import UserError
from lightspan.evaluation.scores.tag_precision import TagPrecision
from lightspan.methods.supervised.heuristic_mtl import HeuristicMTL
from lightspan.nn.heads.mlp_head import MLPHead
from lightspan.nn.heads.projector import Projector
from lightspan.nn.masking.block_masks import BlockMasks
from lightspan.nn.masking.mask_samplers import RandomMasks
from lightspan.nn.sequences.patches import unpatchify
from lightspan.objectives.asymmetric import asymmetric_loss
from lightspan.optim.schedules import cosine_between

BATCHES = [tagged_views(6, seed) for seed in range(4)]
TASKS = ("tags", "pixels", "contrast")


def method(count: int = 3, **settings: Any) -> HeuristicMTL:
    torch.manual_seed(0)
    backbone = vit(width=16, depth=2, heads=4, img_size=8, patch_size=2, in_chans=1, mask_token=True)
    given = {"momentum": 0.5, "optimizer": partial(torch.optim.SGD, lr=0.05)}
    return HeuristicMTL(backbone, nn.Linear(16, count), nn.Linear(16, 8), **given | settings)


def batch() -> dict[str, Any]:
    return tagged_views(6, 1)


def gradient(loss: Tensor, module: nn.Module) -> list[Tensor]:
    parameters = [p for p in module.parameters() if p.requires_grad]
    found = torch.autograd.grad(loss, parameters, allow_unused=True, retain_graph=True)
    return [torch.zeros_like(p) if grad is None else grad for p, grad in zip(parameters, found, strict=True)]


def test_the_losses_are_those_by_hand() -> None:
    model, given = moved(method()), batch()
    losses = model.losses(given)
    (first, second), hidden = given["views"], model.hidden(given["views"][0], given["index"])
    clean = model.backbone.tokens(first)[:, 1:].mean(dim=1)
    tags = asymmetric_loss(model.tagger(clean), given["tags"], given["tags_known"])
    masked = model.backbone.tokens(first, mask_BHW=hidden)[:, 1:]
    guess = unpatchify(model.decoder(masked), (2, 2), (4, 4))
    of_pixels = hidden.repeat_interleave(2, 1).repeat_interleave(2, 2)[:, None]
    teacher = model.teacher.module
    query = F.normalize(model.projector(masked.mean(dim=1)), dim=1)
    key = F.normalize(teacher.projector(teacher.backbone.tokens(second)[:, 1:].mean(dim=1)), dim=1)
    torch.testing.assert_close(losses["tags"], tags)
    torch.testing.assert_close(losses["pixels"], (guess - first).abs()[of_pixels].mean())
    torch.testing.assert_close(losses["contrast"], F.cross_entropy(query @ key.T / 0.2, torch.arange(6)))


def test_the_gradient_on_the_trunk_is_the_weighted_sum_of_those_of_the_tasks() -> None:
    weights = {"tags": 1.5, "pixels": 0.5, "contrast": 0.25}
    model, given = moved(method(**weights)), batch()
    found = gradient(model.training_step(given, 0), model.backbone)
    alone = [gradient(loss, model.backbone) for loss in model.losses(given).values()]
    for each, *parts in zip(found, *alone, strict=True):
        expected = sum(weights[task] * of_task for task, of_task in zip(TASKS, parts, strict=True))
        torch.testing.assert_close(each, expected, rtol=1e-4, atol=1e-6)
    assert all(any(grad.abs().max() > 0 for grad in of_task) for of_task in alone)


@pytest.mark.parametrize("left_out", TASKS)
def test_a_weight_of_zero_leaves_the_trajectory_of_the_other_two(left_out: str, tmp_path: Path) -> None:
    without, two = method(**{left_out: 0.0}), method()
    of_all = two.losses

    def of_two(given: Any) -> dict[str, Tensor]:
        return {name: loss for name, loss in of_all(given).items() if name != left_out}

    two.losses = of_two  # type: ignore[method-assign]
    assert fit(without, BATCHES, tmp_path) == fit(two, BATCHES, tmp_path)
    for name, tensor in without.backbone.state_dict().items():
        assert torch.equal(tensor, two.backbone.state_dict()[name]), name


def test_visible_pixels_and_unknown_tags_have_no_say() -> None:
    model, given = method(), batch()
    losses, hidden = model.losses(given), model.hidden(given["views"][0], given["index"])
    guess, of_pixels = model.pixels(torch.randn(6, 16, 16), hidden)
    assert of_pixels.float().mean() == hidden.float().mean() == 10 / 16  # 0.4 of 16 patches, rounded down, are seen
    assert guess.shape == given["views"][0].shape
    known = given["tags_known"] == 1
    changed = given | {"tags": torch.where(known, given["tags"], 1 - given["tags"])}
    assert not torch.equal(changed["tags"], given["tags"])
    assert torch.equal(model.losses(changed)["tags"], losses["tags"])
    assert model.losses(given | {"tags_known": torch.zeros(6, 3)})["tags"] == 0


def test_norms_of_the_teachers_projector_see_its_own_batch() -> None:
    model, given, modes = method(), batch(), list[bool]()
    projector = Projector(16, [12], 8, batch_norm=True)
    model = HeuristicMTL(model.backbone, nn.Linear(16, 3), projector, optimizer=torch.optim.SGD)
    norm = next(module for module in model.teacher.module.modules() if isinstance(module, nn.BatchNorm1d))
    norm.register_forward_pre_hook(lambda module, args: modes.append(module.training))
    model.training_step(given, 0)
    assert modes == [True]


def test_all_tags_are_known_where_nothing_else_is_said() -> None:
    model, given = method(), batch()
    said = given | {"tags_known": torch.ones(6, 3)}
    del given["tags_known"]
    assert torch.equal(model.losses(given)["tags"], model.losses(said)["tags"])


def test_the_first_view_is_seen_whole_and_masked_the_second_by_the_teacher_alone() -> None:
    model, given, seen = method(), batch(), list[tuple[str, Tensor, bool]]()
    for name, network in (("student", model.student), ("teacher", model.teacher.module)):
        network.register_forward_pre_hook(
            lambda module, args, name=name: seen.append((name, args[0], len(args) > 1 and args[1] is not None))
        )
    model.training_step(given, 0).backward()
    first, second = given["views"]
    assert [(name, masked) for name, _, masked in seen] == [("student", False), ("student", True), ("teacher", False)]
    assert torch.equal(seen[0][1], first)
    assert torch.equal(seen[1][1], first)
    assert torch.equal(seen[2][1], second)
    assert all(parameter.grad is None for parameter in model.teacher.parameters())
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)


def test_the_teacher_is_the_moving_average_of_the_student(tmp_path: Path) -> None:
    momenta = method_runs.averages(method(momentum=0.5, final_momentum=0.9), BATCHES, tmp_path)
    assert momenta == pytest.approx([cosine_between(0.5, 0.9, step / 4) for step in range(4)])


def test_features_are_the_mean_of_patches_and_a_reconstruction_changes_what_is_hidden_alone() -> None:
    model, (image, _) = method(), batch()["views"]
    expected = model.backbone.tokens(image)[:, 1:].mean(dim=1)
    torch.testing.assert_close(model.features({"image": image}), expected)
    torch.testing.assert_close(model.features(batch()), expected)
    found = model.reconstruct({"image": image, "label": torch.zeros(6), "index": torch.arange(6)})
    assert torch.equal(found.guess_BChw.where(~found.hidden_B1hw, 0), image.where(~found.hidden_B1hw, 0))
    assert (found.guess_BChw != image)[found.hidden_B1hw.expand_as(image)].all()


def test_what_does_not_fit_is_refused() -> None:
    sgd: Any = {"optimizer": torch.optim.SGD}
    given = batch()
    untagged = {name: field for name, field in given.items() if not name.startswith("tags")}
    with pytest.raises(UserError, match=r"needs the tags of each sample, and this batch has none \(it holds index"):
        method().training_step(untagged, 0)
    with pytest.raises(UserError, match=r"head of 4 tags, and tags of this batch are \[6, 3\]; set tagger"):
        method(count=4).training_step(given, 0)
    with pytest.raises(
        UserError, match="masks hide none of the 16 patches of each image, which leaves nothing to guess"
    ):
        method(masks=RandomMasks(0.0)).training_step(given, 0)
    with pytest.raises(UserError, match="masks hide all of the 16 patches of each image, which leaves nothing to see"):
        method(masks=BlockMasks(1.0, (1.0, 1.0))).training_step(given, 0)
    with pytest.raises(UserError, match="HeuristicMTL needs views of which the first global_views=2 are of one size"):
        method().training_step(given | {"views": given["views"][:1]}, 0)
    with pytest.raises(UserError, match="contrast=-1 must be at least 0"):
        method(contrast=-1)
    with pytest.raises(UserError, match=r"margin=1\.5 must"):
        method(margin=1.5)
    with pytest.raises(UserError, match="HeuristicMTL needs a backbone with tokens and a grid"):
        HeuristicMTL(SmallConvNet(), nn.Linear(128, 3), nn.Linear(128, 8), **sgd)
    with pytest.raises(UserError, match=r"decoder\.out_features=5, and a patch of 2 x 2 pixels with 1 channels has 4"):
        method(decoder=MLPHead(16, 5))
    backbone = vit(width=16, depth=1, heads=2, img_size=8, patch_size=2, in_chans=1)
    with pytest.raises(UserError, match=r"tagger\.in_features=9, but TokenViT gives 16 features"):
        HeuristicMTL(backbone, nn.Linear(9, 3), nn.Linear(16, 8), **sgd)
    with pytest.raises(UserError, match="this TokenViT has none; set mask_token=true"):
        HeuristicMTL(backbone, nn.Linear(16, 3), nn.Linear(16, 8), **sgd).training_step(given, 0)


def test_validation_logs_the_precision_of_known_tags(tmp_path: Path) -> None:
    model = method()
    batches = [tagged_views(rows, rows) for rows in (6, 2, 5)]
    given = [batch | {"image": batch["views"][0]} for batch in batches]
    trainer = Trainer(
        default_root_dir=tmp_path, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    (found,) = trainer.validate(model, DataLoader(given, batch_size=None), verbose=False)
    rows = {name: torch.cat([batch[name] for batch in given]) for name in ("image", "tags", "tags_known")}
    expected = TagPrecision(3)
    with torch.no_grad():
        scores = model.tagger(model.backbone.tokens(rows["image"])[:, 1:].mean(dim=1))
    expected.update(scores, rows["tags"].bool(), rows["tags_known"].bool())
    assert found == {"val/mean_average_precision": pytest.approx(float(expected.compute()))}
    assert 0 < found["val/mean_average_precision"] < 1
    assert not [name for name in model.state_dict() if "precision" in name]
