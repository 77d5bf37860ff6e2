"""DINOv2: the loss put together by hand and against lightly's, two heads, schedules, and DINOv3's anchor."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import method_runs
import pytest
import timm
import torch
from method_runs import batch, fit, moved
from picture_files import write_pictures
from safetensors.torch import save_file
from torch import Tensor

from lightspan.backbones.vit import vit
from lightspan.cli.config.build import build
from lightspan.cli.config.user_images import with_images
from lightspan.core.errors import UserError
from lightspan.methods.distillation.dinov2 import DINOv2
from lightspan.nn.heads.dino_head import DINOHead
from lightspan.nn.masking.block_masks import BlockMasks
from lightspan.nn.teachers.gram_anchor import GramAnchor
from lightspan.objectives.gram import gram_loss
from lightspan.objectives.koleo import koleo
from lightspan.objectives.prototypes import sinkhorn
from lightspan.optim.schedules import cosine_between

STEPS = 4
BATCHES = [batch(seed=seed) for seed in range(STEPS)]


def head(prototypes: int, width: int = 16) -> DINOHead:
    return DINOHead(width, prototypes, hidden=(12,), bottleneck=6)


def method(**settings: Any) -> DINOv2:
    torch.manual_seed(0)
    backbone = vit(
        16, 2, 2, img_size=8, patch_size=2, in_chans=1, sincos=False, mask_token=True, any_size=True, registers=2,
        layer_scale=0.1, swiglu=True,
    )  # fmt: skip
    given = {
        "head": head(9), "patch_head": head(5), "momentum": 0.5, "final_momentum": 0.9, "temperature_warmup": 0.5,
        "freeze_prototypes": 0.0, "masks": BlockMasks(probability=0.8),
        "optimizer": partial(torch.optim.SGD, lr=0.05, weight_decay=0.04),
    }  # fmt: skip
    return DINOv2(backbone, **given | settings)


class Scored:
    """Tokens of each view, and scores of class tokens and of masked patches by the head of each."""

    def __init__(self, model: DINOv2, given: dict[str, Any]) -> None:
        teacher, student, views = model.teacher.module, model.student, given["views"]
        masks = [torch.from_numpy(model.masks.draw((4, 4), 0, given["index"].tolist(), view)) for view in range(2)]
        self.hidden = torch.cat(masks)
        taught = [teacher.backbone.tokens(view) for view in views[:2]]
        self.tokens = [student.backbone.tokens(view, mask) for view, mask in zip(views, masks, strict=False)]
        self.tokens += [student.backbone.tokens(view) for view in views[2:]]
        at = self.hidden.flatten(1)
        self.taught = torch.stack([teacher.head(of[:, 0]) for of in taught])
        self.seen = torch.stack([student.head(of[:, 0]) for of in self.tokens])
        self.taught_patches = teacher.patch_head(torch.cat(taught)[:, 3:][at])
        self.seen_patches = student.patch_head(torch.cat(self.tokens[:2])[:, 3:][at])


def cross_entropy(target: Tensor, scores: Tensor) -> Tensor:
    return -(target * (scores / 0.1).log_softmax(dim=-1)).sum(dim=-1)


def test_the_loss_is_the_papers_put_together_view_by_view_and_image_by_image() -> None:
    model, given = moved(method()), batch()
    found = Scored(model, given)
    targets = sinkhorn(found.taught.flatten(0, 1), 0.04).view_as(found.taught)
    pairs = [cross_entropy(targets[g], found.seen[v]).mean() for g in range(2) for v in range(5) if g != v]
    rows = cross_entropy(sinkhorn(found.taught_patches, 0.04), found.seen_patches)
    by_image = rows.split(found.hidden.sum(dim=(1, 2)).tolist())
    patches = sum(of.mean() for of in by_image if len(of)) / 12
    expected = sum(pairs) / 8 + patches + 0.1 * koleo(found.tokens[0][:, 0])
    torch.testing.assert_close(model.training_step(given, 0), expected)


def test_class_and_patch_losses_and_koleo_are_lightlys() -> None:
    lightly = pytest.importorskip("lightly.loss")
    model, given = moved(method(koleo_weight=0.3)), batch()
    found = Scored(model, given)
    figures: dict[str, Tensor] = {}
    model.log_training = figures.update  # type: ignore[method-assign, assignment]
    model.training_step(given, 0)
    patches = lightly.IBOTPatchLoss(5, center_mode="mean")
    spread = lightly.KoLeoLoss()(found.tokens[0][:, 0])
    torch.testing.assert_close(figures["train/koleo"], spread, rtol=1e-5, atol=1e-5)
    # lightly takes a running centre off the teacher's scores. One of v / -tau per prototype makes its softmax that of
    # Sinkhorn-Knopp, whose v is what both have in common.
    targets = sinkhorn(found.taught_patches, 0.04)
    centre = found.taught_patches - 0.04 * targets.log()
    centre = (centre - centre.mean(dim=1, keepdim=True)).mean(dim=0)
    patches.center.center.copy_(centre[None])
    expected = patches(found.taught_patches, found.seen_patches, found.hidden, 0.04)
    torch.testing.assert_close(figures["train/patches"], expected, rtol=1e-4, atol=1e-5)


def test_each_head_learns_of_its_own_loss_alone() -> None:
    model, given = moved(method(koleo_weight=0.0)), batch()
    given["views"] = [view.clone() for view in given["views"]]
    unmasked = method(koleo_weight=0.0, masks=BlockMasks(probability=0.0))
    unmasked.training_step(given, 0).backward()
    assert all(parameter.grad.abs().max() == 0 for parameter in unmasked.student.patch_head.parameters())
    model.training_step(given, 0).backward()
    for part in (model.student.head, model.student.patch_head, model.student.backbone):
        assert all(parameter.grad is not None for parameter in part.parameters())
        assert any(parameter.grad.abs().max() > 0 for parameter in part.parameters())
    assert all(parameter.grad is None for parameter in model.teacher.parameters())


def test_schedules_are_followed_and_both_heads_prototypes_wait(tmp_path: Path) -> None:
    model = method(freeze_prototypes=0.5)
    weights = [prototypes.weight for prototypes in model.student.prototypes]
    momenta, kept = method_runs.taught(model, BATCHES, tmp_path, lambda: torch.cat(weights))
    assert momenta == pytest.approx([cosine_between(0.5, 0.9, step / STEPS) for step in range(STEPS)])
    assert kept == [True, True, False, False]


def enlarged(given: dict[str, Any]) -> dict[str, Any]:
    """Global views of twice the side, which shrink to these again."""
    large = [view.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3) for view in given["views"][:2]]
    return given | {"views": [*large, *given["views"][2:]]}


def test_the_anchor_adds_its_loss_of_all_patches_of_the_students_masked_global_views() -> None:
    anchor = GramAnchor(weight=3.0, scale=2.0)
    model, plain, given = moved(method(anchor=anchor)), moved(method()), enlarged(batch())
    plain.load_state_dict(model.state_dict(), strict=False)
    small = given | {"views": [*map(anchor.shrunk, given["views"][:2]), *given["views"][2:]]}
    assert small["views"][0].shape[2:] == (8, 8)
    tokens = torch.cat(Scored(plain, small).tokens[:2])[:, 3:]
    network = anchor.network.module.backbone
    maps = network.tokens(torch.cat(given["views"][:2]))[:, 3:].mT.unflatten(2, (8, 8))
    maps = torch.nn.functional.interpolate(maps, (4, 4), mode="bicubic")
    expected = plain.training_step(small, 0) + 3 * gram_loss(tokens, maps.flatten(2).mT)
    torch.testing.assert_close(model.training_step(given, 0), expected)


def test_the_anchor_is_taken_from_the_teacher_within_the_run_and_not_trained(tmp_path: Path) -> None:
    model = method(anchor=GramAnchor(taken=0.5, start=0.5, renewed=0.5))
    seen: list[list[Tensor]] = []
    follow = model.anchor.follow

    def watched(backbone: Any, before: float, after: float) -> None:
        follow(backbone, before, after)
        own = model.anchor.network.module.backbone.parameters()
        seen.append([torch.stack([(a - b).abs().max() for a, b in zip(own, backbone.parameters(), strict=True)]).max()])

    model.anchor.follow = watched
    losses = fit(model, [enlarged(given) for given in BATCHES], tmp_path)
    assert [of[0].item() == 0 for of in seen] == [False, True, False, True]
    assert torch.tensor(losses).isfinite().all()


def test_a_run_with_an_anchor_resumes_bit_for_bit(tmp_path: Path) -> None:
    def anchored() -> DINOv2:
        return method(anchor=GramAnchor(taken=0.25, start=0.25, renewed=0.5))

    method_runs.resumes(anchored, [enlarged(given) for given in BATCHES], tmp_path, steps=(1, 3))


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_equal_images_and_a_batch_of_one_stay_finite(precision: Any, tmp_path: Path) -> None:
    equal = batch()
    equal["views"] = [torch.ones_like(view) for view in equal["views"]]
    model = method(anchor=GramAnchor(), koleo_group=2)
    batches = [enlarged(given) for given in (equal, batch(rows=1), batch(rows=3))]
    method_runs.stays_finite(model, batches, tmp_path, precision=precision)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"koleo_weight": -1.0}, r"koleo_weight=-1.0"),
        ({"koleo_group": 1}, r"koleo_group=1"),
        ({"head": head(4, 8)}, r"head.in_features=8"),
        ({"patch_head": head(4, 8)}, r"patch_head.in_features=8"),
        ({"global_views": 1}, r"global_views=1"),
        ({"freeze_prototypes": 2.0}, r"freeze_prototypes=2.0"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        method(**settings)


def test_one_head_for_both_and_a_backbone_without_class_token_are_refused() -> None:
    both = head(4)
    with pytest.raises(UserError, match="head and patch_head are one"):
        method(head=both, patch_head=both)
    backbone = vit(16, 1, 2, img_size=8, patch_size=2, in_chans=1, class_token=False, mask_token=True)
    with pytest.raises(UserError, match="class_token=true"):
        DINOv2(backbone, head(4), head(4), optimizer=torch.optim.SGD)


def test_the_sentinel_reads_the_bottleneck_of_class_tokens_and_answers() -> None:
    model, image = moved(method()).eval(), batch()["views"][0]
    taught = model.teacher.module.head(model.teacher.module.backbone.tokens(image)[:, 0])
    torch.testing.assert_close(model.teacher.module.head.prototypes(model.embeddings({"image": image})), taught)
    torch.testing.assert_close(model.assignments({"image": image}), (taught / 0.07).softmax(dim=1))


def test_the_recipe_continues_from_a_file_of_weights_on_a_folder_of_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = write_pictures(tmp_path / "in", {"cat": 4, "bird": 4})
    stored = timm.create_model("vit_tiny_patch16_224", num_classes=0).state_dict()
    save_file(stored, "mine.safetensors")
    head = {"init_args": {"in_features": 192, "prototypes": 32}}
    network = {"init_args": {"name": "vit_tiny_patch16_224", "path": "mine.safetensors"}}
    mine = {"model": {"init_args": {"backbone": network, "head": head, "patch_head": head}}}
    Path("mine.yaml").write_text(json.dumps(mine))
    flags = [
        *("trainer.accelerator=cpu", "trainer.precision=null", "trainer.logger=null", "trainer.max_steps=1"),
        *("trainer.callbacks=null", "trainer.limit_val_batches=0", "data.init_args.batch_size=4"),
        *("data.init_args.num_workers=0", "trainer.enable_progress_bar=false"),
    ]
    made = build(with_images("distillation/dinov2_continued", ["mine.yaml"], folder, 64, flags), tmp_path / "run")
    for name, tensor in stored.items():
        assert torch.equal(made.model.student.backbone.network.state_dict()[name], tensor), name
    made.trainer.fit(made.model, datamodule=made.datamodule)
    assert made.trainer.global_step == 1
    assert all(parameter.isfinite().all() for parameter in made.model.parameters())
