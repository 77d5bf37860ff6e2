"""iBOT: the loss put together by hand and against lightly's, centres and schedules."""

from functools import partial
from pathlib import Path
from typing import Any

import method_runs
import pytest
import torch
from method_runs import batch, moved
from torch import Tensor

from lightspan.backbones.elastic import ElasticViT
from lightspan.core.errors import UserError
from lightspan.methods.distillation.ibot import IBOT
from lightspan.nn.heads.dino_head import DINOHead
from lightspan.nn.masking.block_masks import BlockMasks
from lightspan.objectives.koleo import koleo
from lightspan.objectives.prototypes import centred_softmax, sinkhorn
from lightspan.optim.schedules import cosine_between

STEPS = 4
BATCHES = [batch(seed=seed) for seed in range(STEPS)]


def method(prototypes: tuple[int, ...] = (9,), **settings: Any) -> IBOT:
    torch.manual_seed(0)
    backbone = ElasticViT([16], [2], head_dim=4, img_size=8, patch_size=2, in_chans=1, init_values=0.1)
    given = {
        "momentum": 0.5, "final_momentum": 0.9, "temperature_warmup": 0.5, "freeze_prototypes": 0.0,
        "masks": BlockMasks(probability=0.8), "optimizer": partial(torch.optim.SGD, lr=0.05, weight_decay=0.04),
    }  # fmt: skip
    return IBOT(backbone, [DINOHead(16, count, hidden=(12,), bottleneck=6) for count in prototypes], **given | settings)


def masks_of(model: IBOT, given: dict[str, Any]) -> list[Tensor]:
    return [torch.from_numpy(model.masks.draw((4, 4), 0, given["index"].tolist(), view)) for view in range(2)]


class Scored:
    """Scores of one head: the teacher's of both global views, the student's of all; of masked patches by image."""

    def __init__(self, model: IBOT, given: dict[str, Any], head: int = 0) -> None:
        teacher, student, masks = model.teacher.module, model.student, masks_of(model, given)
        taught = [teacher.backbone.tokens(view) for view in given["views"][:2]]
        self.tokens = [
            student.backbone.tokens(view, None, mask) for view, mask in zip(given["views"], masks, strict=False)
        ]
        self.tokens += [student.backbone.tokens(view) for view in given["views"][2:]]
        self.hidden = torch.cat(masks)
        self.taught = [teacher.heads[head](of[:, 0]) for of in taught]
        self.seen = [student.heads[head](of[:, 0]) for of in self.tokens]
        at = self.hidden.flatten(1)
        self.taught_patches = teacher.heads[head](torch.cat(taught)[:, 1:][at])
        self.seen_patches = student.heads[head](torch.cat(self.tokens[:2])[:, 1:][at])


def cross_entropy(target: Tensor, scores: Tensor) -> Tensor:
    return -(target * (scores / 0.1).log_softmax(dim=-1)).sum(dim=-1)


def test_the_loss_is_the_papers_put_together_view_by_view_and_image_by_image() -> None:
    model, given = moved(method()), batch()
    found, (of_class, of_patches) = Scored(model, given), model.centres[0]
    before = of_class().clone(), of_patches().clone()
    targets = [centred_softmax(scores, before[0], 0.04) for scores in found.taught]
    pairs = [cross_entropy(targets[g], found.seen[v]).mean() for g in range(2) for v in range(5) if g != v]
    rows = cross_entropy(centred_softmax(found.taught_patches, before[1], 0.04), found.seen_patches)
    by_image = rows.split(found.hidden.sum(dim=(1, 2)).tolist())
    patches = sum(of.mean() for of in by_image if len(of)) / 12
    torch.testing.assert_close(model.training_step(given, 0), sum(pairs) / 8 + patches)
    assert torch.equal(of_class(), before[0])
    model.after_optimizer_step()
    torch.testing.assert_close(of_class(), 0.9 * before[0] + 0.1 * torch.cat(found.taught).mean(dim=0))
    torch.testing.assert_close(of_patches(), 0.9 * before[1] + 0.1 * found.taught_patches.mean(dim=0))


def test_both_losses_and_centres_are_lightlys() -> None:
    lightly = pytest.importorskip("lightly.loss")
    model, given = moved(method()), batch()
    found, (of_class, of_patches) = Scored(model, given), model.centres[0]
    dino, ibot = lightly.DINOLoss(9, teacher_temp=0.04), lightly.IBOTPatchLoss(9)
    dino.center.copy_(of_class()[None, None])
    ibot.center.center.copy_(of_patches()[None])
    expected = dino(found.taught, found.seen) + ibot(found.taught_patches, found.seen_patches, found.hidden, 0.04)
    torch.testing.assert_close(model.training_step(given, 0), expected)
    model.after_optimizer_step()
    torch.testing.assert_close(of_class(), dino.center[0, 0])
    torch.testing.assert_close(of_patches(), ibot.center.value[0])


def test_with_sinkhorn_knopp_and_koleo_it_is_dinov2s_mean_over_heads() -> None:
    model, given = moved(method((5, 9), centre_momentum=None, koleo_weight=0.1)), batch()
    total = torch.zeros(())
    for head in range(2):
        found = Scored(model, given, head)
        targets = sinkhorn(torch.cat(found.taught), 0.04).chunk(2)
        pairs = [cross_entropy(targets[g], found.seen[v]).mean() for g in range(2) for v in range(5) if g != v]
        weights = (1 / found.hidden.sum(dim=(1, 2)).clamp_min(1))[:, None, None].expand_as(found.hidden)[found.hidden]
        rows = cross_entropy(sinkhorn(found.taught_patches, 0.04), found.seen_patches)
        total = total + (sum(pairs) / 8 + (weights * rows).sum() / 12) / 2
    spread = sum(koleo(tokens[:, 0]) for tokens in found.tokens[:2])
    torch.testing.assert_close(model.training_step(given, 0), total + 0.1 * spread)
    assert not [*model.centres]


def test_gradients_reach_the_student_alone_and_hidden_patches_reach_no_token_of_it() -> None:
    model, given = method(), batch()
    given["views"] = [view.requires_grad_() for view in given["views"]]
    model.training_step(given, 0).backward()
    assert all(parameter.grad is None for parameter in model.teacher.parameters())
    assert all(parameter.grad is not None for parameter in model.student.parameters())
    for view, mask in zip(given["views"], masks_of(model, given), strict=False):
        hidden = mask.repeat_interleave(2, dim=1).repeat_interleave(2, dim=2)[:, None]
        assert view.grad[hidden].abs().max() == 0
        assert view.grad[~hidden].abs().max() > 0


def test_schedules_are_followed(tmp_path: Path) -> None:
    model, masked = method(freeze_prototypes=0.5, patch_loss_from=0.5), list[int]()
    model.student.register_forward_hook(lambda module, given, seen: masked.append(len(seen.patches_NK[0])))
    momenta, kept = method_runs.taught(model, BATCHES, tmp_path, lambda: model.student.heads[0].prototypes.weight)
    assert momenta == pytest.approx([cosine_between(0.5, 0.9, step / STEPS) for step in range(STEPS)])
    assert kept == [True, True, False, False]
    assert masked[:2] == [0, 0]
    assert min(masked[2:]) > 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"centre_momentum": 1.2}, r"centre_momentum=1.2 must lie in \[0, 1\]"),
        ({"koleo_weight": -1.0}, r"koleo_weight=-1.0 must be at least 0"),
        ({"prototypes": ()}, r"heads take \[\] features, and ElasticViT gives 16; give one head or more"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        method(**settings)


@pytest.mark.parametrize("centre_momentum", [0.9, None])
def test_the_sentinel_reads_the_first_heads_bottleneck_and_answers(centre_momentum: float | None) -> None:
    model, image = moved(method((5, 9), centre_momentum=centre_momentum)).eval(), batch()["views"][0]
    head = model.teacher.module.heads[0]
    taught = head(model.teacher.module.backbone.tokens(image)[:, 0])
    centre = model.centres[0][0]() if centre_momentum else torch.zeros(5)
    torch.testing.assert_close(head.prototypes(model.embeddings({"image": image})), taught)
    torch.testing.assert_close(model.assignments({"image": image}), ((taught - centre) / 0.07).softmax(dim=1))
